"""The order and the batches of rows. Pure: the same seed and position always yield the same batches."""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src.config.schema import Batching
from src.data.encoding import IGNORE_INDEX, PARTS
from src.data.sets import EncodedSet, LabelledRow
from src.data.stream import StreamedSet
from src.errors import DataError

GROUP_BATCHES = 50  # batches whose rows are sorted by length together, for Batching.length_grouped
Sequences = list[list[int]]  # rows of a micro-batch by sequence: one row in each, or several where they are packed


@dataclass
class Batch:
    """Sequences padded on the right: input_ids [batch, seq]; labels [batch, seq] are not shifted.

    Padding needs no attention mask in a causal model: no token comes after it. Packed rows are kept apart by
    `position_ids` [batch, seq], which restart at 0 with every row, and with padding too. For an encoder-decoder
    `attention_mask` [batch, seq] masks padding of the input, and `target_ids` and labels are [batch, target].
    `parts`, of the labels' shape, numbers the part of each label (see PARTS); None where no row has a thought.
    `row_weights`, of the same shape, is the weight of each label's row in the loss; None where all weigh 1.
    `part_counts` [parts] are the supervised tokens of each part, `part_weights` [parts] the sums of their rows'
    weights. `bounds` are the rows', for FlashAttention's padding-free form: see row_bounds.
    """

    input_ids: Tensor
    labels: Tensor
    rows: list[int]
    num_tokens: int
    part_counts: np.ndarray
    part_weights: np.ndarray
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    target_ids: Tensor | None = None
    parts: Tensor | None = None
    row_weights: Tensor | None = None
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def num_supervised(self) -> int:
        return int(self.part_counts.sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device, copied without waiting where the memory is pinned."""
        moved, bounds = (
            {name: tensor.to(device, non_blocking=True) for name, tensor in _tensors(values).items()}
            for values in (vars(self), self.bounds)
        )
        return replace(self, **moved, bounds=self.bounds | bounds)

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a ModelWithLoss."""
        return _tensors(vars(self)) | self.bounds


def _tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class BatchSampler:
    """Arranges rows into micro-batches.

    `batch_size` counts sequences, `micro_batches_per_step` those of all processes; packed ones hold up to `max_tokens`.
    """

    batching: Batching
    batch_size: int
    micro_batches_per_step: int
    max_tokens: int

    def micro_batches_of(self, rows: EncodedSet, seed: Sequence[int], num_taken: int = 0) -> list[Sequences]:
        """Do the same with a set, whose lengths are computed only where they count."""
        lengths = np.zeros(len(rows)) if self.batching is Batching.padded else rows.lengths
        return self.micro_batches(lengths, seed, num_taken)

    def micro_batches(self, lengths: np.ndarray, seed: Sequence[int], num_taken: int = 0) -> list[Sequences]:
        """Put every row into exactly one micro-batch, in an order by seed.

        Args:
            lengths: of each row, in tokens, [rows].
            num_taken: how many sequences to leave out, the first ones in this order: they were used before.
        """
        sequences = self._sequences(lengths, np.random.default_rng(list(seed)))[num_taken:]
        return [sequences[start : start + self.batch_size] for start in range(0, len(sequences), self.batch_size)]

    def _sequences(self, lengths: np.ndarray, rng: np.random.Generator) -> Sequences:
        """Put every row into exactly one sequence; only the order of length-grouped ones depends on the batch size."""
        order = rng.permutation(len(lengths))
        if self.batching is Batching.packed:
            packed = [[int(order[i]) for i in rows] for rows in pack(lengths[order], self.max_tokens)]
            return [packed[i] for i in rng.permutation(len(packed))]
        if self.batching is Batching.length_grouped:
            order = _grouped(lengths, order, self.batch_size, rng)
        return [[row] for row in order.tolist()]


@dataclass(frozen=True)
class Position:
    """The position of a run in its data, at which its next window begins.

    `num_sequences` rows, or packs of rows, were used of this epoch; of this block, where the set is streamed. They are
    counted, not micro-batches, so that a run can resume with another batch size: no padded or packed row of the epoch
    is repeated or left out. `block` is the cursor of a streamed set's block, in plain JSON values (see stream.Cursor);
    None where the set is not streamed, or nothing was read yet.
    """

    epoch: int = 0
    num_sequences: int = 0
    block: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step, each with the set of its rows, and the position of the next window."""

    epoch: int
    micro_batches: list[tuple[EncodedSet, Sequences]]
    after: Position
    ends_epoch: bool = False


def windows(
    rows: EncodedSet | StreamedSet, sampler: BatchSampler, seed: int, start: Position = Position()
) -> Iterator[Window]:
    """Yield, without end, the micro-batches of one optimizer step after another; an epoch's last window may be short.

    They begin at `start`, or in the next epoch, where a set that was changed has nothing left of this one. Raises
    DataError where there are no rows; of a streamed set, as its `read`.
    """
    if isinstance(rows, EncodedSet) and not len(rows):
        raise DataError(f"{rows.name} has no rows")
    while True:
        micro_batches: list[tuple[EncodedSet, Sequences]] = []
        for block, block_seed, position in _blocks(rows, seed, start):
            for sequences in sampler.micro_batches_of(block, block_seed, position.num_sequences):
                if len(micro_batches) == sampler.micro_batches_per_step:
                    yield Window(start.epoch, micro_batches, position)
                    micro_batches = []
                micro_batches.append((block, sequences))
                position = replace(position, num_sequences=position.num_sequences + len(sequences))
        after = Position(start.epoch + 1, block=rows.start() if isinstance(rows, StreamedSet) else None)
        if micro_batches:
            yield Window(start.epoch, micro_batches, after, ends_epoch=True)
        start = after


def _blocks(
    rows: EncodedSet | StreamedSet, seed: int, start: Position
) -> Iterator[tuple[EncodedSet, list[int], Position]]:
    """Yield the blocks of the rest of an epoch, each with the seed of its order and where to begin in it."""
    if isinstance(rows, EncodedSet):
        yield rows.in_epoch(start.epoch), [seed, start.epoch], start
        return
    num_taken = start.num_sequences
    for block in rows.read(start.block):
        yield (
            block.rows.in_epoch(start.epoch),
            [seed, start.epoch, block.number],
            Position(start.epoch, num_taken, block.begin),
        )
        num_taken = 0


def steps_per_epoch(rows: EncodedSet, sampler: BatchSampler, seed: int, num_taken: int = 0, epoch: int = 0) -> int:
    """Return the number of optimizer steps of an epoch, or of the rest of it; the last one may be short."""
    if sampler.batching is Batching.packed:
        num_micro_batches = len(sampler.micro_batches(rows.in_epoch(epoch).lengths, [seed, epoch], num_taken))
    else:
        num_micro_batches = math.ceil(max(0, len(rows) - num_taken) / sampler.batch_size)
    return math.ceil(num_micro_batches / sampler.micro_batches_per_step)


def pack(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Pack rows into sequences by best-fit decreasing: the longest first, each where it fits most tightly.

    The number of sequences depends on the lengths only, not on their order.

    Source: Johnson, Demers, Ullman, Garey, Graham 1974, "Worst-case performance bounds for simple one-dimensional
    packing algorithms" (at most 11/9 of the fewest possible, plus a constant).
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> sequences
    rooms: list[int] = []  # sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        i = bisect_left(rooms, length)
        if i == len(rooms):
            room, number = max_tokens, len(sequences)
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


class LabelledRows(Protocol):
    """Rows by their index, as a set has them."""

    @property
    def is_encoder_decoder(self) -> bool: ...

    def __getitem__(self, index: int) -> LabelledRow: ...


def collate(rows: LabelledRows, sequences: Sequences, pad_token_id: int, *, padding_free: bool = False) -> Batch:
    """Collate rows, padded on the right to the longest sequence; several rows in a sequence are packed.

    With `padding_free` all are in a single sequence without padding, for FlashAttention.
    """
    indices = [index for sequence in sequences for index in sequence]
    packed = [[rows[index] for index in sequence] for sequence in ([indices] if padding_free else sequences)]
    each = [row for sequence in packed for row in sequence]

    def padded(column: Callable[[LabelledRow], Any], filler: int, dtype: torch.dtype = torch.long) -> Tensor:
        joined = [torch.from_numpy(np.concatenate([column(row) for row in sequence])).to(dtype) for sequence in packed]
        return pad_sequence(joined, batch_first=True, padding_value=filler)

    labels = padded(lambda row: row.labels, IGNORE_INDEX)
    is_supervised, parts = labels != IGNORE_INDEX, padded(lambda row: row.parts, 0, torch.uint8)
    supervised_parts = parts[is_supervised].int()
    counts = torch.bincount(supervised_parts, minlength=len(PARTS)).numpy()
    batch = Batch(
        padded(lambda row: row.input_ids, pad_token_id),
        labels,
        indices,
        num_tokens=sum(row.num_tokens for row in each),
        part_counts=counts,
        part_weights=counts,
        parts=parts if counts[1:].any() else None,
    )
    if any(row.weight != 1 for row in each):
        weights = padded(lambda row: np.full(len(row.labels), row.weight), 0, torch.double)
        batch.part_weights = torch.bincount(supervised_parts, weights[is_supervised], len(PARTS)).numpy()
        batch.row_weights = weights.float()
    if rows.is_encoder_decoder:
        batch.attention_mask = padded(lambda row: np.ones(len(row.input_ids)), 0)
        batch.target_ids = padded(lambda row: row.target_ids, pad_token_id)
    elif padding_free or len(each) > len(packed):
        batch.position_ids = torch.from_numpy(_positions(packed, batch.input_ids.shape[1]))
    if padding_free:
        batch.bounds = row_bounds([len(row.input_ids) for row in each], batch.input_ids.device)
    return batch


def row_bounds(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the bounds of rows in one sequence as transformers' arguments; cumulated lengths are [rows + 1]."""
    cumulated = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {"cu_seq_lens_q": cumulated, "cu_seq_lens_k": cumulated, "max_length_q": longest, "max_length_k": longest}


def _positions(sequences: Sequence[Sequence[LabelledRow]], longest: int) -> np.ndarray:
    """Return positions from 0 in every row, and in the padding after the last, [sequences, seq]."""
    each = [[len(row.input_ids) for row in sequence] for sequence in sequences]
    counted = [[np.arange(length) for length in [*lengths, longest - sum(lengths)]] for lengths in each]
    return np.stack([np.concatenate(positions) for positions in counted])
