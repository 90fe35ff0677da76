"""The order and the batches of rows. Pure: the same seed and position always yield the same batches."""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from src.config.schema import Batching
from src.data.encoding import IGNORE_INDEX, PARTS
from src.data.micro_batches import MicroBatches, Sequences
from src.data.sets import EncodedSet, LabelledRow
from src.data.stream import StreamedSet
from src.errors import DataError

GROUP_STEPS = 50  # steps whose rows are sorted by length together, for Batching.length_grouped
RowBounds = Callable[[Sequence[int]], dict[str, Any]]
"""Makes of the lengths of rows in one sequence the arguments by which the model keeps them apart."""


@dataclass
class Batch:
    """Sequences padded on the right: input_ids [batch, seq]; labels [batch, seq] are not shifted.

    Padding needs no attention mask in a causal model: no token comes after it. Packed rows are kept apart by
    `position_ids` [batch, seq], which restart at 0 with every row, and with padding too. For an encoder-decoder
    `attention_mask` [batch, seq] masks padding of the input, and `target_ids` and labels are [batch, target].
    `parts`, of the labels' shape, numbers the part of each label (see PARTS); None where no row has a thought.
    `row_weights`, of the same shape, is the weight of each label's row in the loss; None where all weigh 1.
    `label_positions` [supervised] are where labels are supervised, see positions_of_labels.
    `part_counts` [parts] are the supervised tokens of each part, `part_weights` [parts] the sums of their rows'
    weights. `bounds` tell the model which rows lie in a sequence that has no padding: see RowBounds.
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
    label_positions: Tensor | None = None
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def num_supervised(self) -> int:
        return int(self.part_counts.sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device, copied without waiting where the memory is pinned."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Return the batch in memory that a GPU can copy from while the processor goes on."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields, bounds = (
            {name: change(tensor) for name, tensor in _tensors(values).items()} for values in (vars(self), self.bounds)
        )
        changed: dict[str, Any] = {**fields, "bounds": self.bounds | bounds}
        return replace(self, **changed)

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a ModelWithLoss."""
        return _tensors(vars(self)) | self.bounds


