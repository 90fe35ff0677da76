"""Values as text: how one is written after `KEY=` so that Hydra's grammar reads it unchanged.

Source of the grammar: hydra/grammar/OverrideLexer.g4 and OverrideParser.g4 of Hydra 1.3.
"""

import json
import os
import re
import shlex
from typing import Any

from src.errors import visible
from src.secrets import map_texts

_BARE = re.compile(r"(?:[A-Za-z_]|\.{0,2}/)[\w./-]*", re.ASCII)
"""Texts that need no quotes, but for words that mean something else."""
_RESERVED = ("null", "true", "false", "nan", "inf")
_BARE_KEY = re.compile(r"[A-Za-z_][\w./-]*(?: [\w./-]+)*", re.ASCII)


class Unwritable(ValueError):
    """A value has no form in Hydra's grammar: it has to be given in a file."""


def override_value(value: Any) -> str:
    """Return a JSON-like value as the text after `KEY=` that is read as this value.

    Unwritable is raised where a mapping has a key that can't be quoted there.
    """
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return repr(value).lower()  # true, 1, 1e-05, nan
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value.lower() not in _RESERVED else quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key(key)}:{override_value(one)}" for key, one in value.items()) + "}"
    raise Unwritable(f"a {type(value).__name__} can't be written on a command line")


def quoted(text: str) -> str:
    """Return a text in quotes, as Hydra's grammar has them: of backslashes only those before a quote are doubled."""
    mark = "'" if '"' in text and "'" not in text else '"'
    inner = re.sub(rf"(\\*)({mark}|\Z)", lambda m: m[1] * 2 + ("\\" + mark if m[2] else ""), text)
    return f"{mark}{inner}{mark}"


def escaped(node: Any) -> Any:
    """Return containers in which every text means itself when OmegaConf reads them: nothing is resolved again."""
    return map_texts(node, lambda text, _: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` for Hydra's parser, with interpolations left as they are; for a shell: `shell_override`."""
    return f"{key}={override_value(value)}"


def shell_override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` as it is typed in a shell, whatever is in the value: `${` of a text is text."""
    return shlex.quote(override(key, escaped(value)))


def typed(key: str, value: Any, longest: int) -> str:
    """Return `KEY=VALUE` as it is typed in a shell; '' where it can't be, or is longer."""
    try:
        text = shell_override(key, value)
    except Unwritable:
        return ""
    return text if len(text) <= longest and visible(text, is_line=True) == text else ""


def label(key: str, value: Any) -> str:
    """Return `KEY=VALUE` to be read by people and to distinguish values; as it may be typed, where it can be."""
    try:
        return override(key, value)
    except Unwritable:
        return f"{key}={json.dumps(value, ensure_ascii=False)}"


def in_url(path: str | os.PathLike[str]) -> str:
    """Return a path as written in a `sqlite:///` URL: what SQLAlchemy would decode, or take for a query, is coded."""
    return os.fspath(path).replace("%", "%25").replace("?", "%3F")


def _key(key: Any) -> str:
    if isinstance(key, str) and _BARE_KEY.fullmatch(key) and key.lower() not in _RESERVED:
        return key
    raise Unwritable(f"the key {key!r} of a mapping can't be quoted on a command line: put it into a file")
