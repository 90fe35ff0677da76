"""An item of a forecast, with how it was computed."""

from collections.abc import Sequence
from typing import NamedTuple


class MemoryItem(NamedTuple):
    """An item of a forecast: its name, its bytes (None: unknown), and the formula with its numbers."""

    name: str
    bytes: int | None
    how: str


def total(parts: Sequence[MemoryItem], how: str) -> MemoryItem:
    """Sum what is known of items; where one is unknown, the sum is a lower bound and says so."""
    unknown = [part.name for part in parts if part.bytes is None]
    least = f"at least: {', '.join(unknown)} unknown; " if unknown else ""
    return MemoryItem("total", sum(part.bytes or 0 for part in parts), least + how)
