"""In which order and in which batches rows are fed. Pure: the same seed and epoch always give the same batches."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.config.schema import Batching
from src.data.encoding import IGNORE_INDEX, THOUGHT
from src.data.sets import EncodedSet, Row
from src.data.stream import StreamedSet

GROUP_BATCHES = 50
"""Batches whose rows are sorted by length together when they are grouped."""

Sequences = list[list[int]]
"""Rows of a micro-batch by the sequence that they stand in: one row in each, or several where they are packed."""


@dataclass
class Batch:
    """Sequences side by side, padded on the right: input_ids [batch, seq]; labels [batch, seq] are not shifted.

    Padding needs no attention mask in a causal model: nothing real stands behind it that could see it. Packed rows are
    told apart by `position_ids` [batch, seq], which begin again at 0 with every row, and with padding too. For an
    encoder-decoder `attention_mask` [batch, seq] says what is real of the input, and `target_ids` and labels are
    [batch, target]. `thoughts`, of the labels' shape, is true where a label is of a thought; None where no row has
    one. `bounds` tell FlashAttention where the rows of its padding-free form begin: see row_bounds.
    """

    input_ids: Tensor
    labels: Tensor
    rows: list[int]
    num_tokens: int
    num_supervised: int
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    target_ids: Tensor | None = None
    thoughts: Tensor | None = None
    num_thought: int = 0
    bounds: dict[str, Any] = field(default_factory=dict)

    def mark_thoughts(self, sequences: Sequence[Sequence[tuple[np.ndarray, int]]]) -> None:
        """Mark the labels that are of a thought.

        Args:
            sequences: of the rows in each sequence their spans, [n, 3], and how many labels they have.
        """
        marks = torch.zeros_like(self.labels, dtype=torch.bool)
        for i, rows in enumerate(sequences):
            begin = 0
            for spans, length in rows:
                for kind, start, stop in spans.tolist():
                    if kind == THOUGHT:
                        marks[i, begin + start : begin + stop] = True
                begin += length
        self.num_thought = int(marks.sum())
        self.thoughts = marks if self.num_thought else None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        bounds = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.bounds.items()}
        return replace(self, **moved, bounds=bounds)

    def inputs(self) -> dict[str, Any]:
        """Give what a scored model is called with, by its names."""
        given: dict[str, Tensor | None] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
            "target_ids": self.target_ids,
            "thoughts": self.thoughts,
        }
        return {name: value for name, value in given.items() if value is not None} | self.bounds


@dataclass(frozen=True)
class Plan:
    """How rows become micro-batches.

    `batch_size` counts sequences; `capacity` is how many tokens fit in one when rows are packed.
    """

    batching: Batching
    batch_size: int
    accumulation: int
    capacity: int

    def micro_batches(self, lengths: np.ndarray, seed: Sequence[int]) -> list[Sequences]:
        """Put every row into exactly one micro-batch.

        Args:
            lengths: of each row, in tokens, [rows].
            seed: gives the order.
        """
        rng = np.random.default_rng(list(seed))
        order = rng.permutation(len(lengths))
        if self.batching is Batching.packed:
            sequences = pack(lengths[order], self.capacity)
            packed = [[int(order[i]) for i in rows] for rows in sequences]
            return _cut([packed[i] for i in rng.permutation(len(packed))], self.batch_size)
        if self.batching is Batching.length_grouped:
            order = _grouped(lengths, order, self.batch_size, rng)
        return _cut([[row] for row in order.tolist()], self.batch_size)


@dataclass
class Window:
    """The micro-batches of one optimizer step, each with the set that its row numbers are of."""

    epoch: int
    micro_batches: list[tuple[EncodedSet, Sequences]] = field(default_factory=list)
    ends_epoch: bool = False


def windows(rows: EncodedSet | StreamedSet, plan: Plan, seed: int) -> Iterator[Window]:
    """Give, without end, one optimizer step's micro-batches after the other; an epoch's last window may be short."""
    epoch = 0
    while True:
        window = Window(epoch)
        for micro_batch in _epoch(rows, plan, seed, epoch):
            if len(window.micro_batches) == plan.accumulation:
                yield window
                window = Window(epoch)
            window.micro_batches.append(micro_batch)
        window.ends_epoch = True
        yield window
        epoch += 1


def _epoch(rows: EncodedSet | StreamedSet, plan: Plan, seed: int, epoch: int) -> Iterator[tuple[EncodedSet, Sequences]]:
    if isinstance(rows, EncodedSet):
        yield from ((rows, sequences) for sequences in plan.micro_batches(rows.lengths, [seed, epoch]))
        return
    for number, block in enumerate(rows.blocks()):
        yield from ((block, sequences) for sequences in plan.micro_batches(block.lengths, [seed, epoch, number]))


def steps_per_epoch(rows: EncodedSet, plan: Plan, seed: int) -> int:
    """Count an epoch's optimizer steps; its last one may be short."""
    if plan.batching is Batching.packed:
        num_micro_batches = len(plan.micro_batches(rows.lengths, [seed, 0]))
    else:
        num_micro_batches = math.ceil(len(rows) / plan.batch_size)
    return math.ceil(num_micro_batches / plan.accumulation)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put rows into as few sequences as best-fit decreasing does: the longest first, each where it fits most tightly.

    How many sequences there are depends on the lengths only, not on their order.

    Source: Johnson, Demers, Ullman, Garey, Graham 1974, "Worst-case performance bounds for simple one-dimensional
    packing algorithms" (at most 11/9 of the fewest possible, plus a constant).
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> sequences
    rooms: list[int] = []  # those that some sequence has, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        i = bisect_left(rooms, length)
        if i == len(rooms):
            room, number = capacity, len(sequences)
            sequences.append([])
        else:
            room = rooms[i]
            number = with_room[room].pop()
            if not with_room[room]:
                del rooms[i]
        sequences[number].append(row)
        if left := room - length:
            if not with_room.setdefault(left, []):
                insort(rooms, left)
            with_room[left].append(number)
    return sequences


