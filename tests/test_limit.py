"""data.limit: the first N records of each source are read and encoded, and nothing after them is looked at."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from src.data import sources
from src.data.dataset import Data, build_data, build_prompts
from src.data.encoding import Encoder
from src.data.readers.record import ReadResult
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from tests.conftest import admitted, write_lines

LIMIT = 40
GOOD = [{"prompt": f"p{i}", "completion": f"c{i % 7}"} for i in range(50)]
PAIRS = ("data=prompt_completion", "data.columns={prompt:prompt,completion:completion}", "data.test_files=null")


class Seen:
    """What was read, by file, and what was encoded, by prompt."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.encoded: list[str] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Count the records that are taken from files, and the rows that are encoded."""
    found, read_file, encode = Seen(), sources.read_file, Encoder.encode

    def reading(file: str) -> Iterator[ReadResult]:
        for row in read_file(file):
            found.read[Path(file).name] += 1
            yield row

    def encoding(encoder: Encoder, examples: Any, lengths: Any) -> Any:
        found.encoded.extend(example.prompt for example in examples)
        return encode(encoder, examples, lengths)

    monkeypatch.setattr(sources, "read_file", reading)
    monkeypatch.setattr(Encoder, "encode", encoding)
    return found


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Data]:
    def build(*overrides: str) -> Data:
        chosen = [*PAIRS, f"data.cache_dir='{tmp_path / 'rows'}'", *overrides]
        config = admitted(*chosen).config
        return build_data(config, load_tokenizer(config.model, config.tokens)[0])

    return build


