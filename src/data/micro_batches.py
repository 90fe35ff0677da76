"""Which rows the micro-batches of an epoch have, in three arrays: an epoch may have millions of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Self, overload

import numpy as np

Sequences = list[list[int]]  # rows of a micro-batch by sequence: one row in each, or several where they are packed


@dataclass(frozen=True, eq=False)
class MicroBatches(Sequence[Sequences]):
    """The micro-batches of an epoch, or of the rest of it, in their order.

    `rows` [rows] are in their order too; `sequences` [sequences + 1] are where each sequence begins in them, and where
    the last one ends; `batches` [micro-batches + 1] are where each micro-batch begins in the sequences.
    """

    rows: np.ndarray
    sequences: np.ndarray
    batches: np.ndarray

    @classmethod
    def cut(cls, sequences: Sequence[list[int]] | np.ndarray, size: int) -> Self:
        """Make micro-batches of `size` sequences; of an array [rows] each row is a sequence."""
        if isinstance(sequences, np.ndarray):
            rows, starts = sequences, np.arange(len(sequences) + 1)
        else:
            rows, starts = _joined(sequences), _starts(sequences)
        return cls(rows, starts, np.append(np.arange(0, len(sequences), size), len(sequences)))

    @classmethod
    def of(cls, batches: Sequence[Sequences]) -> Self:
        """Make them of lists."""
        sequences = list(chain.from_iterable(batches))
        return cls(_joined(sequences), _starts(sequences), _starts(batches))

    def __len__(self) -> int:
        return len(self.batches) - 1

    @overload
    def __getitem__(self, index: int) -> Sequences: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequences]: ...
    def __getitem__(self, index: int | slice) -> Sequences | list[Sequences]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = self.batches[: len(self)][index], self.batches[1:][index]
        bounds = self.sequences[start : stop + 1]
        rows = self.rows[bounds[0] : bounds[-1]].tolist()
        ends = (bounds - bounds[0]).tolist()
        return [rows[begin:end] for begin, end in pairwise(ends)]

    def num_positions(self, lengths: np.ndarray) -> int:
        """Return how many positions are computed, padding included, of rows with these lengths, [rows of the set]."""
        if not len(self):
            return 0
        of_sequences = np.add.reduceat(lengths[self.rows], self.sequences[:-1])
        return int((np.maximum.reduceat(of_sequences, self.batches[:-1]) * np.diff(self.batches)).sum())


def _joined(sequences: Sequence[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(sequences), np.int64)


def _starts(parts: Sequence[Sequence[object]]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)])
