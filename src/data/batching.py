"""In which order and in which batches rows are fed. Pure: the same seed and epoch always give the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from src.data.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from src.data.dataset import EncodedSet


@dataclass
class Batch:
    """Rows side by side, padded on the right: input_ids and labels [batch, seq]; labels are not shifted.

    Padding needs no attention mask in a causal model: nothing real stands behind it that could see it.
    """

    input_ids: Tensor
    labels: Tensor
    rows: list[int]
    num_tokens: int
    num_supervised: int

    def to(self, device: torch.device) -> Batch:
        moved = (self.input_ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))
        return Batch(*moved, self.rows, self.num_tokens, self.num_supervised)


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Give the order of an epoch's rows, [num_rows]; every row once."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def steps_per_epoch(num_rows: int, batch_size: int, accumulation: int) -> int:
    """Count an epoch's optimizer steps; its last one may be short."""
    return math.ceil(math.ceil(num_rows / batch_size) / accumulation)


def windows(num_rows: int, seed: int, batch_size: int, accumulation: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Give, without end, the epoch and the micro-batches' row numbers of one optimizer step after the other."""
    epoch = 0
    while True:
        order = epoch_order(num_rows, seed, epoch)
        micro_batches = [order[start : start + batch_size] for start in range(0, num_rows, batch_size)]
        for start in range(0, len(micro_batches), accumulation):
            yield epoch, micro_batches[start : start + accumulation]
        epoch += 1


def collate(rows: EncodedSet, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    encoded = [rows[int(index)] for index in indices]
    longest = max(len(ids) for ids, _ in encoded)
    input_ids = np.full((len(encoded), longest), pad_token_id, dtype=np.int64)
    labels = np.full((len(encoded), longest), IGNORE_INDEX, dtype=np.int64)
    for i, (row_ids, row_labels) in enumerate(encoded):
        input_ids[i, : len(row_ids)] = row_ids
        labels[i, : len(row_labels)] = row_labels
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        [int(index) for index in indices],
        num_tokens=sum(len(ids) for ids, _ in encoded),
        num_supervised=int((labels != IGNORE_INDEX).sum()),
    )