def _grouped(lengths: np.ndarray, order: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Sort the rows by length within groups of some batches, then shuffle the batches; the short one stays last."""
    size = batch_size * GROUP_BATCHES
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    grouped = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups] or [order])
    num_full = len(grouped) // batch_size
    full = grouped[: num_full * batch_size].reshape(num_full, batch_size)
    return np.concatenate([full[rng.permutation(num_full)].ravel(), grouped[num_full * batch_size :]])


def _cut(sequences: Sequences, batch_size: int) -> list[Sequences]:
    return [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]


def collate(rows: EncodedSet, sequences: Sequences, pad_token_id: int, *, flat: bool = False) -> Batch:
    """Put rows side by side, padded on the right to the longest sequence.

    Args:
        sequences: the rows of each sequence; several in one are packed.
        flat: put all of them into a single sequence without padding, for FlashAttention.
    """
    taken = [[rows[row] for row in sequence] for sequence in sequences]
    numbers = [row for sequence in sequences for row in sequence]
    if rows.is_encoder_decoder:
        return _pairs([row for sequence in taken for row in sequence], numbers, pad_token_id)
    is_packed = flat or any(len(sequence) > 1 for sequence in taken)
    if flat:
        taken = [[row for sequence in taken for row in sequence]]
    input_ids = _padded([[row.input_ids for row in sequence] for sequence in taken], pad_token_id)
    labels = _padded([[row.labels for row in sequence] for sequence in taken], IGNORE_INDEX)
    each = [row for sequence in taken for row in sequence]
    batch = Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        numbers,
        num_tokens=sum(len(row.input_ids) for row in each),
        num_supervised=int((labels != IGNORE_INDEX).sum()),
    )
    if is_packed:
        batch.position_ids = torch.from_numpy(_positions(taken, input_ids.shape[1]))
    batch.mark_thoughts([[(row.spans, len(row.labels)) for row in sequence] for sequence in taken])
    if flat:
        batch.bounds = row_bounds([len(row.input_ids) for row in each], batch.input_ids.device)
    return batch


def row_bounds(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Give the bounds of rows in one sequence by transformers' names: cumulated lengths [rows + 1], and the longest."""
    cumulated = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": cumulated,
        "cu_seq_lens_k": cumulated,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _pairs(rows: Sequence[Row], numbers: list[int], pad_token_id: int) -> Batch:
    """Pad the inputs and the targets of an encoder-decoder, each to its longest."""
    targets = [row.target_ids for row in rows if row.target_ids is not None]
    input_ids = _padded([[row.input_ids] for row in rows], pad_token_id)
    labels = _padded([[row.labels] for row in rows], IGNORE_INDEX)
    mask = np.arange(input_ids.shape[1]) < np.array([[len(row.input_ids)] for row in rows])
    batch = Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        numbers,
        num_tokens=sum(len(row.input_ids) + len(row.labels) for row in rows),
        num_supervised=int((labels != IGNORE_INDEX).sum()),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        target_ids=torch.from_numpy(_padded([[target] for target in targets], pad_token_id)),
    )
    batch.mark_thoughts([[(row.spans, len(row.labels))] for row in rows])
    return batch


def _padded(sequences: Sequence[Sequence[np.ndarray]], filler: int) -> np.ndarray:
    """Join the arrays of each sequence and fill up to the longest, [sequences, seq]."""
    joined = [np.concatenate(arrays) for arrays in sequences]
    padded = np.full((len(joined), max(map(len, joined))), filler, dtype=np.int64)
    for i, one in enumerate(joined):
        padded[i, : len(one)] = one
    return padded


def _positions(sequences: Sequence[Sequence[Row]], longest: int) -> np.ndarray:
    """Count positions from 0 in every row, and in the padding behind the last, [sequences, seq]."""
    positions = np.empty((len(sequences), longest), dtype=np.int64)
    for i, sequence in enumerate(sequences):
        lengths = [len(row.input_ids) for row in sequence]
        counted = [np.arange(length) for length in [*lengths, longest - sum(lengths)]]
        positions[i] = np.concatenate(counted)
    return positions
