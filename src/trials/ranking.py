"""Which setting really won: numbers in, rows out. No files, no configuration and no torch here.

All settings are compared with one of them, the reference: the best mean over two replicates or more. A row that can't
be distinguished from it shares the first rank. What only one seed says is never a win.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Literal, TypeVar

from src.metrics import LOSSES
from src.trials.significance import MOST_SEEDS, SIGNIFICANCE, Replicate, compare, half_width, holm, seeds_to_tell
from src.util import in_words, plural

Direction = Literal["minimize", "maximize"]
SECONDS, MEMORY = "perf/elapsed_seconds", "peak_memory_bytes"  # what a run cost, by summary.json
FEWEST_SEEDS = 3  # that a first comparison takes
MOST_NAMED = 3  # settings in a sentence
FATES = {"FAILED": "failed", "FINISHED": "failed", "PRUNED": "pruned"}  # of replicates without a value, by their state


@dataclass(frozen=True)
class Result:
    """One trial, as the ranking needs it.

    `setting` is the hash of the configuration without seed and fold, `label` its overrides in words (`tokens=tow`; ""
    where only seeds vary), `group` the model where models are compared, else "". `state` is one of status.json, or
    WAITING. `values` are of each metric, and count where all are finite and the trial is FINISHED; FINISHED without any
    is failed. `measures` are other values of its summary.
    """

    trial: int
    setting: str
    label: str
    group: str
    replicate: Replicate
    state: str
    values: tuple[float, ...]
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        return self.state == "FINISHED" and bool(self.values) and all(map(math.isfinite, self.values))


@dataclass(frozen=True)
class Row:
    """One setting: its mean with a 95 % interval (None where n < 2), and how it compares with the reference.

    `failed`, `pruned` and `unfinished` count replicates without a value, by what became of the last trial of each.
    `difference` is this row's minus the reference's, in the metric's own unit, over the `num_pairs` replicates that
    both have (0: over all of each); its interval is for this comparison alone, while `p_value` is corrected for all of
    them. None: not computable. `rank` is None, and all else empty, where there is no value. `more_seeds` is how many
    seeds more would tell a tied row from the reference; None where no number that is worth running would.
    `measures` are means over its trials, of memory the most.
    """

    setting: str
    label: str
    group: str
    values: Mapping[Replicate, float]
    trials: tuple[int, ...]
    best_trial: int | None
    failed: int
    pruned: int
    unfinished: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    rank: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    num_pairs: int = 0
    deviation: float | None = None
    is_reference: bool = False
    is_tied: bool = False
    more_seeds: int | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many replicates have a value."""
        return len(self.values)

    @property
    def name(self) -> str:
        """What to call it in a text."""
        group = self.group if self.group not in self.label else ""
        return ", ".join(part for part in (group, self.label) if part) or f"setting {self.setting[:8]}"

    @property
    def lacks(self) -> str:
        """Return how many replicates have no value, by why."""
        counts = {"failed": self.failed, "pruned": self.pruned, "unfinished": self.unfinished}
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count)

    @property
    def seeds_compared(self) -> int:
        """How many seeds its comparison with the reference rests on."""
        return math.ceil(self.num_pairs / len(folds_of([self]))) or len(seeds_of([self]))

    @property
    def is_first(self) -> bool:
        return self.is_tied or self.is_reference

    @property
    def is_unequal(self) -> bool:
        """Whether it is better than the reference, but not on equal terms: what was pruned or failed flatters it."""
        return self.is_tied and self.p_value is not None and self.p_value < SIGNIFICANCE


AnyRow = TypeVar("AnyRow", bound=Row)


def rank(results: Iterable[Result], *, direction: Direction, num_folds: int | None = None) -> list[Row]:
    """Return one row a setting: those tied with the best, the others by their difference to it, those without a value.

    Two trials of one replicate are one value, their mean: doing a run again adds nothing. That a row alone has rank 1
    is wrong in about 5 % of sweeps at most. That some row is worse than the best of many is less sure, as the best is
    chosen after looking: of 40 equal settings with 3 seeds, some row is called worse in 13 % (simulated).
    `num_folds` is of the cross-validation where folds are replicates, see `variance_factor`.
    """
    sign = sign_of(direction)
    rows = [tally(trials, sign, num_folds) for trials in by_setting(results)]
    ranked = [row for row in rows if row.values]
    return [*(_ranked(ranked, sign, num_folds) if ranked else ()), *without_values(rows)]


def sign_of(direction: Direction) -> int:
    """Return what to multiply values with so that the lower is the better."""
    return 1 if direction == "minimize" else -1


def by_setting(results: Iterable[Result]) -> Iterable[list[Result]]:
    """Return the trials of each setting."""
    settings: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.trial):
        settings.setdefault(result.setting, []).append(result)
    return settings.values()


