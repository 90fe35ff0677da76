"""Segments of a row's text: each is tokenised by itself, and supervised or not."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A text. Where a chat template rendered it control tokens are tokens, elsewhere they are text."""

    text: str
    is_supervised: bool
    is_rendered: bool = False


def last_turn(segments: Sequence[Segment]) -> tuple[int, int]:
    """Return [first, stop) of the last adjacent supervised segments; both are the end where there are none."""
    stop = len(segments)
    while stop > 0 and not segments[stop - 1].is_supervised:
        stop -= 1
    first = stop
    while first > 0 and segments[first - 1].is_supervised:  # control tokens in a message split its turn
        first -= 1
    return (first, stop) if stop else (len(segments), len(segments))


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, the longest first; without tokens it finds nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")
