"""A set of encoded rows: selected rows of one or several sources, in an order."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np

from src.data.encoding import AFTER_THOUGHT, ANSWER, IGNORE_INDEX, THOUGHT, THOUGHT_CLOSE, THOUGHT_OPEN
from src.data.readers.record import place_of
from src.data.splits import concatenate
from src.data.store import FADING, FadingText, Shard, StoredBatch, numbers_of


@dataclass(slots=True)
class LabelledRow:
    """One row as training uses it: input_ids [length]; labels [length], or [target] with target_ids; not shifted.

    `spans` [n, 3] are kind, start and stop of the supervised positions; `tag_ids` open and close a thought in them.
    `weight` is the row's in the loss; one of weight 0 is fed, and not supervised.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    target_ids: np.ndarray | None
    spans: np.ndarray
    tag_ids: tuple[int, int] | None = None
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + (0 if self.target_ids is None else len(self.target_ids))

    @property
    def parts(self) -> np.ndarray:
        """The part of each supervised label, a number of PARTS, of the labels' shape; elsewhere it means nothing.

        A tag is one only at its end of the thought: a thought that is cut has no closing tag, and one that begins the
        row no opening tag, as nothing predicts it.
        """
        parts = np.full(len(self.labels), ANSWER, dtype=np.uint8)
        if self.tag_ids is None:
            return parts
        open_id, close_id = self.tag_ids
        for kind, start, stop in self.spans.tolist():
            if kind != THOUGHT:
                continue
            parts[start:stop] = THOUGHT
            if self.labels[start] == open_id:
                parts[start] = THOUGHT_OPEN
            if self.labels[stop - 1] == close_id:
                parts[stop - 1] = THOUGHT_CLOSE
            parts[stop : stop + 1] = AFTER_THOUGHT  # where a thought follows, it comes next and takes its place
        return parts


