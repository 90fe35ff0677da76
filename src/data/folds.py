"""Which fold of a cross-validation each record of the train sources is in, by seed; records of a group stay together.

A record's fold depends on the seed, the number of folds and the groups, never on which fold is the validation set, so
the validation sets of all folds are the whole of train, each record once.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from numbers import Number
from typing import Any

import numpy as np

from src.config.schema import DataConfig
from src.data.cache import MOST_TOLD, Tell, are_too_many, bad_rows
from src.data.formats import BadRow, type_name
from src.data.readers.record import Unreadable
from src.data.sources import Source
from src.errors import DataError

TELL_RECORDS = 10_000


def assign_folds(sizes: Sequence[int], num_folds: int, seed: int) -> list[np.ndarray]:
    """Give the fold of each record of each source, [records]; sizes of a source's folds differ by at most one.

    Each source is dealt by itself, and those of one size alike: a file that is there twice, under two templates, has
    its rows in the same folds, so none is trained on in one form and validated in the other.

    Args:
        sizes: how many records each source has.
    Raises:
        DataError: where a fold would be empty.
    """
    if max(sizes) < num_folds:
        where = " in its largest source" if len(sizes) > 1 else ""
        raise DataError(
            f"data.num_folds = {num_folds} needs as many rows of train, and there are {max(sizes)}{where}: give fewer "
            "folds"
        )
    folds = []
    for size in sizes:
        of_source = np.empty(size, dtype=np.int64)
        of_source[np.random.default_rng([seed, 0xF01D]).permutation(size)] = np.arange(size) % num_folds
        folds.append(of_source)
    return folds


def assign_group_folds(groups: Sequence[Sequence[str]], num_folds: int, seed: int) -> list[np.ndarray]:
    """Give the fold of each record of each source, [records]; a group is in one fold, whatever source it is in.

    Groups are shuffled by seed and given, largest first, to the fold with the fewest records so far, the first of them
    where several have. That is scikit-learn's GroupKFold, which does not shuffle groups of one size.

    Args:
        groups: the group of each record of each source.
    Raises:
        DataError: where a fold would be empty.
    """
    sizes = Counter(chain.from_iterable(groups))
    if len(sizes) < num_folds:
        raise DataError(
            f"data.num_folds = {num_folds} needs as many groups, and data.group_column finds {len(sizes)} in train: "
            "give fewer folds"
        )
    names = sorted(sizes)
    shuffled = [names[i] for i in np.random.default_rng([seed, 0xF01D]).permutation(len(names))]
    filled, fold_of = [(0, fold) for fold in range(num_folds)], dict[str, int]()
    for name in sorted(shuffled, key=lambda name: -sizes[name]):
        size, fold = filled[0]
        heapq.heapreplace(filled, (size + sizes[name], fold))
        fold_of[name] = fold
    return [np.array([fold_of[group] for group in of_source], dtype=np.int64) for of_source in groups]


def read_groups(sources: Mapping[str, Source], column: str, tell: Tell) -> list[list[str]]:
    """Read the group of each record of each source: a field as it is in the file, of which encoded rows know nothing.

    A record that can't be read has none here: it is told with all others of its kind when rows are prepared.

    Raises:
        DataError: listing the records whose group isn't known.
    """
    groups, bad, num_bad = list[list[str]](), list[tuple[str, str]](), 0
    unread, num_unread, num_records = list[tuple[str, str]](), 0, 0
    for name, source in sources.items():
        of_source: list[str] = []
        for number, record in enumerate(source.records(), start=1):
            num_records += 1
            try:
                if isinstance(record, Unreadable):
                    unread += [(record.place, record.reason)][: MOST_TOLD - len(unread)]
                    num_unread += 1
                    of_source.append("")
                else:
                    of_source.append(_group(record.fields, column))
            except BadRow as problem:
                bad += [(record.place, str(problem))][: MOST_TOLD - len(bad)]
                num_bad += 1
            if are_too_many(num_bad + num_unread, num_records):
                raise bad_rows(bad + unread, num_bad + num_unread, record.place)
            if number % TELL_RECORDS == 0:
                tell(f"{name}: groups of {number:,} rows read")
        groups.append(of_source)
    if num_bad:
        raise bad_rows(bad, num_bad)
    return groups


def _group(fields: dict[str, Any], column: str) -> str:
    """Give a record's group as text, since one file may write 1 and another "1".

    Raises:
        BadRow: where there is none.
    """
    if column not in fields:
        there = ", ".join(map(repr, fields)) or "none"
        raise BadRow(f"no field {column!r}, which data.group_column names; there are {there}")
    value = fields[column]
    if value == "":  # what null is in CSV
        raise BadRow(f"{column!r} is empty: data.group_column needs a group in each row")
    if not isinstance(value, str | Number):
        raise BadRow(f"{column!r} is {type_name(value)}: a group is a text, a number, true or false")
    return sys.intern(str(value))


def told(data: DataConfig) -> str:
    """Say which fold the validation set is, and what is not read because of it; '' without folds."""
    if data.num_folds is None:
        return ""
    by = f" by {data.group_column}" if data.group_column is not None else ""
    without = replace(data, num_folds=None)
    if without.validation_sets():
        unread = ", the validation files are not read"
    elif without.has_hub_validation:
        unread = ", the hub's validation split is not read"
    else:
        unread = ", data.validation_fraction is not read" if without.held_out_fraction else ""
    return f"fold {data.fold} of {data.num_folds}{by}{unread}"
