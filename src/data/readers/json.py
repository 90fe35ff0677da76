"""JSON Lines, and .json files that hold a list of objects or JSON Lines.

A list is parsed row by row while it is read, so only the row that is being parsed is in memory.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from src.data.readers import record as limits
from src.data.readers import text as texts
from src.data.readers.record import InvalidRecordError, NumberedRow, UnpackedSize, UnreadableFileError

CHUNK_BYTES = 2**20
WHITE_SPACE = " \t\r\n"
LIST_NEEDED = "a list of rows is needed: [{…}, …], or one object a line"
TYPE_NAMES = {list: "list", str: "text", int: "number", float: "number", bool: "truth value", type(None): "null"}
_skip_white_space = re.compile(f"[{WHITE_SPACE}]*").match
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidRecordError(f"{limits.repeated([name for name, _ in pairs])} occurs twice in one object")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise InvalidRecordError(f"{limits.shortened(text)} is too large a number")
    return value


def _refuse_constant(text: str) -> float:
    raise InvalidRecordError(f"{text} is no JSON")


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse_constant).raw_decode
_decode_leniently = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode


def _parse_object(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Return the object at `start` and where it ends; JSONDecodeError or InvalidRecordError where there is none."""
    try:
        fields, end = _decode(text, start)
        if not isinstance(fields, dict):
            raise InvalidRecordError(f"a JSON object is needed, this is a {TYPE_NAMES[type(fields)]}")
        if text.find("\\u", start, end) >= 0 and _SURROGATE.search(text, start, end):
            json.dumps(fields, ensure_ascii=False).encode()
    except (json.JSONDecodeError, InvalidRecordError):
        raise
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InvalidRecordError(f"{half} is half a character (a surrogate without its other half)") from error
    except RecursionError as error:
        raise InvalidRecordError("nested too deep") from error
    except ValueError as error:  # Python's limit on digits
        raise InvalidRecordError("a whole number with too many digits") from error
    return fields, end


def _describe(error: json.JSONDecodeError) -> str:
    return f"not JSON: {error.msg.removesuffix(' at')}"


def read_json_lines(file: str) -> Iterator[NumberedRow]:
    """Yield one row a line, without blank lines."""
    for number, text, fault in texts.read_lines(file):
        body = text.rstrip(WHITE_SPACE)
        if not body and not fault:
            continue
        try:
            if fault:
                raise InvalidRecordError(fault)
            fields, end = _parse_object(body, len(body) - len(body.lstrip(WHITE_SPACE)))
            if end < len(body):
                more = "more text after the object; one object per line is needed"
                raise InvalidRecordError(f"{more} (column {end + 1})")
        except json.JSONDecodeError as error:
            yield number, f"{_describe(error)}, column {error.colno}"
        except InvalidRecordError as invalid:
            yield number, str(invalid)
        else:
            yield number, fields


def read_json(file: str) -> Iterator[NumberedRow]:
    """Yield the rows of a list, or of JSON Lines where the file begins with an object."""
    with texts.open_data(file) as stream:
        head = stream.peek(4096).removeprefix(texts.BOM).lstrip()
        if not head.startswith(b"{"):
            yield from _read_list(_JsonStream(file, stream))
            return
    rows = read_json_lines(file)
    number, first = next(rows)
    if isinstance(first, str) and first.startswith("not JSON"):
        raise UnreadableFileError(number, f"{LIST_NEEDED} ({first})")
    yield number, first
    yield from rows


