"""Which rows a run was trained on, by hashes of what it reads of them: the same for every tokenizer and template."""

import hashlib
import json
from collections.abc import Iterator, Sequence

from src.config.files import expand
from src.config.schema import DataConfig, RunConfig
from src.data.cache import ShowProgress
from src.data.dataset import held_out_records, train_source
from src.data.groups import read_groups
from src.data.readers.record import ReadResult, Unreadable
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
