"""Named entries that can be extended without editing a table: optimizers, schedules, metrics, formats, exporters.

No heavy import here: registries are read while a command line is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import TypeVar

from src.errors import ConfigError

Entry = TypeVar("Entry")
Value = TypeVar("Value")


class UnknownNameError(ConfigError, KeyError):
    """A name that no entry has, with those there are and the nearest of them."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(Mapping[str, Entry]):
    """A mapping from names to entries, in the order of registration.

    Args:
        kind: what an entry is, in the singular: "optimizer".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Value], Value]:
        """Return a decorator that adds what it decorates under this name, unchanged.

        Raises:
            ValueError: where the name is taken by another entry.
        """

        def add(entry: Value) -> Value:
            self.add(name, entry)  # type: ignore[arg-type]
            return entry

        return add

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: where the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"there is already {self.an} named {name}")
        self._entries[name] = entry

    @property
    def an(self) -> str:
        """The kind with its article."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def reason(self, name: object) -> str:
        """Return why a name is refused, with the nearest that is known; '' where it is known."""
        if name in self._entries:
            return ""
        near = get_close_matches(str(name), self._entries, n=1)
        return f"not one of {', '.join(self._entries)}{f'; did you mean {near[0]}?' if near else ''}"

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(f"{name} is no {self.kind}: {self.reason(name)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
