"""Every kind of file gives the same rows, and whatever is wrong in one is told by its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from src.config.files import KINDS, TEXT_KINDS, expand, kind_of, problems_of
from src.data.readers import read_file
from src.data.readers.record import MAX_ROW_BYTES, ReadResult, Record, Unreadable

ROWS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": 'say "a,b"\tand\nstop', "completion": "안녕 🙂"},
    {"prompt": " ", "completion": "c\\u0041"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
A, B = b'{"a": "1"}\n', b'{"a": "2"}\n'
LONG = b"x" * (MAX_ROW_BYTES + 1)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def table(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(columns: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    data = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(data, content, **options)
    return content.getvalue()


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def read(folder: Path, name: str, content: bytes) -> list[ReadResult]:
    return list(read_file(written(folder, name, content)))


def fields(rows: list[ReadResult]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Record) for row in rows), rows
    return [row.fields for row in rows if isinstance(row, Record)]


WHOLE = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": table(ROWS),
    ".tsv": table(ROWS, "\t"),
    ".parquet": parquet({name: [row[name] for row in ROWS] for name in ROWS[0]}),
}


@pytest.mark.parametrize("suffix", sorted(WHOLE))
def test_every_kind_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert fields(read(tmp_path, f"rows{suffix}", WHOLE[suffix])) == ROWS
    if f"{suffix}.gz" in KINDS:
        assert fields(read(tmp_path, f"ROWS{suffix}.GZ".upper(), gzip.compress(WHOLE[suffix]))) == ROWS


def test_every_kind_is_tested() -> None:
    assert {*WHOLE, *(f"{suffix}.gz" for suffix in WHOLE if suffix != ".parquet"), ".txt", ".txt.gz"} == set(KINDS)


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    assert fields(read(tmp_path, "rows.json", b"\n" + LINES)) == ROWS


def test_lines_of_a_text(tmp_path: Path) -> None:
    content = "a\r\n\n \t\n b\rc \nd\u2028e\nend".encode()
    for name, packed in (("rows.txt", content), ("rows.txt.gz", gzip.compress(content))):
        rows = read(tmp_path, name, packed)
        assert [row["text"] for row in fields(rows)] == ["a", " b\rc ", "d\u2028e", "end"]
        assert [row.number for row in rows] == [1, 4, 5, 6]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_crlf_ends_a_line(tmp_path: Path, name: str) -> None:
    content = b"a\nb\n" if name == "rows.txt" else WHOLE[Path(name).suffix].replace(b"\r\n", b"\n")
    unix, dos = (read(tmp_path, name, text) for text in (content, content.replace(b"\n", b"\r\n")))
    assert [row.number for row in dos] == [row.number for row in unix]
    if name == "rows.csv":  # a line end inside quotes is content
        assert fields(dos)[1]["prompt"] == ROWS[1]["prompt"].replace("\n", "\r\n")
    else:
        assert fields(dos) == fields(unix)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"rows{suffix}", b"") for suffix in TEXT_KINDS),
        ("rows.jsonl", b"\n \r\n\t\n"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("rows.json", b" \n"),
        ("rows.json", b"\n[\n]\n"),
        ("rows.csv", b"\n\r\n"),
        ("rows.csv", b"a,b\r\n\n"),
        ("rows.txt", b"\n\r\n \n"),
        ("rows.parquet", parquet({"a": pyarrow.array([], pyarrow.string())})),
    ],
)
def test_nothing_in_a_file_is_no_row(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, name, content) == []


def test_numbers_are_lines_or_rows(tmp_path: Path) -> None:
    def numbers(name: str, content: bytes) -> list[int | None]:
        return [row.number for row in read(tmp_path, name, content)]

    assert numbers("rows.jsonl", b"\n" + A + b"\n" + B) == [2, 4]
    assert numbers("rows.csv", b'a,b\n"1\n\n2",3\n\n4,5\n"6\n",7\n8,9') == [2, 6, 7, 9]
    assert numbers("rows.json", b'[{}\n\n,\n{"a": [{}]}, {}]') == [1, 2, 3]
    assert numbers("rows.parquet", parquet({"a": list(range(2500))})) == list(range(1, 2501))
    first = read(tmp_path, "rows.jsonl", A)[0]
    assert first.place == f"{tmp_path / 'rows.jsonl'}:1"
    assert Unreadable("rows.jsonl", None, "why").place == "rows.jsonl"


def test_what_looks_odd_but_is_right(tmp_path: Path) -> None:
    line = rb' {"e": "\ud83d\ude42", "z": "\u0000", "back": "\\ud83d", "n": 1e3, "b": [{"e": 1}, null]}  '
    assert fields(read(tmp_path, "rows.jsonl", line)) == [
        {"e": "🙂", "z": "\0", "back": "\\ud83d", "n": 1000.0, "b": [{"e": 1}, None]}
    ]
    row = b'{"a": "' + b"x" * (MAX_ROW_BYTES - 9) + b'"}'
    assert len(fields(read(tmp_path, "rows.jsonl", row + b"\r\n" + row))) == 2
    assert fields(read(tmp_path, "rows.csv", b'a,b\nit is 5", "c"\n')) == [{"a": 'it is 5"', "b": ' "c"'}]
    assert fields(read(tmp_path, "rows.jsonl.gz", gzip.compress(A) + gzip.compress(B))) == [{"a": "1"}, {"a": "2"}]


BAD_JSONL = {
    "not JSON": (b'{"a": }\n', ":2", "not JSON: Expecting value, column 7"),
    "not closed": (b'{"a": "b"\n', ":2", "not JSON: Expecting ',' delimiter, column 10"),
    "single quotes": (b"{'a': 1}\n", ":2", "not JSON: Expecting property name enclosed in double quotes, column 2"),
    "comma at the end": (b'{"a": 1,}\n', ":2", "not JSON"),
    "raw control character": (b'{"a": "\x01"}\n', ":2", "not JSON: Invalid control character, column 8"),
    "wrong escape": (rb'{"a": "\x41"}' + b"\n", ":2", "not JSON: Invalid \\escape"),
    "a list": (b'["a"]\n', ":2", "a JSON object is needed, this is a list"),
    "a text": (b'"a"\n', ":2", "a JSON object is needed, this is a text"),
    "null": (b"null\n", ":2", "a JSON object is needed, this is a null"),
    "not UTF-8": (b'{"a": "\xe9"}\n', ":2", "not UTF-8 (byte 8): 0xe9"),
    "half an emoji in UTF-8": (b'{"a": "\xed\xa0\xbd"}\n', ":2", "not UTF-8 (byte 8): 0xed"),
    "NUL": (b'{"a": "\0"}\n', ":2", "a NUL byte (byte 8)"),
    "BOM later": (b"\xef\xbb\xbf" + A, ":2", "not JSON"),
    "half an emoji": (rb'{"a": {"b": ["\ud83d"]}}' + b"\n", ":2", "\\ud83d is half a character"),
    "half an emoji in a name": (rb'{"\uDE42": 1}' + b"\n", ":2", "\\ude42 is half a character"),
    "key twice": (b'{"a": 1, "b": 2, "a": 1}\n', ":2", "'a' occurs twice in one object"),
    "key twice inside": (b'{"m": [{"role": 1, "role": 2}]}\n', ":2", "'role' occurs twice"),
    "key twice, long": (b'{"' + b"k" * 99 + b'": 1, "' + b"k" * 99 + b'": 1}\n', ":2", f"'{'k' * 59}…' occurs twice"),
    "NaN": (b'{"a": NaN}\n', ":2", "NaN is no JSON"),
    "Infinity": (b'{"a": [-Infinity]}\n', ":2", "-Infinity is no JSON"),
    "beyond a float": (b'{"a": 1e999}\n', ":2", "1e999 is too large a number"),
    "beyond an int": (b'{"a": ' + b"9" * 5000 + b"}\n", ":2", "a whole number with too many digits"),
    "nested": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ":2", "nested too deep"),
    "two objects": (b'{"a": 1} {"a": 2}\n', ":2", "more text after the object"),
    "garbage behind": (b'{"a": 1},\n', ":2", "more text after the object"),
    "a form feed": (b"\x0c\n", ":2", "not JSON"),
    "too long": (LONG + b"\n", ":2", "longer than 4 MiB; is this really one row?"),
    "far too long": (b'{"a": "' + LONG * 3 + b'"}\r\n', ":2", "longer than 4 MiB"),
}
BAD_TABLE = {
    "too few": (b"3\n", ":3", "1 field, the header has 2"),
    "too many": (b"3,4,5\n", ":3", "3 fields, the header has 2"),
    "blanks": (b"  \n", ":3", "1 field, the header has 2"),
    "not UTF-8": (b"\xff,4\n", ":3", "not UTF-8 (byte 1): 0xff"),
    "not UTF-8 in quotes": (b'"3\n\n\xff\n",4\n', ":3", "not UTF-8 (byte 1): 0xff"),
    "NUL": (b"3,\0\n", ":3", "a NUL byte (byte 3)"),
    "text behind quotes": (b'"3"x,4\n', ":3", "wrong quotes: ',' expected after '\"'"),
    "old Mac line ends": (b"3,4\r5,6\n", ":3", "a carriage return inside a field without quotes"),
    "too long": (b"3," + LONG + b"\n", ":3", "longer than 4 MiB"),
}
BAD_LIST = {
    "not an object": (b"[1]", ":2", "a JSON object is needed, this is a list"),
    "a number": (b"1.5", ":2", "a JSON object is needed, this is a number"),
    "key twice": (b'{"b": {"a": NaN, "a": "]"}}', ":2", "NaN is no JSON"),
    "too many digits": (b'{"b": ' + b"9" * 5000 + b"}", ":2", "a whole number with too many digits"),
    "half an emoji": (rb'{"a": "\udc00"}', ":2", "\\udc00 is half a character"),
    "too long": (b'{"a": "' + LONG + b'"}', ":2", "longer than 4 MiB"),
    "too long in all": (b'{"m": [{"a": "' + LONG[9:] + b'"}, {"a": "0123456789"}]}', ":2", "longer than 4 MiB"),
}


@pytest.mark.parametrize(("line", "place", "words"), BAD_JSONL.values(), ids=BAD_JSONL)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson.gz"])
def test_a_bad_line_is_told_and_the_next_is_read(
    tmp_path: Path, name: str, line: bytes, place: str, words: str
) -> None:
    content = A + line + B
    check_one_bad(read(tmp_path, name, gzip.compress(content) if "gz" in name else content), place, words)


@pytest.mark.parametrize(("line", "place", "words"), BAD_TABLE.values(), ids=BAD_TABLE)
@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", b","), ("rows.tsv", b"\t")])
def test_a_bad_record_is_told_and_the_next_is_read(
    tmp_path: Path, name: str, delimiter: bytes, line: bytes, place: str, words: str
) -> None:
    content = (b"a,b\n1,2\n" + line + b"5,6\n").replace(b",", delimiter)
    words = words.replace("','", "','" if delimiter == b"," else "'\t'")
    check_one_bad(read(tmp_path, name, content), place, words)


@pytest.mark.parametrize(("row", "place", "words"), BAD_LIST.values(), ids=BAD_LIST)
def test_a_bad_row_of_a_list_is_told_and_the_next_is_read(tmp_path: Path, row: bytes, place: str, words: str) -> None:
    check_one_bad(read(tmp_path, "rows.json", b"[" + A + b"," + row + b",\n" + B + b"]"), place, words)


def check_one_bad(rows: list[ReadResult], place: str, words: str) -> None:
    assert [type(row) for row in rows] == [Record, Unreadable, Record]
    bad = rows[1]
    assert isinstance(bad, Unreadable)
    assert bad.place == bad.source + place
    assert bad.reason.startswith(words)


BOM = "begins with a byte order mark; save it as UTF-8 without one"
ZIPPED = gzip.compress(A * 50_000, mtime=0)
ONE = parquet({"a": ["1"] * 9})
ENDS: dict[str, tuple[str, bytes, int, str, str]] = {  # name, content, rows before the end, place, words
    "jsonl UTF-16": ("rows.jsonl", A.decode().encode("utf-16"), 0, "", "looks like UTF-16; save it as UTF-8"),
    "jsonl UTF-16 BE": ("rows.jsonl", codecs.BOM_UTF16_BE + A.decode().encode("utf-16-be"), 0, "", "looks like UTF-16"),
    "jsonl UTF-16, no mark": ("rows.jsonl", A.decode().encode("utf-16-le"), 0, "", "looks like UTF-16"),
    "csv UTF-16 BE, no mark": ("rows.csv", "a,b\n".encode("utf-16-be"), 0, "", "looks like UTF-16"),
    "txt UTF-16 from a blank line": ("rows.txt", "\na".encode("utf-16-le"), 0, "", "looks like UTF-16"),
    "json UTF-16": ("rows.json", "[{}]".encode("utf-16"), 0, "", "looks like UTF-16"),
    "json BOM": ("rows.json", codecs.BOM_UTF8 + b"[{}]", 0, "", BOM),
    "csv BOM": ("rows.csv", codecs.BOM_UTF8 + b"a,b\n1,2\n", 0, ":1", BOM),
    "txt NUL": ("rows.txt", b"\0" * 9, 0, ":1", "a NUL byte (byte 1)"),
    "json NUL": ("rows.json", b'[{"a": "\0"}]', 0, "", "a NUL byte (byte 9)"),
    "json not UTF-8": ("rows.json", b'[{},\n{"a": "\xff"}]', 1, "", "not UTF-8 (byte 13): 0xff, in line 2"),
    "json text": ("rows.json", b'"a"', 0, "", "a list of rows is needed: [{…}, …], or one object a line"),
    "json one object": ("rows.json", b'{\n "a": 1\n}', 0, ":1", "a list of rows is needed"),
    "json not closed": ("rows.json", b"[{},\n{}\n", 2, ":2", "not JSON: Expecting ',' delimiter, line 3, column 1"),
    "json never begun": ("rows.json", b"[", 0, ":1", "not JSON: Expecting value, line 1, column 2"),
    "json comma at the end": ("rows.json", b"[{},]", 1, ":2", "not JSON: Expecting value, line 1, column 5"),
    "json no comma": ("rows.json", b"[{} {}]", 1, ":1", "not JSON: Expecting ',' delimiter, line 1, column 5"),
    "json cut in a row": ("rows.json", b'[{}, {"a": "b', 1, ":2", "not JSON: Unterminated string"),
    "json more behind": ("rows.json", b"[{}]\n[{}]", 1, ":1", "more text after the end"),
    "json more behind nothing": ("rows.json", b"[] {}", 0, "", "more text after the end"),
    "json nested": ("rows.json", b"[" * 100_000, 0, ":1", "nested too deep"),
    "csv no name": ("rows.csv", b"\n,a\n1,2\n", 0, ":2", "column 1 of the header has no name"),
    "csv blank name": ("rows.csv", b"a, ,b\n1,2,3\n", 0, ":1", "column 2 of the header has no name"),
    "csv name twice": ("rows.csv", b"a,b,a\n1,2,3\n", 0, ":1", "the header has 'a' twice"),
    "csv header broken": ("rows.csv", b'"a"b,c\n1,2\n', 0, ":1", "wrong quotes"),
    "csv header not UTF-8": ("rows.csv", b"\xff,c\n1,2\n", 0, ":1", "not UTF-8 (byte 1)"),
    "csv quote not closed": (
        "rows.csv",
        b'a,b\n1,2\n3,"4\n5,6\n',
        1,
        ":3",
        "a quote is opened in this record and never",
    ),
    "csv quote not closed, long": ("rows.csv", b'a\n1\n"' + b"x,y\n" * 2**20, 1, ":3", "longer than 4 MiB; is this re"),
    "txt not UTF-8": ("rows.txt", b"a\nb \xc3", 1, ":2", "not UTF-8 (byte 3): 0xc3"),
    "txt too long": ("rows.txt", b"a\n" + LONG, 1, ":2", "longer than 4 MiB"),
    "gz cut": ("rows.jsonl.gz", ZIPPED[:-100], -1, "", "cut off: the gzip data ends too early"),
    "gz cut in its end": ("rows.jsonl.gz", gzip.compress(A)[:-4], 1, ":2", "cut off: the gzip data ends too early"),
    "gz cut in its head": ("rows.jsonl.gz", ZIPPED[:5], 0, "", "cut off: the gzip data ends too early"),
    "gz empty": ("rows.txt.gz", b"", 0, "", "cut off: the gzip data ends too early"),
    "gz cut, list": ("rows.json.gz", gzip.compress(b"[{}]")[:-4], 0, "", "cut off: the gzip data ends too early"),
    "gz cut, csv": ("rows.csv.gz", gzip.compress(b'a\n1\n"2\n')[:-4], 1, ":4", "cut off: the gzip data ends too"),
    "gz not gzip": ("rows.jsonl.gz", A, 0, "", "not gzip, though its name says so"),
    "gz garbage behind": ("rows.jsonl.gz", gzip.compress(A) + b"garbage", 1, ":2", "something that is not gzip"),
    "gz wrong checksum": ("rows.jsonl.gz", gzip.compress(A)[:-8] + b"\0" * 8, 1, ":2", "damaged gzip data: CRC check"),
    "gz wrong data": ("rows.txt.gz", gzip.compress(A)[:10] + b"\xff" * 20, 0, "", "damaged gzip data"),
    "gz UTF-16 inside": ("rows.txt.gz", gzip.compress("a".encode("utf-16")), 0, "", "looks like UTF-16"),
    "gz without the name": ("rows.jsonl", ZIPPED, 0, "", "looks gzipped; then its name has to end in .gz"),
    "csv a spreadsheet": ("rows.csv", b"PK\x03\x04\x14\0", 0, "", "looks like a spreadsheet"),
    "txt LFS": ("rows.txt", LFS, 0, "", "a Git LFS pointer, not the data"),
    "parquet LFS": ("rows.parquet", LFS, 0, "", "a Git LFS pointer, not the data"),
    "parquet empty": ("rows.parquet", b"", 0, "", "not Parquet, or damaged"),
    "parquet text": ("rows.parquet", A, 0, "", "not Parquet, or damaged"),
    "parquet cut": ("rows.parquet", ONE[:-20], 0, "", "not Parquet, or damaged"),
    "parquet head lost": ("rows.parquet", ONE[100:], 0, "", "not Parquet, or damaged"),
    "parquet column twice": (
        "rows.parquet",
        parquet(pyarrow.table([["1"], ["2"]], names=["a", "a"])),
        0,
        "",
        "two columns are called 'a'",
    ),
    "unknown kind": ("rows.xlsx", A, 0, "", "not a kind that is read; these are .jsonl, .ndjson, .json, .csv"),
    "no kind": ("rows.gz", ZIPPED, 0, "", "not a kind that is read"),
}


@pytest.mark.parametrize(("name", "content", "before", "place", "words"), ENDS.values(), ids=ENDS)
def test_what_ends_a_file_is_told_last(
    tmp_path: Path, name: str, content: bytes, before: int, place: str, words: str
) -> None:
    *rows, last = read(tmp_path, name, content)
    assert isinstance(last, Unreadable)
    fields(rows)
    if before < 0:  # as far as it can be unpacked
        before, place = len(rows), f":{len(rows) + 1}"
        assert before > 1000
    assert (len(rows), last.place) == (before, last.source + place)
    assert last.reason.startswith(words)


def test_a_byte_order_mark_does_not_hide_the_other_lines(tmp_path: Path) -> None:
    first, second = read(tmp_path, "rows.jsonl", codecs.BOM_UTF8 + A + B)
    assert first == Unreadable(first.source, 1, BOM)
    assert fields([second]) == [{"a": "2"}]


def test_a_damaged_parquet_page_is_told_with_its_row(tmp_path: Path) -> None:
    texts = [f"{i:04}" * 100 for i in range(3000)]
    content = parquet(
        {"a": texts}, row_group_size=1000, compression="none", use_dictionary=False, write_page_checksum=True
    )
    where = content.index(texts[2500].encode())
    *rows, last = read(tmp_path, "rows.parquet", content[:where] + b"9" + content[where + 1 :])
    assert fields(rows) == [{"a": text} for text in texts[:2000]]
    assert isinstance(last, Unreadable)
    assert last.number == 2001
    assert "damaged" in last.reason


def test_one_bad_row_of_parquet_does_not_hide_the_others(tmp_path: Path) -> None:
    bad = pyarrow.array([b"1", b"a\xff", b"2"]).cast(pyarrow.string(), safe=False)
    first, second, third = read(tmp_path, "rows.parquet", parquet({"a": bad}))
    assert second == Unreadable(first.source, 2, "not UTF-8 (byte 2): 0xff")
    assert fields([first, third]) == [{"a": "1"}, {"a": "2"}]
    first, second = read(tmp_path, "rows.parquet", parquet({"a": ["1", LONG.decode()]}))
    assert fields([first]) == [{"a": "1"}]
    assert second == Unreadable(first.source, 2, "longer than 4 MiB; is this really one row?")


@pytest.mark.parametrize("suffix", [*KINDS, ".none"])
def test_files_that_cannot_be_opened_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    reasons = ["not a kind"] * 3 if suffix == ".none" else ["No such file", "Is a directory", "Permission denied"]

    def reason() -> str:
        (row,) = read_file(str(file))
        assert isinstance(row, Unreadable)
        assert row.place == str(file)
        return row.reason.removeprefix("can't be read: ")

    assert reason().startswith(reasons[0])
    file.mkdir()
    assert reason().startswith(reasons[1])

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # a test may run as root, to whom nothing is denied
    assert reason().startswith(reasons[2])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    name = written(tmp_path, "rows.jsonl", b'{"prompt": "one and one", "completion": "two"}\n' * 300_000)
    tracemalloc.start()
    count = sum(1 for _ in read_file(name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300_000
    assert peak < 2 * 2**20


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    texts = [f"{i:05}" * 200 for i in range(20_000)]
    content = parquet({"a": texts}, row_group_size=20_000, compression="none", use_dictionary=False)
    assert len(content) > 20_000_000
    name = written(tmp_path, "rows.parquet", content)
    before = pyarrow.total_allocated_bytes()
    assert max(pyarrow.total_allocated_bytes() - before for _ in read_file(name)) < 8 * 2**20


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.NDJSON", "jsonl"),
        ("x/a.json.gz", "json"),
        ("a.csv", "csv"),
        ("a.tsv.gz", "tsv"),
        ("a.txt", "txt"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("jsonl", None),
        (".jsonl", None),
        ("a.jsonl.zst", None),
        ("", None),
    ],
)
def test_the_end_of_a_name_is_its_kind(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with data files, others, and hidden ones."""
    for name in ("b.jsonl", "a.csv", "notes.md", "d/2.txt.gz", "d/1.txt", "d/.hidden.txt", ".git/x.json", "[1].json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("patterns", "files"),
    [
        (["b.jsonl", "a.csv"], ["b.jsonl", "a.csv"]),
        (["?.*"], ["a.csv", "b.jsonl"]),
        (["d/*", "[ab].*"], ["d/1.txt", "d/2.txt.gz", "a.csv", "b.jsonl"]),
        (["**/*.txt*"], ["d/1.txt", "d/2.txt.gz"]),
        (["[1].json"], ["[1].json"]),
        (["d"], ["d/1.txt", "d/2.txt.gz"]),
        (["d/.hidden.txt"], ["d/.hidden.txt"]),
        (["."], ["./[1].json", "./a.csv", "./b.jsonl", "./d/1.txt", "./d/2.txt.gz"]),
        (["d", "d/1.txt"], ["d/1.txt", "d/2.txt.gz", "d/1.txt"]),
        (["none.jsonl", "*.none", "empty", ""], ["none.jsonl", "*.none", "empty", ""]),
        ([], []),
    ],
)
def test_patterns_become_files(patterns: list[str], files: list[str]) -> None:
    assert expand(patterns) == files


