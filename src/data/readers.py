"""How each kind of file becomes rows. What can't be read is told in its place; nothing is skipped or mended.

Rows are read one after the other, so memory does not grow with the file, however much a compressed one unpacks to.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from typing import Any, NamedTuple

from src.config.files import KNOWN, kind_of
from src.errors import one_line, visible
from src.util import human_bytes, plural

MAX_ROW_BYTES = 4 * 2**20
"""A longer row is refused: more likely a file without line ends, or a quote that nobody closed."""

MAX_LINE_BYTES = 64 * 2**20
"""Nothing is read behind a longer line, or a longer row of a .json list."""

MAX_BLANK_BYTES = 4 * 2**20
"""Nothing is read behind more lines without a row, or more white space."""

MAX_UNPACKED_BYTES, MAX_UNPACKED_TIMES = 2**30, 500
"""Nothing is read behind so many bytes that a compressed file unpacks to, where that is so many times its size."""

JSON_CHUNK_BYTES = 2**20
PARQUET_BATCH_ROWS = 100
PARQUET_BATCH_BYTES = 64 * 2**20
"""What a batch of rows may unpack to."""
PARQUET_PIECE_BYTES = 4 * 2**20
"""What of a batch becomes rows at once."""
PARQUET_BUFFER_BYTES = 2**20

ENTRY_BYTES = 64
"""What an entry of a list or object takes in memory, besides its text."""
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


class Record(NamedTuple):
    """One row as it was read, with the source and the number of its line or row, counted from 1, for messages."""

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        return visible(f"{self.source}:{self.number}", is_line=True)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that can't be read, or with no number a whole file, and why."""

    source: str
    number: int | None
    reason: str

    @property
    def place(self) -> str:
        return visible(self.source if self.number is None else f"{self.source}:{self.number}", is_line=True)


Row = Record | Unreadable


class _Refused(ValueError):
    """A row can't be read, for the reason given."""


class _FileEnds(Exception):
    """Nothing behind this line or row can be read; number is None where it is the file as a whole."""

    def __init__(self, number: int | None, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


def read_file(file: str) -> Iterator[Row]:
    """Yield the rows of a file in their order, each as a Record or an Unreadable. Bad content raises nothing.

    Numbers are lines (of CSV and TSV the one where the row begins), of a .json list and of Parquet they are rows.
    What makes the rest of the file unreadable is yielded last.
    """
    kind = kind_of(file)
    try:
        if kind is None:
            raise _FileEnds(None, f"not a kind that is read; these are {KNOWN}")
        yield from READERS[kind](file)
    except _FileEnds as end:
        yield Unreadable(file, end.number, end.reason)
    except GZIP_ERRORS as error:
        yield Unreadable(file, None, _gzip_damage(error, begun=False))
    except OSError as error:
        yield Unreadable(file, None, f"can't be read: {error.strerror or one_line(error)}")


# Bytes and lines

_BOM = b"\xef\xbb\xbf"
_BOM_FOUND = "begins with a byte order mark; save it as UTF-8 without one"
_UTF16 = "looks like UTF-16; save it as UTF-8"
_DISGUISES = {
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"\x1f\x8b": "looks gzipped; then its name has to end in .gz",
    b"PK\x03\x04": "looks like a spreadsheet or a zip archive; save it as one of the kinds that are read",
    b"version https://git-lfs.": "a Git LFS pointer, not the data; `git lfs pull` fetches that",
}
_TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB; is this really one row?"
_ENDLESS = f"longer than {MAX_LINE_BYTES // 2**20} MiB, so nothing behind it is read; is this really one row?"
_BLANK_FILE = f"more than {MAX_BLANK_BYTES // 2**20} MiB without a row, so nothing behind it is read"


class _Unpacked:
    """How much a file has unpacked to."""

    def __init__(self, file: str) -> None:
        self._most = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_TIMES * os.path.getsize(file))
        self._size = 0

    def add(self, size: int, number: int | None) -> None:
        """Count bytes of this line or row.

        Raises:
            _FileEnds: where they are too many.
        """
        self._size += size
        if self._size > self._most:
            raise _FileEnds(
                number,
                f"the file unpacks to more than {human_bytes(MAX_UNPACKED_BYTES)} and {MAX_UNPACKED_TIMES} times its "
                "size, so nothing behind this is read; if that is meant, store it unpacked",
            )