def _tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class BatchSampler:
    """Arranges rows into micro-batches.

    `batch_size` counts sequences, `micro_batches_per_step` those of all processes; packed ones hold up to `max_tokens`.
    With a `token_budget` a micro-batch has as many rows as fit in so many positions, padding included; a row that is
    longer is alone. `saved_share` is the share of positions for which Batching.auto chose to group, from 0 to 1. Where
    it `is_padding_free`, all rows of a micro-batch are to lie in one sequence.
    """

    batching: Batching  # not auto
    batch_size: int
    micro_batches_per_step: int
    max_tokens: int
    token_budget: int | None = None
    saved_share: float | None = None
    is_padding_free: bool = False

    def micro_batches_of(self, rows: EncodedSet, seed: Sequence[int], num_taken: int = 0) -> MicroBatches:
        """Do the same with a set, whose lengths are computed only where they count."""
        if self.batching is Batching.padded and not self.counts_tokens:
            return self.micro_batches(np.zeros(len(rows)), seed, num_taken)
        return self.micro_batches(rows.lengths, seed, num_taken, rows.target_lengths)

    def micro_batches(
        self, lengths: np.ndarray, seed: Sequence[int], num_taken: int = 0, target_lengths: np.ndarray | None = None
    ) -> MicroBatches:
        """Put every row into exactly one micro-batch, in an order by seed.

        Args:
            lengths: of each row, in tokens, [rows]; `target_lengths` those of an encoder-decoder's targets.
            num_taken: how many sequences to leave out, the first ones in this order: they were used before.
        """
        rng = np.random.default_rng(list(seed))
        if self.counts_tokens:
            return MicroBatches.of(_without(num_taken, self._within_budget(lengths, target_lengths, rng)))
        return MicroBatches.cut(self._sequences(lengths, rng)[num_taken:], self.size)

    @property
    def counts_tokens(self) -> bool:
        """Whether how many rows a micro-batch has depends on their lengths."""
        return self.token_budget is not None and self.batching is not Batching.packed

    @property
    def size(self) -> int:
        """Sequences of a micro-batch; packed ones are all counted as full."""
        return self.batch_size if self.token_budget is None else max(1, self.token_budget // self.max_tokens)

    @property
    def step_size(self) -> int:
        """Sequences that a step takes from all processes, or positions, where these are counted."""
        size = self.batch_size if self.token_budget is None else self.token_budget
        return size * self.micro_batches_per_step

    def _sequences(self, lengths: np.ndarray, rng: np.random.Generator) -> Sequences | np.ndarray:
        """Put every row into exactly one sequence; of an array [rows] each row is one.

        The order of length-grouped ones depends on how many a step has.
        """
        order = rng.permutation(len(lengths))
        if self.batching is Batching.packed:
            packed = [[int(order[i]) for i in rows] for rows in pack(lengths[order], self.max_tokens)]
            return [packed[i] for i in rng.permutation(len(packed))]
        if self.batching is Batching.length_grouped:
            return _grouped(lengths, order, self.batch_size * self.micro_batches_per_step, rng)
        return order

    def _within_budget(
        self, lengths: np.ndarray, target_lengths: np.ndarray | None, rng: np.random.Generator
    ) -> list[Sequences]:
        """Fill each micro-batch with rows up to the budget; those of similar length are shuffled as steps."""
        assert self.token_budget is not None
        each = np.stack([lengths, np.zeros_like(lengths) if target_lengths is None else target_lengths])
        order = rng.permutation(len(lengths))
        if self.batching is Batching.padded:
            return _filled(each, order, self.token_budget)
        mean = max(1.0, float(each.sum()) / max(1, len(lengths)))
        rows_per_step = max(1, int(self.token_budget * self.micro_batches_per_step / mean))
        grouped = _sorted_in_groups(lengths, order, rows_per_step * GROUP_STEPS)
        filled, per_step = _filled(each, grouped, self.token_budget), self.micro_batches_per_step
        steps = [filled[start : start + per_step] for start in range(0, len(filled) - per_step + 1, per_step)]
        shuffled = [batch for i in rng.permutation(len(steps)) for batch in steps[i]]
        return shuffled + filled[len(shuffled) :]


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
    if sampler.batching is Batching.packed or sampler.counts_tokens:
        num_micro_batches = len(sampler.micro_batches_of(rows.in_epoch(epoch), [seed, epoch], num_taken))
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


def _grouped(lengths: np.ndarray, order: np.ndarray, step_size: int, rng: np.random.Generator) -> np.ndarray:
    """Sort the rows by length within groups of some steps, then shuffle the steps; the short one stays last.

    A step has the same rows in however many micro-batches and processes, which have about as much to compute each.
    """
    grouped = _sorted_in_groups(lengths, order, step_size * GROUP_STEPS)
    num_full = len(grouped) // step_size
    full = grouped[: num_full * step_size].reshape(num_full, step_size)
    return np.concatenate([full[rng.permutation(num_full)].ravel(), grouped[num_full * step_size :]])


def _sorted_in_groups(lengths: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups] or [order])


def _filled(lengths: np.ndarray, order: np.ndarray, budget: int) -> list[Sequences]:
    """Cut rows, in their order, into micro-batches of at most `budget` positions; lengths are [input and target, rows].

    A row that is longer than that is alone.
    """
    batches: list[Sequences] = []
    longest = (0, 0)
    for row, length, target in zip(order.tolist(), *lengths[:, order].astype(int).tolist(), strict=True):
        longest = max(longest[0], length), max(longest[1], target)
        if batches and (len(batches[-1]) + 1) * sum(longest) <= budget:
            batches[-1].append([row])
        else:
            batches.append([[row]])
            longest = length, target
    return batches


