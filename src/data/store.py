"""Encoded rows in one Arrow file: written in batches and memory-mapped, so that memory does not grow with the data."""

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from src.data.encoding import EncodedRow
from src.data.examples import Example
from src.data.formats import Chat
from src.data.readers.record import Record
from src.errors import visible
from src.util import load_json

ROWS, STATS = "rows.arrow", "stats.json"
BATCH_ROWS, BATCH_BYTES = 1000, 32 * 2**20
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "input_ids": IDS,
        "target_ids": IDS,  # of an encoder-decoder; empty for a causal model
        "spans": IDS,  # kind, start, stop, kind, start, …
        "prompt_length": pa.int32(),
        "num_control_tokens": pa.int32(),
        "is_truncated": pa.bool_(),
        "was_cleaned": pa.bool_(),
        "is_rendered": pa.bool_(),  # by a chat template
        "number": pa.int64(),  # line or row in its source
        "source": pa.string(),
        "ordinal": pa.int64(),  # number of records of the source before it
        "prompt": pa.string(),
        "completion": pa.string(),
        "reference": pa.string(),  # null: the completion
        "supervised_text": pa.string(),  # of every turn; null: the completion
        "changes": pa.string(),  # by the chat template, one a line: see chat.RenderedChat; null: none
        "unread": pa.string(),  # keys that nothing reads, one a line; null: none
        "weight": pa.float64(),  # in the loss; null: 1
        "num_thoughts": pa.int32(),  # in the data, also where they are dropped
        "about_thoughts": pa.string(),  # what is wrong with them, one a line: see thought_finder; null: nothing
    }
)

FADING = pa.field("fading", pa.string())
"""The column of rows whose thoughts fade: what one is encoded of without some of them, see FadingText; null: never."""


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not in the set, and why."""

    ordinal: int
    place: str
    reason: str


@dataclass
class SourceStats:
    """Counts of the records of one source, stored with its rows, and the ids of the tags of their thoughts."""

    num_records: int = 0
    dropped: list[DroppedRow] = field(default_factory=list)
    digest: str = ""
    tag_ids: tuple[int, int] | None = None


Encoded = tuple[int, Record, Example, EncodedRow]  # the ordinal of a row, its record, its text, its ids


@dataclass(frozen=True, slots=True)
class FadingText:
    """What a row is encoded of again, without some of its thoughts, besides its prompt and its completion.

    `lengths` are the ids between the tags of each thought, counted before the row is cut; `chat` is what was rendered;
    `has_others`: its template writes a thought of its own in place of each that is left out, as an empty one.
    """

    lengths: list[int]
    chat: Chat | None
    has_others: bool = False

    def to_json(self) -> str:
        chat = None if self.chat is None else [self.chat.messages, self.chat.is_supervised]
        return json.dumps([self.lengths, chat, self.has_others], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        lengths, chat, has_others = json.loads(text)
        return cls(lengths, chat and Chat(*chat), has_others)


def to_batch(rows: Sequence[Encoded], fading: Mapping[int, FadingText] | None = None) -> pa.RecordBatch:
    """Return rows as columns; `fading` is of rows whose thoughts fade, by their ordinals; None: those of none do."""
    encoded = [row for _, _, _, row in rows]
    examples = [example for _, _, example, _ in rows]
    columns = {
        "input_ids": _lists([row.input_ids for row in encoded]),
        "target_ids": _lists([row.target_ids or [] for row in encoded]),
        "spans": _lists([list(chain.from_iterable(row.spans)) for row in encoded]),
        "prompt_length": [row.prompt_length for row in encoded],
        "num_control_tokens": [row.num_control_tokens for row in encoded],
        "is_truncated": [row.is_truncated for row in encoded],
        "was_cleaned": [example.was_cleaned for example in examples],
        "is_rendered": [any(segment.is_rendered for segment in example.segments) for example in examples],
        "number": [record.number for _, record, _, _ in rows],
        "source": [record.source for _, record, _, _ in rows],
        "ordinal": [ordinal for ordinal, _, _, _ in rows],
        "prompt": [example.prompt for example in examples],
        "completion": [example.completion for example in examples],
        "reference": [None if e.reference == e.completion else e.reference for e in examples],
        "supervised_text": [None if (text := e.supervised_text) == e.completion else text for e in examples],
        "changes": ["\n".join(example.changes) or None for example in examples],
        "unread": ["\n".join(visible(key, is_line=True) for key in example.unread) or None for example in examples],
        "weight": [example.weight for example in examples],
        "num_thoughts": [example.num_thoughts for example in examples],
        "about_thoughts": ["\n".join((*e.about_thoughts, *row.about_thoughts)) or None for _, _, e, row in rows],
    }
    if fading is None:
        return pa.record_batch(columns, schema=SCHEMA)
    texts = [fading[ordinal].to_json() if ordinal in fading else None for ordinal, _, _, _ in rows]
    return pa.record_batch(columns | {FADING.name: texts}, schema=SCHEMA.append(FADING))


def _lists(rows: list[list[int]]) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class RowWriter:
    """Writes a folder of rows, which is complete only after `finish`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._sink = pa.OSFile(str(folder / ROWS), "wb")
        self._writer: pa.RecordBatchFileWriter | None = None  # its columns are those of the first rows
        self._hash = hashlib.sha256()
        self._pending: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; small batches are written together, because each costs memory when the file is read."""
        self._pending.append(batch)
        num_bytes = sum(pending.nbytes for pending in self._pending)
        if num_bytes >= BATCH_BYTES or sum(map(len, self._pending)) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            batch = pa.concat_batches(self._pending)
            self._pending = []
            update_digest(self._hash, batch)
            self._open(batch.schema).write_batch(batch)

    def _open(self, schema: pa.Schema) -> pa.RecordBatchFileWriter:
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._sink, schema)
        return self._writer

    def finish(self, stats: SourceStats) -> None:
        """Write the stats; their digest reveals rows that did not reach the disk in a power cut."""
        self._flush()
        stats.digest = self._hash.hexdigest()
        self._open(SCHEMA).close()
        self._sink.close()
        (self._folder / STATS).write_text(json.dumps(dataclasses.asdict(stats)), encoding="utf-8")

    def close(self) -> None:
        """Close the file; without its end, where it is not finished, so that it can't be opened."""
        self._sink.close()


