"""Which rows a run was trained on, by hashes of what it reads of them: the same for every tokenizer and template."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress

import numpy as np

from src.config.schema import DataConfig, RunConfig
from src.data.cache import ShowProgress
from src.data.dataset import held_out_records, train_source
from src.data.groups import read_groups
from src.data.readers.record import ReadResult, Unreadable
from src.data.sets import EncodedSet
from src.data.sources import Source, file_source
from src.errors import DataError

PROGRESS_RECORDS = 10_000
Columns = tuple[str, ...]


class RowHashes:
    """Reads the hashes of records, of each source once."""

    def __init__(self, show_progress: ShowProgress) -> None:
        self._show_progress = show_progress
        self._known: dict[tuple[Source, Columns], list[bytes]] = {}

    def trained(self, config: RunConfig) -> set[bytes]:
        """Return the hashes of the rows that a run may have been trained on: of its train set, whatever came of them.

        So rows count that were dropped, left out of a mixture, or not reached. DataError: they can't be read again.
        """
        data = config.data
        described = data.train_sources()
        hashes = [self.of(train_source(source.data), _columns(source.data)) for source in described.values()]
        if data.streaming:
            return set(chain.from_iterable(hashes))
        sources = {name: train_source(source.data) for name, source in described.items()}
        groups = None if data.group_column is None else read_groups(sources, data.group_column, self._show_progress)
        held_out = held_out_records(data, config.seed, [len(of_source) for of_source in hashes], groups)
        pairs = zip(hashes, held_out, strict=True)
        return set(chain.from_iterable(compress(of_source, ~is_out) for of_source, is_out in pairs))

    def of(self, source: Source, columns: Columns) -> list[bytes]:
        """Return the hash of each record of a source, read by these columns."""
        if (source, columns) not in self._known:
            self._known[source, columns] = list(self._read(source, columns))
        return self._known[source, columns]

    def _read(self, source: Source, columns: Columns) -> Iterator[bytes]:
        for number, record in enumerate(source.records(), start=1):
            yield row_hash(record, columns)
            if number % PROGRESS_RECORDS == 0:
                self._show_progress(f"{source.name}: {number:,} rows read")


@dataclass
class SeenRows:
    """The rows that runs may have been trained on, by their hashes, and the columns by which these runs read a row.

    Another set's record is among them if it is by any of these columns: what one run reads of it, another may not.
    """

    hashes: RowHashes
    rows: set[bytes] = field(default_factory=set)
    readings: set[Columns] = field(default_factory=set)

    def add(self, config: RunConfig) -> None:
        """Add the rows of a run; raises as `RowHashes.trained`."""
        self.rows |= self.hashes.trained(config)
        self.readings |= {_columns(one.data) for one in config.data.train_sources().values()} | {_columns(config.data)}

    def in_files(self, data: DataConfig, files: Sequence[str]) -> list[bool]:
        """Return whether each record of a set's files, by its number from 0, is a row that was trained on."""
        return self._in(file_source(files, data.limit))

    def in_validation(self, data: DataConfig, name: str) -> list[list[bool]]:
        """Return the same of each record of a validation set by its number in its source, for each source of it."""
        if name in data.validation_sets():
            return [self.in_files(data, data.validation_sets()[name])]
        sources = [one.data for one in data.train_sources().values()]  # it is held out of these
        if data.has_hub_validation:
            sources = [replace(one, train_split=data.validation_split) for one in sources]
        return [self._in(train_source(one)) for one in sources]

    def _in(self, source: Source) -> list[bool]:
        of_readings = zip(*(self.hashes.of(source, columns) for columns in sorted(self.readings)), strict=True)
        return [not self.rows.isdisjoint(of_record) for of_record in of_readings]


def without(rows: EncodedSet, are_seen: Sequence[Sequence[bool]]) -> EncodedSet:
    """Return a set without the rows whose records are seen; `are_seen` is of the records of each shard."""
    is_new = [not are_seen[shard][rows.shards[shard].ordinals[row]] for shard, row in rows.indices.tolist()]
    return rows.select(np.array(is_new, dtype=bool))


def row_hash(record: ReadResult, columns: Columns) -> bytes:
    """Return a hash of the values of columns, whatever they are called; DataError: the record can't be read."""
    if isinstance(record, Unreadable):
        raise DataError(f"{record.place}  can't be read: {record.reason}")
    texts = (json.dumps(record.fields.get(column), sort_keys=True, default=str) for column in columns)
    return hashlib.blake2b("\0".join(sorted(texts)).encode(errors="surrogatepass"), digest_size=16).digest()


def _columns(data: DataConfig) -> Columns:
    return tuple(sorted(data.columns.values()))