def test_what_is_wrong_with_patterns(folder: Path) -> None:
    os.mkfifo("pipe.jsonl")
    os.symlink("gone.jsonl", "d/link.jsonl")
    os.symlink("b.jsonl", "same.jsonl")
    told = {
        "none.jsonl": f"no such file (looked in {folder})",
        "": f"no such file (looked in {folder})",
        "*.none": f"matches no file (looked in {folder})",
        "empt*": f"matches no file (looked in {folder})",
        "empty": "a folder without data files; these are .jsonl, .ndjson, .json, .csv, .tsv, .txt (each also",
        "notes.md": "not a kind that is read; these are .jsonl, .ndjson",
        "n*": "notes.md: not a kind that is read",
        "pipe.jsonl": "not a file that can be read twice",
        "d": f"d/link.jsonl: no such file (looked in {folder})",
    }
    found = dict(problems_of([*told, "b.jsonl"]))
    assert found.keys() == told.keys()
    for pattern, words in told.items():
        assert found[pattern].startswith(words)
    assert list(problems_of(["b.jsonl", "a.csv", "[1].json"])) == []
    twice = problems_of(["b.jsonl", "./b.jsonl", "d/*.txt", "d/1*", "same.jsonl", "[ab].*"])
    assert list(twice) == [
        ("./b.jsonl", "given twice"),
        ("d/1*", "d/1.txt: given twice"),
        ("same.jsonl", "given twice"),
        ("[ab].*", "b.jsonl: given twice"),
    ]
    assert ("d/*", "d/1.txt and 1 more: given twice") in problems_of(["d/?.*", "d/*"])


def test_a_folder_that_cannot_be_listed_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = os.scandir

    def scandir(path: str) -> Any:
        if path == "./d":
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, _: path != "./d")
    assert "./d" in expand(["."])
    assert list(problems_of(["."])) == [(".", "./d: a folder that can't be listed: no permission")]
