r"""The user's regular expressions, applied to rows with a time limit, with the syntax of Python's `re`.

The engine is the package regex, which has timeouts: `(a+)+$` on a long row would keep `re` busy for centuries.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import regex

from src.errors import ConfigError, DataError, LimitError

SECONDS = 5.0  # processor time for one pattern on one text; texts of a few MiB take milliseconds

_BRACES = re.compile(r"\\N\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|\{", re.DOTALL)


class Pattern:
    """A pattern whose `.` matches line ends too; errors name its `key`: ConfigError where it can't be compiled."""

    def __init__(self, key: str, pattern: str) -> None:
        self._key, self._text = key, pattern
        try:
            self._compiled = _compiled(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{key} = {pattern} is no regular expression: {error}") from error

    def is_in(self, text: str) -> bool:
        """Return whether there is a match in a text. All methods raise LimitError where a pattern takes too long."""
        with self._limited(text):
            return self._compiled.search(text, timeout=SECONDS) is not None

    def matches(self, text: str) -> list[Any]:
        """Return the matches in a text, which are as those of `re`."""
        with self._limited(text):
            return list(self._compiled.finditer(text, timeout=SECONDS))

    @contextmanager
    def _limited(self, text: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise LimitError(
                f"{self._key} = {self._text} does not terminate within {SECONDS:g} s on a text of {len(text):,} "
                "characters; write it without a repetition inside a repetition, such as (a+)+"
            ) from error


@contextmanager
def at(place: Callable[..., str], *of: Any) -> Iterator[None]:
    """Raise DataError where a text exceeds a limit in this block; it names the place, which `place(*of)` returns."""
    try:
        yield
    except LimitError as problem:
        raise DataError(f"{place(*of)}: {problem}") from problem


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    return regex.compile(_BRACES.sub(_as_re_reads, pattern), regex.DOTALL | regex.VERSION0)


def _as_re_reads(match: re.Match[str]) -> str:
    """Escape a brace that is no repetition: `re` takes it literally, regex for fuzzy matching."""
    return {"{": r"\{", "{}": r"\{\}"}.get(match.group(), match.group())
