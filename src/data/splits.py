"""Which records and rows make a set, by seed: hold-out, folds of a cross-validation, and mixtures of sources. Pure."""

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from src.errors import DataError


def hold_out(num_records: int, fraction: float, seed: int) -> np.ndarray:
    """Return which records are held out, [records]: a share of them by seed, at least one where there are two."""
    count = min(max(1, round(num_records * fraction)), num_records - 1) if num_records > 1 and fraction else 0
    is_held_out = np.zeros(num_records, dtype=bool)
    is_held_out[np.random.default_rng([seed, 0x5EED]).permutation(num_records)[:count]] = True
    return is_held_out


def assign_folds(sizes: Sequence[int], num_folds: int, seed: int) -> list[np.ndarray]:
    """Return the fold of each record of each source, [records]; sizes of a source's folds differ by at most one.

    A record's fold never depends on which fold is the validation set, so the validation sets of all folds are the whole
    of train, each record once. Sources of one size are assigned alike: a file that is there twice, with two templates,
    has its rows in the same folds, so none is trained on in one form and validated in the other. DataError where a fold
    would be empty. `sizes` are the numbers of records.
    """
    if max(sizes) < num_folds:
        where = " in its largest source" if len(sizes) > 1 else ""
        raise DataError(
            f"data.num_folds = {num_folds} needs as many rows of train, and there are {max(sizes)}{where}: set fewer "
            "folds"
        )
    orders = [np.random.default_rng([seed, 0xF01D]).permutation(size) for size in sizes]
    return [np.argsort(order) % num_folds for order in orders]  # argsort inverts an order


def assign_group_folds(groups: Sequence[Sequence[str]], num_folds: int, seed: int) -> list[np.ndarray]:
    """Return the fold of each record of each source, [records]; a group is in one fold, whatever source it is in.

    Groups are shuffled by seed and assigned, largest first, to the fold with the fewest records so far, the first of
    them where several have. That is scikit-learn's GroupKFold, which does not shuffle groups of one size. DataError
    where a fold would be empty.
    """
    sizes = Counter(chain.from_iterable(groups))
    if len(sizes) < num_folds:
        raise DataError(
            f"data.num_folds = {num_folds} needs as many groups, and data.group_column finds {len(sizes)} in train: "
            "set fewer folds"
        )
    names = sorted(sizes)
    shuffled = [names[i] for i in np.random.default_rng([seed, 0xF01D]).permutation(len(names))]
    filled, fold_of = [(0, fold) for fold in range(num_folds)], dict[str, int]()
    for name in sorted(shuffled, key=lambda name: -sizes[name]):
        size, fold = filled[0]
        heapq.heapreplace(filled, (size + sizes[name], fold))
        fold_of[name] = fold
    return [np.array([fold_of[group] for group in of_source], dtype=np.int64) for of_source in groups]


def sample_counts(sizes: Sequence[int], weights: Sequence[float | None], counts: Sequence[int | None]) -> list[int]:
    """Return how many rows of each source a mixture has.

    With weights it is as large as it can be at these proportions without repeating a row. With counts each source has
    its count, also more than its rows; without one, all its rows. `sizes` are the rows of each source, `weights`
    proportions, of all sources or of none; they need not add up to 1.
    """
    known = [weight for weight in weights if weight is not None]
    if not known:
        return [size if count is None else count for size, count in zip(sizes, counts, strict=True)]
    shares = [weight / sum(known) for weight in known]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [int(total * share + 1e-6) for share in shares]


def interleave(rows: Sequence[np.ndarray], counts: Sequence[int], seed: int) -> np.ndarray:
    """Sample rows of each source and interleave the sources, by seed.

    Args:
        rows: the indices of each source's rows.
        counts: how many of them; where more than there are, all are repeated as often as needed.
    Returns:
        (source, row) in the order of the mixture, [sum of counts, 2]; each source's rows keep their order.
    """
    order = np.random.default_rng([seed, 0x317]).permutation(np.repeat(np.arange(len(rows)), counts))
    mixed = np.stack([order, np.empty_like(order)], axis=1).astype(np.int64)
    for source, (indices, count) in enumerate(zip(rows, counts, strict=True)):
        rng = np.random.default_rng([seed, 0x317, source])
        passes, remainder = divmod(count, max(1, len(indices)))
        sampled = np.sort(rng.permutation(len(indices))[:remainder])
        mixed[order == source, 1] = np.concatenate([*([indices] * passes), indices[sampled]])
    return mixed


def concatenate(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return (source, row) of all rows, source after source, [rows, 2]."""
    pairs = [np.stack([np.full(len(indices), source), indices], axis=1) for source, indices in enumerate(rows)]
    return np.concatenate(pairs).astype(np.int64) if pairs else np.zeros((0, 2), dtype=np.int64)
