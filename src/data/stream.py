"""A train set that is read while it is trained on: nothing is counted or kept beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from src.data.cache import bad_rows
from src.data.preparation import CHUNK_ROWS, Recipe, prepared
from src.data.readers import Record, Unreadable
from src.data.sets import EncodedSet
from src.data.sources import Source
from src.data.store import Account, DroppedRow, Part
from src.errors import DataError

BLOCK_ROWS = 10_000
"""Rows that are in memory at a time: they are shuffled, grouped or packed among themselves."""


@dataclass(frozen=True)
class StreamSource:
    """A source, with its share of the rows (from 0 to 1), and how many of it make an epoch (None: all it has)."""

    source: Source
    recipe: Recipe
    share: float
    count: int | None


@dataclass
class StreamAccount:
    """What became of the records read so far."""

    num_records: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: list[DroppedRow] = field(default_factory=list)


class StreamedSet:
    """The rows of the sources, block after block, as often as they are asked for.

    Of several sources each gives its share of every block. Where they have counts, an epoch is these counts, also more
    rows than a source has; else it ends when every source has ended, and one that ends before begins again, so no row
    is left out.

    Args:
        max_dropped_fraction: of the rows read so far in an epoch, from the first block's end on.
        limit: rows of an epoch.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[StreamSource],
        num_workers: int,
        max_dropped_fraction: float,
        limit: int | None,
    ) -> None:
        self.name = name
        self.account = StreamAccount()
        """Of all epochs that were read."""
        self._sources = sources
        self._num_workers = num_workers
        self._max_dropped_fraction = max_dropped_fraction
        self._limit = limit

    @cached_property
    def first(self) -> EncodedSet:
        """The first block, to look at before training; it is not accounted for."""
        block = next(self.blocks())
        self.account = StreamAccount()
        return block

    def blocks(self) -> Iterator[EncodedSet]:
        """Read an epoch from its start, a block at a time.

        Raises:
            DataError: at the first chunk with rows that can't be used, or too many that would be dropped.
        """
        parts: list[Part] = []
        read = dropped = given = 0
        for part in self._parts():
            read += part.account.num_records
            dropped += len(part.account.dropped)
            parts.append(part)
            ready = sum(map(len, parts))
            is_last = self._limit is not None and given + ready >= self._limit
            if ready >= BLOCK_ROWS or is_last:
                self._check_dropped(read, dropped)
                yield self._block(parts, given)
                given, parts = given + ready, []
                if is_last:
                    return
        self._check_dropped(read, dropped)
        if sum(map(len, parts)):
            yield self._block(parts, given)

    def _check_dropped(self, read: int, dropped: int) -> None:
        if read == dropped:
            raise DataError(f"{self.name}: no row is left, all {read:,} are dropped")
        if dropped > self._max_dropped_fraction * read:
            raise DataError(
                f"{self.name}: {dropped:,} of the first {read:,} rows would be dropped, more than "
                f"data.max_dropped_fraction = {self._max_dropped_fraction:g}"
            )

    def _block(self, parts: list[Part], given: int) -> EncodedSet:
        """Put parts together, without what is beyond the limit, and account for them."""
        block = EncodedSet(self.name, parts)
        if self._limit is not None:
            block = EncodedSet(self.name, parts, block.chosen[: self._limit - given])
        self.account.num_kept += len(block)
        for part in parts:
            self.account.num_records += part.account.num_records
            self.account.dropped.update(row.reason for row in part.account.dropped)
            self.account.first_dropped += part.account.dropped[: 10 - len(self.account.first_dropped)]
        return block

    def _parts(self) -> Iterator[Part]:
        """Take a chunk of each source in turn, as large as its share."""
        streams = {i: self._of(one) for i, one in enumerate(self._sources)}
        ended: set[int] = set()
        while streams:
            for i, stream in list(streams.items()):
                part = next(stream, None)
                if part is None:
                    ended.add(i)
                    if len(ended) == len(self._sources):
                        return
                    if self._sources[i].count is not None:
                        del streams[i]
                        continue
                    streams[i] = self._of(self._sources[i])
                    part = next(streams[i])  # it had rows before
                yield part

    def _of(self, one: StreamSource) -> Iterator[Part]:
        chunk_rows = max(1, round(CHUNK_ROWS * one.share))
        for chunk in prepared(_records(one.source, one.count), one.recipe, self._num_workers, chunk_rows):
            if chunk.bad:
                raise bad_rows(chunk.bad, len(chunk.bad))
            yield Part([chunk.rows], Account(chunk.num_records, chunk.dropped))


def _records(source: Source, count: int | None) -> Iterator[Record | Unreadable]:
    """Read a source, again from its start where it has fewer rows than `count`.

    Raises:
        DataError: where it has none.
    """
    given = 0
    while True:
        before = given
        for record in islice(source.records(), None if count is None else count - given):
            given += 1
            yield record
        if given == before:
            raise DataError(f"no rows: {source.name}")
        if count is None or given >= count:
            return