def without_values(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """Return the rows that have no value, in the order in which they come last."""
    rest = [row for row in rows if not row.values]
    return sorted(rest, key=lambda row: (row.pruned == 0, row.unfinished == 0, row.trials))  # pruned: were looked at


def tally(trials: Sequence[Result], sign: int, num_folds: int | None, place: int = 0) -> Row:
    """Gather the trials of one setting, by the metric at a place."""
    found: dict[Replicate, list[float]] = {}
    numbers: dict[int, float] = {}
    for trial in trials:
        if trial.counts:
            found.setdefault(trial.replicate, []).append(trial.values[place])
            numbers[trial.trial] = sign * trial.values[place]
    order = sorted(found, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    values = {key: mean(found[key]) for key in order}
    lacking = {trial.replicate: trial.state for trial in trials if trial.replicate not in found}
    fates = Counter(FATES.get(state, "unfinished") for state in lacking.values())
    middle, half = mean(values.values()) if values else None, half_width(values, num_folds)
    measured = [trial.measures for trial in trials if trial.trial in numbers]
    shared = [name for name in (measured[0] if measured else ()) if all(name in one for one in measured)]
    return Row(
        setting=trials[0].setting,
        label=trials[0].label,
        group=trials[0].group,
        values=values,
        trials=tuple(trial.trial for trial in trials),
        best_trial=min(numbers, key=numbers.__getitem__, default=None),
        failed=fates["failed"],
        pruned=fates["pruned"],
        unfinished=fates["unfinished"],
        mean=middle,
        low=None if middle is None or half is None else middle - half,
        high=None if middle is None or half is None else middle + half,
        measures={name: (max if name == MEMORY else mean)([one[name] for one in measured]) for name in shared},
    )


def _ranked(rows: Sequence[Row], sign: int, num_folds: int | None) -> Iterator[Row]:
    """Yield rows with values, compared with the best: those that are tied with it, then the others by difference."""
    best = _reference(rows, sign)
    others = [row for row in rows if row is not best]
    found = [compare(row.values, best.values, num_folds) for row in others]
    compared = [replace(row, **vars(each)) for row, each in zip(others, found, strict=True)]
    compared = [
        replace(row, p_value=p, is_tied=p is None or p >= SIGNIFICANCE or sign * (row.difference or 0) <= 0)
        for row, p in zip(compared, holm([each.p_value for each in found]), strict=True)
    ]
    everyone = [replace(best, is_reference=True, is_tied=any(row.is_tied for row in compared)), *compared]
    everyone.sort(key=lambda row: (not row.is_first, sign * (row.difference or 0)))
    level = SIGNIFICANCE / max(1, sum(row.is_tied and row.p_value is not None for row in compared))  # Holm's first step
    num_folds = num_folds if len(folds_of(rows)) > 1 else None
    places: dict[float | None, int] = {}  # those in one place share a rank
    for place, row in enumerate(everyone, 1):
        rank = places.setdefault(None if row.is_first else row.difference, place)
        yield replace(row, rank=rank, more_seeds=more_seeds(row, best, level, num_folds))


def more_seeds(row: Row, best: Row, level: float, num_folds: int | None) -> int | None:
    """Return how many seeds more would tell a tied row from another at a level; None where no sensible number would."""
    needed = None
    if row.n < 2:
        needed = len(seeds_of([best])) if best.n > 1 else FEWEST_SEEDS
    elif row.is_tied and row.deviation is not None and not row.is_unequal:
        needed = seeds_to_tell(row.difference or 0, row.deviation, level=level, num_folds=num_folds)
    return None if needed is None else max(1, needed - row.seeds_compared)


def _reference(rows: Sequence[Row], sign: int) -> Row:
    """Choose the row that all are compared with: the best mean that can be trusted.

    One value alone is no measure, and pruning takes away the bad replicates of a row, so that the rest flatters it:
    such rows are chosen only where there are no others. Means over other replicates than a rival's are not comparable:
    while a rival is better on what both have, it takes the place.
    """
    candidates = trusted(rows)
    best = min(candidates, key=lambda row: (sign * mean(row.values.values()), -row.n))
    rivals = [row for row in candidates if row is not best]
    while better := [row for row in rivals if sign * _shared_gap(row, best) < 0]:
        best = min(better, key=lambda row: sign * _shared_gap(row, best))
        rivals.remove(best)
    return best


def trusted(rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
    """Return the rows that may be first: with several values, and none pruned, as far as there are such."""
    several = [row for row in rows if row.n > 1]
    return [row for row in several if not row.pruned] or several or rows


def _shared_gap(row: Row, best: Row) -> float:
    """Return the mean difference on shared replicates; 0 where it says no more than the means do."""
    shared = row.values.keys() & best.values.keys()
    if len(shared) < 2 or row.values.keys() == best.values.keys():
        return 0.0
    return mean(row.values[key] - best.values[key] for key in shared)


def number(value: float, spread: float | None) -> str:
    """Write a number with the digits that matter: two of its spread (half an interval), else four of its own."""
    if spread is None or not 0 < spread < math.inf:
        return f"{value:.4g}"  # nothing says how far it may be trusted
    places = 1 - math.floor(math.log10(spread))
    if places <= 6 and abs(value) < 1e7:
        return f"{value:,.{max(0, places)}f}"
    return f"{value:.{min(max(1, places + math.floor(math.log10(abs(value) or spread))), 6)}e}"


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """Return the seeds that have a value, in ascending order."""
    return sorted({seed for row in rows for seed, _ in row.values})


def folds_of(rows: Iterable[Row]) -> set[int | None]:
    """Return the folds that have a value; None alone where there are none."""
    return {fold for row in rows for _, fold in row.values}


def with_spread(middle: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """Write a mean or a difference, with half of its interval where it has one: `0.310 ± 0.025`."""
    if middle is None:
        return "–"
    half = None if low is None or high is None else (high - low) / 2
    text = f"{'+' if sign and middle > 0 else ''}{number(middle, half)}"
    return text if half is None else f"{text} ± {number(half, half)}"


def conclusion(rows: Sequence[Row], metric: str, sweep_name: str | None = None) -> str:
    """Return in a sentence which rows of `rank` are first, and what would tell those apart that are tied.

    `sweep_name` is of a sweep that the same command with more seeds adds trials to; None: these settings need another.
    """
    ranked = [row for row in rows if row.rank is not None]
    if not ranked:
        return nothing_to_rank(metric)
    first = [row for row in ranked if row.rank == 1]
    best = next(row for row in ranked if row.is_reference)
    if len(first) > 1:
        who = f"{names(first)} are tied in {metric}"
    else:
        kind = "fold" if len(folds_of([best])) > 1 and len(seeds_of([best])) == 1 else "seed"
        measured = f"{with_spread(best.mean, best.low, best.high)}, {plural(best.n, kind)}"
        who = f"{best.name} {'is first in' if len(ranked) > 1 else 'has'} {metric} ({measured})"
    step = _next_step(first, best, seeds_of(ranked), sweep_name)
    return "; ".join(filter(None, [who, step])) + f".{caution([metric], ranked)}"


def nothing_to_rank(metrics: str) -> str:
    return f"No trial finished with a value of {metrics}: there is nothing to rank."


def caution(metrics: Iterable[str], rows: Iterable[Row]) -> str:
    """Return what else to know before models are compared by these metrics, or ''."""
    is_of_tokens = any(metric.rpartition("/")[2] in LOSSES for metric in metrics) and len({r.group for r in rows}) > 1
    return " Losses per token compare models only where they share a tokenizer." if is_of_tokens else ""


def _next_step(first: Sequence[Row], best: Row, seeds: list[int], sweep_name: str | None) -> str:
    """Return what to run to tell the first rows apart, or why nothing would."""
    if wanting := [row for row in first if row.more_seeds]:
        others = names([row for row in wanting if row is not best])
        gain = f"tell {f'{others} from {best.name}' if len(first) > 2 else 'them apart'}"
        return add_seeds(wanting, len(first), "" if best.n < 2 else gain, seeds, sweep_name)
    if unequal := [row for row in first if row.is_unequal]:
        return (
            f"{names(unequal)} can't be compared with {best.name} on equal terms ({unequal[0].lacks or 'other seeds'})"
        )
    return f"they differ too little to matter: {MOST_SEEDS} seeds would not tell them apart" if len(first) > 1 else ""


def add_seeds(wanting: Sequence[Row], num_first: int, gain: str, seeds: list[int], sweep_name: str | None) -> str:
    """Return how to give the rows `more_seeds`, and what that would do; no `gain`: there is no test without them.

    `num_first` rows share the first rank, `seeds` are those of all rows.
    """
    total = max(row.seeds_compared + (row.more_seeds or 0) for row in wanting)
    seeds = seeds + [seeds[-1] + more for more in range(1, 1 + total - len(seeds))]
    count = plural(max(row.more_seeds or 0 for row in wanting), "more seed")
    why = f"{count} would {gain}" if gain else "one seed allows no test"
    which = "the same command" if num_first <= MOST_NAMED else "the same command for the best of them"
    means = [f"seed={','.join(map(str, seeds))}"]
    if sweep_name is None:
        which = f"run {'the best of them' if num_first > 1 else 'it'} as a grid"
    else:
        means.append(f"sweep.name={shlex.quote(sweep_name)}")
    return f"{why}: {which} with {' '.join(means)}"


def names(rows: Sequence[Row]) -> str:
    """Return what to call rows in a sentence."""
    if len(rows) > MOST_NAMED:
        return f"{rows[0].name} and {len(rows) - 1} others"
    return in_words(row.name for row in rows)
