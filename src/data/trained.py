"""Which rows a run was trained on, by hashes of what it reads of them: the same for every tokenizer and template."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from src.config.files import expand
from src.config.schema import DataConfig, RunConfig
from src.data.cache import ShowProgress
from src.data.dataset import held_out_records, train_source
from src.data.groups import read_groups
from src.data.readers.record import ReadResult, Unreadable
from src.data.sets import EncodedSet
from src.data.sources import Source, file_source
from src.errors import DataError

PROGRESS_RECORDS = 10_000


def trained_rows(config: RunConfig, show_progress: ShowProgress) -> set[bytes]:
    """Return the hashes of the rows that a run may have been trained on: of its train set, whatever came of them.

    So rows count that were dropped, left out of a mixture, or not reached. DataError where they can't be read again.
    """
    data = config.data
    described = data.train_sources()
    sources = {name: train_source(source.data) for name, source in described.items()}
    hashes = [list(_hashes(name, source, described[name].data, show_progress)) for name, source in sources.items()]
    if data.streaming:
        return {one for of_source in hashes for one in of_source}
    groups = None if data.group_column is None else read_groups(sources, data.group_column, show_progress)
    held_out = held_out_records(data, config.seed, [len(of_source) for of_source in hashes], groups)
    pairs = zip(hashes, held_out, strict=True)
    return {one for of_source, is_out in pairs for one, out in zip(of_source, is_out.tolist(), strict=True) if not out}


def rows_of_files(data: DataConfig, files: Sequence[str], show_progress: ShowProgress) -> list[bytes]:
    """Return the hash of each record of a set's files, by its number from 0."""
    return list(_hashes(", ".join(expand(files)), file_source(files, data.limit), data, show_progress))


def rows_of_validation(data: DataConfig, name: str, show_progress: ShowProgress) -> list[list[bytes]]:
    """Return the hash of each record of a validation set by its number in its source, for each source of the set."""
    if name in data.validation_sets():
        return [rows_of_files(data, data.validation_sets()[name], show_progress)]
    described = data.train_sources()  # it is held out of these
    if data.has_hub_validation:
        described = {
            name: replace(one, data=replace(one.data, train_split=data.validation_split))
            for name, one in described.items()
        }
    return [list(_hashes(of, train_source(one.data), one.data, show_progress)) for of, one in described.items()]


def without(rows: EncodedSet, hashes: Sequence[Sequence[bytes]], seen: Collection[bytes]) -> EncodedSet:
    """Return a set without the rows whose records are among those `seen`; `hashes` are of the records of each shard."""
    is_new = [hashes[shard][rows.shards[shard].ordinals[row]] not in seen for shard, row in rows.indices.tolist()]
    return EncodedSet(rows.name, rows.shards, rows.indices[np.array(is_new, dtype=bool)])


def _hashes(name: str, source: Source, data: DataConfig, show_progress: ShowProgress) -> Iterator[bytes]:
    for number, record in enumerate(source.records(), start=1):
        yield row_hash(record, data)
        if number % PROGRESS_RECORDS == 0:
            show_progress(f"{name}: {number:,} rows read")


def row_hash(record: ReadResult, data: DataConfig) -> bytes:
    """Return a hash of the values that a row's format reads, whatever they are called; DataError: it can't be read."""
    if isinstance(record, Unreadable):
        raise DataError(f"{record.place}  can't be read: {record.reason}")
    texts = (json.dumps(record.fields.get(column), sort_keys=True, default=str) for column in data.columns.values())
    return hashlib.blake2b("\0".join(sorted(texts)).encode(errors="surrogatepass"), digest_size=16).digest()
