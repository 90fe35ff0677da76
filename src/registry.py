"""Named entries that can be extended without editing a table: optimizers, schedules, metrics, formats, exporters.

No heavy import here: registries are read while a command line is checked.
"""

from collections.abc import Callable
from typing import TypeVar

from src.errors import ConfigError
from src.util import did_you_mean

Entry = TypeVar("Entry")
Value = TypeVar("Value")


class UnknownNameError(ConfigError, KeyError):
    """A name that no entry has, with those there are and the nearest of them."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(dict[str, Entry]):
    """A mapping from names to entries of a kind ("optimizer"), in the order of registration, each name once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Value], Value]:
        """Return a decorator that enters what it decorates under this name; ValueError where the name is taken."""

        def enter(entry: Value) -> Value:
            self[name] = entry  # type: ignore[assignment]
            return entry

        return enter

    def why_unknown(self, name: object, remedy: str = "") -> str:
        """Return why a name is refused, with the nearest that is known; '' where it is known."""
        return "" if name in self else f"not one of {', '.join(self.names())}{remedy}{did_you_mean(name, self.names())}"

    def names(self) -> list[str]:
        """Return all names, as an error lists them."""
        return list(self)

    def __setitem__(self, name: str, entry: Entry) -> None:
        if name in self:
            raise ValueError(f"the {self.kind} {name} is registered already")
        super().__setitem__(name, entry)

    def __missing__(self, name: str) -> Entry:
        raise UnknownNameError(f"{name} is no {self.kind}: {self.why_unknown(name)}")