@contextmanager
def _opened(file: str) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open a file, unpacking .gz, and refuse it where its first bytes are not what its name promises."""
    zipped = file.lower().endswith(".gz")
    with gzip.open(file, "rb") if zipped else open(file, "rb") as stream:
        head = stream.peek(64)
        if zipped and not head and os.path.getsize(file) == 0:
            raise EOFError
        for begin, reason in _DISGUISES.items():
            if head.startswith(begin):
                raise _FileEnds(None, reason)
        if (head[0:4:2] == b"\0\0") != (head[1:4:2] == b"\0\0"):  # ASCII in UTF-16 without a mark
            raise _FileEnds(None, _UTF16)
        yield stream


def _gzip_damage(error: Exception, *, begun: bool) -> str:
    if isinstance(error, EOFError):
        return "cut off: the gzip data ends too early"
    if not str(error).startswith("Not a gzipped file"):
        return f"damaged gzip data: {one_line(error)}"
    return "something that is not gzip stands behind the gzip data" if begun else "not gzip, though its name says so"


def _lines(file: str) -> Iterator[tuple[int, str, str]]:
    """Yield each line with its number, its text with the line end, and what is wrong with it ('' for nothing).

    Where something is wrong the text is only good for telling where a record ends; of a line too long it is ''.
    """
    with _opened(file) as stream:
        number = blank = 0
        unpacked = _Unpacked(file) if isinstance(stream, gzip.GzipFile) else None
        try:
            while line := stream.readline(MAX_ROW_BYTES + 2):  # 2 for the line end
                number += 1
                if unpacked is not None:
                    unpacked.add(len(line), number)
                fault = ""
                blank = blank + len(line) if line.isspace() else 0
                if blank > MAX_BLANK_BYTES:
                    raise _FileEnds(number, _BLANK_FILE)
                if len(line) > MAX_ROW_BYTES and len(line.rstrip(b"\r\n")) > MAX_ROW_BYTES:
                    length = len(line)
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_ROW_BYTES)
                        length += len(line)
                        if unpacked is not None:
                            unpacked.add(len(line), number)
                        if length > MAX_LINE_BYTES:
                            raise _FileEnds(number, _ENDLESS)
                    yield number, "", _TOO_LONG
                    continue
                if b"\0" in line:
                    fault = _nul(line)
                elif number == 1 and line.startswith(_BOM):
                    fault = _BOM_FOUND
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    text, fault = line.decode(errors="replace"), fault or _not_utf8(error)
                yield number, text, fault
        except GZIP_ERRORS as error:
            raise _FileEnds(number + 1, _gzip_damage(error, begun=True)) from error


def _twice(names: Sequence[str]) -> str:
    """Quote the name that is there most often; '' where each is there once."""
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    return repr(_short(name)) if times > 1 else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _nul(content: bytes, before: int = 0) -> str:
    return f"a NUL byte (byte {before + content.index(0) + 1}): not a text"


def _not_utf8(error: UnicodeDecodeError, before: int = 0) -> str:
    return f"not UTF-8 (byte {before + error.start + 1}): 0x{error.object[error.start]:02x}"


# Plain text


def _text_lines(file: str) -> Iterator[Row]:
    r"""Yield each line that is not blank as {"text": …}; "\n" and "\r\n" end a line, a lone "\r" stays in it."""
    for number, text, fault in _lines(file):
        if fault:
            yield Unreadable(file, number, fault)
        elif text.strip():
            body = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
            yield Record({"text": body}, file, number)


# JSON

_BLANK = " \t\r\n"
_skip_blanks = re.compile(f"[{_BLANK}]*").match
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MORE = "something stands behind the object; one object a line is needed"
_LIST_NEEDED = "a list of rows is needed: [{…}, …], or one object a line"
_JSON_NAMES = {list: "list", str: "text", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Refused(f"{_twice([name for name, _ in pairs])} stands twice in one object")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"{_short(text)} is too large a number")
    return value


def _refuse(text: str) -> float:
    raise _Refused(f"{text} is no JSON")


_decode = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_refuse).raw_decode
_decode_anything = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode  # to find where a refused row ends


def _fields(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Parse the object that begins at start, and give it with the position behind it.

    Raises:
        JSONDecodeError: not JSON.
        _Refused: JSON, but not an object that can be taken as it is.
    """
    try:
        fields, end = _decode(text, start)
        if not isinstance(fields, dict):
            raise _Refused(f"a JSON object is needed, this is a {_JSON_NAMES[type(fields)]}")
        if text.find("\\u", start, end) >= 0 and _HALF.search(text, start, end):
            json.dumps(fields, ensure_ascii=False).encode()
    except (json.JSONDecodeError, _Refused):
        raise
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise _Refused(f"{half} is half a character (a surrogate without its other half)") from error
    except RecursionError as error:
        raise _Refused("nested too deep") from error
    except ValueError as error:  # Python's limit on digits
        raise _Refused("a whole number with too many digits") from error
    return fields, end


