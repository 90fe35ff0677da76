"""How a dataclass of the schema declares a key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from omegaconf import MISSING

from src.config.schema.checks import Check, Keys
from src.util import in_words

TYPE_TEXT = "set by the option; choose with {group}=…"


def key(
    check: Check | None = None,
    default: Any = MISSING,
    each: str | None = None,
    inner: Keys | None = None,
    text: str = "",
) -> Any:
    """Declare a key.

    Args:
        each: the dataclass of the values of a mapping.
        inner: the keys of another library's mapping.
        text: what the key means, where no line of conf/ has it and says so.
    """
    return field(default=default, metadata={"check": check, "each": each, "inner": inner, "text": text})


def type_key(group: str, *kinds: str) -> Any:
    """Declare the key that says which of a group's dataclasses an option is of; each option sets it."""
    check = Check(f"{in_words(kinds, 'or')} (choose another with {group}=…)", lambda v: v in kinds)
    return key(check, text=TYPE_TEXT.format(group=group))


def registered_type_key(group: str, registry: Mapping[str, type]) -> Any:
    """Declare that key of a group whose dataclasses are registered, by plugins too."""
    check = Check(f"set by the option (choose another with {group}=…)", lambda v: v in registry)
    return key(check, text=TYPE_TEXT.format(group=group))
