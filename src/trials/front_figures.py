"""Figures of a ranking by one metric or several: the Pareto front, the settings and how the values came."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

from src.figures import Figure, Series, is_logarithmic
from src.terminal import short_numbers
from src.trials.leaderboard import MOST_NAMED, by_metric, history_figure, settings_figure
from src.trials.pareto import FrontRow, Goals
from src.trials.ranking import Row


def figures(rows: Sequence[Row], goals: Goals, history: Sequence[Sequence[float]]) -> Iterator[Figure]:
    """Yield the figures of a sweep: the front, and by each metric the settings and the history of finished trials."""
    yield from front_figures(rows, goals)
    yield from settings_figures(rows, goals)
    for place, (metric, direction) in enumerate(goals.items()):
        yield numbered(history_figure([values[place] for values in history], metric, direction), place, goals)


def settings_figures(rows: Sequence[Row], goals: Goals) -> Iterator[Figure]:
    """Yield a figure of the settings by each metric."""
    first = "the best" if len(goals) == 1 else "the front"
    for place, metric in enumerate(goals):
        yield numbered(settings_figure(by_metric(rows, place), metric, first), place, goals)


def numbered(figure: Figure, place: int, goals: Goals) -> Figure:
    """Return a figure of one of several metrics with the number of its metric in its key; of the only one as it is."""
    return replace(figure, key=f"{figure.key}_{place + 1}") if len(goals) > 1 else figure


def front_figures(rows: Sequence[Row], goals: Goals) -> Iterator[Figure]:
    """Yield a figure of each two metrics: the settings' means, the front among them; of two in all it has steps."""
    shown = [row for row in rows if isinstance(row, FrontRow) and row.values]
    front = [row for row in shown if row.is_reference]
    is_named = len(front) <= MOST_NAMED
    groups = [(_short(row.name), [row]) for row in front] if is_named else [("on the front", front)]
    groups.append(("can't be told from the front", [row for row in shown if row.is_tied]))
    groups.append(("off the front", [row for row in shown if not row.is_first]))
    is_spread = any(row.n > 1 for row in shown)
    for number, (x, y) in enumerate(combinations(range(len(goals)), 2)):
        labels = [f"{metric}, {direction}d" for metric, direction in goals.items()]
        series = [_steps(front, is_rising=goals[next(iter(goals))] == "minimize")] if len(goals) == 2 else []
        series += [one for group in groups for one in (_points(*group, x, y), _spans(*group, x, y)) if one.x]
        yield Figure(
            f"pareto_{number + 1}" if len(goals) > 2 else "pareto",
            "The Pareto front, by means",
            labels[x],
            labels[y],
            series,
            note="lines through a setting reach from its lowest to its highest value" if is_spread else "",
            has_log_x=is_logarithmic(_values(shown, x)),
            has_log_y=is_logarithmic(_values(shown, y)),
            is_joined=False,
        )


def _short(name: str) -> str:
    """Return a setting's name with the last words of its keys."""
    return re.sub(r"(?<!\S)\w+\.[\w.]*?(\w+=)", r"\1", short_numbers(name))


def _values(rows: Sequence[FrontRow], place: int) -> list[float]:
    return [value for row in rows for value in row.objectives[place].values.values()]


def _mean(row: FrontRow, place: int) -> float:
    found = row.objectives[place].mean
    assert found is not None  # it has values
    return found


def _points(name: str, rows: Sequence[FrontRow], x: int, y: int) -> Series:
    return Series(name, [_mean(row, x) for row in rows], [_mean(row, y) for row in rows], "points")


def _spans(name: str, rows: Sequence[FrontRow], x: int, y: int) -> Series:
    """Return from where to where the values of each setting with several reach, by two metrics."""
    ends = []
    for row in rows:
        if row.n > 1:
            across, along = _values([row], x), _values([row], y)
            ends += [(min(across), _mean(row, y)), (max(across), _mean(row, y))]
            ends += [(_mean(row, x), min(along)), (_mean(row, x), max(along))]
    left, right = [one for one, _ in ends], [one for _, one in ends]
    return Series(f"{name}, lowest to highest", left, right, "intervals", is_listed=False)


def _steps(front: Sequence[FrontRow], *, is_rising: bool) -> Series:
    """Return the border of what the front dominates: from each of its points to the next, by the worse of both."""
    points = sorted(((_mean(row, 0), _mean(row, 1)) for row in front), reverse=not is_rising)  # the best x first
    corners = [(x, y) for (_, y), (x, _) in pairwise(points)]
    joined = [one for pair in zip(points, corners, strict=False) for one in pair] + points[-1:]
    return Series("the front", [x for x, _ in joined], [y for _, y in joined], "dashes")
