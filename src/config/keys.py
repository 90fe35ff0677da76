"""Every key that a configuration can have, as the schema declares it: for hints, help and reference."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from src.config import schema as declared
from src.config.schema import ENTRY_SECTIONS, SECTIONS, Keys, SweepConfig, TopLevelConfig
from src.config.schema.fields import READING_ROWS, KeyInfo, key_info
from src.config.values import convert, described, hints_of, members


@dataclass(frozen=True)
class Key:
    """A key, dotted from the top: its type, its condition, and what is declared of it.

    `types` are the section's types whose options have the key; empty where the section has one form.
    """

    name: str
    owner: type
    types: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """The section that it stands in; '' for the top level."""
        return self.name.partition(".")[0] if "." in self.name else ""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def hint(self) -> Any:
        return hints_of(self.owner)[self.leaf]

    @property
    def info(self) -> KeyInfo:
        return key_info(next(one for one in dataclasses.fields(self.owner) if one.name == self.leaf))

    @property
    def inner(self) -> Keys:
        """The keys of another library's that its mapping may have."""
        return self.info.inner or {}

    @property
    def shapes_rows(self) -> bool:
        """Whether encoded rows depend on it; only sections that the row encoder gets."""
        return self.section in ("data", "tokens") and self.info.shapes_rows

    @property
    def entry(self) -> str:
        """The entry that alone reads it; '' for a key of runs or sweeps."""
        return next((name for name, owner in ENTRY_SECTIONS.items() if owner is self.owner), "")

    def is_read_by(self, entry: str) -> bool:
        """Return whether an entry that uses finished runs takes it."""
        if self.section == entry:
            return True
        if self.info.read_by is None:
            return self.section == "data" and self.shapes_rows and entry in READING_ROWS
        return entry in self.info.read_by

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        if self.types and self.leaf == "type":
            return f"one of {', '.join(self.types)}" if self.types[1:] else self.types[0]
        if (check := self.info.check) is None:
            return described(self.hint)
        is_optional = type(None) in members(self.hint) and "null" not in check.allowed
        return check.allowed + (", or null" if is_optional else "")

    def accepts(self, value: Any) -> bool:
        """Return whether the key may have this value, as far as the key alone decides."""
        return not convert(self.owner, self.leaf, self.hint, self.info.check, value)[1]


@cache
def all_keys() -> dict[str, Key]:
    """Return every key by its dotted name: those of a run, of a sweep, and of one entry alone."""
    found = {key.name: key for key in _of("", TopLevelConfig)}
    sections = {**SECTIONS, "sweep": SweepConfig, **{n: s for n, s in ENTRY_SECTIONS.items() if n not in SECTIONS}}
    for name, schema in sections.items():
        forms: dict[str, type] = schema if isinstance(schema, dict) else {"": schema}
        for kind, owner in forms.items():
            for key in (*_of(name, owner), *(keys_of_entry(name) if name in SECTIONS else ())):
                before = found.setdefault(key.name, key)  # of a run, where an entry's section has the same name
                if kind:
                    found[key.name] = dataclasses.replace(before, types=(*before.types, kind))
    return found


def keys_of_entry(entry: str) -> list[Key]:
    """Return the keys that an entry has for itself."""
    return list(_of(entry, ENTRY_SECTIONS[entry])) if entry in ENTRY_SECTIONS else []


def known_keys() -> Iterator[str]:
    """Yield every dotted key that the configuration of some run can have."""
    yield from (key.name for key in all_keys().values() if not key.entry and key.section != "sweep")


def _of(prefix: str, owner: type) -> Iterator[Key]:
    for name, hint in hints_of(owner).items():
        dotted = f"{prefix}.{name}" if prefix else name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _of(dotted, hint)
        else:
            yield Key(dotted, owner)


def source_keys() -> list[Key]:
    """Return the keys that a source of `data.mixture` may have for itself, by their names within it."""
    return [Key(f"data.mixture.NAME.{name}", declared.SourceConfig) for name in hints_of(declared.SourceConfig)]


def is_read_by(entry: str, name: str) -> bool:
    """Return whether an entry that uses finished runs reads a key, or all keys of a section; True for other names."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):  # a key's value may be a mapping that has this name in it
        if found := all_keys().get(".".join(parts[:length])):
            return found.is_read_by(entry)
    return not name.startswith("hydra.") and all(
        key.is_read_by(entry) for key in all_keys().values() if key.section == name
    )


def is_whole_number(key: str) -> bool:
    """Return whether a key's value has to be a whole number."""
    found = all_keys().get(key)
    return found is not None and found.accepts(2) and not found.accepts(1.5)
