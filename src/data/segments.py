"""Pieces of a row's text: what is tokenised in one go, and whether it is learned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A text; in one that a chat template rendered, control tokens are tokens, elsewhere they are text."""

    text: str
    is_supervised: bool
    is_rendered: bool = False


def last_turn(segments: Sequence[Segment]) -> tuple[int, int]:
    """Give [first, stop) of the last segments that are learned together; both are the end where none is learned."""
    learned = [i for i, segment in enumerate(segments) if segment.is_supervised]
    if not learned:
        return len(segments), len(segments)
    first = learned[-1]
    while first > 0 and segments[first - 1].is_supervised:  # control tokens in a message cut its turn into segments
        first -= 1
    return first, learned[-1] + 1


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Give a pattern that finds any of the tokens, the longest first; of none it finds nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")
