"""Which setting really won: numbers in, rows out. No files, no configuration and no torch here.

All settings are compared with one of them, the reference: the best mean over two replicates or more. A row that can't
be distinguished from it shares the first rank. What only one seed says is never a win.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from src.metrics import LOSSES
from src.sweep.significance import SIGNIFICANCE, Comparison, Replicate, compare, half_width, holm
from src.util import in_words, plural

Direction = Literal["minimize", "maximize"]
EXTREME: Mapping[Direction, str] = {"minimize": "lowest", "maximize": "highest"}
FATES = {"FAILED": "failed", "FINISHED": "failed", "PRUNED": "pruned"}  # of replicates without a value, by their state


@dataclass(frozen=True)
class Result:
    """One trial, as the ranking needs it.

    `setting` is the hash of the configuration without seed and fold, `label` its overrides in words (`tokens=tow`; ""
    where only seeds vary), `group` the model where models are compared, else "". `state` is one of status.json, or
    WAITING. A `value` counts where it is finite and the trial is FINISHED; FINISHED without one is failed.
    """

    trial: int
    setting: str
    label: str
    group: str
    replicate: Replicate
    state: str
    value: float | None


@dataclass(frozen=True)
class Row:
    """One setting: its mean with a 95 % interval (None where n < 2), and how it compares with the reference.

    `failed`, `pruned` and `unfinished` count replicates without a value, by what became of the last trial of each.
    `difference` is this row's minus the reference's, in the metric's own unit, over the `num_pairs` replicates that
    both have (0: over all of each); its interval is for this comparison alone, while `p_value` is corrected for all of
    them. None: not computable. `rank` is None, and all else empty, where there is no value.
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
    is_reference: bool = False
    is_tied: bool = False
    verdict: str = ""

    @property
    def n(self) -> int:
        """How many replicates have a value."""
        return len(self.values)

    @property
    def name(self) -> str:
        """What to call it in a text."""
        group = self.group if self.group not in self.label else ""
        return ", ".join(part for part in (group, self.label) if part) or f"setting {self.setting[:8]}"


def rank(results: Iterable[Result], *, direction: Direction, num_folds: int | None = None) -> list[Row]:
    """Return one row a setting: those tied with the best, the others by their difference to it, those without a value.

    Two trials of one replicate are one value, their mean: doing a run again adds nothing. That a row alone has rank 1
    is wrong in about 5 % of sweeps at most. That some row is worse than the best of many is less sure, as the best is
    chosen after looking: of 40 equal settings with 3 seeds, some row is called worse in 13 % (simulated).
    `num_folds` is of the cross-validation where folds are replicates, see `variance_factor`.
    """
    settings: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.trial):
        settings.setdefault(result.setting, []).append(result)
    sign = 1 if direction == "minimize" else -1
    rows = [_tally(trials, sign, num_folds) for trials in settings.values()]
    return _ranked([row for row in rows if row.values], sign, num_folds) + _unranked(rows)


def _tally(trials: Sequence[Result], sign: int, num_folds: int | None) -> Row:
    """Gather the trials of one setting."""
    found: dict[Replicate, list[float]] = {}
    numbers: dict[int, float] = {}
    for trial in trials:
        if trial.state == "FINISHED" and trial.value is not None and math.isfinite(trial.value):
            found.setdefault(trial.replicate, []).append(trial.value)
            numbers[trial.trial] = sign * trial.value
    order = sorted(found, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    values = {key: mean(found[key]) for key in order}
    lacking = {trial.replicate: trial.state for trial in trials if trial.replicate not in found}
    fates = Counter(FATES.get(state, "unfinished") for state in lacking.values())
    middle, half = mean(values.values()) if values else None, half_width(values, num_folds)
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
    )


def _ranked(rows: Sequence[Row], sign: int, num_folds: int | None) -> list[Row]:
    if not rows:
        return []
    reference = _reference(rows, sign)
    others = [row for row in rows if row is not reference]
    comparisons = [compare(row.values, reference.values, num_folds) for row in others]
    adjusted = iter(holm([each.p_value for each in comparisons if each.p_value is not None]))
    comparisons = [each if each.p_value is None else replace(each, p_value=next(adjusted)) for each in comparisons]
    compared = [_compared(row, each, sign) for row, each in zip(others, comparisons, strict=True)]
    is_tied = any(row.is_tied for row in compared)
    everyone = [replace(reference, is_reference=True, is_tied=is_tied), *compared]
    everyone.sort(key=lambda row: (not _is_first(row), sign * (row.difference or 0)))
    places = [None if _is_first(row) else row.difference for row in everyone]  # those in one place share a rank
    ranks = [places.index(place) + 1 for place in places]
    verdicts = [_verdict(row, everyone, sign) for row in everyone]
    return [replace(row, rank=r, verdict=v) for row, r, v in zip(everyone, ranks, verdicts, strict=True)]


