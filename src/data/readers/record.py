"""A record as it is read from a file, what is read in its place where it is broken, and how large records may be."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from src.errors import visible
from src.util import human_bytes

MAX_ROW_BYTES = 4 * 2**20  # a longer row is refused: rather a file without line ends, or a quote that is never closed
MAX_LINE_BYTES = 64 * 2**20  # reading stops at a longer line, or a longer row of a .json list
MAX_BLANK_BYTES = 4 * 2**20  # reading stops after more blank lines or white space in a row
MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 2**30, 500
"""Reading a compressed file stops where it unpacks to more than both: so many bytes, and so many times its size."""
ENTRY_BYTES = 64  # memory of an entry of a list or object, besides its text

ROW_TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB; is this really one row?"
LINE_TOO_LONG = f"longer than {MAX_LINE_BYTES // 2**20} MiB, so nothing after it is read; is this really one row?"
TOO_MUCH_BLANK = f"more than {MAX_BLANK_BYTES // 2**20} MiB without a row, so nothing after it is read"


class Record(NamedTuple):
    """The fields of one row, with its source and the number of its line or row there, counted from 1."""

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        return place_of(self.source, self.number)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that can't be read, or without a number a whole file, and the reason."""

    source: str
    number: int | None
    reason: str

    @property
    def place(self) -> str:
        return place_of(self.source, self.number)


ReadResult = Record | Unreadable
NumberedRow = tuple[int, dict[str, Any] | str]
"""What the reader of a kind of file yields: the number of a line or row, and its fields, or why it can't be read."""


class InvalidRecordError(ValueError):
    """One row can't be read; those after it can."""


class UnreadableFileError(Exception):
    """Nothing from this line or row on can be read; the number is None for the file as a whole."""

    def __init__(self, number: int | None, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


class UnpackedSize:
    """Counts the bytes that a file unpacks to."""

    def __init__(self, file: str) -> None:
        self._limit = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * os.path.getsize(file))
        self._size = 0

    def add(self, size: int, number: int | None) -> None:
        """Count the bytes of a line or row, by its number; UnreadableFileError where the file unpacks to too many."""
        self._size += size
        if self._size > self._limit:
            most = f"{human_bytes(MAX_UNPACKED_BYTES)} and {MAX_UNPACKED_RATIO} times its size"
            remedy = "so nothing after this is read; if that is meant, store it unpacked"
            raise UnreadableFileError(number, f"the file unpacks to more than {most}, {remedy}")


def place_of(source: str, number: int | None) -> str:
    """Return a row's place as FILE:LINE, for messages."""
    return visible(source if number is None else f"{source}:{number}", is_line=True)


def text_bytes(value: Any) -> int:
    """Return the total size of all texts in a value, without the names of fields."""
    if isinstance(value, str | bytes):
        return len(value.encode() if isinstance(value, str) else value)
    values = value.values() if isinstance(value, dict) else value
    return sum(map(text_bytes, values)) if isinstance(value, dict | list | tuple) else 0


def memory_of(record: Record) -> int:
    """Estimate the memory of a record's fields in bytes; texts count as UTF-8."""
    size, stack = 0, [record.fields]
    while stack:
        value: Any = stack.pop()
        if isinstance(value, str):
            size += len(value) if value.isascii() else 3 * len(value)
        elif isinstance(value, bytes):
            size += len(value)
        elif isinstance(value, dict | list | tuple):
            size += ENTRY_BYTES * len(value)
            stack += value.values() if isinstance(value, dict) else value
    return size


def repeated(names: Sequence[str]) -> str:
    """Return the most frequent name, quoted; '' where none occurs twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    return repr(shortened(name)) if count > 1 else ""


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