def lines_of(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table_of(rows: list[dict[str, str]], delimiter: str) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def parquet_of(rows: list[dict[str, str]]) -> bytes:
    """Write row groups of 10, and spoil the fifth."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=10, write_page_checksum=True)
    content = bytearray(sink.getvalue())
    column = pyarrow.parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(4).column(0)
    content[column.data_page_offset + 20] ^= 0xFF
    return bytes(content)


BROKEN: dict[str, bytes] = {  # fifty rows, and something that can't be read from the 48th on
    "a.jsonl": (lines_of(GOOD[:47]) + "{broken\n").encode(),
    "a.json": f"[{lines_of(GOOD[:47]).strip().replace(chr(10), ',')}, {{broken}}]".encode(),
    "b.json": b"[" + lines_of(GOOD[:47]).strip().replace("\n", ",").encode() + b', {"prompt": "\xff"}]',
    "a.csv": (table_of(GOOD[:47], ",") + "one,two,three\n").encode(),
    "a.tsv": (table_of(GOOD[:47], "\t") + 'a\t"never closed\n').encode(),
    "a.txt": "".join(f"line {i}\n" for i in range(47)).encode() + b"\xff\n",
    "a.parquet": parquet_of(GOOD),
    "a.jsonl.gz": gzip.compress((lines_of(GOOD[:47]) + "{broken\n").encode()),
    "a.csv.gz": gzip.compress((table_of(GOOD[:47], ",") + "one,two,three\n").encode()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_comes_after_the_limit_is_not_read(
    tmp_path: Path, built: Callable[..., Data], seen: Seen, name: str
) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    chosen = [f"data.train_files=['{tmp_path / name}']"]
    if name.endswith(".txt"):
        chosen += ["data=text", "data.columns={text:text}"]
    data = built(*chosen, f"data.limit={LIMIT}")
    assert seen.read == {name: LIMIT}
    assert len(seen.encoded) == LIMIT
    report = data.reports["train"]
    assert (report.rows_read, report.rows_kept, dict(report.rows_dropped)) == (LIMIT, LIMIT, {})
    with pytest.raises(DataError, match="can't be used"):
        built(*chosen, "data.limit=50")


def test_it_comes_before_holding_out_and_dropping(tmp_path: Path, built: Callable[..., Data], seen: Seen) -> None:
    rows = [{"prompt": "x" * (90 if i in (3, 5, 44) else 1) + str(i), "completion": "y"} for i in range(50)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    dropping = ["data.max_seq_length=60", "data.overflow=drop", "data.max_dropped_fraction=0.2"]
    data = built(f"data.train_files=['{file}']", "data.validation_fraction=0.25", *dropping, f"data.limit={LIMIT}")
    reports = data.reports
    assert (seen.read, len(seen.encoded)) == ({"a.jsonl": LIMIT}, LIMIT)
    assert [reports[name].rows_read for name in ("train", "validation")] == [30, 10]
    assert sum(report.rows_dropped["too_long"] for report in reports.values()) == 2
    assert sum(report.rows_kept for report in reports.values()) == 38
    assert isinstance(data.train, EncodedSet)
    both = [rows.prompt(i) for rows in (data.train, data.validation["validation"]) for i in range(len(rows))]
    assert sorted(both) == sorted(row["prompt"] for i, row in enumerate(rows[:LIMIT]) if i not in (3, 5))


@pytest.mark.parametrize("more", [(), ("data.num_folds=4", "data.fold=1"), ("data.validation_fraction=0.5",)], ids=str)
@pytest.mark.parametrize("share", [{}, {"weight": 1}, {"count": 30}], ids=str)
def test_of_a_mixture_it_is_of_each_source(
    tmp_path: Path, built: Callable[..., Data], seen: Seen, share: dict[str, int], more: tuple[str, ...]
) -> None:
    mixed = {
        name: {"train_files": [write_lines(tmp_path / f"{name}.jsonl", GOOD[:count])]} | share
        for name, count in (("a", 50), ("b", 12))
    }
    data = built(f"data.mixture={json.dumps(mixed)}".replace('"', ""), "data.limit=20", *more)
    assert seen.read == {"a.jsonl": 20, "b.jsonl": 12}
    assert len(seen.encoded) == 32
    assert sum(report.rows_read for report in data.reports.values()) == 32
    for report in data.reports.values():
        assert report.rows_kept == report.rows_read - report.rows_dropped.total() + report.rows_repeated


def test_of_a_stream_it_is_of_each_source_and_epoch(tmp_path: Path, built: Callable[..., Data], seen: Seen) -> None:
    (tmp_path / "a.jsonl").write_bytes(BROKEN["a.jsonl"])
    data = built(
        f"data.train_files=['{tmp_path / 'a.jsonl'}']", "data.streaming=true", "training.max_train_steps=9",
        "data.validation_fraction=0", f"data.limit={LIMIT}",
    )  # fmt: skip
    assert not isinstance(data.train, EncodedSet)
    seen.read.clear()
    for _ in range(2):
        rows = [block.prompt(i) for block in data.train.blocks() for i in range(len(block))]
        assert rows == [row["prompt"] for row in GOOD[:LIMIT]]
    assert seen.read == {"a.jsonl": 2 * LIMIT}
    report = data.report()["train"]
    assert (report["rows_read"], report["rows_kept"], report["rows_dropped"]) == (2 * LIMIT, 2 * LIMIT, {})


def test_of_a_data_set_of_the_library_no_file_beyond_is_opened(
    tmp_path: Path, built: Callable[..., Data], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "corpus" / "train-0.jsonl", GOOD)
    (tmp_path / "corpus" / "train-1.jsonl").write_text("{broken\n")
    chosen = [f"data.dataset_name='{tmp_path / 'corpus'}'", "data.validation_fraction=0"]
    data = built(*chosen, f"data.limit={LIMIT}")
    assert isinstance(data.train, EncodedSet)
    assert [data.train.prompt(i) for i in range(len(data.train))] == [row["prompt"] for row in GOOD[:LIMIT]]
    assert len(seen.encoded) == LIMIT
    with pytest.raises(DataError, match="can't be loaded"):
        built(*chosen)


def test_the_cache_knows_the_limit_and_one_beyond_the_end_changes_nothing(
    tmp_path: Path, built: Callable[..., Data], seen: Seen
) -> None:
    file = write_lines(tmp_path / "a.jsonl", GOOD)
    chosen = (f"data.train_files=['{file}']", "data.validation_fraction=0.2")
    for limit, encoded, kept in ((20, 20, 16), (20, 0, 16), (30, 30, 24), ("null", 50, 40), (1000, 50, 40)):
        seen.encoded.clear()
        data = built(*chosen, f"data.limit={limit}")
        assert (len(seen.encoded), data.num_train_rows) == (encoded, kept)
    assert data.train.digest() == built(*chosen).train.digest()


def test_prompts_to_predict_are_limited_alike(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "a.jsonl").write_bytes(BROKEN["a.jsonl"])
    files = f"['{tmp_path / 'a.jsonl'}']"
    config = admitted(*PAIRS, f"data.train_files={files}", f"data.test_files={files}", f"data.limit={LIMIT}").config
    prompts = build_prompts(config, load_tokenizer(config.model, config.tokens)[0])
    assert len(prompts.sets["test"]) == LIMIT
    assert seen.read == {"a.jsonl": LIMIT}