def labels_of(ids: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return the labels of a row: its ids where they are supervised."""
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for _, start, stop in spans.tolist():
        labels[start:stop] = ids[start:stop]
    return labels


class Fader(Protocol):
    """What rows are in each epoch, where that differs."""

    def in_epoch(self, rows: "EncodedSet", epoch: int) -> "EncodedSet": ...

    def settings(self) -> str: ...


class EncodedSet:
    """Rows of shards, one a source; row i is `set[i]`.

    `indices` are (shard, row in it) of every row of the set, [rows, 2]; None: all rows, shard after shard. `lengths`
    [rows] are of a causal model's input, or an encoder's; `target_lengths` [rows] are 0 for a causal model. In a set
    that is trained on, `is_weighted`, rows have their weights; elsewhere all count alike.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        indices: np.ndarray | None = None,
        *,
        is_weighted: bool = False,
        fader: Fader | None = None,
    ) -> None:
        self.name, self.shards, self.is_weighted, self._fader = name, list(shards), is_weighted, fader
        self.indices = concatenate([np.arange(len(shard)) for shard in shards]) if indices is None else indices

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._select([shard.lengths for shard in self.shards])

    @cached_property
    def target_lengths(self) -> np.ndarray:
        return self._select([shard.target_lengths for shard in self.shards])

    @cached_property
    def is_encoder_decoder(self) -> bool:
        return bool(self.target_lengths.any())

    @property
    def varies(self) -> bool:
        """Whether an epoch's rows may differ from another's."""
        return self._fader is not None

    def in_epoch(self, epoch: int) -> "EncodedSet":
        """Return the rows as an epoch, from 0, feeds them: the same, in the same order, without what is gone."""
        return self if self._fader is None else self._fader.in_epoch(self, epoch)

    def select(self, rows: Sequence[int] | np.ndarray) -> "EncodedSet":
        """Return a set of some of its rows: by their indices, or by a mask, [rows]."""
        return EncodedSet(self.name, self.shards, self.indices[rows], is_weighted=self.is_weighted, fader=self._fader)

    @property
    def first(self) -> Self:
        """The first block: all rows are in memory at once, unlike those of a streamed set."""
        return self

    def blocks(self) -> Iterator["EncodedSet"]:
        """Yield all rows as one block."""
        yield self

    def _select(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the values of this set's rows, [rows], from those of each shard's."""
        selected = np.zeros(len(self), dtype=np.int64)
        for i, shard_values in enumerate(values):
            here = self.indices[:, 0] == i
            selected[here] = shard_values[self.indices[here, 1]]
        return selected

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> LabelledRow:
        batch, i = self._locate(index)
        weight = float(batch.weights[i]) if self.is_weighted and batch.weights is not None else 1.0
        ids = batch.input_ids[batch.input_offsets[i] : batch.input_offsets[i + 1]]
        targets = batch.target_ids[batch.target_offsets[i] : batch.target_offsets[i + 1]]
        stop = batch.span_offsets[i + 1] if weight else batch.span_offsets[i]
        spans = batch.spans[batch.span_offsets[i] : stop].reshape(-1, 3)
        labels = labels_of(targets if len(targets) else ids, spans)
        tag_ids = self.shards[self.indices[index, 0]].tag_ids
        return LabelledRow(ids, labels, targets if len(targets) else None, spans, tag_ids, weight)

    def _locate(self, index: int) -> tuple[StoredBatch, int]:
        shard, row = self.indices[index].tolist()
        return self.shards[shard].locate(row)

    def _value(self, index: int, column: str) -> Any:
        batch, i = self._locate(index)
        return batch.records.column(column)[i].as_py()

    def place(self, index: int) -> str:
        """Return the file and line of a row."""
        return place_of(self._value(index, "source"), self._value(index, "number"))

    def prompt_ids(self, index: int) -> list[int]:
        """Return the ids that generation is fed for a row: exactly those before its completion in training."""
        return self[index].input_ids[: self._value(index, "prompt_length")].tolist()

    def first_ids(self, index: int) -> list[int]:
        """Return the ids that a sample begins with: the prompt's, or the first one of a row without a prompt."""
        return self.prompt_ids(index) or self[index].input_ids[:1].tolist()

    def prompt_lengths(self) -> np.ndarray:
        """Return the length of each row's prompt, [rows]."""
        return self._select([shard.column("prompt_length") for shard in self.shards])

    def _text(self, index: int, column: str) -> str:
        text = self._value(index, column)
        return self.completion(index) if text is None else text

    def prompt(self, index: int) -> str:
        """Return all of a row's text before its last supervised turn."""
        return self._value(index, "prompt")

    def completion(self, index: int) -> str:
        """Return the text of a row's last supervised turn; '' for a row to predict that has no answer."""
        return self._value(index, "completion")

    def supervised_text(self, index: int) -> str:
        return self._text(index, "supervised_text")

    def reference(self, index: int) -> str:
        """Return the completion without thoughts, to compare answers with."""
        return self._text(index, "reference")

    def changes(self, index: int) -> list[str]:
        """Return the changes of the chat template to the texts of a row's messages, see chat.RenderedChat."""
        return (self._value(index, "changes") or "").splitlines()

    def fading(self, index: int) -> FadingText | None:
        """Return what a row is encoded of without some of its thoughts, in a set that varies; None: it has none."""
        text = self._value(index, FADING.name)
        return None if text is None else FadingText.from_json(text)

    def is_truncated(self, index: int) -> bool:
        return bool(self._value(index, "is_truncated"))

    def is_rendered(self, index: int) -> bool:
        return bool(self._value(index, "is_rendered"))

    @property
    def num_tokens(self) -> int:
        """Ids of an epoch, targets included."""
        return int(self.lengths.sum() + self.target_lengths.sum())

    def supervised_lengths(self) -> np.ndarray:
        """Return the number of supervised tokens of each row, [rows]."""
        return self._select([shard.joined(self._supervised_lengths) for shard in self.shards])

    def _supervised_lengths(self, batch: StoredBatch) -> np.ndarray:
        return batch.supervised_lengths() * self.are_supervised(batch)

    def are_supervised(self, batch: StoredBatch) -> np.ndarray:
        """Return which rows of a batch are supervised: not those of weight 0, [rows of the batch]."""
        if self.is_weighted and batch.weights is not None:
            return batch.weights > 0
        return np.ones(batch.records.num_rows, dtype=bool)

    @property
    def has_weights(self) -> bool:
        """Whether any row has a weight of its own."""
        return self.is_weighted and any(batch.weights is not None for s in self.shards for batch in s.batches)

    def multiplicities(self) -> Iterator[tuple[StoredBatch, np.ndarray]]:
        """Yield every batch with rows of this set, and how often each row is in the set, [rows of the batch]."""
        for i, shard in enumerate(self.shards):
            times = np.bincount(self.indices[self.indices[:, 0] == i, 1], minlength=len(shard))
            start = 0
            for batch in shard.batches:
                stop = start + batch.records.num_rows
                if times[start:stop].any():
                    yield batch, times[start:stop]
                start = stop

    def count_lines(self, column: str) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Return how often each line of a column of texts occurs, and the places of its first three rows."""
        counts: dict[str, int] = {}
        places: dict[str, list[str]] = {}
        for batch, times in self.multiplicities():
            texts = batch.records.column(column)
            if texts.null_count == len(texts):
                continue
            for text, count, row in zip(texts.to_pylist(), times.tolist(), range(len(texts)), strict=True):
                for line in text.split("\n") if text and count else ():
                    counts[line] = counts.get(line, 0) + count
                    if len(seen := places.setdefault(line, [])) < 3:
                        source, number = (batch.records.column(name)[row].as_py() for name in ("source", "number"))
                        seen.append(place_of(source, number))
        return counts, places

    def total(self, column: str) -> int:
        """Return the sum of a column of numbers or booleans."""
        return sum(
            int((numbers_of(batch.records.column(column)) * times).sum()) for batch, times in self.multiplicities()
        )

    def digest(self) -> str:
        """Return a hash of all ids and labels in their order, and of how they differ by epoch, 32 hex digits."""
        hashed = hashlib.sha256("".join(shard.stats.digest for shard in self.shards).encode())
        hashed.update(np.ascontiguousarray(self.indices).tobytes())
        if self._fader is not None:
            hashed.update(self._fader.settings().encode())
        return hashed.hexdigest()[:32]