def _unranked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without a value: pruned ones first, which were at least looked at, failed ones last."""
    lacking = [row for row in rows if not row.values]
    lacking.sort(key=lambda row: (row.pruned == 0, row.unfinished == 0, row.trials))
    return [replace(row, verdict=", ".join(word.upper() for word in _lacks(row))) for row in lacking]


def _is_first(row: Row) -> bool:
    return row.is_tied or row.is_reference


def _reference(rows: Sequence[Row], sign: int) -> Row:
    """Choose the row that all are compared with: the best mean that can be trusted.

    One value alone is no measure, and pruning takes away the bad replicates of a row, so that the rest flatters it:
    such rows are chosen only where there are no others. Means over other replicates than a rival's are not comparable:
    while a rival is better on what both have, it takes the place.
    """
    candidates = [row for row in rows if row.n > 1 and not row.pruned] or [row for row in rows if row.n > 1] or rows
    best = min(candidates, key=lambda row: (sign * mean(row.values.values()), -row.n))
    rivals = [row for row in candidates if row is not best]
    while better := [row for row in rivals if sign * _shared_gap(row, best) < 0]:
        best = min(better, key=lambda row: sign * _shared_gap(row, best))
        rivals.remove(best)
    return best


def _shared_gap(row: Row, best: Row) -> float:
    """Return the mean difference on shared replicates; 0 where it says no more than the means do."""
    shared = row.values.keys() & best.values.keys()
    if len(shared) < 2 or row.values.keys() == best.values.keys():
        return 0.0
    return mean(row.values[key] - best.values[key] for key in shared)


def _compared(row: Row, comparison: Comparison, sign: int) -> Row:
    p_value = comparison.p_value
    is_worse = p_value is not None and p_value < SIGNIFICANCE and sign * comparison.difference > 0
    return replace(row, **vars(comparison), is_tied=not is_worse)


def number(value: float, spread: float | None) -> str:
    """Write a number with the digits that matter: two of its spread (half an interval), else four of its own."""
    if spread is None or not 0 < spread < math.inf:
        return f"{value:.4g}"  # nothing says how far it may be trusted
    places = 1 - math.floor(math.log10(spread))
    if places <= 6 and abs(value) < 1e7:
        return f"{value:,.{max(0, places)}f}"
    return f"{value:.{min(max(1, places + math.floor(math.log10(abs(value) or spread))), 6)}e}"


def p_text(p_value: float) -> str:
    """Write a p value: `p 0.031`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p {p_value:.2g}"


def kind_of_replicates(rows: Iterable[Row]) -> str:
    """Return what replicates are in these rows: seed, fold, or replicate where both vary."""
    keys = {key for row in rows for key in row.values}
    if all(fold is None for _, fold in keys) or len({fold for _, fold in keys}) == 1:
        return "seed"
    return "fold" if len({seed for seed, _ in keys}) == 1 else "replicate"


def _verdict(row: Row, rows: Sequence[Row], sign: int) -> str:
    reference = next(each for each in rows if each.is_reference)
    kind, everywhere = kind_of_replicates(rows), len({key for each in rows for key in each.values})
    notes = [_outcome(row, reference, len(rows), kind, sign)]
    if row.is_reference and 1 < row.n < everywhere:
        notes.append(f"has {row.n} of {everywhere} {kind}s")
    elif row.n > 1 and not row.is_reference and not row.num_pairs:
        notes.append(f"unpaired: fewer than 2 shared {kind}s")
    elif 1 < row.num_pairs < max(row.n, reference.n):
        notes.append(f"on {row.num_pairs} shared {kind}s")
    return ", ".join([*notes, *(f"{count} {word}" for word, count in _lacks(row).items())])


def _outcome(row: Row, reference: Row, num_rows: int, kind: str, sign: int) -> str:
    if row.n < 2:
        return f"one {kind}: no test possible"
    if row.is_reference:
        single = "nothing to compare with" if num_rows == 1 else "best"
        return "tie: the reference" if row.is_tied else single
    if row.p_value is None:
        return f"the same gap in too few {kind}s: no test possible"
    if _is_equal(row):
        return "equal"
    if not row.is_tied:
        return f"worse: {p_text(row.p_value)}"
    if row.p_value < SIGNIFICANCE and sign * (row.difference or 0) < 0:
        return f"tie: better ({p_text(row.p_value)}), but not on equal terms"
    return f"tie: {p_text(row.p_value)}"


def _is_equal(row: Row) -> bool:
    return row.difference_low == row.difference_high == 0


def _lacks(row: Row) -> dict[str, int]:
    """Count the replicates without a value, by why they have none."""
    counts = {"failed": row.failed, "pruned": row.pruned, "unfinished": row.unfinished}
    return {word: count for word, count in counts.items() if count}


