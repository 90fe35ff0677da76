"""A train set that is read during training: nothing is counted or stored beforehand."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Self

import pyarrow as pa

from src.data.bad_rows import BadRows
from src.data.preparation import CHUNK_ROWS, EncodingConfig, encode_chunks
from src.data.readers.record import ReadResult, Unreadable
from src.data.sets import EncodedSet, Fader
from src.data.sources import Source, hash_of
from src.data.store import DroppedRow, Shard, SourceStats
from src.errors import DataError

BLOCK_ROWS, BLOCK_BYTES = 10_000, 512 * 2**20
"""Rows in memory at a time, shuffled, grouped or packed among themselves; fewer where they are long."""


@dataclass(frozen=True)
class StreamSource:
    """A source, with its share of the rows (from 0 to 1), and its number of rows in an epoch (None: all)."""

    source: Source
    config: EncodingConfig
    share: float
    count: int | None


@dataclass
class StreamAccount:
    """Counts of the records read so far."""

    num_records: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: list[DroppedRow] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        return self.num_records - sum(self.dropped.values())

    def add(self, shard: Shard) -> None:
        self.num_records += shard.stats.num_records
        self.dropped = dict(Counter(self.dropped) + Counter(row.reason for row in shard.stats.dropped))
        self.first_dropped += shard.stats.dropped[: 10 - len(self.first_dropped)]


@dataclass
class Cursor:
    """How far an epoch is read: the whole state of reading, so it resumes exactly from here.

    For each source `taken` counts the records since its start, or its last restart, and `has_ended` is true once its
    end was reached in this epoch. `turn` is the source of the next chunk. The counts are of this epoch, `account` is of
    all epochs that were read.
    """

    taken: list[int]
    has_ended: list[bool]
    account: StreamAccount
    turn: int = 0
    num_blocks: int = 0
    num_records: int = 0
    num_dropped: int = 0

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return a cursor that shares no list with the JSON values it is made of."""
        values = deepcopy(dict(state))
        account = values["account"]
        account["first_dropped"] = [DroppedRow(**row) for row in account["first_dropped"]]
        return cls(**values | {"account": StreamAccount(**account)})


@dataclass(frozen=True)
class Block:
    """Rows that are in memory together: the epoch's `number`-th block, from 0.

    `begin` is the cursor before it, in plain JSON values, from which `StreamedSet.read` begins with this block again.
    """

    number: int
    begin: dict[str, Any]
    rows: EncodedSet


