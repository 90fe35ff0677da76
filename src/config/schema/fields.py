"""How a dataclass of the schema declares a key: its default, and everything else that is known of it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from omegaconf import MISSING

from src.config.schema.checks import Check, Keys
from src.registry import Registry
from src.util import in_words


class Impact(IntEnum):
    """What a change means for a run that resumes, from harmless to impossible."""

    harmless = 0
    """Allowed without checkpoint.allow_changed: what is trained stays the same, or the run only gets longer."""
    rounding = 1  # the same computation, rounded differently: resumes with a warning, no longer bit for bit
    trajectory = 2  # a different training from here on: needs checkpoint.allow_changed=true
    impossible = 3  # the saved state does not fit: refused, also with allow_changed


BY_OUTCOME = Impact.harmless
"""The impact of a key whose outcome (rows, ids, weights) is in the run's fingerprint, where it is compared instead."""
GENERATING = ("predict", "evaluate", "benchmark", "ensemble")
"""The entries that compute with finished runs."""
READING_ROWS = ("predict", "evaluate", "ensemble")
"""Those of them that read rows of the user's, in the form that the run has them in."""
AT_START = "only decides how a run starts, so it changes nothing here"
"""Why a change of such a key is harmless."""

DottedConfig = Mapping[str, Any]
"""A frozen configuration by dotted keys."""
Verdict = tuple[Impact, str]
"""The impact of a change, and why."""
ImpactRule = Callable[[str, DottedConfig, DottedConfig], Verdict]
"""Computes the impact of a change of a key from both configurations: before, now."""


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key besides its type, its default and, in conf/, its help text. Each has a safe default."""

    check: Check | None = None
    each: str | None = None  # the dataclass of the values of a mapping
    form: str | None = None  # the dataclass that a mapping becomes
    inner: Keys | None = None  # the keys that a mapping of another library may have
    text: str = ""  # what the key means, where it has no line in conf/ that says so
    resume: Impact | ImpactRule = Impact.trajectory  # what a change means for a run that resumes
    why: str = ""  # why a change has that impact, in a few words
    counts_where: Callable[[DottedConfig], bool] | None = None
    """Whether a configuration reads the key at all; where neither side does, a change is harmless."""
    reorders: bool | Callable[[DottedConfig], bool] = False
    """Whether a change puts the train rows into another order, so that the current epoch starts again."""
    shapes_rows: bool = True
    """Whether encoded rows depend on it, so that it is part of the cache's key; only in `data` and `tokens`."""
    cache_key_field: str = ""  # the field of EncodingConfig by which it enters the cache's key; empty: by its own value
    per_source: bool = False  # whether a source of a mixture may have its own; only in `data`
    read_by: Collection[str] | None = None
    """The entries that take it with a finished run; None: READING_ROWS for keys of `data` that shape rows."""


def key(check: Check | None = None, default: Any = MISSING, **info: Any) -> Any:
    """Declare a key; `info` are attributes of `KeyInfo`.

    `default` is for one that is added to a section that people have frozen already: what is as without it. Defaults of
    new configurations are in conf/, and an option file that lacks the key has it from here.
    """
    metadata = vars(KeyInfo(check, **info))
    if default == []:
        return dataclasses.field(default_factory=list, kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def type_key(group: str, kinds: Collection[str] | None = None, **info: Any) -> Any:
    """Declare the key that chooses among the dataclasses of a group; each option sets it.

    `kinds` are the values that it may have: None where its type is an Enum, a registry where plugins add some.
    """
    allowed = "set by the option" if isinstance(kinds, Registry) else in_words(kinds or (), "or")
    check = None if kinds is None else Check(f"{allowed} (choose another with {group}=…)", lambda v: v in kinds)
    return key(check, text=f"set by the option; choose with {group}=…", **info)


def later_default(one: dataclasses.Field[Any]) -> Any:
    """Return the value at which all is as without a key that was added later; MISSING for one that is in conf/."""
    if one.default_factory is list or one.default is not dataclasses.MISSING:
        return [] if one.default_factory is list else one.default
    return MISSING


def key_info(one: dataclasses.Field[Any]) -> KeyInfo:
    """Return what is declared of a dataclass's field; the safe defaults for one that was not declared by `key`."""
    return KeyInfo(**one.metadata)