def _json_lines(file: str) -> Iterator[Row]:
    """Yield one row a line; blank lines are no rows."""
    for number, text, fault in _lines(file):
        if fault:
            yield Unreadable(file, number, fault)
            continue
        body = text.rstrip(_BLANK)
        if not body:
            continue
        try:
            fields, end = _fields(body, len(body) - len(body.lstrip(_BLANK)))
        except json.JSONDecodeError as error:
            yield Unreadable(file, number, f"{_not_json(error)}, column {error.colno}")
        except _Refused as refused:
            yield Unreadable(file, number, str(refused))
        else:
            if end == len(body):
                yield Record(fields, file, number)
            else:
                yield Unreadable(file, number, f"{_MORE} (column {end + 1})")


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not JSON: {error.msg.removesuffix(' at')}"


def _json(file: str) -> Iterator[Row]:
    """Yield the rows of a list, or of JSON Lines where the file begins with an object."""
    with _opened(file) as stream:
        head = stream.peek(4096).removeprefix(_BOM).lstrip()
        if not head.startswith(b"{"):
            yield from _json_list(file, _JsonText(file, stream))
            return
    rows = _json_lines(file)
    first = next(rows)
    if isinstance(first, Unreadable) and first.reason.startswith("not JSON"):
        raise _FileEnds(first.number, f"{_LIST_NEEDED} ({first.reason})")
    yield first
    yield from rows


class _JsonText:
    """The text of a file, of which only what is being parsed is in memory: `text` from `position` on.

    Raises:
        _FileEnds: from each method, where the file can't be read on.
    """

    def __init__(self, file: str, stream: BufferedReader | gzip.GzipFile) -> None:
        self._stream = stream
        self._unpacked = _Unpacked(file)
        self._waiting = b""  # the beginning of a character
        self._bytes = self._lines = 0  # before those that wait
        self._line, self._column = 1, 0  # where the text begins
        self._fault: _FileEnds | None = None  # of what comes after the text
        self.text, self.position, self.is_whole = "", 0, False

    def read_on(self) -> None:
        """Let go of the text before the position, and read at least as much as is left."""
        passed = self.text[: self.position]
        if (newlines := passed.count("\n")) > 0:
            self._line, self._column = self._line + newlines, len(passed) - passed.rindex("\n") - 1
        else:
            self._column += len(passed)
        left, self.position = self.text[self.position :], 0
        if self._fault is not None:
            raise self._fault
        if len(left) > MAX_LINE_BYTES:
            raise _FileEnds(None, _ENDLESS)
        try:
            chunk = self._stream.read(max(JSON_CHUNK_BYTES, len(left)))
        except GZIP_ERRORS as error:
            raise _FileEnds(None, _gzip_damage(error, begun=True)) from error
        self._unpacked.add(len(chunk), None)
        self.is_whole = not chunk
        self.text = left + self._decoded(self._waiting + chunk)

    def _decoded(self, content: bytes) -> str:
        """Decode bytes up to the first that is no text; what stands before it can still be read."""
        if not self._bytes and content.startswith(_BOM):
            raise _FileEnds(None, _BOM_FOUND)
        if 0 in content:
            self._fault = _FileEnds(None, _nul(content, self._bytes))
            content = content[: content.index(0)]
        try:
            text, used = codecs.utf_8_decode(content, "strict", self.is_whole)
        except UnicodeDecodeError as error:
            line = self._lines + content.count(b"\n", 0, error.start) + 1
            self._fault = _FileEnds(None, f"{_not_utf8(error, self._bytes)}, in line {line}")
            text, used = codecs.utf_8_decode(content[: error.start])
        self._waiting = content[used:]
        self._bytes += used
        self._lines += text.count("\n")
        return text

    def skip_blanks(self) -> str:
        """Move behind white space; return the character there, '' at the end of the file."""
        skipped = 0
        while True:
            blanks = _skip_blanks(self.text, self.position)
            assert blanks is not None
            skipped += blanks.end() - self.position
            self.position = blanks.end()
            if self.position < len(self.text) or self.is_whole:
                return self.text[self.position : self.position + 1]
            if skipped > MAX_BLANK_BYTES:
                raise _FileEnds(None, _BLANK_FILE)
            self.read_on()

    def row(self, file: str, number: int) -> Row:
        """Parse the row that begins here, and move behind it.

        Raises:
            JSONDecodeError: where it is not JSON.
        """
        while True:
            try:
                row, end = _list_row(file, number, self.text, self.position)
            except json.JSONDecodeError as error:
                if self.is_whole or not _is_cut(error):
                    raise
            else:
                if end < len(self.text) or self.is_whole:
                    self.position = end
                    return row
            self.read_on()

    def place(self, error: json.JSONDecodeError) -> str:
        """Say where in the file an error is."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return f"line {self._line + error.lineno - 1}, column {column}"


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Return whether a text may only be no JSON because it ends too early, within a string or a word."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("-Infinity")


def _json_list(file: str, text: _JsonText) -> Iterator[Row]:
    if not (first := text.skip_blanks()):
        return
    if first != "[":
        raise _FileEnds(None, _LIST_NEEDED)
    text.position += 1
    number, following = 0, text.skip_blanks()
    try:
        while number or following != "]":
            number += 1
            yield text.row(file, number)
            if (following := text.skip_blanks()) == "]":
                break
            if following != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position)
            text.position += 1
            text.skip_blanks()
    except json.JSONDecodeError as error:
        raise _FileEnds(number, f"{_not_json(error)}, {text.place(error)}") from error
    except _FileEnds as end:
        raise _FileEnds(number if end.reason in (_ENDLESS, _BLANK_FILE) else end.number, end.reason) from end
    text.position += 1
    if text.skip_blanks():
        raise _FileEnds(number or None, "something stands behind the end of the list")


def _list_row(file: str, number: int, text: str, start: int) -> tuple[Row, int]:
    try:
        fields, end = _fields(text, start)
    except _Refused as refused:
        try:
            return Unreadable(file, number, str(refused)), _decode_anything(text, start)[1]
        except RecursionError:
            raise _FileEnds(number, str(refused)) from refused
    if (end - start) * 4 > MAX_ROW_BYTES and _text_bytes(fields) > MAX_ROW_BYTES:
        return Unreadable(file, number, _TOO_LONG), end
    return Record(fields, file, number), end


def _text_bytes(value: Any) -> int:
    """Add up the sizes of all texts in a value, names of fields apart."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list | tuple) else 0