def similar_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Put rows of similar length together, the shortest first, to be scored or generated for.

    A batch has at most as many positions as `batch_size` of the longest rows have, so that short rows come in larger
    ones. `lengths` are [rows], or of an encoder-decoder [input and target, rows].
    """
    each = np.atleast_2d(lengths)
    each = np.concatenate([each, np.zeros((2 - len(each), each.shape[1]), dtype=each.dtype)])
    order = np.argsort(each[0], kind="stable")
    budget = batch_size * int(each.max(axis=1, initial=0).sum())
    return [[row for (row,) in batch] for batch in _filled(each, order, budget)]


def _without(num_taken: int, batches: list[Sequences]) -> list[Sequences]:
    """Return micro-batches without the first sequences; one that lacks some of its own is shorter."""
    left: list[Sequences] = []
    for batch in batches:
        if len(batch) > num_taken:
            left.append(batch[num_taken:])
        num_taken = max(0, num_taken - len(batch))
    return left


class LabelledRows(Protocol):
    """Rows by their index, as a set has them."""

    @property
    def is_encoder_decoder(self) -> bool: ...

    def __getitem__(self, index: int) -> LabelledRow: ...


def collate(rows: LabelledRows, sequences: Sequences, pad_token_id: int, bounds: RowBounds | None = None) -> Batch:
    """Collate rows, padded on the right to the longest sequence; several rows in a sequence are packed.

    With `bounds` all are in a single sequence, without padding. It is done in numpy alone: torch would give the thread
    that collates an OpenMP team of its own, and where teams are more than the cores, every wait of a step is a sleep.
    """
    indices = [index for sequence in sequences for index in sequence]
    packed = [[rows[index] for index in sequence] for sequence in (sequences if bounds is None else [indices])]
    each = [row for sequence in packed for row in sequence]

    def padded(column: Callable[[LabelledRow], Any], filler: int, dtype: type = np.int64) -> np.ndarray:
        joined = [np.concatenate([column(row) for row in sequence]) for sequence in packed]
        values: np.ndarray = np.full((len(joined), max(map(len, joined))), filler, dtype)
        for padded_sequence, sequence in zip(values, joined, strict=True):
            padded_sequence[: len(sequence)] = sequence
        return values

    labels = padded(lambda row: row.labels, IGNORE_INDEX)
    is_supervised, parts = labels != IGNORE_INDEX, padded(lambda row: row.parts, 0, np.uint8)
    counts = np.bincount(parts[is_supervised], minlength=len(PARTS))
    batch = Batch(
        torch.from_numpy(padded(lambda row: row.input_ids, pad_token_id)),
        torch.from_numpy(labels),
        indices,
        num_tokens=sum(row.num_tokens for row in each),
        part_counts=counts,
        part_weights=counts,
        parts=torch.from_numpy(parts) if counts[1:].any() else None,
        label_positions=torch.from_numpy(positions_of_labels(labels, is_causal=not rows.is_encoder_decoder)),
    )
    if any(row.weight != 1 for row in each):
        weights = padded(lambda row: np.full(len(row.labels), row.weight), 0, np.float64)
        batch.part_weights = np.bincount(parts[is_supervised], weights[is_supervised], len(PARTS))
        batch.row_weights = torch.from_numpy(weights.astype(np.float32))
    if rows.is_encoder_decoder:
        batch.attention_mask = torch.from_numpy(padded(lambda row: np.ones(len(row.input_ids)), 0))
        batch.target_ids = torch.from_numpy(padded(lambda row: row.target_ids, pad_token_id))
    elif bounds is not None or len(each) > len(packed):
        batch.position_ids = torch.from_numpy(_positions(packed, batch.input_ids.shape[1]))
    if bounds is not None:
        batch.bounds = bounds([len(row.input_ids) for row in each])
    return batch


def positions_of_labels(labels: np.ndarray, *, is_causal: bool) -> np.ndarray:
    """Return where labels [batch, seq] are supervised, as positions in them flattened, [supervised].

    In a causal model nothing predicts the first token of a sequence.
    """
    is_supervised = labels != IGNORE_INDEX
    if is_causal:
        is_supervised[:, 0] = False
    return np.flatnonzero(is_supervised)


def flash_bounds(lengths: Sequence[int]) -> dict[str, Any]:
    """Return the bounds of rows in one sequence as FlashAttention takes them; cumulated lengths are [rows + 1]."""
    cumulated = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": cumulated, "cu_seq_lens_k": cumulated, "max_length_q": longest, "max_length_k": longest}


def _positions(sequences: Sequence[Sequence[LabelledRow]], longest: int) -> np.ndarray:
    """Return positions from 0 in every row, and in the padding after the last, [sequences, seq]."""
    each = [[len(row.input_ids) for row in sequence] for sequence in sequences]
    counted = [[np.arange(length) for length in [*lengths, longest - sum(lengths)]] for lengths in each]
    return np.stack([np.concatenate(positions) for positions in counted])
