"""How rows of several sources become one set: how many of each, which ones, in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sample_counts(sizes: Sequence[int], weights: Sequence[float | None], counts: Sequence[int | None]) -> list[int]:
    """Say how many rows of each source a mixture has.

    With weights it is as large as it can be at these proportions without any row twice. With counts each source gives
    its count, also more than it has; without one, all it has.

    Args:
        sizes: rows that each source has.
        weights: proportions, of all sources or of none; they need not add up to 1.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [size if count is None else count for size, count in zip(sizes, counts, strict=True)]
    shares = [weight / sum(given) for weight in given]
    whole = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [int(whole * share + 1e-6) for share in shares]


def interleave(rows: Sequence[np.ndarray], taken: Sequence[int], seed: int) -> np.ndarray:
    """Choose rows of each source and interleave the sources, by seed.

    Args:
        rows: the numbers of each source's rows.
        taken: how many of them; where more than there are, all are taken as often as needed.
    Returns:
        (source, row) in the order of the mixture, [sum of taken, 2]; each source's rows keep their order.
    """
    chosen = []
    for number, (some, count) in enumerate(zip(rows, taken, strict=True)):
        rng = np.random.default_rng([seed, 0x317, number])
        passes, rest = divmod(count, max(1, len(some)))
        picked = np.sort(rng.permutation(len(some))[:rest])
        chosen.append(np.concatenate([*([some] * passes), some[picked]]).astype(np.int64))
    order = np.random.default_rng([seed, 0x317]).permutation(np.repeat(np.arange(len(rows)), taken))
    mixed = np.empty((len(order), 2), dtype=np.int64)
    mixed[:, 0] = order
    for number, some in enumerate(chosen):
        mixed[order == number, 1] = some
    return mixed