def size_of(record: Record) -> int:
    """Return what a record's fields take in memory, roughly, in bytes: texts what they take as UTF-8."""
    size, waiting = ENTRY_BYTES * len(record.fields), []
    for value in record.fields.values():
        if type(value) is str:
            size += len(value) if value.isascii() else 3 * len(value)
        else:
            waiting.append(value)
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one) if one.isascii() else 3 * len(one)
        elif isinstance(one, dict):
            size += ENTRY_BYTES * len(one)
            waiting += one.values()
        elif isinstance(one, list | tuple):
            size += ENTRY_BYTES * len(one)
            waiting += one
        elif isinstance(one, bytes):
            size += len(one)
    return size


# CSV and TSV


class _TableText:
    """The lines that a csv.reader is fed with, and what is known of the record that it is reading."""

    def __init__(self, file: str) -> None:
        self.lines = _lines(file)
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """Forget the last record; the next begins on the next line."""
        self.start, self.characters, self.fault = self.number + 1, 0, ""

    def __iter__(self) -> _TableText:
        return self

    def __next__(self) -> str:
        self.number, text, fault = next(self.lines)
        self.fault = self.fault or fault
        self.characters += len(text)
        if self.characters > MAX_ROW_BYTES and self.number > self.start:
            raise _FileEnds(self.start, f"{_TOO_LONG} Perhaps a quote is never closed")
        return text


def _table(delimiter: str) -> Callable[[str], Iterator[Row]]:
    """Make the reader of tables whose first record names the columns. All fields are texts."""

    def rows(file: str) -> Iterator[Row]:
        csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))
        text = _TableText(file)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            text.begin()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells, text.fault = [], text.fault or _not_a_table(error)
            if text.fault and not header:
                raise _FileEnds(text.start, text.fault)
            if text.fault:
                yield Unreadable(file, text.start, text.fault)
            elif cells is None:
                return
            elif not header:
                header = cells
                _check_header(header, text.start)
            elif len(cells) == len(header):
                yield Record(dict(zip(header, cells, strict=True)), file, text.start)
            elif cells:
                many = plural(len(cells), "field")
                yield Unreadable(file, text.start, f"{many}, the header has {len(header)}")

    return rows