class _JsonStream:
    """The text of a file from the row that is being parsed on, as far as it is read; `position` is the parser's.

    Each method raises UnreadableFileError where the rest of the file can't be read.
    """

    def __init__(self, file: str, stream: texts.BinaryStream) -> None:
        self._stream = stream
        self._unpacked = UnpackedSize(file)
        self._undecoded = b""  # the beginning of a character
        self._num_decoded = 0  # bytes
        self._line, self._column = 1, 0  # where `text` begins
        self._fault: UnreadableFileError | None = None  # of what follows `text`
        self.text, self.position, self.is_at_end = "", 0, False

    def read_more(self) -> None:
        """Drop the text before the position, and append at least as much as is left."""
        parsed, self.text, self.position = self.text[: self.position], self.text[self.position :], 0
        if (newlines := parsed.count("\n")) > 0:
            self._line, self._column = self._line + newlines, len(parsed) - parsed.rindex("\n") - 1
        else:
            self._column += len(parsed)
        if self._fault is not None:
            raise self._fault
        if len(self.text) > limits.MAX_LINE_BYTES:
            raise UnreadableFileError(None, limits.LINE_TOO_LONG)
        try:
            chunk = self._stream.read(max(CHUNK_BYTES, len(self.text)))
        except texts.GZIP_ERRORS as error:
            raise UnreadableFileError(None, texts.describe_gzip_damage(error, begun=True)) from error
        self._unpacked.add(len(chunk), None)
        self.is_at_end = not chunk
        self.text += self._decode(self._undecoded + chunk)

    def _decode(self, content: bytes) -> str:
        """Decode bytes up to the first that is no text; what comes before it can still be parsed."""
        if not self._num_decoded and content.startswith(texts.BOM):
            raise UnreadableFileError(None, texts.BOM_FOUND)
        if 0 in content:
            self._fault = UnreadableFileError(None, texts.describe_nul(content, self._num_decoded))
            content = content[: content.index(0)]
        try:
            text, used = codecs.utf_8_decode(content, "strict", self.is_at_end)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n") + content.count(b"\n", 0, error.start)
            fault = texts.describe_not_utf8(error, self._num_decoded)
            self._fault = UnreadableFileError(None, f"{fault}, in line {line}")
            text, used = codecs.utf_8_decode(content[: error.start])
        self._undecoded = content[used:]
        self._num_decoded += used
        return text

    def skip_white_space(self) -> str:
        """Move to the next character that is no white space and return it; '' at the end of the file."""
        skipped = 0
        while True:
            blanks = _skip_white_space(self.text, self.position)
            assert blanks is not None
            skipped += blanks.end() - self.position
            self.position = blanks.end()
            if self.position < len(self.text) or self.is_at_end:
                return self.text[self.position : self.position + 1]
            if skipped > limits.MAX_BLANK_BYTES:
                raise UnreadableFileError(None, limits.TOO_MUCH_BLANK)
            self.read_more()

    def row(self, number: int) -> dict[str, Any] | str:
        """Move past the row and return its fields, or why it can't be used; JSONDecodeError where it is not JSON."""
        while True:
            try:
                row, end = self._parse_row(number)
            except json.JSONDecodeError as error:
                # a text that ends too early, within a string or a word, may be JSON with what follows
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("-Infinity")
                if self.is_at_end or not is_cut:
                    raise
            else:
                if end < len(self.text) or self.is_at_end:
                    self.position = end
                    return row
            self.read_more()

    def _parse_row(self, number: int) -> tuple[dict[str, Any] | str, int]:
        start = self.position
        try:
            fields, end = _parse_object(self.text, start)
        except InvalidRecordError as invalid:
            try:
                return str(invalid), _decode_leniently(self.text, start)[1]
            except RecursionError:
                raise UnreadableFileError(number, str(invalid)) from invalid
        if (end - start) * 4 > limits.MAX_ROW_BYTES and limits.text_bytes(fields) > limits.MAX_ROW_BYTES:
            return limits.ROW_TOO_LONG, end
        return fields, end

    def place(self, error: json.JSONDecodeError) -> str:
        """Return where in the file an error is."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return f"line {self._line + error.lineno - 1}, column {column}"


def _read_list(stream: _JsonStream) -> Iterator[NumberedRow]:
    if not (first := stream.skip_white_space()):
        return
    if first != "[":
        raise UnreadableFileError(None, LIST_NEEDED)
    stream.position += 1
    number, following = 0, stream.skip_white_space()
    try:
        while number or following != "]":
            number += 1
            yield number, stream.row(number)
            if (following := stream.skip_white_space()) == "]":
                break
            if following != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", stream.text, stream.position)
            stream.position += 1
            stream.skip_white_space()
    except json.JSONDecodeError as error:
        raise UnreadableFileError(number, f"{_describe(error)}, {stream.place(error)}") from error
    except UnreadableFileError as end:
        has_row = end.reason in (limits.LINE_TOO_LONG, limits.TOO_MUCH_BLANK)
        raise UnreadableFileError(number if has_row else end.number, end.reason) from end
    stream.position += 1
    if stream.skip_white_space():
        raise UnreadableFileError(number or None, "more text after the end of the list")
