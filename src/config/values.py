"""One value held against the type and the condition that its key declares, and both in words."""

import inspect
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache, lru_cache
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.quoting import escaped
from src.config.schema import Check

MISSING_TEXT = f"{MISSING} stands for a value that is missing, and can't be given as a text"


@cache
def hints_of(owner: type) -> dict[str, Any]:
    """Return the types that a dataclass declares for its keys."""
    return typing.get_type_hints(owner)


def convert(owner: type, key: str, hint: Any, check: Check | None, value: Any) -> tuple[Any, str]:
    """Return a value, whose texts mean themselves, as its key's type, and why it can't be one ('' where it can).

    `owner` is the dataclass that declares the key.
    """
    if isinstance(value, bool) and bool not in members(hint) and hint is not Any:
        return None, f"not {described(hint)}"
    kinds = {typing.get_origin(member) or member for member in members(hint)} - {type(None)}
    if isinstance(value, str) and kinds and kinds <= {list, dict} and not holds_missing(value):
        return None, f"not {described(hint)}"  # OmegaConf would take one with an interpolation in it
    try:
        converted = _typed(owner, key, value) if isinstance(value, (dict, list)) else _typed_once(owner, key, value)
    except (OmegaConfBaseException, OverflowError):  # the latter of a whole number that no float holds
        return None, MISSING_TEXT if holds_missing(value) else f"not {described(hint)}"
    return converted, check.reason(converted) if check else ""


@cache
def _structured(owner: type) -> Any:
    """Return the structured config of a dataclass, made once: values that were set before are never read."""
    return OmegaConf.structured(owner)


def _typed(owner: type, key: str, value: Any) -> Any:
    """Return a value as its key's type; raise what OmegaConf raises where it can't be one."""
    typed = _structured(owner)
    typed[key] = escaped(value)
    return OmegaConf.to_object(typed[key]) if OmegaConf.is_config(typed[key]) else typed[key]


_typed_once = lru_cache(maxsize=10_000, typed=True)(_typed)  # points of a sweep have most values in common


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
    return " or ".join(map(_described_type, members(hint)))


def _described_type(kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return ("one of " if len(kind) > 1 else "") + ", ".join(option.name for option in kind)
    if typing.get_origin(kind) is list:
        return f"a list ({described(typing.get_args(kind)[0])} each)"
    if typing.get_origin(kind) is dict:
        return "a mapping from text to text"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return known.get(kind, "a value")
