"""Series of a figure out of lines of metrics, thinned so that every extreme stays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.figures import Kind, Series
from src.reporting.runs import is_number

MOST_POINTS = 2000
"""Points of a series: more than a screen has columns."""
MOST_SERIES = 30  # of a figure; more can't be told apart


def series_of(
    lines: Iterable[Mapping[str, Any]], metric: str, name: str = "", kind: Kind = "line", most: int = MOST_POINTS
) -> Series:
    """Return a metric of lines of metrics over their steps, in at most so many points."""
    pairs = [(line["step"], line[metric]) for line in lines if is_number(line.get(metric))]
    return Series(name or metric, *thinned([x for x, _ in pairs], [y for _, y in pairs], most), kind)


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[Sequence[float], Sequence[float]]:
    """Return at most so many points of a curve: the first, the last, and the extremes of equal parts between them."""
    count = len(x)
    if count <= most:
        return x, y
    parts = (most - 2) // 2
    kept = [0]
    for part in range(parts):
        start, stop = (1 + (count - 2) * end // parts for end in (part, part + 1))
        inner = range(start, stop)
        kept += sorted({min(inner, key=y.__getitem__), max(inner, key=y.__getitem__)})
    kept.append(count - 1)
    return [x[i] for i in kept], [y[i] for i in kept]
