"""One value held against the type and the condition that its key declares, and both in words."""

import inspect
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.schema import Check
from src.util import did_you_mean

MISSING_TEXT = f"{MISSING} stands for a value that is missing, and can't be given as a text"


def convert(typed: Any, key: str, hint: Any, check: Check | None, value: Any) -> tuple[Any, str]:
    """Return a value as its key's type, and why it can't be one ('' where it can).

    Args:
        typed: the structured config of the dataclass that declares the key.
        value: whose texts mean themselves, see `src.config.quoting.escaped`.
    """
    if isinstance(value, bool) and bool not in members(hint) and hint is not Any:
        return None, f"not {described(hint)}"
    try:
        typed[key] = value
        converted = OmegaConf.to_object(typed[key]) if OmegaConf.is_config(typed[key]) else typed[key]
    except (OmegaConfBaseException, OverflowError):  # the latter of a whole number that no float holds
        return None, _unlike(hint, value)
    return converted, check.reason(converted) if check else ""


def _unlike(hint: Any, value: Any) -> str:
    """Return why a value is not what its type allows; of a list of choices, which one is none."""
    if holds_missing(value):
        return MISSING_TEXT
    choices = [e for m in members(hint) for e in typing.get_args(m) if inspect.isclass(e) and issubclass(e, Enum)]
    if isinstance(value, list) and len(choices) == 1:
        allowed = [option.name for option in choices[0]]
        for one in value:
            if one not in allowed:
                return f"{one} is not one of {', '.join(allowed)}{did_you_mean(one, allowed)}"
    return f"not {described(hint)}"


def holds_missing(value: Any) -> bool:
    """Return whether a value is, or has in it, the text that OmegaConf takes for a missing value."""
    if isinstance(value, Mapping):
        return any(map(holds_missing, value.values()))
    return any(map(holds_missing, value)) if isinstance(value, list) else value == MISSING


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types that a union is of; a type that is none as the only one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def described(hint: Any) -> str:
    """Return in words what a type allows."""
    words = []
    all_members = members(hint)
    for member in all_members:
        if member is type(None):
            words.append("null")
        elif inspect.isclass(member) and issubclass(member, Enum):
            words.append(("one of " if len(member) > 1 else "") + ", ".join(option.name for option in member))
        elif typing.get_origin(member) is list:
            (inner,) = typing.get_args(member)
            words.append(f"a list ({described(inner)} each)")
        elif typing.get_origin(member) is dict:
            words.append("a mapping from text to text")
        else:
            known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            words.append(known.get(member, "a value"))
    return " or ".join(words)
