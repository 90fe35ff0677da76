"""Student's t over replicates: intervals of means, comparisons of two settings, correction for many of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

Replicate = tuple[int, int | None]  # (seed, fold)
CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
ROUNDING = 1e-12  # share of the largest value: a smaller difference is rounding of floats, not of trials


@dataclass(frozen=True)
class Comparison:
    """A difference of two means, its interval and p value; None where they can't be computed."""

    difference: float
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    num_pairs: int = 0


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
        error = _standard_error(gaps, num_folds)
        return replace(_tested(mean(gaps.values()), error, len(gaps) - 1, len(gaps), rounding), num_pairs=len(gaps))
    fewest = min(len(ours), len(theirs))
    if fewest < 2:
        both = [(ours[key], theirs[key]) for key in shared] or [(mean(ours.values()), mean(theirs.values()))]
        return Comparison(both[0][0] - both[0][1], num_pairs=len(shared))
    errors = _standard_error(ours, num_folds), _standard_error(theirs, num_folds)
    error = math.hypot(*errors)
    share = (errors[0] / error) ** 2 if error else 0.5
    freedom = 1 / (share**2 / (len(ours) - 1) + (1 - share) ** 2 / (len(theirs) - 1))
    return _tested(mean(ours.values()) - mean(theirs.values()), error, freedom, fewest, rounding)


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for how many there are, step-down: Holm, Scandinavian Journal of Statistics 6 (1979)."""
    adjusted, highest = list(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