def conclusion(rows: Sequence[Row], metric: str, direction: Direction) -> str:
    """Return in a sentence what the rows of `rank` show, and what it does not hold for."""
    ranked = [row for row in rows if row.rank is not None]
    if not ranked:
        return f"No trial finished with a value of {metric}: there is nothing to rank."
    measured = [row for row in ranked if row.n > 1]
    if not measured:
        result = _conclusion_of_single_values(ranked, metric, direction)
    elif len(measured) == 1:
        name = f"{measured[0].name}: " if measured[0].label or measured[0].group else ""
        result = f"{name}{metric} has {_measure(measured[0], ranked)}; there is nothing to compare it with."
    else:
        result = _conclusion_of_many(measured, ranked, metric, direction)
    return " ".join([result, *_cautions(rows, ranked, measured, metric)])


def _conclusion_of_single_values(ranked: Sequence[Row], metric: str, direction: Direction) -> str:
    best = next(row for row in ranked if row.is_reference)
    value, remedy = number(best.mean or 0, None), "no test is possible; run more seeds, e.g. seed=1,2,3"
    if len(ranked) == 1:
        return f"One trial ({metric} {value}): {remedy}."
    return f"One trial per setting: {remedy} ({EXTREME[direction]} {metric}: {value}, {best.name})."


def _conclusion_of_many(measured: Sequence[Row], ranked: Sequence[Row], metric: str, direction: Direction) -> str:
    best = next(row for row in measured if row.is_reference)
    tied = [row for row in measured if row.is_tied and row is not best]
    worse = [row for row in measured if not row.is_tied and row is not best]
    if not tied:
        all_others = "all others" if len(measured) == len(ranked) else "all that can be compared"
        loser = worse[0].name if len(worse) == 1 else all_others
        return f"{best.name} is better than {loser} in {metric} ({_measure(best, ranked)})."
    rest = f"; {plural(len(worse), 'other is', 'others are')} worse" if worse else ""
    if len(tied) == 1:
        return f"{best.name} and {tied[0].name} {_tie_of_two(tied[0], ranked, metric)}{rest}."
    choose = min if direction == "minimize" else max
    is_extreme = best.mean == choose(row.mean or 0 for row in measured)
    which = EXTREME[direction] if is_extreme else "reference"
    compared = f"the {which}: {best.name} with {_measure(best, ranked)}"
    return f"{len(tied) + 1} settings are not significantly different in {metric}{rest} ({compared})."


def _tie_of_two(row: Row, ranked: Sequence[Row], metric: str) -> str:
    if _is_equal(row):
        return f"are equal in {metric}"
    if row.p_value is not None and row.p_value < SIGNIFICANCE:
        return f"can't be compared on equal terms in {metric} (the second: {row.verdict})"
    if row.difference_low is None:
        gap, kind = number(row.difference or 0, None), kind_of_replicates(ranked)
        return f"can't be tested in {metric}: the same difference {gap} in too few {kind}s"
    pairs = f"{row.num_pairs} pairs" if row.num_pairs else "no pairs"
    many = f", {p_text(row.p_value or 0)} among {len(ranked)} settings" if len(ranked) > 2 else ""
    gap = _with_interval(row.difference, row.difference_low, row.difference_high)
    return f"are not significantly different in {metric}: difference {gap}, {pairs}{many}"


def _cautions(rows: Sequence[Row], ranked: Sequence[Row], measured: Sequence[Row], metric: str) -> list[str]:
    cautions = []
    single = [row for row in ranked if row.n < 2]
    if measured and single:
        names = in_words(row.name for row in single) if len(single) <= 3 else f"{len(single)} settings"
        have = "has" if len(single) == 1 else "have"
        cautions.append(f"{names} {have} one {kind_of_replicates(ranked)}: no test is possible.")
    best = next(row for row in ranked if row.is_reference)
    if measured and (lacks := _lacks(best)):
        parts = ", ".join(f"{count} {word}" for word, count in lacks.items())
        cautions.append(f"{best.name} is not complete: {parts}.")
    if lacking := len(rows) - len(ranked):
        cautions.append(f"{plural(lacking, 'setting has', 'settings have')} no value.")
    if metric.rpartition("/")[2] in LOSSES and len({row.group for row in ranked}) > 1:
        cautions.append("Losses per token compare models only where they share a tokenizer.")
    return cautions


def _measure(row: Row, rows: Sequence[Row]) -> str:
    return f"mean {_with_interval(row.mean, row.low, row.high)}, {row.n} {kind_of_replicates(rows)}s"


def _with_interval(middle: float | None, low: float | None, high: float | None) -> str:
    half = None if low is None or high is None else (high - low) / 2
    return f"{number(middle or 0, half)}, 95 % interval {number(low or 0, half)} to {number(high or 0, half)}"