def _not_a_table(error: csv.Error) -> str:
    if str(error) == "unexpected end of data":
        return "a quote is opened in this record and never closed"
    if str(error).startswith("new-line character"):
        return "a carriage return inside a field without quotes"
    return f"wrong quotes: {error}"


def _check_header(header: list[str], line: int) -> None:
    for column, name in enumerate(header, start=1):
        if not name.strip():
            raise _FileEnds(line, f"column {column} of the header has no name")
    if again := _twice(header):
        raise _FileEnds(line, f"the header has {again} twice")


# Parquet


def _parquet(file: str) -> Iterator[Row]:
    """Yield rows in batches, each column of a row group through a small buffer."""
    import pyarrow as arrow  # heavy, and only this needs it
    import pyarrow.parquet as parquet

    # pre_buffer, on by default, would hold a whole row group, which often is the whole file
    opened = partial(
        parquet.ParquetFile,
        file,
        buffer_size=PARQUET_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
    )
    number, unpacked = 0, _Unpacked(file)
    with _opened(file):
        pass
    try:
        with opened() as plain:
            if again := _twice(plain.schema_arrow.names):
                raise _FileEnds(None, f"two columns are called {again}")
            for i in range(plain.metadata.num_row_groups):
                columns = _columns(file, plain.metadata, i)
                rows = _rows_at_once(columns, number + 1)
                repeated = [column.path for column in columns if column.repeats_in_a_row]
                with opened(read_dictionary=repeated) if repeated else nullcontext(plain) as table:
                    for batch in table.iter_batches(batch_size=rows, row_groups=[i]):
                        sizes = _sizes_of_rows(batch, plain.schema_arrow)
                        kept = batch.nbytes if sizes is None else sum(min(size, MAX_ROW_BYTES) for size in sizes)
                        unpacked.add(kept, number + 1)
                        for row in _batch_rows(batch, file, number, plain.schema_arrow, sizes):
                            number += 1
                            yield row
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _FileEnds(number + 1 if number else None, f"not Parquet, or damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class _Column:
    """What is known of a column of a row group before it is read.

    `size` is what it stores, uncompressed, in bytes; `largest` the most that one value can take, `values_per_row` how
    many a row has on average. Where `repeats_in_a_row` a row may hold a large value very often that is stored once.
    """

    path: str
    num_values: int
    values_per_row: int
    size: int
    largest: int
    repeats_in_a_row: bool


def _columns(file: str, metadata: Any, group: int) -> list[_Column]:
    """Describe the columns of a row group."""
    columns, rows = [], metadata.row_group(group)
    with open(file, "rb") as stream:
        for i in range(rows.num_columns):
            column, schema = rows.column(i), metadata.schema.column(i)
            size, num_values = column.total_uncompressed_size, max(1, column.num_values)
            dictionary = _dictionary_bytes(stream, column, size)
            largest = size if "DELTA_BYTE_ARRAY" in column.encodings else max(dictionary, size // num_values)
            columns.append(
                _Column(
                    column.path_in_schema,
                    num_values,
                    -(-num_values // max(1, rows.num_rows)),
                    size,
                    largest if column.physical_type.endswith("BYTE_ARRAY") else 16,
                    schema.max_repetition_level > 0
                    and column.physical_type == "BYTE_ARRAY"
                    and dictionary * num_values > PARQUET_BATCH_BYTES
                    and size - dictionary < MOST_OF_AN_INDEX * num_values,
                )
            )
    return columns


MOST_OF_AN_INDEX = 16
"""Bytes of a value that is stored as the number of an entry of the dictionary."""


def _dictionary_bytes(stream: BufferedReader, column: Any, most: int) -> int:
    """Return the size of a column's dictionary as the header of its page has it; 0 where there is none.

    A value that is stored once, in the dictionary, may stand in every row.

    Args:
        most: returned where the header can't be read.
    """
    if not any(encoding.endswith("_DICTIONARY") for encoding in column.encodings):
        return 0
    stream.seek(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)
    header = stream.read(16)
    # Thrift's compact protocol: field 1, the kind of page, and field 2, its size, as zigzag numbers of 7 bits a byte
    if header[:3] != b"\x15\x04\x15":
        return most
    size = 0
    for i, byte in enumerate(header[3:8]):
        size |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return size >> 1
    return most


def _rows_at_once(columns: Sequence[_Column], first: int) -> int:
    """Return how many rows of a group are read together, so that they fit into memory whatever is in them.

    Args:
        first: the number of the group's first row.
    Raises:
        _FileEnds: where its rows can't be read in any number.
    """
    most = 1
    for column in columns:
        if column.size / column.num_values > MAX_LINE_BYTES:
            raise _FileEnds(first, _ENDLESS)
        most = max(most, (4 if column.repeats_in_a_row else column.largest) * column.values_per_row)
    return max(1, min(PARQUET_BATCH_ROWS, PARQUET_BATCH_BYTES // most))


def _sizes_of_rows(batch: Any, schema: Any) -> list[int] | None:
    """Return what each row of a batch takes in memory, roughly, in bytes; None where all of them together are small."""
    is_plain = batch.schema.equals(schema) and not any(map(_has_dictionary, schema.types))
    is_small = is_plain and batch.nbytes <= MAX_ROW_BYTES
    return None if is_small or not batch.num_columns else sum(map(_sizes, batch.columns)).tolist()


def _batch_rows(batch: Any, file: str, before: int, schema: Any, sizes: list[int] | None) -> Iterator[Row]:
    """Yield the rows of a batch; few of them are Python values at a time, and none that is far too long.

    Args:
        before: how many rows come before it.
        schema: of the rows, without dictionaries that only the reading made.
        sizes: of its rows, see `_sizes_of_rows`.
    """
    if sizes is None:
        yield from _parquet_rows(batch, file, before, schema, is_small=True)
        return
    begin = waiting = 0
    for i, size in enumerate(sizes):
        if i > begin and waiting + size > PARQUET_PIECE_BYTES:
            yield from _parquet_rows(batch.slice(begin, i - begin), file, before + begin, schema)
            begin, waiting = i, 0
        waiting += size
        if size > MAX_LINE_BYTES:
            yield Unreadable(file, before + i + 1, _TOO_LONG)
            begin, waiting = i + 1, 0
    if begin < len(batch):
        yield from _parquet_rows(batch.slice(begin), file, before + begin, schema)


def _has_dictionary(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return True
    return types.is_nested(kind) and any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _sizes(array: Any) -> Any:
    """Return what each value of a column takes in memory, roughly, in bytes, [rows]."""
    import numpy as np
    from pyarrow import compute, types

    kind = array.type
    sizes = np.full(len(array), ENTRY_BYTES, dtype=np.int64)
    if types.is_dictionary(kind):
        of_entries = np.append(_sizes(array.dictionary), 0)  # the last stands for null
        sizes += of_entries[array.indices.fill_null(len(array.dictionary)).to_numpy(zero_copy_only=False)]
    elif types.is_struct(kind):
        sizes += sum(map(_sizes, array.flatten()))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        inner = [array.keys, array.items] if types.is_map(kind) else [array.values]
        until = np.append(0, np.cumsum(sum(map(_sizes, inner))))
        offsets = array.offsets.to_numpy()
        sizes += until[offsets[1:]] - until[offsets[:-1]]
    elif types.is_fixed_size_list(kind):
        inner = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        sizes += _sizes(inner).reshape(len(array), -1).sum(axis=1)
    elif str(kind) in ("string", "large_string", "binary", "large_binary"):
        sizes += compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return sizes


def _parquet_rows(batch: Any, file: str, before: int, schema: Any, *, is_small: bool = False) -> Iterator[Row]:
    try:
        rows = (batch if batch.schema.equals(schema) else batch.cast(schema)).to_pylist()
    except (ValueError, TypeError, OverflowError) as error:
        if len(batch) > 1:
            for i in range(len(batch)):
                yield from _parquet_rows(batch.slice(i, 1), file, before + i, schema)
        else:
            reason = _not_utf8(error) if isinstance(error, UnicodeDecodeError) else one_line(error)
            yield Unreadable(file, before + 1, reason)
        return
    for number, fields in enumerate(rows, start=before + 1):
        if is_small or _text_bytes(fields) <= MAX_ROW_BYTES:
            yield Record(fields, file, number)
        else:
            yield Unreadable(file, number, _TOO_LONG)


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _table(","),
    "tsv": _table("\t"),
    "txt": _text_lines,
    "parquet": _parquet,
}
