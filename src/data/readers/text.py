"""Files of lines: plain text, CSV and TSV, gzipped or not."""

import csv
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Self

from src.data.readers import record as limits
from src.data.readers.record import NumberedRow, UnpackedSize, UnreadableFileError, repeated
from src.errors import one_line
from src.util import plural

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
BOM = b"\xef\xbb\xbf"
BOM_FOUND = "begins with a byte order mark; save it as UTF-8 without one"
UTF16_FOUND = "looks like UTF-16; save it as UTF-8"
OTHER_FORMATS = {
    b"\xff\xfe": UTF16_FOUND,
    b"\xfe\xff": UTF16_FOUND,
    b"\x1f\x8b": "looks gzipped; then its name has to end in .gz",
    b"PK\x03\x04": "looks like a spreadsheet or a zip archive; save it as one of the kinds that are read",
    b"version https://git-lfs.": "a Git LFS pointer, not the data; `git lfs pull` fetches that",
}
"""First bytes of files that are not what their names say."""

BinaryStream = BufferedReader | gzip.GzipFile


@contextmanager
def open_data(file: str) -> Iterator[BinaryStream]:
    """Open a file, unpacking .gz; UnreadableFileError where its first bytes are those of another format."""
    is_gzip = file.lower().endswith(".gz")
    with gzip.open(file, "rb") if is_gzip else open(file, "rb") as stream:
        head = stream.peek(64)
        if is_gzip and not head and os.path.getsize(file) == 0:
            raise EOFError
        for magic, reason in OTHER_FORMATS.items():
            if head.startswith(magic):
                raise UnreadableFileError(None, reason)
        if (head[0:4:2] == b"\0\0") != (head[1:4:2] == b"\0\0"):  # ASCII in UTF-16 without a mark
            raise UnreadableFileError(None, UTF16_FOUND)
        yield stream


def describe_gzip_damage(error: Exception, *, begun: bool) -> str:
    """Describe an error of gzip, which has `begun` where some of the file could be unpacked."""
    if isinstance(error, EOFError):
        return "cut off: the gzip data ends too early"
    if not str(error).startswith("Not a gzipped file"):
        return f"damaged gzip data: {one_line(error)}"
    return "something that is not gzip follows the gzip data" if begun else "not gzip, though its name says so"


def describe_nul(content: bytes, offset: int = 0) -> str:
    return f"a NUL byte (byte {offset + content.index(0) + 1}): not a text"


def describe_not_utf8(error: UnicodeDecodeError, offset: int = 0) -> str:
    return f"not UTF-8 (byte {offset + error.start + 1}): 0x{error.object[error.start]:02x}"


def read_lines(file: str) -> Iterator[tuple[int, str, str]]:
    """Yield each line's number, its text with the line end, and its fault ('' for none).

    The text of a faulty line only shows where a record ends; that of a line that is too long is ''.
    """
    with open_data(file) as stream:
        number = num_blank = 0
        unpacked = UnpackedSize(file)
        try:
            while line := stream.readline(limits.MAX_ROW_BYTES + 2):  # 2 for the line end
                number += 1
                unpacked.add(len(line), number)
                num_blank = num_blank + len(line) if line.isspace() else 0
                if num_blank > limits.MAX_BLANK_BYTES:
                    raise UnreadableFileError(number, limits.TOO_MUCH_BLANK)
                if len(line) > limits.MAX_ROW_BYTES and len(line.rstrip(b"\r\n")) > limits.MAX_ROW_BYTES:
                    _skip_line(stream, line, number, unpacked)
                    yield number, "", limits.ROW_TOO_LONG
                else:
                    yield number, *_decode_line(line, is_first=number == 1)
        except GZIP_ERRORS as error:
            raise UnreadableFileError(number + 1, describe_gzip_damage(error, begun=True)) from error


def _skip_line(stream: BinaryStream, line: bytes, number: int, unpacked: UnpackedSize) -> None:
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = stream.readline(limits.MAX_ROW_BYTES)
        length += len(line)
        unpacked.add(len(line), number)
        if length > limits.MAX_LINE_BYTES:
            raise UnreadableFileError(number, limits.LINE_TOO_LONG)


def _decode_line(line: bytes, *, is_first: bool) -> tuple[str, str]:
    fault = BOM_FOUND if is_first and line.startswith(BOM) else ""
    if b"\0" in line:
        fault = describe_nul(line)
    try:
        return line.decode(), fault
    except UnicodeDecodeError as error:
        return line.decode(errors="replace"), fault or describe_not_utf8(error)


def read_text(file: str) -> Iterator[NumberedRow]:
    r"""Yield each line that is not blank as {"text": …}; "\n" and "\r\n" end a line, a lone "\r" stays in it."""
    for number, text, fault in read_lines(file):
        if fault:
            yield number, fault
        elif text.strip():
            body = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
            yield number, {"text": body}


class _TableLines:
    """The lines that feed a csv.reader, and the first line, size and fault of the record that it is reading."""

    def __init__(self, file: str) -> None:
        self._lines = read_lines(file)
        self._number = 0
        self.begin_record()

    def begin_record(self) -> None:
        self.start, self.num_characters, self.fault = self._number + 1, 0, ""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self._number, text, fault = next(self._lines)
        self.fault = self.fault or fault
        self.num_characters += len(text)
        if self.num_characters > limits.MAX_ROW_BYTES and self._number > self.start:
            raise UnreadableFileError(self.start, f"{limits.ROW_TOO_LONG} Perhaps a quote is never closed")
        return text


def read_table(file: str, delimiter: str) -> Iterator[NumberedRow]:
    """Yield the records of a table whose first one names the columns. All fields are texts."""
    csv.field_size_limit(max(limits.MAX_ROW_BYTES, csv.field_size_limit()))
    lines = _TableLines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        lines.begin_record()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells, lines.fault = [], lines.fault or _describe_csv_error(error)
        if lines.fault and not header:
            raise UnreadableFileError(lines.start, lines.fault)
        if lines.fault:
            yield lines.start, lines.fault
        elif cells is None:
            return
        elif not header:
            header = cells
            _check_header(header, lines.start)
        elif len(cells) == len(header):
            yield lines.start, dict(zip(header, cells, strict=True))
        elif cells:
            yield lines.start, f"{plural(len(cells), 'field')}, the header has {len(header)}"


def _describe_csv_error(error: csv.Error) -> str:
    if str(error) == "unexpected end of data":
        return "a quote is opened in this record and never closed"
    if str(error).startswith("new-line character"):
        return "a carriage return inside a field without quotes"
    return f"wrong quotes: {error}"


def _check_header(header: list[str], line: int) -> None:
    for column, name in enumerate(header, start=1):
        if not name.strip():
            raise UnreadableFileError(line, f"column {column} of the header has no name")
    if name := repeated(header):
        raise UnreadableFileError(line, f"the header has {name} twice")
