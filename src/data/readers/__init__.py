"""Data files as records, one after another, so memory does not grow with the file or with what it unpacks to.

What can't be read is reported in its place; nothing is skipped or repaired.
"""

from collections.abc import Callable, Iterator
from functools import partial

from src.config.files import KNOWN, kind_of
from src.data.readers.json import read_json, read_json_lines
from src.data.readers.record import NumberedRow, ReadResult, Record, Unreadable, UnreadableFileError
from src.data.readers.text import GZIP_ERRORS, describe_gzip_damage, read_table, read_text
from src.errors import one_line


def _read_parquet(file: str) -> Iterator[NumberedRow]:
    from src.data.readers.parquet import read_parquet  # imports a library that other files don't need

    return read_parquet(file)


READERS: dict[str, Callable[[str], Iterator[NumberedRow]]] = {
    "jsonl": read_json_lines,
    "json": read_json,
    "csv": partial(read_table, delimiter=","),
    "tsv": partial(read_table, delimiter="\t"),
    "txt": read_text,
    "parquet": _read_parquet,
}


def read_file(file: str) -> Iterator[ReadResult]:
    """Yield the rows of a file in order, an Unreadable for one that is broken. Bad content raises nothing.

    Numbers are lines (in CSV and TSV the one where the row begins); in a .json list and in Parquet they are rows. What
    makes the rest of the file unreadable is yielded last.
    """
    kind = kind_of(file)
    try:
        if kind is None:
            raise UnreadableFileError(None, f"not a kind that is read; these are {KNOWN}")
        for number, row in READERS[kind](file):
            yield Unreadable(file, number, row) if isinstance(row, str) else Record(row, file, number)
    except UnreadableFileError as error:
        yield Unreadable(file, error.number, error.reason)
    except GZIP_ERRORS as error:
        yield Unreadable(file, None, describe_gzip_damage(error, begun=False))
    except OSError as error:
        yield Unreadable(file, None, f"can't be read: {error.strerror or one_line(error)}")
