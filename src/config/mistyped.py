"""Overrides that can't be read, or that mean several values: what is wrong with them, and what to type.

Whatever is shown as an argument can be pasted into a shell: it is read, and its key takes the value.
"""

import re
import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError

from src.config.keys import all_keys
from src.config.quoting import quoted, typed
from src.config.schema import SECTIONS
from src.config.values import MISSING_TEXT, holds_missing
from src.errors import visible

FOLDERS = ("rerun", "run", "dir", "init_from", "hydra.run.dir", "hydra.sweep.dir")
"""Keys whose value needs no quotes where it is a folder that is there."""
SENTENCES = ("report.where",)
"""Keys whose value needs no quotes but those of the shell, whatever is in it."""
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')
LONGEST_HINT = 200
INTERPOLATIONS = r"an interpolation that can't be read: ${NAME} is one, and \${ is text"


def unreadable(key: str, value: str) -> str:
    """Return what is wrong with KEY=VALUE, which Hydra's grammar can't read."""
    bare = key.lstrip("+~")
    if _parsed(f"{key}=null"):
        if not is_interpolated_well(value):
            return f"{INTERPOLATIONS}{_hint(key, value)}"
        known = all_keys().get(bare)
        if known is None or known.accepts(value):
            hint = _quoting_hint(key, value)
            return f"can't be read; a value with '=', ',', quotes, brackets or spaces needs quotes of its own{hint}"
        text = _good(f"{key}={value.lstrip('= ')}")
        return f"did you mean {text}?" if text else f"can't be read; it is {known.allowed}"
    if found := re.search(r"\[-?\d+\]", bare):
        whole = bare[: found.start()]
        hint = next(filter(None, (_hint(whole, items) for items in _lists_of(value))), "")
        return f"items of a list can't be set by themselves: give the whole list{hint}"
    named = re.sub(r"\[(\w+)\]", r".\1", bare)
    meant = re.sub(r"[./]{2,}", ".", re.sub(r"\s", "", named)).strip("./")
    text = _good(f"{key.removesuffix(bare)}{meant}={value}")
    return f"not a key; {f'did you mean {text}?' if text else 'names with one dot between them, as optimizer.lr'}"


def _good(text: str) -> str:
    """Return KEY=VALUE as it is typed in a shell, where there is such a key and it takes the value; else ''."""
    key, shown, read = text.partition("=")[0].lstrip("+~"), shlex.quote(text), _parsed(text)
    known = all_keys().get(key)
    is_known = known or key in SECTIONS or key.rpartition(".")[0] in all_keys()
    if not is_known or read is None or not _fits(shown):
        return ""
    return shown if known is None or known.accepts(read.value()) else ""


def several(override: Override, text: str, *, is_group: bool) -> str:
    """Return what to do about several values of a run that is no sweep; `text` is the values as they were typed."""
    key, reason = override.key_or_group, "several values are a sweep: add -m"
    if is_group:
        return reason
    sweep = override.value()
    if (
        isinstance(sweep, ChoiceSweep)
        and sweep.simple_form
        and (listed := _hint(key, Override._convert_value(sweep.list)))
    ):
        reason += f"; or, of one list, write it in brackets{listed}"
    if quoted := _quoting_hint(key, text):
        reason += f"; or, of one value, quote it{quoted}"
    return reason


def unusable_text(key: str, value: Any) -> str:
    """Return what is wrong with the texts of a value that was read, as OmegaConf takes them; '' where all are good."""
    is_sweep = isinstance(value, ChoiceSweep)
    given = Override._convert_value(value.list) if is_sweep else value
    if holds_missing(given):
        return MISSING_TEXT
    if all(map(is_interpolated_well, _texts(given))):
        return ""
    return f"{INTERPOLATIONS}{'' if is_sweep else _hint(key, given)}"


def is_interpolated_well(text: str) -> bool:
    """Return whether OmegaConf can read the interpolations of a text."""
    if "${" not in text:
        return True
    try:
        grammar_parser.parse(text)
    except GrammarParseError:
        return False
    return True


def _texts(value: Any) -> list[str]:
    """Return all texts of a plain value, keys of mappings included."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(inner, list):
        return [text for item in inner for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _quoting_hint(key: str, value: str) -> str:
    """Return how a text is typed in a shell so that it is one value, after a colon; '' where it can't be one.

    Its interpolations stay what they are, where they can be read.
    """
    if not is_interpolated_well(value):
        return _hint(key, value)
    text = shlex.quote(f"{key}={quoted(value)}")
    return f": {text}" if _takes(key, value) and _fits(text) else ""


def _hint(key: str, value: Any) -> str:
    """Return how a value is typed in a shell, after a colon; '' where its key can't be that, or it is too long."""
    text = typed(key, value, LONGEST_HINT) if _takes(key, value) else ""
    return f": {text}" if text else ""


def _takes(key: str, value: Any) -> bool:
    bare = key.lstrip("+~")
    known = all_keys().get(bare)
    return known.accepts(value) if known else bare in FOLDERS and isinstance(value, str)


def _fits(text: str) -> bool:
    return len(text) <= LONGEST_HINT and visible(text, is_line=True) == text


def _parsed(text: str) -> Override | None:
    """Return an override; None where Hydra's grammar can't read it."""
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError):
        return None


def _lists_of(value: str) -> list[list[Any]]:
    """Return the lists that a value, as it was typed, may mean: of it alone, or itself."""
    read = _parsed(f"key={value}")
    if read is None:
        return [[value]]
    given = read.value()
    if isinstance(given, ChoiceSweep):
        given = Override._convert_value(given.list)
        return [given]
    return [[given], given] if isinstance(given, list) else [[given]]