def update_digest(digest: Any, batch: pa.RecordBatch) -> None:
    """Update a hash with the ids, spans and weights of rows, not with texts and places."""
    for name in ("input_ids", "target_ids", "spans"):
        offsets, values = _flat(batch.column(name))
        digest.update(np.diff(offsets).astype(np.int32).tobytes())
        digest.update(values.tobytes())
    if (weights := weights_of(batch)) is not None:
        digest.update(weights.tobytes())


def weights_of(records: pa.RecordBatch) -> np.ndarray | None:
    """Return the weight of each row in the loss, [rows]; None where no row has one of its own."""
    column = records.column("weight")
    return None if column.null_count == len(column) else numbers_of(column.fill_null(1.0))


def numbers_of(array: pa.Array) -> np.ndarray:
    """Return an Arrow array of numbers or booleans as NumPy's; of numbers it is no copy, and can't be written to.

    Arrow's own to_numpy imports pandas first, where that is installed, which takes 0.3 s.
    """
    return np.from_dlpack(array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array)


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a column's offsets, [rows + 1], and its concatenated values, without a copy."""
    offsets = numbers_of(lists.offsets)
    return offsets - offsets[0], numbers_of(lists.values)[offsets[0] : offsets[-1]]


class StoredBatch:
    """Rows as they are stored, one Arrow record batch: ids and spans flat, with the offsets of each row."""

    def __init__(self, records: pa.RecordBatch) -> None:
        self.records = records
        self.input_offsets, self.input_ids = inputs = _flat(records.column("input_ids"))
        self.target_offsets, self.target_ids = targets = _flat(records.column("target_ids"))
        self.span_offsets, self.spans = _flat(records.column("spans"))
        self.weights = weights_of(records)
        # labels are made of an encoder-decoder's targets, else of the input
        self.label_offsets, self.label_ids = targets if len(self.target_ids) else inputs

    def supervised(self) -> np.ndarray:
        """Return which of `label_ids` are supervised."""
        spans = self.spans.reshape(-1, 3)
        begins = np.repeat(self.label_offsets[:-1], np.diff(self.span_offsets) // 3)
        change = np.zeros(len(self.label_ids) + 1, dtype=np.int32)
        np.add.at(change, spans[:, 1] + begins, 1)
        np.add.at(change, spans[:, 2] + begins, -1)
        return np.cumsum(change[:-1]) > 0

    def supervised_lengths(self) -> np.ndarray:
        """Return the number of supervised tokens of each row, [rows]."""
        return np.diff(np.append(0, np.cumsum(self.supervised()))[self.label_offsets])


class Shard:
    """The encoded rows of one source, on disk or in memory."""

    def __init__(self, batches: Sequence[pa.RecordBatch], stats: SourceStats) -> None:
        self.stats, self.tag_ids = stats, stats.tag_ids
        self.batches = [StoredBatch(batch) for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self.lengths = self.joined(lambda batch: np.diff(batch.input_offsets))
        self.target_lengths = self.joined(lambda batch: np.diff(batch.target_offsets))
        self.ordinals = self.column("ordinal")

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """Memory-map a folder of rows; with `verify` they are read once and their digest is compared.

        Raises OSError, ValueError or KeyError where it is incomplete or damaged.
        """
        given = load_json(folder / STATS)
        dropped, tags = [DroppedRow(**row) for row in given["dropped"]], given["tag_ids"]
        stats = SourceStats(**given | {"dropped": dropped, "tag_ids": None if tags is None else (tags[0], tags[1])})
        reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        if verify:
            digest = hashlib.sha256()
            for batch in batches:
                update_digest(digest, batch)
            if digest.hexdigest() != stats.digest:
                raise ValueError(f"{folder} does not hold what was written")
        return cls(batches, stats)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_bytes(self) -> int:
        return sum(batch.records.nbytes for batch in self.batches)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, [rows]."""
        return self.joined(lambda batch: numbers_of(batch.records.column(name)))

    def joined(self, values: Callable[[StoredBatch], np.ndarray]) -> np.ndarray:
        """Return whole numbers of all rows, [rows], from a function of a batch."""
        arrays = [values(batch) for batch in self.batches]
        return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64)

    def locate(self, row: int) -> tuple[StoredBatch, int]:
        """Return the batch that holds a row, and the row's index in it."""
        i = bisect_right(self._starts, row) - 1
        return self.batches[i], row - self._starts[i]
