"""A set of encoded rows: chosen rows of one source or several, in an order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from src.data.encoding import IGNORE_INDEX
from src.data.store import Chunk, Shard
from src.errors import visible


@dataclass(slots=True)
class Row:
    """One row as training takes it: input_ids [length]; labels [length], or [target] with target_ids; not shifted.

    `spans` [n, 3] are kind, start and stop of the supervised positions.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    target_ids: np.ndarray | None
    spans: np.ndarray

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class EncodedSet:
    """Rows that lie in parts on disk; row i is `set[i]`.

    Args:
        parts: where the rows lie, one a source.
        chosen: (part, row in it) of every row of the set, [rows, 2]; None: all rows, part after part.
    """

    def __init__(self, name: str, parts: Sequence[Shard], chosen: np.ndarray | None = None) -> None:
        self.name = name
        self.parts = list(parts)
        if chosen is None:
            numbers = [np.stack([np.full(len(p), i), np.arange(len(p))], axis=1) for i, p in enumerate(parts)]
            chosen = np.concatenate(numbers) if numbers else np.zeros((0, 2), dtype=np.int64)
        self.chosen = chosen
        self.lengths = self._of_each([part.lengths for part in parts])
        """Length of each row, [rows]: what a causal model is fed, or an encoder."""
        self.target_lengths = self._of_each([part.target_lengths for part in parts])
        """Length of each row's target, [rows]; 0 in all of them for a causal model."""

    def _of_each(self, values: Sequence[np.ndarray]) -> np.ndarray:
        found = np.zeros(len(self), dtype=np.int64)
        for i, of_part in enumerate(values):
            here = self.chosen[:, 0] == i
            found[here] = of_part[self.chosen[here, 1]]
        return found

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        chunk, i = self._locate(index)
        start, stop = chunk.input_offsets[i], chunk.input_offsets[i + 1]
        ids = chunk.input_ids[start:stop]
        start, stop = chunk.target_offsets[i], chunk.target_offsets[i + 1]
        targets = chunk.target_ids[start:stop] if stop > start else None
        spans = chunk.spans[chunk.span_offsets[i] : chunk.span_offsets[i + 1]].reshape(-1, 3)
        learned_from = ids if targets is None else targets
        labels = np.full(len(learned_from), IGNORE_INDEX, dtype=np.int32)
        for _, first, last in spans.tolist():
            labels[first:last] = learned_from[first:last]
        return Row(ids, labels, targets, spans)

    def _locate(self, index: int) -> tuple[Chunk, int]:
        part, row = self.chosen[index].tolist()
        return self.parts[part].locate(row)

    def _value(self, index: int, column: str) -> Any:
        chunk, i = self._locate(index)
        return chunk.batch.column(column)[i].as_py()

    def place(self, index: int) -> str:
        """Say where a row comes from: file and line."""
        return visible(f"{self._value(index, 'source')}:{self._value(index, 'number')}", is_line=True)

    def prompt_ids(self, index: int) -> list[int]:
        """Give the ids that generation is fed for a row: exactly those before its completion in training."""
        return self[index].input_ids[: self._value(index, "prompt_length")].tolist()

    def first_ids(self, index: int) -> list[int]:
        """Give the ids that a sample begins with: the prompt's, or the first of a row that is learned as a whole."""
        return self.prompt_ids(index) or self[index].input_ids[:1].tolist()

    def prompt_lengths(self) -> np.ndarray:
        """Count the ids of each row's prompt, [rows]."""
        return self._of_each([part.column("prompt_length") for part in self.parts])

    def prompt(self, index: int) -> str:
        return self._value(index, "prompt")

    def completion(self, index: int) -> str:
        return self._value(index, "completion")

    def learned(self, index: int) -> str:
        """Give the text of all that is learned, of every turn of a chat."""
        found = self._value(index, "learned")
        return self.completion(index) if found is None else found

    def reference(self, index: int) -> str:
        """Give the completion without thoughts, to compare answers with."""
        found = self._value(index, "reference")
        return self.completion(index) if found is None else found

    def changes(self, index: int) -> list[str]:
        """Return what the chat template did to the texts of a row's messages, see chat.Rendered."""
        return (self._value(index, "changes") or "").splitlines()

    def is_truncated(self, index: int) -> bool:
        return bool(self._value(index, "is_truncated"))

    def is_rendered(self, index: int) -> bool:
        """Whether a chat template wrote the row's text."""
        return bool(self._value(index, "is_rendered"))

    @cached_property
    def is_encoder_decoder(self) -> bool:
        return bool(self.target_lengths.any())

    @property
    def num_tokens(self) -> int:
        """How many ids a model is fed in an epoch, targets included."""
        return int(self.lengths.sum() + self.target_lengths.sum())

    def supervised_lengths(self) -> np.ndarray:
        """Count the supervised tokens of each row, [rows]."""
        of_parts = []
        for part in self.parts:
            of_part = [np.zeros(0, dtype=np.int64)]
            for chunk in part.chunks:
                cumulated = np.concatenate([[0], np.cumsum(chunk.supervised())])
                of_part.append(np.diff(cumulated[chunk.learned_offsets]))
            of_parts.append(np.concatenate(of_part))
        return self._of_each(of_parts)

    def masks(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Give every chunk that holds rows of this set, with how often each of its rows is in it, [rows of the chunk].

        For counting over all rows at once.
        """
        for number, part in enumerate(self.parts):
            times = np.bincount(self.chosen[self.chosen[:, 0] == number, 1], minlength=len(part))
            start = 0
            for chunk in part.chunks:
                stop = start + chunk.batch.num_rows
                if times[start:stop].any():
                    yield chunk, times[start:stop]
                start = stop

    def count_lines(self, column: str) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Count the lines of a column of texts, and return the places of the first three rows of each."""
        counts: dict[str, int] = {}
        places: dict[str, list[str]] = {}
        for chunk, times in self.masks():
            texts = chunk.batch.column(column)
            if texts.null_count == len(texts):
                continue
            for text, count, row in zip(texts.to_pylist(), times.tolist(), range(len(texts)), strict=True):
                for line in text.split("\n") if text and count else ():
                    counts[line] = counts.get(line, 0) + count
                    if len(seen := places.setdefault(line, [])) < 3:
                        source, number = (chunk.batch.column(name)[row].as_py() for name in ("source", "number"))
                        seen.append(visible(f"{source}:{number}", is_line=True))
        return counts, places

    def total(self, column: str) -> int:
        """Add up a column of numbers or of true and false."""
        return sum(
            int((chunk.batch.column(column).to_numpy(zero_copy_only=False) * times).sum())
            for chunk, times in self.masks()
        )

    def digest(self) -> str:
        """Give a hash of all ids and labels in their order, 32 hex digits."""
        hashed = hashlib.sha256()
        for part in self.parts:
            hashed.update(part.account.digest.encode())
        hashed.update(np.ascontiguousarray(self.chosen).tobytes())
        return hashed.hexdigest()[:32]
