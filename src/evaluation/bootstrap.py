"""How sure a difference of two ratios is, by drawing rows again and again. Pure.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 13 (percentile interval) and 15; Koehn
2004, "Statistical Significance Tests for Machine Translation Evaluation" (the same rows are drawn for both sides).
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
MOST_VALUES = 2**20
"""Values held at once while rows are drawn."""


@dataclass(frozen=True)
class Difference:
    """A difference of two bits per byte over the same rows, with its 95 % interval and two-sided p value."""

    difference: float
    low: float
    high: float
    p_value: float
    num_rows: int


def resampled_sums(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Draw as many rows as there are, with replacement, and sum each column: [rows, columns] to [resamples, columns].

    All columns of a draw are summed over the same rows.
    """
    num_rows, rng = len(values), np.random.default_rng(seed)
    at_once = max(1, MOST_VALUES // max(1, num_rows))
    sums = [
        values[rng.integers(num_rows, size=(min(at_once, resamples - done), num_rows))].sum(axis=1)
        for done in range(0, resamples, at_once)
    ]
    return np.concatenate(sums)


def compare_bits(
    ours: np.ndarray, our_bytes: np.ndarray, theirs: np.ndarray, their_bytes: np.ndarray, seed: int
) -> Difference | None:
    """Compare bits per byte, the ratio of the sums over rows: ours minus theirs; None where no row has a byte.

    The interval is the percentile one. p is twice the smaller share of draws on one side of 0, with 1 added to both
    counts, so that it is never 0 (Davison and Hinkley 1997, "Bootstrap Methods and their Application", 4.2.3). It is
    not below 2 / 2^rows, the chance that all rows fall on one side where the sides are alike: few rows drawn again and
    again are still few.

    Args:
        ours: nats of each row's answer, [rows].
        our_bytes: bytes of each row's answer, [rows].
        theirs: nats of the same rows' answers on the other side, [rows].
        their_bytes: bytes of these, [rows].
        seed: decides which rows are drawn.
    """
    table = np.stack([ours / math.log(2), our_bytes, theirs / math.log(2), their_bytes], axis=1).astype(np.float64)
    if not (table[:, 1].sum() and table[:, 3].sum()):
        return None
    sums = resampled_sums(table, seed)
    drawn = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]  # a draw of rows without a byte has no ratio
    differences = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1 - tail]).tolist()
    fewest = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    bits, num_bytes, their_bits, num_their_bytes = table.sum(axis=0).tolist()
    difference = bits / num_bytes - their_bits / num_their_bytes
    p_value = max(2 * (fewest + 1) / (len(differences) + 1), 2.0 ** (1 - len(table)))
    return Difference(difference, low, high, min(1.0, p_value), len(table))