class StreamedSet:
    """The rows of the sources, block after block, for any number of epochs.

    Each of several sources has its share of every block. Where sources have counts, these make an epoch, also more rows
    than a source has; else an epoch ends when every source has ended, and one that ends before restarts, so no row is
    left out. `max_dropped_fraction` is of the rows read so far in an epoch, checked from the first block's end on.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[StreamSource],
        num_workers: int,
        max_dropped_fraction: float,
        fader: Fader | None = None,
    ) -> None:
        self.name, self._sources, self._num_workers, self._fader = name, sources, num_workers, fader
        self._max_dropped_fraction = max_dropped_fraction
        self.account = StreamAccount()  # of all epochs that were read, also by the runs that this one resumes

    @cached_property
    def first(self) -> EncodedSet:
        """The first block, to look at before training; it is not counted."""
        return next(self._blocks(self._at_start(StreamAccount()))).rows

    def digest(self) -> str:
        """Return a hash of the sources and settings of the rows, 32 hex digits."""
        each = [(s.source.identity(), s.config.settings(), s.share, s.count) for s in self._sources]
        return hash_of(each, *([] if self._fader is None else [self._fader.settings()]))[:32]

    def start(self) -> dict[str, Any]:
        """Return the cursor of the next epoch's start, in plain JSON values."""
        return asdict(self._at_start(self.account))

    def _at_start(self, account: StreamAccount) -> Cursor:
        """Return the start of an epoch after those of the account."""
        return Cursor([0] * len(self._sources), [False] * len(self._sources), account)

    def blocks(self) -> Iterator[EncodedSet]:
        """Read an epoch from its start, a block at a time; raises as `read`."""
        return (block.rows for block in self.read())

    def read(self, begin: Mapping[str, Any] | None = None) -> Iterator[Block]:
        """Read an epoch to its end, a block at a time.

        It resumes at `begin`, where a block of this set began, or `start`, also in another process: the records before
        it are read and skipped, and the account becomes what it was then. None: the epoch's start. DataError at the
        first chunk with rows that can't be used, or too many that would be dropped; where `begin` is of another number
        of sources.
        """
        cursor = Cursor.from_dict(self.start() if begin is None else begin)
        if len(cursor.taken) != len(self._sources):
            raise DataError(
                f"{self.name} has {len(self._sources)} sources, and had {len(cursor.taken)} where reading is to resume"
            )
        self.account = cursor.account
        return self._blocks(cursor)

    def _blocks(self, cursor: Cursor) -> Iterator[Block]:
        """Yield the blocks from a cursor on, moving it."""
        begin, shards, size = asdict(cursor), list[Shard](), 0
        for shard in self._shards(cursor):
            shards.append(shard)
            size += shard.num_bytes
            ready = sum(map(len, shards))
            if ready >= BLOCK_ROWS or (ready and size >= BLOCK_BYTES):
                yield self._block(shards, begin, cursor)
                begin, shards, size = asdict(cursor), [], 0
        self._check_dropped(cursor)
        if sum(map(len, shards)):
            yield self._block(shards, begin, cursor)

    def _block(self, shards: list[Shard], begin: dict[str, Any], cursor: Cursor) -> Block:
        self._check_dropped(cursor)
        cursor.num_blocks += 1
        rows = EncodedSet(self.name, shards, is_weighted=True, fader=self._fader)
        return Block(cursor.num_blocks - 1, begin, rows)

    def _check_dropped(self, cursor: Cursor) -> None:
        read, dropped = cursor.num_records, cursor.num_dropped
        if read == dropped:
            raise DataError(f"{self.name}: no row is left, all {read:,} are dropped")
        if dropped > self._max_dropped_fraction * read:
            raise DataError(
                f"{self.name}: {dropped:,} of the first {read:,} rows would be dropped, more than "
                f"data.max_dropped_fraction = {self._max_dropped_fraction:g}"
            )

    def _shards(self, cursor: Cursor) -> Iterator[Shard]:
        """Yield a chunk of each source in turn, as large as its share, with the cursor moved past it."""
        streams = [self._read_source(source, taken) for source, taken in zip(self._sources, cursor.taken, strict=True)]
        while not all(cursor.has_ended):
            i = cursor.turn
            cursor.turn = (i + 1) % len(streams)
            is_counted = self._sources[i].count is not None
            if is_counted and cursor.has_ended[i]:
                continue
            shard = next(streams[i], None)
            if shard is None:
                cursor.has_ended[i] = True
                if is_counted or all(cursor.has_ended):
                    continue
                streams[i], cursor.taken[i] = self._read_source(self._sources[i], 0), 0
                shard = next(streams[i])  # it had rows before
            cursor.taken[i] += shard.stats.num_records
            cursor.num_records += shard.stats.num_records
            cursor.num_dropped += len(shard.stats.dropped)
            cursor.account.add(shard)
            yield shard

    def _read_source(self, source: StreamSource, taken: int) -> Iterator[Shard]:
        """Yield a source's records after the first `taken`, encoded, a chunk of its share at a time."""
        chunk_rows = max(1, round(CHUNK_ROWS * source.share))
        records = _records(source.source, taken, source.count)
        batches, stats = list[pa.RecordBatch](), SourceStats(tag_ids=source.config.tag_ids)
        for chunk in encode_chunks(records, source.config, self._num_workers, chunk_rows, taken):
            BadRows(chunk.bad).raise_if_any()
            batches.append(chunk.rows)
            stats.num_records += chunk.num_records
            stats.dropped += chunk.dropped
            taken += chunk.num_records
            # a chunk of long rows has fewer of them; each of several sources still has its share
            if len(self._sources) == 1 or taken % chunk_rows == 0:
                yield Shard(batches, stats)
                batches, stats = [], SourceStats(tag_ids=source.config.tag_ids)
        if batches:
            yield Shard(batches, stats)


def _records(source: Source, taken: int, count: int | None) -> Iterator[ReadResult]:
    """Yield a source's records after the first `taken`, repeated from its start where it has fewer than `count`.

    What can't be read is yielded also where it comes before them: the source may end there. DataError if it is empty.
    """
    skip = taken  # of this reading of the source
    while count is None or taken < count:
        size = 0
        for size, record in enumerate(islice(source.records(), None if count is None else skip + count - taken), 1):
            if size > skip:
                taken += 1
                yield record
            elif isinstance(record, Unreadable):
                yield record
        if not size:
            raise DataError(f"no rows: {source.name}")
        if count is None:
            return
        skip = max(0, skip - size) % size
