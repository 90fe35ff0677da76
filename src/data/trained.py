"""Which rows a run was trained on, by hashes of what it reads of them: the same for every tokenizer and template."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
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


class RowHashes:
    """Reads the hashes of records, of each source once."""

    def __init__(self, show_progress: ShowProgress) -> None:
        self._show_progress = show_progress
        self._known: dict[tuple[Source, tuple[str, ...]], list[bytes]] = {}

    def trained(self, config: RunConfig) -> set[bytes]:
        """Return the hashes of the rows that a run may have been trained on: of its train set, whatever came of them.

        So rows count that were dropped, left out of a mixture, or not reached. DataError: they can't be read again.
        """
        data = config.data
        described = data.train_sources()
        hashes = [self._of(train_source(source.data), source.data) for source in described.values()]
        if data.streaming:
            return set(chain.from_iterable(hashes))
        sources = {name: train_source(source.data) for name, source in described.items()}
        groups = None if data.group_column is None else read_groups(sources, data.group_column, self._show_progress)
        held_out = held_out_records(data, config.seed, [len(of_source) for of_source in hashes], groups)
        pairs = zip(hashes, held_out, strict=True)
        return set(chain.from_iterable(compress(of_source, ~is_out) for of_source, is_out in pairs))

    def of_files(self, data: DataConfig, files: Sequence[str]) -> list[bytes]:
        """Return the hash of each record of a set's files, by its number from 0."""
        return self._of(file_source(files, data.limit), data)

    def of_validation(self, data: DataConfig, name: str) -> list[list[bytes]]:
        """Return the hash of each record of a validation set by its number in its source, for each source of it."""
        if name in data.validation_sets():
            return [self.of_files(data, data.validation_sets()[name])]
        sources = [one.data for one in data.train_sources().values()]  # it is held out of these
        if data.has_hub_validation:
            sources = [replace(one, train_split=data.validation_split) for one in sources]
        return [self._of(train_source(one), one) for one in sources]

    def _of(self, source: Source, data: DataConfig) -> list[bytes]:
        key = source, tuple(data.columns.values())
        if key not in self._known:
            self._known[key] = list(self._read(source, data))
        return self._known[key]

    def _read(self, source: Source, data: DataConfig) -> Iterator[bytes]:
        for number, record in enumerate(source.records(), start=1):
            yield row_hash(record, data)
            if number % PROGRESS_RECORDS == 0:
                self._show_progress(f"{source.name}: {number:,} rows read")


def without(rows: EncodedSet, hashes: Sequence[Sequence[bytes]], seen: Collection[bytes]) -> EncodedSet:
    """Return a set without the rows whose records are among those `seen`; `hashes` are of the records of each shard."""
    is_new = [hashes[shard][rows.shards[shard].ordinals[row]] not in seen for shard, row in rows.indices.tolist()]
    return EncodedSet(rows.name, rows.shards, rows.indices[np.array(is_new, dtype=bool)])


def row_hash(record: ReadResult, data: DataConfig) -> bytes:
    """Return a hash of the values that a row's format reads, whatever they are called; DataError: it can't be read."""
    if isinstance(record, Unreadable):
        raise DataError(f"{record.place}  can't be read: {record.reason}")
    texts = (json.dumps(record.fields.get(column), sort_keys=True, default=str) for column in data.columns.values())
    return hashlib.blake2b("\0".join(sorted(texts)).encode(errors="surrogatepass"), digest_size=16).digest()
