"""A train set that is read while it is trained on: nothing is counted or kept beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from src.data.cache import bad_rows
from src.data.preparation import CHUNK_ROWS, Recipe, prepared
from src.data.sets import EncodedSet
from src.data.sources import Source
from src.data.store import Account, Part
from src.errors import DataError

BLOCK_ROWS = 10_000
"""Rows that are in memory at a time: they are shuffled, grouped or packed among themselves."""


class StreamedSet:
    """The rows of the sources, block after block, as often as they are asked for.

    Args:
        sources: each with its share of the rows, from 0 to 1.
        until_all_end: whether an epoch goes on until every source has ended, rather than the first.
        max_dropped_fraction: of the rows read so far in an epoch.
        limit: rows of an epoch.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[tuple[Source, Recipe, float]],
        num_workers: int,
        max_dropped_fraction: float,
        limit: int | None,
        *,
        until_all_end: bool = False,
    ) -> None:
        self.name = name
        self._sources = sources
        self._num_workers = num_workers
        self._max_dropped_fraction = max_dropped_fraction
        self._limit = limit
        self._until_all_end = until_all_end

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
            if dropped > self._max_dropped_fraction * read:
                raise DataError(
                    f"{self.name}: {dropped:,} of the first {read:,} rows would be dropped, more than "
                    f"data.max_dropped_fraction = {self._max_dropped_fraction:g}"
                )
            parts.append(part)
            ready = sum(map(len, parts))
            if ready >= BLOCK_ROWS or (self._limit is not None and given + ready >= self._limit):
                yield self._block(parts, given)
                given, parts = given + ready, []
                if self._limit is not None and given >= self._limit:
                    return
        if parts:
            yield self._block(parts, given)
        if read == dropped:
            raise DataError(f"{self.name}: no row is left, all {read:,} are dropped")

    def _block(self, parts: list[Part], given: int) -> EncodedSet:
        """Put parts together, without what is beyond the limit."""
        block = EncodedSet(self.name, parts)
        return block if self._limit is None else EncodedSet(self.name, parts, block.chosen[: self._limit - given])

    def _parts(self) -> Iterator[Part]:
        """Take a chunk of each source in turn, as large as its share."""
        streams = {i: self._of(*source) for i, source in enumerate(self._sources)}
        given: set[int] = set()
        while streams:
            for i, stream in list(streams.items()):
                part = next(stream, None)
                if part is not None:
                    given.add(i)
                    yield part
                elif i not in given:
                    raise DataError(f"{self.name} has no rows: {self._sources[i][0].name}")
                elif not self._until_all_end:
                    return
                else:
                    del streams[i]

    def _of(self, source: Source, recipe: Recipe, share: float) -> Iterator[Part]:
        chunk_rows = max(1, round(CHUNK_ROWS * share))
        for chunk in prepared(source.records(), recipe, self._num_workers, chunk_rows):
            if chunk.bad:
                raise bad_rows(chunk.bad)
            yield Part([chunk.rows], Account(chunk.num_records, chunk.dropped))
