"""One thing that is wrong with a configuration, and how all of them are reported together."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from src import terminal
from src.errors import ConfigError, visible
from src.secrets import masked
from src.util import plural

COMMAND_LINE = "command line"
LONGEST_KEY, LONGEST_VALUE, LONGEST_REASON = 100, 60, 2000
"""The most characters that are shown of each."""
HINT = "Nothing was loaded or written. `python -m src.run --help` lists every group and key."


@dataclass(frozen=True)
class Problem:
    """A key, the value it was given, what is wrong with it, and where it was set."""

    key: str
    reason: str
    value: Any = None
    has_value: bool = True
    where: str = ""
    point: str = ""  # in a sweep: the point at which it is wrong

    @classmethod
    def on_command_line(cls, key: str, reason: str, value: Any) -> Self:
        """Return the problem of a value that the command line gives."""
        return cls(key, reason, value, where=COMMAND_LINE)

    def placed(self, where: str) -> Self:
        """Return the problem with where it was set, unless that is known."""
        return self if self.where else dataclasses.replace(self, where=where)

    @property
    def given(self) -> str:
        """The key and its value as a person would write them."""
        key = shortened(self.key, LONGEST_KEY)
        if not self.has_value:
            return key
        value = masked(self.value, self.key)
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return f"{key} = {shortened(value, LONGEST_VALUE)}"


def shortened(text: str, most: int) -> str:
    """Return a text as one line of at most `most` characters, its control characters written out; no number is cut."""
    return terminal.shortened(visible(text, is_line=True), most, "…")


def refuse(problems: Sequence[Problem]) -> ConfigError:
    """Build the one error that lists all problems, in columns."""
    unique = list(
        dict.fromkeys((p.given, shortened(p.reason, LONGEST_REASON), visible(p.where, is_line=True)) for p in problems)
    )
    width = min(44, max(len(given) for given, _, _ in unique))
    lines = [f"Configuration refused: {plural(len(unique), 'problem')}"]
    for given, reason, where in unique:
        lines.append(f"  {given:<{width}}   {reason}{f'   ({where})' if where else ''}")
    return ConfigError("\n".join([*lines, HINT]))
