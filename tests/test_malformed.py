"""Whatever is wrong with a file ends as a message by file and line: no traceback, no row lost, nothing half cached."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import io
import json
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from src.config.files import TEXT_KINDS
from src.config.schema import RunConfig
from src.data.dataset import Data, build_data
from src.data.tokenizer import load_tokenizer
from src.errors import DataError, TowlineError
from tests.conftest import admitted, towline, write_lines
from tests.kinds import byte_bpe

Turn = dict[str, Any]


def said(role: str, content: Any = "x", **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


USER, ASSISTANT, SYSTEM = said("user"), said("assistant"), said("system")
GOOD: dict[str, list[dict[str, Any]]] = {
    "prompt_completion": [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(3)],
    "query_response": [{"query": f"{i}?", "response": f"{i}"} for i in range(3)],
    "gsm8k": [{"question": f"{i}?", "answer": f"<<{i}>>#### {i}"} for i in range(3)],
    "dialogue_summary": [{"dialogue": f"A: {i}", "summary": f"{i}"} for i in range(3)],
    "text": [{"text": f"line {i}"} for i in range(3)],
    "messages": [{"messages": [said("user", f"{i}"), ASSISTANT, USER, ASSISTANT]} for i in range(3)],
}
PAIR = GOOD["prompt_completion"][0]


def jsonl(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def between(row: Any, rows: str = "prompt_completion") -> bytes:
    """Put a bad row on line 3, behind a blank one, between good ones."""
    good = GOOD[rows]
    return jsonl(good[0], b"", row, good[1])


def chat(*turns: Any) -> bytes:
    return between({"messages": list(turns)}, "messages")


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: Any) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def mended(name: str, format_name: str) -> bytes:
    """Give good rows of a format in the kind of file that the name promises."""
    rows = GOOD[format_name]
    kind = name.removesuffix(".gz").rpartition(".")[2]
    content = {
        "json": lambda: json.dumps(rows).encode(),
        "csv": lambda: table(rows),
        "tsv": lambda: table(rows, "\t"),
        "txt": lambda: "".join(row["text"] + "\n" for row in rows).encode(),
        "parquet": lambda: parquet(rows),
    }.get(kind, lambda: jsonl(*rows))()
    return gzip.compress(content) if name.endswith(".gz") else content


ONE_TEXT = "data=text"
DIALOGUE = "data=dialogue_summary"
QUERY = "data=query_response"
CHAT = "data=messages"
LONG = b"x" * (5 * 2**20)
ZIPPED = gzip.compress(jsonl(*GOOD["prompt_completion"]) * 2000, mtime=0)

Case = tuple[str, bytes, list[str], list[str]]
JSON_LINES: dict[str, Case] = {
    "not JSON": ("rows.jsonl", between(b'{"prompt": "a", "completion": }'), [], [":3  not JSON: Expecting value"]),
    "cut in a row": ("rows.jsonl", jsonl(PAIR) + b'{"prompt": "a', [], [":2  not JSON: Unterminated string"]),
    "single quotes": ("rows.jsonl", between(b"{'prompt': 'a'}"), [], [":3  not JSON"]),
    "two in a line": ("rows.jsonl", between(jsonl(PAIR).strip() * 2), [], [":3  more text after the object"]),
    "a list": ("rows.ndjson", between(["a", "b"]), [], [":3  a JSON object is needed, this is a list"]),
    "a text": ("rows.jsonl", between("a"), [], [":3  a JSON object is needed, this is a text"]),
    "null": ("rows.jsonl", between(None), [], [":3  a JSON object is needed, this is a null"]),
    "Latin-1": ("rows.jsonl", between('{"prompt": "é"}'.encode("latin-1")), [], [":3  not UTF-8 (byte 13): 0xe9"]),
    "UTF-16": ("rows.jsonl", jsonl(PAIR).decode().encode("utf-16"), [], ["rows.jsonl  looks like UTF-16"]),
    "BOM": ("rows.jsonl", codecs.BOM_UTF8 + jsonl(PAIR), [], [":1  begins with a byte order mark"]),
    "NUL": ("rows.jsonl", between(b'{"prompt": "\0"}'), [], [":3  a NUL byte (byte 13)"]),
    "key twice": ("rows.jsonl", between(b'{"prompt": "a", "prompt": "b"}'), [], [":3  'prompt' occurs twice"]),
    "half an emoji": ("rows.jsonl", between(rb'{"prompt": "\ud83d"}'), [], [":3  \\ud83d is half a character"]),
    "NaN": ("rows.jsonl", between(b'{"prompt": NaN}'), [], [":3  NaN is no JSON"]),
    "nested": ("rows.jsonl", between(b'{"prompt": ' + b"[" * 10**5), [], [":3  nested too deep"]),
    "5 MB": ("rows.jsonl", between(b'{"prompt": "' + LONG + b'"}'), [], [":3  longer than 4 MiB"]),
    "5 MB of nothing": ("rows.jsonl", between(LONG), [], [":3  longer than 4 MiB"]),
    "empty": ("rows.jsonl", b"", [], ["train has no rows", "rows.jsonl"]),
    "blank": ("rows.jsonl", b"\n \n\t\r\n", [], ["train has no rows", "rows.jsonl"]),
    "LFS": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", [], ["rows.jsonl  a Git LFS pointer"]),
}
OTHER_KINDS: dict[str, Case] = {
    "gz cut": ("rows.jsonl.gz", ZIPPED[:-50], [], ["rows.jsonl.gz:", "cut off: the gzip data ends too early"]),
    "gz damaged": ("rows.jsonl.gz", ZIPPED[:60] + b"\xff" * 9 + ZIPPED[69:], [], ["rows.jsonl.gz", "gzip data"]),
    "gz plain": ("rows.jsonl.gz", jsonl(PAIR), [], ["rows.jsonl.gz  not gzip, though its name says so"]),
    "gz empty": ("rows.csv.gz", b"", [], ["rows.csv.gz  cut off: the gzip data ends too early"]),
    "gz of nothing": ("rows.jsonl.gz", gzip.compress(b""), [], ["train has no rows", "rows.jsonl.gz"]),
    "zipped, not named": ("rows.jsonl", ZIPPED, [], ["rows.jsonl  looks gzipped; then its name has to end in .gz"]),
    "list not closed": ("rows.json", b'[{"prompt": "a", "completion": "b"},', [], [":2  not JSON"]),
    "list of texts": ("rows.json", b'["a", "b"]', [], ["2 rows", ":1  a JSON object is needed", ":2  the same"]),
    "no list": ("rows.json", b"3", [], ["rows.json  a list of rows is needed"]),
    "one object": ("rows.json", b'{\n"prompt": "a"}', [], ["rows.json:1  a list of rows is needed"]),
    "list of nothing": ("rows.json", b"[]", [], ["train has no rows", "rows.json"]),
    "list, null": ("rows.json", b'[{"prompt": null, "completion": "b"}]', [], [":1  'prompt' is null, not a text"]),
    "list, BOM": ("rows.json", codecs.BOM_UTF8 + b"[]", [], ["rows.json  begins with a byte order mark"]),
    "ragged, short": ("rows.csv", b"prompt,completion\na,b\nc\n", [], [":3  1 field, the header has 2"]),
    "ragged, long": ("rows.csv", b"prompt,completion\na,b,c\n", [], [":2  3 fields, the header has 2"]),
    "ragged, tabs": ("rows.tsv", b"prompt\tcompletion\na\tb\tc\n", [], [":2  3 fields, the header has 2"]),
    "commas in tsv": ("rows.tsv", b"prompt,completion\na,b\n", [], [":2  no field 'prompt'", "'prompt,completion'"]),
    "quote not closed": ("rows.csv", b'prompt,completion\na,"b\nc,d\n', [], [":2  a quote is opened in this record"]),
    "column twice": ("rows.csv", b"prompt,prompt\na,b\n", [], ["rows.csv:1  the header has 'prompt' twice"]),
    "no header": ("rows.csv", b"a,b\nc,d\n", [], ["rows.csv:2  no field 'prompt'; there are 'a', 'b'"]),
    "header alone": ("rows.csv", b"prompt,completion\n", [], ["train has no rows", "rows.csv"]),
    "empty cell": ("rows.csv", b"prompt,completion\na,\n", [], [":2  'completion' is empty: nothing to train on"]),
    "csv, Latin-1": ("rows.csv", b"prompt,completion\n\xe9,b\n", [], [":2  not UTF-8 (byte 1)"]),
    "csv, BOM": ("rows.csv", codecs.BOM_UTF8 + b"prompt,completion\na,b\n", [], [":1  begins with a byte order mark"]),
    "csv, spreadsheet": ("rows.csv", b"PK\x03\x04\x14\0", [], ["rows.csv  looks like a spreadsheet"]),
    "csv, 5 MB": ("rows.csv", b"prompt,completion\na," + LONG + b"\n", [], [":2  longer than 4 MiB"]),
    "txt, Latin-1": ("rows.txt", b"a\n\xe9\n", [ONE_TEXT], ["rows.txt:2  not UTF-8 (byte 1)"]),
    "txt, NUL": ("rows.txt", b"a\n\nb\0\n", [ONE_TEXT], ["rows.txt:3  a NUL byte (byte 2)"]),
    "txt, 5 MB": ("rows.txt.gz", gzip.compress(b"a\n" + LONG), [ONE_TEXT], ["rows.txt.gz:2  longer than 4 MiB"]),
    "Parquet, columns": ("rows.parquet", parquet([{"a": "1", "completion": "b"}]), [], [":1  no field 'prompt'"]),
    "Parquet, null": (
        "rows.parquet",
        parquet([PAIR, {"prompt": "a", "completion": None}]),
        [],
        [":2  'completion' is null, not a text"],
    ),
    "Parquet, null column": (
        "rows.parquet",
        parquet([{"prompt": None, "completion": "b"}] * 3),
        [],
        ["3 rows", ":1  'prompt' is null", ":2  the same", ":3  the same"],
    ),
    "Parquet, numbers": ("rows.parquet", parquet([{"prompt": 1, "completion": "2"}]), [], [":1  'prompt' is a number"]),
    "Parquet, bytes": ("rows.parquet", parquet([{"prompt": b"1", "completion": "2"}]), [], [":1  'prompt' is bytes"]),
    "Parquet, lists": ("rows.parquet", parquet([{"prompt": ["1"], "completion": ""}]), [], [":1  'prompt' is a list"]),
    "Parquet, structs": ("rows.parquet", parquet([{"prompt": {"a": 1}, "completion": ""}]), [], ["is an object"]),
    "Parquet, no rows": (
        "rows.parquet",
        parquet(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})),
        [],
        ["train has no rows", "rows.parquet"],
    ),
    "Parquet, cut": ("rows.parquet", parquet(GOOD["text"])[:-9], [ONE_TEXT], ["rows.parquet  not Parquet, or damaged"]),
    "Parquet, JSON in it": ("rows.parquet", jsonl(PAIR), [], ["rows.parquet  not Parquet, or damaged"]),
    "Parquet, chat with null": (
        "rows.parquet",
        parquet([{"messages": [said("user"), said("assistant", None)]}]),
        [CHAT],
        [":1  'messages', message 2: 'content' is null, not a text"],
    ),
    "Parquet, message null": ("rows.parquet", parquet([{"messages": [USER, None]}]), [CHAT], [":1", "2 is null"]),
}
FORMATS: dict[str, Case] = {
    "no prompt": ("rows.jsonl", between({"completion": "b"}), [], [":3  no field 'prompt'", "data.columns.prompt=FI"]),
    "no field": ("rows.jsonl", between({}), [], [":3  no field 'prompt'; there are none"]),
    "wrong column": ("rows.jsonl", between({"Prompt": "a", "completion": "b"}), [], ["there are 'Prompt', 'comple"]),
    "own column": ("rows.jsonl", jsonl({"q": "a", "completion": "b"}), [], [":1  no field 'prompt'; there are 'q'"]),
    "null": ("rows.jsonl", between({"prompt": "a", "completion": None}), [], [":3  'completion' is null, not a text"]),
    "number": ("rows.jsonl", between({"prompt": 3.5, "completion": "b"}), [], [":3  'prompt' is a number, not a text"]),
    "boolean": ("rows.jsonl", between({"prompt": "a", "completion": True}), [], [":3  'completion' is true or false"]),
    "list of texts": ("rows.jsonl", between({"prompt": "a", "completion": ["b"]}), [], [":3  'completion' is a list"]),
    "object": ("rows.jsonl", between({"prompt": {"text": "a"}, "completion": "b"}), [], [":3  'prompt' is an object"]),
    "empty completion": ("rows.jsonl", between({"prompt": "a", "completion": ""}), [], [":3  'completion' is empty"]),
    "empty, chat of pairs": (
        "rows.jsonl",
        between({"prompt": "a", "completion": ""}),
        ["data.system_prompt='Be brief.'"],
        [":3  'completion' is empty"],
    ),
    "empty response": (
        "rows.jsonl",
        between({"query": "", "response": ""}, "query_response"),
        [QUERY],
        [":3", "empty"],
    ),
    "query twice": ("rows.jsonl", between(b'{"query": "", "query": ""}', "query_response"), [QUERY], ["occurs twice"]),
    "no summary": ("rows.jsonl", between({"dialogue": "a"}, "dialogue_summary"), [DIALOGUE], [":3  no field 'summary"]),
    "dialogue of turns": (
        "rows.jsonl",
        between({"dialogue": ["a", "b"], "summary": "c"}, "dialogue_summary"),
        [DIALOGUE, "data.clean_dialogue=true"],
        [":3  'dialogue' is a list, not a text"],
    ),
    "text is null": ("rows.jsonl", between({"text": None}, "text"), [ONE_TEXT], [":3  'text' is null, not a text"]),
    "text is empty": ("rows.jsonl", between({"text": ""}, "text"), [ONE_TEXT], [":3  'text' is empty"]),
    "no answer at all": (
        "rows.jsonl",
        between({"question": "a"}, "gsm8k"),
        ["data=gsm8k"],
        [":3  no field 'answer'; there are 'question'"],
    ),
    "no answer found": (
        "rows.jsonl",
        between({"question": "a", "answer": "no number"}, "gsm8k"),
        ["data=gsm8k", "data.train_files=['{good}']", "data.validation_files=['{file}']"],
        ["1 row of validation can't be used", "data.answer_pattern", "finds nothing", "rows.jsonl:3"],
    ),
    "no answer found, held out": (
        "rows.jsonl",
        jsonl(*[{"question": "a", "answer": "b"}] * 40),
        ["data=gsm8k", "data.validation_fraction=0.5"],
        ["20 rows of validation can't be used", "and 10 more"],
    ),
    "test row": (
        "rows.jsonl",
        between({"prompt": "a"}),
        ["data.train_files=['{good}']", "data.test_files={{hard: ['{file}']}}"],
        ["1 row can't be used", "rows.jsonl:3  no field 'completion'"],
    ),
    "too long": (
        "rows.jsonl",
        between({"prompt": "a" * 99, "completion": "b"}),
        ["data.max_seq_length=50", "data.overflow=error"],
        [":3  longer than data.max_seq_length = 50, and data.overflow = error"],
    ),
    "target too long": (
        "rows.jsonl",
        between({"prompt": "a", "completion": "b" * 99}),
        ["model.type=encoder_decoder", "data.max_target_length=50", "data.overflow=error"],
        [":3  longer than data.max_seq_length = 1024 or data.max_target_length = 50"],
    ),
    "nothing supervised": (
        "rows.jsonl",
        jsonl(PAIR, *[{"prompt": "a" * 99, "completion": "b"}] * 25),
        ["data.max_seq_length=50"],
        ["train: 25 of 26 rows would be dropped (25 no supervised token)", ":2\n", ":11\n", "15 more", "data.overflow"],
    ),
    "all dropped": (
        "rows.jsonl",
        jsonl(*[{"prompt": "a" * 99, "completion": "b"}] * 2),
        ["data.max_seq_length=50", "data.overflow=drop", "data.max_dropped_fraction=1"],
        ["2 of 2 rows would be dropped (2 too long)", ":1\n", ":2\n"],
    ),
    "many": (
        "rows.jsonl",
        jsonl(*[{"prompt": "a"}] * 5000),
        [],
        ["5,000 rows can't be used", ":1  no field", ":10  the same", "… and 4990 more"],
    ),
}
CHATS: dict[str, Case] = {
    "no messages": ("rows.jsonl", between({"conversations": []}, "messages"), [CHAT], [":3  no field 'messages'"]),
    "null": ("rows.jsonl", between({"messages": None}, "messages"), [CHAT], ["'messages' is null, not a list"]),
    "text": ("rows.jsonl", between({"messages": "[]"}, "messages"), [CHAT], ["'messages' is a text, not a list"]),
    "object": ("rows.jsonl", between({"messages": USER}, "messages"), [CHAT], ["'messages' is an object, not a list"]),
    "empty": ("rows.jsonl", chat(), [CHAT], [":3  'messages' is empty: nothing to train on"]),
    "a text in it": ("rows.jsonl", chat("hi", ASSISTANT), [CHAT], [":3  'messages', message 1 is a text, not an obj"]),
    "a list in it": ("rows.jsonl", chat([], ASSISTANT), [CHAT], [":3  'messages', message 1 is a list, not an obj"]),
    "a null in it": ("rows.jsonl", chat(USER, None), [CHAT], [":3  'messages', message 2 is null, not an object"]),
    "an empty object": ("rows.jsonl", chat({}), [CHAT], [":3  'messages', message 1 has no", "there are none"]),
    "no content": ("rows.jsonl", chat({"role": "user"}), [CHAT], ["message 1 has no 'content'; there are 'role'"]),
    "no role": ("rows.jsonl", chat({"content": "a"}), [CHAT], ["message 1 has no 'role'; there are 'content'"]),
    "no value": ("rows.jsonl", chat({"from": "human"}), [CHAT], ["message 1 has no 'value'; there are 'from'"]),
    "mixed forms": ("rows.jsonl", chat(USER, {"role": "assistant", "value": "x"}), [CHAT], ["message 2 has no 'conte"]),
    "content is null": ("rows.jsonl", chat(said("user", None)), [CHAT], ["message 1: 'content' is null, not a text"]),
    "content is empty": ("rows.jsonl", chat(said("user", " \n")), [CHAT], ["message 1: 'content' is empty"]),
    "content is parts": (
        "rows.jsonl",
        chat(said("user", [{"type": "text", "text": "a"}]), ASSISTANT),
        [CHAT],
        [":3  'messages', message 1: 'content' is a list, not a text"],
    ),
    "role unknown": ("rows.jsonl", chat(said("tool")), [CHAT], ["message 1 has the role 'tool'; one of system, user"]),
    "role in capitals": ("rows.jsonl", chat(said("User")), [CHAT], ["message 1 has the role 'User'"]),
    "role is null": ("rows.jsonl", chat({"role": None, "content": "a"}), [CHAT], ["message 1 has the role None"]),
    "role is a list": ("rows.jsonl", chat({"role": [], "content": "a"}), [CHAT], ["message 1 has the role []"]),
    "two systems": ("rows.jsonl", chat(SYSTEM, SYSTEM, USER), [CHAT], ["message 2 is a second system message"]),
    "system later": ("rows.jsonl", chat(USER, ASSISTANT, SYSTEM), [CHAT], ["message 3 is a system message after the"]),
    "assistant first": ("rows.jsonl", chat(ASSISTANT, USER), [CHAT], ["message 1: the assistant can't speak first"]),
    "after the system": ("rows.jsonl", chat(SYSTEM, ASSISTANT), [CHAT], ["message 2: the assistant can't speak first"]),
    "two users": ("rows.jsonl", chat(USER, USER, ASSISTANT), [CHAT], ["message 2 is a second user's message in a row"]),
    "two answers": ("rows.jsonl", chat(USER, ASSISTANT, ASSISTANT), [CHAT], ["message 3 is a second assistant's mess"]),
    "ends with the user": ("rows.jsonl", chat(USER, ASSISTANT, USER), [CHAT], ["ends with the user: there is no answ"]),
    "system alone": ("rows.jsonl", chat(SYSTEM), [CHAT], [":3  'messages' ends with the system"]),
    "tool calls": (
        "rows.jsonl",
        chat(USER, said("assistant", tool_calls=[{"name": "f"}])),
        [CHAT],
        ["message 2 has tool_calls, which is not supported"],
    ),
    "function call": ("rows.jsonl", chat(USER, said("assistant", function_call={"n": 1})), [CHAT], ["function_call"]),
    "weight 2": ("rows.jsonl", chat(USER, said("assistant", weight=2)), [CHAT], ["message 2 has the weight 2; 0 (not"]),
    "weight 0.5": ("rows.jsonl", chat(USER, said("assistant", weight=0.5)), [CHAT], ["message 2 has the weight 0.5"]),
    "weight a text": ("rows.jsonl", chat(USER, said("assistant", weight="1")), [CHAT], ["has the weight '1'"]),
    "weight an object": ("rows.jsonl", chat(USER, said("assistant", weight={})), [CHAT], ["has the weight {}"]),
    "weight 0 in all": (
        "rows.jsonl",
        chat(USER, said("assistant", weight=0)),
        [CHAT],
        ["1 of 3 rows would be dropped (1 no supervised token)", "rows.jsonl:3"],
    ),
    "weight 0, encoder-decoder": (
        "rows.jsonl",
        chat(USER, said("assistant", weight=0)),
        [CHAT, "model.type=encoder_decoder", "data.supervised_turns=last"],
        ["1 of 3 rows would be dropped (1 no supervised token)", "rows.jsonl:3"],
    ),
}
CASES = {
    f"{group}: {name}": case
    for group, cases in [("lines", JSON_LINES), ("kind", OTHER_KINDS), ("format", FORMATS), ("chat", CHATS)]
    for name, case in cases.items()
}


def chosen(file: Path, cache: Path, *overrides: str) -> list[str]:
    option = [] if any(override.startswith("data=") for override in overrides) else ["data=prompt_completion"]
    files = [f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null"]
    nothing_else = ["data.validation_fraction=0", "tokens=none", f"data.cache_dir='{cache}'"]
    own = [override.format(file=file, good=file.with_name("good.jsonl")) for override in overrides]
    return [*option, *files, *nothing_else, *own]


def configured(file: Path, cache: Path, *overrides: str) -> RunConfig:
    return admitted(*chosen(file, cache, *overrides)).config


def of(config: RunConfig, file: str) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train_files=[file]))


def built(config: RunConfig, tokenizer: Any = None) -> Data:
    return build_data(config, tokenizer or load_tokenizer(config.model, config.tokens)[0])


def refusal(config: RunConfig, tokenizer: Any = None) -> str:
    """Build what can't be built, and give what is told."""
    with pytest.raises(TowlineError) as caught:
        built(config, tokenizer)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 2
    return str(caught.value)


