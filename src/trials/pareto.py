"""Which settings are best by several metrics: numbers in, rows out. No files, no configuration and no torch here.

First is the Pareto front: the settings than which no other is at least as good by every metric and better by one. A row
off the front that can't be distinguished from it shares the first rank.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import le
from statistics import fmean, mean
from typing import TypeVar

from src.trials.ranking import (
    Direction,
    Result,
    Row,
    add_seeds,
    by_setting,
    caution,
    folds_of,
    more_seeds,
    names,
    nothing_to_rank,
    seeds_of,
    sign_of,
    tally,
    trusted,
    without_values,
)
from src.trials.significance import MOST_SEEDS, SIGNIFICANCE, Replicate, compare, holm
from src.util import in_words

Goals = Mapping[str, Direction]
"""The metrics that rank, and which of their values are better."""
Key = TypeVar("Key")
Point = tuple[float, ...]  # of each metric, the lower the better


@dataclass(frozen=True)
class Objective:
    """A setting by one metric: a value for each replicate, their mean and its 95 % interval (None where n < 2)."""

    metric: str
    values: Mapping[Replicate, float]
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class FrontRow(Row):
    """One setting by several metrics; `is_reference`: it is on the front, which the others are compared with.

    `p_value` is of the surest of its `num_tests` tests against the settings of the front that dominate it, by each
    metric, corrected for their number; `difference`, `deviation` and `num_pairs` are of the same test. What else `Row`
    has of one metric is of the first.
    """

    objectives: tuple[Objective, ...] = ()
    num_tests: int = 0

    def by(self, place: int) -> Row:
        """Return the row as it is by one of the metrics."""
        one = self.objectives[place]
        return replace(self, values=one.values, mean=one.mean, low=one.low, high=one.high)


def dominates(one: Point, other: Point) -> bool:
    """Return whether a point is at least as good as another everywhere, and better somewhere."""
    return one != other and all(map(le, one, other))


def front(points: Mapping[Key, Point]) -> list[Key]:
    """Return the keys of the points that no other dominates, in their order."""
    kept: list[Key] = []
    for key in sorted(points, key=points.__getitem__):  # nothing that comes later dominates what was before
        if not any(dominates(points[one], points[key]) for one in kept):
            kept.append(key)
    chosen = set(kept)
    return [key for key in points if key in chosen]


def layers(points: Mapping[Key, Point]) -> list[list[Key]]:
    """Return the keys of the front, of the front of what is left, and so on.

    Source: Zhang et al. (2015), "An Efficient Approach to Nondominated Sorting" (ENS-BS).
    """
    found: list[list[Key]] = []

    def has_place(key: Key, layer: Sequence[Key]) -> bool:
        return not any(dominates(points[one], points[key]) for one in reversed(layer))

    for key in sorted(points, key=points.__getitem__):
        place = bisect_left(found, True, key=partial(has_place, key))
        if place == len(found):
            found.append([])
        found[place].append(key)
    return found


def point_of(values: Iterable[float], directions: Iterable[Direction]) -> Point:
    """Return values of the metrics so that the lower are the better."""
    return tuple(sign_of(direction) * value for value, direction in zip(values, directions, strict=True))


def rank_by_several(results: Iterable[Result], goals: Goals, num_folds: int | None = None) -> list[FrontRow]:
    """Return one row a setting: the front, those tied with it, the others by layers of the rest, those without values.

    A row is off the front for sure where one of the front that dominates it by means is significantly better by at
    least one metric; by the others it is better, or equal, by its means only. One seed alone takes no place in the
    front where others have more. `num_folds` as in `rank`.
    """
    rows = [_row(trials, goals, num_folds) for trials in by_setting(results)]
    ranked = [row for row in rows if row.values]
    return [*(_ranked(ranked, goals, num_folds) if ranked else ()), *without_values(rows)]


def _row(trials: Sequence[Result], goals: Goals, num_folds: int | None) -> FrontRow:
    tallies = [tally(trials, 1, num_folds, place) for place in range(len(goals))]
    found = zip(goals, tallies, strict=True)
    objectives = tuple(Objective(metric, one.values, one.mean, one.low, one.high) for metric, one in found)
    return FrontRow(**vars(tallies[0]) | {"best_trial": None}, objectives=objectives)


def _ranked(rows: Sequence[FrontRow], goals: Goals, num_folds: int | None) -> Iterator[FrontRow]:
    """Yield rows with values, compared with the front."""
    of_each = {row.setting: [mean(one.values.values()) for one in row.objectives] for row in rows}
    means = {setting: point_of(values, goals.values()) for setting, values in of_each.items()}
    candidates = list(trusted(rows))
    while True:
        layer_of = _places(layers({row.setting: means[row.setting] for row in candidates}))
        first = [row for row in candidates if layer_of[row.setting] == 0]
        flattered = [row for row in first if any(_dominates_where_shared(one, row, goals) for one in candidates)]
        if not flattered:
            break
        candidates.remove(min(flattered, key=lambda row: (row.n, row.setting)))
    best = [replace(row, is_reference=True) for row in rows if layer_of.get(row.setting) == 0]
    found = []
    for row in rows:
        if layer_of.setdefault(row.setting, 1) != 0:
            rivals = [
                one
                for one in best
                if dominates(means[one.setting], means[row.setting]) or _dominates_where_shared(one, row, goals)
            ]
            found.append(_against(row, rivals, goals, num_folds))
    compared = [
        replace(row, p_value=p_value, is_tied=p_value is None or p_value >= SIGNIFICANCE)
        for row, p_value in zip(found, holm([row.p_value for row in found]), strict=True)
    ]
    num_tied = max(1, sum(row.is_tied and row.p_value is not None for row in compared))  # Holm's first step
    most, num_folds = max(best, key=lambda row: row.n), num_folds if len(folds_of(rows)) > 1 else None
    layer_of |= {row.setting: 0 for row in (*best, *compared) if row.is_first}
    everyone = [*best, *compared]
    everyone.sort(key=lambda row: (not row.is_reference, not row.is_tied, layer_of[row.setting], means[row.setting]))
    places: dict[int, int] = {}  # those of one layer share a rank
    for place, row in enumerate(everyone, 1):
        level = SIGNIFICANCE / (num_tied * max(1, row.num_tests))
        rank = places.setdefault(layer_of[row.setting], place)
        yield replace(row, rank=rank, more_seeds=more_seeds(row, most, level, num_folds))


def _places(of_layers: Sequence[Sequence[Key]]) -> dict[Key, int]:
    return {key: place for place, layer in enumerate(of_layers) for key in layer}


def _dominates_where_shared(one: FrontRow, other: FrontRow, goals: Goals) -> bool:
    """Return whether a row dominates another on the replicates that both have, where these say more than the means."""
    shared = one.values.keys() & other.values.keys()
    if len(shared) < 2 or one.values.keys() == other.values.keys():
        return False
    pairs = zip(one.objectives, other.objectives, goals.values(), strict=True)
    gaps = [
        sign_of(direction) * fmean(mine.values[key] - theirs.values[key] for key in shared)
        for mine, theirs, direction in pairs
    ]
    return max(gaps) <= 0 > min(gaps)


def _against(row: FrontRow, rivals: Sequence[FrontRow], goals: Goals, num_folds: int | None) -> FrontRow:
    """Return a row with the surest of its tests against rivals by each metric; its p is corrected for their number."""
    tests = [
        (sign_of(direction), compare(ours.values, theirs.values, num_folds))
        for rival in rivals
        for ours, theirs, direction in zip(row.objectives, rival.objectives, goals.values(), strict=True)
    ]
    worse = [test for sign, test in tests if sign * test.difference > 0]
    if not tests:
        return row
    surest = min(worse or [test for _, test in tests], key=lambda test: (test.p_value is None, test.p_value or 0.0))
    p_value = surest.p_value
    if p_value is not None:  # Bonferroni
        p_value = min(1.0, len(tests) * p_value) if worse else 1.0
    return replace(row, **vars(surest) | {"p_value": p_value}, num_tests=len(tests))


def front_conclusion(rows: Sequence[Row], goals: Goals, sweep_name: str | None = None) -> str:
    """Return in a sentence which rows of `rank_by_several` are on the front, and what would tell others from it.

    `sweep_name` as in `conclusion`.
    """
    ranked, metrics = [row for row in rows if row.rank is not None], in_words(goals)
    if not ranked:
        return nothing_to_rank(metrics)
    best, tied = [row for row in ranked if row.is_reference], [row for row in ranked if row.is_tied]
    parts = [f"{names(best)} {'is' if len(best) == 1 else 'are'} on the Pareto front of {metrics}"]
    if tied:
        parts[0] += f", and {names(tied)} can't be told from it"
    if wanting := [row for row in (*best, *tied) if row.more_seeds]:
        gain = f"tell {names([row for row in wanting if row.is_tied])} from the front"
        has_test = any(row.n > 1 for row in best)
        parts.append(add_seeds(wanting, len(best) + len(tied), gain if has_test else "", seeds_of(ranked), sweep_name))
    elif tied:
        parts.append(f"they differ too little to matter: {MOST_SEEDS} seeds would not tell them apart")
    return f"{'; '.join(parts)}.{caution(goals, ranked)}"
