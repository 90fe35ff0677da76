"""Student's t over replicates: intervals of means, comparisons of settings, and how many seeds would tell two apart."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

Replicate = tuple[int, int | None]  # (seed, fold)
CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
POWER = 0.8
MOST_SEEDS = 30  # that are worth running: what takes more is a difference of about half of what seeds differ by
ROUNDING = 1e-12  # share of the largest value: a smaller difference is rounding of floats, not of trials


@dataclass(frozen=True)
class Comparison:
    """A difference of two means, its interval and p value; None where they can't be computed.

    `deviation` is the standard deviation of what the two differ by in one replicate.
    """

    difference: float
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    num_pairs: int = 0
    deviation: float | None = None


def compare(ours: Mapping[Replicate, float], theirs: Mapping[Replicate, float], num_folds: int | None) -> Comparison:
    """Test whether two settings differ: paired t over shared replicates; Welch's t where fewer than 2 are shared.

    Where nothing varies there is no t. Differences that are all 0 are equal. The same gap in 3 pairs or
    more is significant (p = 0); in 2 it is not: a metric that counts (exact_match) often has the same gap twice by
    chance, and two values say little about noise.
    """
    shared = [key for key in ours if key in theirs]
    rounding = ROUNDING * max(map(abs, (*ours.values(), *theirs.values())))
    if len(shared) > 1:
        gaps = {key: ours[key] - theirs[key] for key in shared}
        tested = _tested(mean(gaps.values()), _standard_error(gaps, num_folds), len(gaps) - 1, len(gaps), rounding)
        return replace(tested, num_pairs=len(gaps), deviation=stdev(gaps.values()))
    fewest = min(len(ours), len(theirs))
    if fewest < 2:
        both = [(ours[key], theirs[key]) for key in shared] or [(mean(ours.values()), mean(theirs.values()))]
        return Comparison(both[0][0] - both[0][1], num_pairs=len(shared))
    errors = _standard_error(ours, num_folds), _standard_error(theirs, num_folds)
    error = math.hypot(*errors)
    share = (errors[0] / error) ** 2 if error else 0.5
    freedom = 1 / (share**2 / (len(ours) - 1) + (1 - share) ** 2 / (len(theirs) - 1))
    tested = _tested(mean(ours.values()) - mean(theirs.values()), error, freedom, fewest, rounding)
    return replace(tested, deviation=math.hypot(stdev(ours.values()), stdev(theirs.values())))


def _tested(gap: float, error: float, freedom: float, fewest: int, rounding: float) -> Comparison:
    if error > rounding:
        from scipy.special import stdtr  # only who ranks waits for it

        half = _quantile(freedom) * error
        return Comparison(gap, gap - half, gap + half, 2 * float(stdtr(freedom, -abs(gap / error))))
    if abs(gap) <= rounding:
        return Comparison(0.0, 0.0, 0.0, 1.0)
    return Comparison(gap) if fewest < 3 else Comparison(gap, gap, gap, 0.0)


def half_width(values: Mapping[Replicate, float], num_folds: int | None = None) -> float | None:
    """Return half of the 95 % interval of a mean, by Student's t over replicates; None for fewer than two."""
    if len(values) < 2:
        return None
    return _quantile(len(values) - 1) * _standard_error(values, num_folds)


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _standard_error(values: Mapping[Replicate, float], num_folds: int | None) -> float:
    return stdev(values.values()) * math.sqrt(variance_factor(values, num_folds))


def variance_factor(replicates: Iterable[Replicate], num_folds: int | None) -> float:
    """Return the variance of a mean over replicates, in units of their own variance: 1/n, and more for folds.

    Folds share most of their training rows, so their values vary less than those of independent data would. The
    corrected resampled t-test adds the ratio of tested to trained rows, 1 / (num_folds - 1): Nadeau and Bengio,
    "Inference for the generalization error", Machine Learning 52 (2003). Seeds of one fold need no correction.
    """
    keys = list(replicates)
    are_folds = num_folds is not None and num_folds > 1 and len({fold for _, fold in keys}) > 1
    return 1 / len(keys) + (1 / (num_folds - 1) if are_folds and num_folds else 0)


def p_text(p_value: float) -> str:
    """Write a p value: `0.031`, `< 0.001`."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for how many there are, step-down: Holm, Scandinavian Journal of Statistics 6 (1979)."""
    adjusted, highest = list(p_values), 0.0
    known = sorted((p_value, index) for index, p_value in enumerate(p_values) if p_value is not None)
    for place, (p_value, index) in enumerate(known):
        adjusted[index] = highest = max(highest, min(1.0, (len(known) - place) * p_value))
    return adjusted


def seeds_to_tell(
    difference: float, deviation: float, *, level: float = SIGNIFICANCE, num_folds: int | None = None
) -> int | None:
    """Return how many seeds two settings need to be told apart, in power 0.8 of the cases; None for over MOST_SEEDS.

    It is the least n at which the paired, two-sided t-test at `level` has that power, if `difference` is the true one
    and `deviation` that of the pairs: T' > t(1 - level / 2; n - 1), where T' is noncentral t with n - 1 degrees of
    freedom and noncentrality |difference| / (deviation * sqrt(variance_factor)). With folds each seed brings
    `num_folds` pairs. What a few seeds say of the variance is rough, and so is this number.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences" (1988), chapter 2.
    """
    if deviation <= ROUNDING * abs(difference):  # one gap again and again: significant from three on, see `compare`
        return 3 if difference else None

    def power(seeds: int) -> float:
        from scipy.special import nctdtr, stdtrit

        pairs = [(seed, fold) for seed in range(seeds) for fold in range(num_folds or 1)]
        if len(pairs) < 2:
            return 0.0
        shift = abs(difference) / (deviation * math.sqrt(variance_factor(pairs, num_folds)))
        return 1 - float(nctdtr(len(pairs) - 1, shift, stdtrit(len(pairs) - 1, 1 - level / 2)))

    found = 1 + bisect_left(range(1, MOST_SEEDS + 1), POWER, key=power)
    return found if found <= MOST_SEEDS else None