def check_listed(message: str, file: Path) -> None:
    """Hold that the first ten places are listed, and how many there are."""
    found = re.search(r"([\d,]+) (?:rows? (?:of \w+ )?can't be used|of \d+ rows would be dropped)", message)
    if found is None:
        assert f"train has no rows: {file}" in message
        return
    count = int(found[1].replace(",", ""))
    listed = re.findall(rf"^  {re.escape(str(file))}(?::\d+)?(?:  .+)?$", message, re.MULTILINE)
    assert len(listed) == min(10, count)
    assert (f"… and {count - 10} more" in message) == (count > 10)


@pytest.mark.parametrize(("name", "content", "overrides", "words"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_told_by_its_place_and_can_be_mended(
    tmp_path: Path, name: str, content: bytes, overrides: list[str], words: list[str]
) -> None:
    file, cache = tmp_path / name, tmp_path / "cache"
    file.write_bytes(content)
    format_name = next((o.removeprefix("data=") for o in overrides if o.startswith("data=")), "prompt_completion")
    write_lines(tmp_path / "good.jsonl", GOOD[format_name])
    config = configured(file, cache, *overrides)
    message = refusal(config)
    for some in words:
        assert some in message
    check_listed(message, file)
    assert refusal(config) == message  # the cache makes no difference
    if "rows can't be used:" in message:
        assert not [entry for entry in cache.iterdir() if entry.is_dir() and "good" not in _sources(entry)]
    assert not list(cache.glob("*.tmp"))

    file.unlink()
    file.write_bytes(mended(name, format_name))
    data = built(config)
    sets = [data.train, *data.validation.values(), *data.test.values()]
    held = [rows.place(i) for rows in sets for i in range(len(rows))]
    first = 2 if name.startswith(("rows.csv", "rows.tsv")) else 1
    assert {f"{file}:{number}" for number in range(first, first + 3)} <= set(held)
    assert len(held) == len(set(held)) == (6 if "data.train_files" in str(overrides) else 3)


def _sources(entry: Path) -> str:
    return str(pyarrow.ipc.open_file(pyarrow.memory_map(str(entry / "rows.arrow"))).read_all()["source"].unique())


def test_there_are_enough_cases_of_every_kind_and_format() -> None:
    assert len(CASES) >= 60
    names = {name for name, *_ in CASES.values()}
    assert names >= {f"rows{suffix}" for suffix in (*TEXT_KINDS, ".parquet", ".jsonl.gz", ".csv.gz", ".txt.gz")}
    chosen = {o.removeprefix("data=") for _, _, overrides, _ in CASES.values() for o in overrides if "data=" in o}
    assert chosen | {"prompt_completion"} == set(GOOD)


REFUSES_TWO = "{%- if messages|length > 2 %}{{ raise_exception('one answer only') }}{%- endif %}"
TURNS = "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{%- endfor %}"
PLAIN = TURNS + "{%- if add_generation_prompt %}[assistant]{% endif %}"
NEEDS_SYSTEM = "{%- if messages[0].role != 'system' %}{{ raise_exception('a system message, please') }}{%- endif %}"
TEMPLATES = {
    "refuses long chats": (REFUSES_TWO + PLAIN, ["2 rows", ":1  the chat template refuses it: one answer only", ":2"]),
    "has no system": (
        "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{%- endif %}" + PLAIN,
        ["1 row can't", ":3  the chat template refuses it: no system"],
    ),
    "needs a field": (
        "{{ messages[2].tool.name }}" + PLAIN,
        [":1  the chat template refuses it: 'dict object' has no"],
    ),
    "is broken": ("{% for m in messages %}{{ m.content }", ["chat template"]),
    "fails in Python": ("{{ messages[0].content + 1 }}" + PLAIN, ["chat template"]),
    "needs a system message": (NEEDS_SYSTEM + PLAIN, [":1  the chat template refuses it: a system message, please"]),
    "marks too little": (
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        ["2 rows", ":1  the chat template marks 1 turns", ":2  the same"],
    ),
    "prompts otherwise": (
        TURNS + "{%- if add_generation_prompt %}[gpt]{% endif %}",
        ["3 rows", ":1  the chat template's generation prompt is not how the assistant's turn begins"],
    ),
    "rewrites history": (
        "{%- for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '-' }}{%- endfor %}"
        "{%- if add_generation_prompt %}[assistant]{% endif %}",
        ["2 rows", ":1  the chat template writes an earlier turn otherwise", "data.supervised_turns=last"],
    ),
    "writes nothing": ("{# nothing #}", ["of 3 rows would be dropped", "no supervised token", ":1"]),
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_refuses_is_told(tmp_path: Path, template: str, words: list[str], bos: bool) -> None:
    two = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    one = {"messages": [*([SYSTEM] if "system" in template else []), USER, ASSISTANT]}
    file = Path(write_lines(tmp_path / "rows.jsonl", [two, two, one]))
    config = configured(file, tmp_path / "cache", CHAT)
    tokenizer = byte_bpe(bos=bos)
    tokenizer.chat_template = template
    with pytest.raises(TowlineError) as caught:
        built(config, tokenizer)
    for some in words:
        assert some in str(caught.value)


def test_a_template_that_needs_a_system_message_gets_one(tmp_path: Path) -> None:
    file = Path(write_lines(tmp_path / "rows.jsonl", GOOD["messages"]))
    tokenizer = byte_bpe()
    tokenizer.chat_template = NEEDS_SYSTEM + PLAIN
    data = built(configured(file, tmp_path / "cache", CHAT, "data.system_prompt='Be brief.'"), tokenizer)
    assert data.train.prompt(0).startswith("<s>[system]Be brief.[user]0[assistant]x")


MARKERS = ["\uf8d0", "a\uf8d1b", "\uf8d27\uf8d3", "</s>\uf8d20\uf8d3", "\uf8d2</s>", "\uf8d2٠\uf8d3"]


@pytest.mark.parametrize("template", [None, PLAIN])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_characters_that_we_use_as_markers_are_kept_or_refused(tmp_path: Path, role: str, template: str | None) -> None:
    config = configured(Path(write_lines(tmp_path / "rows.jsonl", GOOD["messages"])), tmp_path / "cache", CHAT)
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    tokenizer.chat_template = template
    for number, sign in enumerate(MARKERS):
        chat = [said("user", "q"), said("assistant", "a")]
        chat[role == "assistant"]["content"] = sign
        file = write_lines(tmp_path / f"{number}.jsonl", [{"messages": chat}])
        try:
            row = built(of(config, file), tokenizer).train[0]
        except DataError as error:
            told = str(error)
        else:
            learned = tokenizer.decode(row.labels[row.labels >= 0])
            assert learned.startswith(chat[1]["content"])
            assert sign in tokenizer.decode(row.input_ids)
            continue
        assert f"{file}:1  " in told


def test_a_text_file_has_no_other_field_than_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("a\n")
    message = refusal(configured(file, tmp_path / "cache"))
    assert f"{file}:1  no field 'prompt'; there are 'text' (name yours with data.columns.prompt=FIELD)" in message
    assert refusal(configured(file, tmp_path / "cache", "data.columns.prompt=text")) != message


def test_a_table_has_no_chats(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('messages\n"[{}]"\n')
    message = refusal(configured(file, tmp_path / "cache", CHAT))
    assert f"{file}:2  'messages' is a text, not a list of messages" in message


def test_bad_rows_of_several_files_are_listed_in_their_order(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.csv", "c.json.gz"]
    (tmp_path / "b.jsonl").write_bytes(between({"prompt": 1}))
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\na,b\nc\n")
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'[{"prompt": "a", "completion": null}]'))
    listed = "', '".join(str(tmp_path / name) for name in names)
    message = refusal(configured(Path(listed), tmp_path / "cache"))
    assert message.startswith("3 rows can't be used:\n")
    assert re.findall(r"\w\.\S+:\d+", message) == ["b.jsonl:3", "a.csv:3", "c.json.gz:1"]


def test_a_file_that_goes_or_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(PAIR))
    config = configured(file, tmp_path / "cache")
    from src.data import sources

    read = sources.read_file

    def grows(name: str) -> Any:
        yield from read(name)
        with file.open("ab") as more:
            more.write(jsonl(PAIR))

    monkeypatch.setattr(sources, "read_file", grows)
    assert "changed while being read" in refusal(config)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    monkeypatch.undo()
    file.unlink()
    assert f"{file} can't be read: No such file or directory" in refusal(config)


COUNT = 80


def test_one_corrupt_byte_never_loses_a_row(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"{i}+1 {'é🙂' * (i % 3)}=", "completion": f'"{i}"\n\\{i}'} for i in range(12)]
    good = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    config = configured(Path(write_lines(tmp_path / "first.jsonl", rows)), tmp_path / "cache")
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    told = refused = 0
    for seed in range(COUNT):
        chance = random.Random(seed)
        where, byte = chance.randrange(len(good)), chance.choice([chance.randrange(256), *b"abc 0"])
        content = good[:where] + bytes([byte]) + good[where + 1 :]
        file = tmp_path / f"{seed}.jsonl"
        file.write_bytes(content)
        try:
            data = built(of(config, str(file)))
        except DataError as error:
            told += bool(re.search(rf"{seed}\.jsonl(:\d+)?  ", str(error)))
            refused += 1
            continue
        expected = [json.loads(line) for line in content.split(b"\n") if line.strip()]
        assert len(expected) == len(rows)
        found = [{"prompt": data.train.prompt(i), "completion": data.train.completion(i)} for i in range(len(rows))]
        assert found == [{key: row[key] for key in ("prompt", "completion")} for row in expected]
        for i, row in enumerate(expected):
            assert tokenizer.decode(data.train[i].input_ids[1:-1]) == row["prompt"] + row["completion"]
    assert COUNT / 4 < told == refused < COUNT


COMMANDS = ["lines: not JSON", "kind: gz cut", "format: too long", "chat: two users", "lines: empty"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """Start `python -m src.run` on each of COMMANDS, two at a time."""

    def start(case: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        folder = tmp_path_factory.mktemp("run")
        name, content, overrides, _ = CASES[case]
        (folder / name).write_bytes(content)
        options = [*chosen(folder / name, folder / "cache", *overrides), "tracking=none"]
        return towline(*options, f"hydra.run.dir='{folder / 'run'}'"), folder / "run"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(start, COMMANDS), strict=True))


@pytest.mark.parametrize("case", COMMANDS)
def test_a_user_never_sees_a_traceback(
    runs: dict[str, tuple[subprocess.CompletedProcess[str], Path]], case: str
) -> None:
    run, folder = runs[case]
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    for some in CASES[case][3]:
        assert some in run.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "FAILED"
