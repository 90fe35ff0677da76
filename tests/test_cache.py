"""The cache: found again when nothing that makes rows has changed, made anew when something has, never half written."""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from src.config.keys import all_keys
from src.config.schema import RunConfig
from src.config.schema.fields import key
from src.data import cache as caching
from src.data import sources, store
from src.data.cache import RowCache, tokenizer_fingerprint
from src.data.dataset import Data, build_data
from src.data.encoding import Encoder, Lengths
from src.data.preparation import EncodingConfig, encode_chunks
from src.data.readers.record import Record
from src.data.sets import EncodedSet
from src.data.sources import file_source
from src.data.store import ROWS, STATS
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from tests.conftest import FORKS, admitted, write_lines
from tests.kinds import byte_bpe

ROWS_MADE = [{"prompt": f"{i}+1=", "completion": f"<ToW>{i} and one</ToW>{i + 1}"} for i in range(40)]
OTHER_ROWS = [{"prompt": f"{i}+2=", "completion": f"<ToW>{i} and one</ToW>{i + 1}"} for i in range(40)]
CHATS = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "a"}]} for i in range(9)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Counted:
    """Counts how often rows are prepared rather than found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        monkeypatch.setattr(caching, "encode_chunks", self)

    def __call__(self, *given: Any) -> Any:
        self.times += 1
        return encode_chunks(*given)

    def since(self) -> int:
        times, self.times = self.times, 0
        return times


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_lines(tmp_path / "rows.jsonl", ROWS_MADE)


def chosen(file: str, cache: Path | None, *overrides: str) -> list[str]:
    where = "null" if cache is None else f"'{cache}'"
    files = [f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null"]
    return [*files, f"data.cache_dir={where}", *overrides]


def built(config: RunConfig, change: Callable[[Any], Any] = lambda _: None) -> Data:
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    change(tokenizer)
    return build_data(config, tokenizer)


def rows_of(rows: EncodedSet) -> list[tuple[Any, ...]]:
    return [
        (rows[i].input_ids.tolist(), rows[i].labels.tolist(), rows.prompt(i), rows.reference(i), rows.place(i))
        for i in range(len(rows))
    ]


def entries(cache: Path) -> list[Path]:
    return [entry for entry in cache.iterdir() if entry.is_dir()]


# Found again, or made anew


def test_the_second_time_rows_are_found_and_the_same(tmp_path: Path, file: str, counted: Counted) -> None:
    validation = write_lines(tmp_path / "validation.jsonl", OTHER_ROWS)
    config = admitted(*chosen(file, tmp_path / "cache", f"data.validation_files=['{validation}']")).config
    first = built(config)
    assert counted.since() == 2
    again = built(config)
    assert counted.since() == 0
    assert {name: report.as_dict() for name, report in again.reports.items()} == {
        name: report.as_dict() for name, report in first.reports.items()
    }
    assert rows_of(again.train) == rows_of(first.train)
    assert rows_of(again.validation["validation"]) == rows_of(first.validation["validation"])
    assert again.train.digest() == first.train.digest() != again.validation["validation"].digest()


def test_rows_are_found_without_importing_pandas(tmp_path: Path, file: str) -> None:
    built(admitted(*chosen(file, tmp_path / "cache")).config)
    [entry] = entries(tmp_path / "cache")
    code = (
        "import sys; from pathlib import Path; from src.data.store import Shard; "
        f"print(len(Shard.open(Path({str(entry)!r}))), 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(ROWS_MADE)), "False"]


HARMLESS = [
    ["data.batching=packed"],
    ["data.batching=length_grouped", "seed=7"],
    ["optimizer.lr=0.1", "training.per_device_train_batch_size=3"],
    ["data.max_dropped_fraction=0.5", "data.answer_pattern='(.*)'"],
    ["data.preprocessing_num_workers=2"],
    ["training.max_train_steps=3", "evaluation.eval_steps=null"],
]


@pytest.mark.parametrize("overrides", HARMLESS, ids=str)
def test_what_does_not_shape_rows_finds_them_again(
    tmp_path: Path, file: str, counted: Counted, overrides: list[str]
) -> None:
    first = built(admitted(*chosen(file, tmp_path / "cache")).config)
    again = built(admitted(*chosen(file, tmp_path / "cache", *overrides)).config)
    assert counted.times == 1
    assert rows_of(again.train) == rows_of(first.train)


SHAPING = {
    "template": (["data.prompt_template='Q {prompt}'"], lambda rows: rows.prompt(0) == "Q 0+1="),
    "completion": (["data.completion_template=' {completion}'"], lambda rows: rows.completion(0)[0] == " "),
    "tags": (["tokens=hcot"], lambda rows: rows.completion(0) == "<hCoT>0 and one</hCoT>1"),
    "no thoughts": (["data.thoughts=drop"], lambda rows: rows.completion(0) == "1"),
    "pattern": (["data.thought_pattern='<ToW>(?:. and )?(.*?)</ToW>'"], lambda rows: "<ToW>one" in rows.completion(0)),
    "malformed": (
        ["data.thought_pattern='<ToW>(.*?) '", "data.malformed_thoughts=keep"],
        lambda rows: rows.reference(0) == "and one</ToW>1",
    ),
    "length": (["data.max_seq_length=12"], lambda rows: max(rows.lengths) == 12),
    "overflow": (
        ["data.max_seq_length=12", "data.overflow=truncate_prompt"],
        lambda rows: max(rows.lengths) == 12 and rows[39].input_ids.tolist()[:2] == [1, rows[39].labels[1]],
    ),
    "limit": (["data.limit=7"], lambda rows: len(rows) == 7),
    "columns": (["data.columns.prompt=completion"], lambda rows: rows.prompt(0).startswith("<ToW>")),
    "system prompt": (["data.system_prompt='Add.'"], lambda rows: "Add." in rows.prompt(0)),
    "no system prompt": (["data.system_prompt=''"], lambda rows: rows.prompt(0).startswith("<s>User:\n")),
}


@pytest.mark.parametrize(("overrides", "holds"), SHAPING.values(), ids=SHAPING)
def test_what_shapes_rows_makes_them_anew(
    tmp_path: Path, file: str, counted: Counted, overrides: list[str], holds: Callable[[EncodedSet], bool]
) -> None:
    plain = admitted(*chosen(file, tmp_path / "cache")).config
    first = built(plain)
    other = built(admitted(*chosen(file, tmp_path / "cache", *overrides)).config)
    assert counted.since() == 2
    assert isinstance(other.train, EncodedSet)
    assert holds(other.train)
    assert rows_of(built(plain).train) == rows_of(first.train)
    assert counted.since() == 0


def with_key(section: Any, value: Any, **info: Any) -> Any:
    """Return the settings of a section with one more key, as a later version would declare it."""
    declared = key(default=None, **info) if info else dataclasses.field(default=None)
    later = dataclasses.make_dataclass("Later", [("lowercase", Any, declared)], bases=(type(section),))
    own = {one.name: getattr(section, one.name) for one in dataclasses.fields(section)}
    return later(**own, lowercase=value)


@pytest.mark.parametrize("section", ["data", "tokens", "tokens.init"])
def test_a_new_key_shapes_rows_unless_it_says_otherwise(
    tmp_path: Path, file: str, counted: Counted, section: str
) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config
    own = config.tokens.init if section == "tokens.init" else getattr(config, section)

    def later(value: Any, **info: Any) -> RunConfig:
        one = with_key(own, value, **info)
        if section == "tokens.init":
            return dataclasses.replace(config, tokens=dataclasses.replace(config.tokens, init=one))
        return dataclasses.replace(config, **{section: one})

    for value in (True, False):
        for _ in range(2):
            built(later(value))
    assert counted.times == 2
    for value in (None, None, True, False):  # at its default all is as without it
        built(later(value, shapes_rows=value is None))
    assert counted.times == 3
    built(config)
    assert counted.times == 3


def test_what_enters_the_cache_by_another_name_is_there() -> None:
    entering = {one.info.cache_key_field for one in all_keys().values()} - {""}
    assert entering == {"lengths", "tags", "tokenizer"}
    assert all(hasattr(EncodingConfig, name) or name in EncodingConfig.__annotations__ for name in entering)


def test_settings_of_chats_make_them_anew(tmp_path: Path, counted: Counted) -> None:
    file = write_lines(tmp_path / "chats.jsonl", CHATS)
    seen = set()
    for number, overrides in enumerate(
        [[], ["data.supervised_turns=last"], ["data.system_prompt='Be brief.'"], ["data.system_prompt=Be"]], start=1
    ):
        for _ in range(2):
            data = built(admitted(*chosen(file, tmp_path / "cache", "data=messages", *overrides)).config)
            seen.add(data.train.prompt(0))
        assert counted.times == number
    assert len(seen) == 3


def test_another_tokenizer_makes_rows_anew(tmp_path: Path, file: str, counted: Counted) -> None:
    config = admitted(*chosen(file, tmp_path / "cache", "data.system_prompt=''")).config
    changes: list[Callable[[Any], Any]] = [
        lambda _: None,
        lambda tokenizer: tokenizer.add_tokens(["+1="]),
        lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"),
        lambda tokenizer: setattr(tokenizer, "pad_token", "</s>"),
    ]
    found = []
    for number, change in enumerate(changes, start=1):
        for _ in range(2):
            data = built(config, change)
        assert counted.times == number
        found.append([tuple(row[0]) for row in rows_of(data.train)])
    plain, with_token, with_template, with_eos, _ = found
    assert max(map(len, with_token)) < max(map(len, plain))
    assert plain != with_template
    assert {ids[-1] for ids in plain} == {2}
    assert {ids[-1] for ids in with_eos} == {0}


class Translator(PreTrainedTokenizerFast):
    """Frames a target by its language, as mBART's and NLLB's tokenizers do."""

    language = "</s>"

    def _switch_to_target_mode(self) -> None:
        ids = [(self.language, self.convert_tokens_to_ids(self.language))]
        framed = processors.TemplateProcessing(single=f"{self.language} $A", special_tokens=ids)
        self.backend_tokenizer.post_processor = framed

    def _switch_to_input_mode(self) -> None:
        self.backend_tokenizer.post_processor = byte_bpe().backend_tokenizer.post_processor


def test_what_a_decoder_begins_with_is_part_of_a_tokenizer() -> None:
    prints, prefixes = set(), set()
    for language in ("</s>", "<|turn|>"):
        tokenizer = Translator(tokenizer_object=byte_bpe().backend_tokenizer, bos_token="<s>", eos_token="</s>")
        tokenizer.language = language
        prefixes.add(tuple(Encoder(tokenizer).target_prefix))
        prints.add(tokenizer_fingerprint(tokenizer))
    assert len(prefixes) == 2
    assert len(prints) == 2


def test_another_content_makes_rows_anew(tmp_path: Path, counted: Counted) -> None:
    config = admitted(*chosen(write_lines(tmp_path / "rows.jsonl", ROWS_MADE), tmp_path / "cache")).config
    built(config)
    write_lines(tmp_path / "rows.jsonl", ROWS_MADE[:-1])
    assert len(built(config).train) == 39
    assert counted.times == 2


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_another_content_of_the_same_size_and_time_makes_rows_anew(
    tmp_path: Path, file: str, counted: Counted, how: str
) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config
    built(config)
    before = os.stat(file)
    written = file if how == "in place" else f"{file}.new"
    write_lines(Path(written), OTHER_ROWS)
    os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.rename(written, file)
    after = os.stat(file)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert built(config).train.prompt(0) == "0+2="
    assert counted.times == 2


def test_a_file_that_changes_before_it_is_read_is_not_kept_under_its_old_content(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config

    def late(*given: Any) -> Any:
        write_lines(Path(file), OTHER_ROWS[:30])
        return encode_chunks(*given)

    monkeypatch.setattr(caching, "encode_chunks", late)
    try:
        built(config)
    except DataError as error:
        told = str(error)
        assert "changed" in told
    monkeypatch.undo()
    write_lines(Path(file), ROWS_MADE)
    assert [row[2] for row in rows_of(built(config).train)] == [row["prompt"] for row in ROWS_MADE]


def test_the_same_content_elsewhere_is_named_by_its_own_path(tmp_path: Path, file: str) -> None:
    long = {"prompt": "x" * 99, "completion": "y"}
    for name in ("first", "second"):
        elsewhere = write_lines(tmp_path / f"{name}.jsonl", [*ROWS_MADE, long])
        config = admitted(*chosen(elsewhere, tmp_path / "cache", "data.max_seq_length=50")).config
        data = built(config)
        assert {data.train.place(i).rpartition(":")[0] for i in range(40)} == {elsewhere}
        assert data.reports["train"].dropped_places == {"no_supervised_token": [f"{elsewhere}:41"]}
        strict = admitted(
            *chosen(elsewhere, tmp_path / "cache", "data.max_seq_length=50", "data.max_dropped_fraction=0")
        ).config
        with pytest.raises(DataError, match=rf"\n  {elsewhere}:41\n"):
            built(strict)


def test_rows_of_another_version_of_the_code_are_made_anew(
    tmp_path: Path, file: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config
    built(config)
    monkeypatch.setattr(caching, "_code", lambda: "another")
    built(config)
    assert counted.times == 2


# Several processes, and those that end in the middle


def build_as_told(pipe: Connection, tmp: str) -> None:
    """Be another process, which is told what to build and how slowly, says that it is ready, and builds when told."""
    tempfile.tempdir = tmp
    slow, *overrides = pipe.recv()
    times_prepared = 0

    def slowly(*given: Any) -> Iterator[Any]:
        nonlocal times_prepared
        times_prepared += 1
        for chunk in encode_chunks(*given):
            yield chunk
            time.sleep(slow)

    caching.encode_chunks = slowly
    store.BATCH_ROWS = 1  # what is prepared is written at once
    config = admitted(*overrides).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    pipe.send("ready")
    pipe.recv()
    data = build_data(config, tokenizer)
    pipe.send([times_prepared, data.train.digest(), len(data.train)])
    atexit._run_exitfuncs()  # a forked process ends without


class Other:
    """A process that builds data."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=build_as_told, args=(theirs, str(tmp)))
        self.process.start()
        theirs.close()

    def ready(self, *options: str, slow: float = 0) -> Other:
        self.pipe.send([slow, *options])
        assert self.pipe.recv() == "ready"
        return self

    def result(self) -> list[Any]:
        result = self.pipe.recv()
        self.process.join(60)
        assert self.process.exitcode == 0
        return list(result)


@pytest.fixture(scope="module", autouse=True)
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Other]]:
    """Start processes early, so that they are ready when a test needs one."""
    started = [Other(tmp_path_factory.mktemp("tmp")) for _ in range(3)]
    yield list(started)
    for other in started:
        other.process.kill()
        other.process.join()


def begun(other: Other, cache: Path) -> None:
    """Let a process build, and come back when it has begun to write rows."""
    other.pipe.send("go")
    deadline = time.monotonic() + 60
    while not [rows for rows in cache.glob(f"*.tmp/{ROWS}") if rows.stat().st_size]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_want_the_same_rows_prepare_them_once(
    tmp_path: Path, file: str, counted: Counted, others: list[Other]
) -> None:
    options = chosen(file, tmp_path / "cache")
    config = admitted(*options).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    other = others.pop().ready(*options, slow=1.5)
    begun(other, tmp_path / "cache")
    told: list[str] = []
    data = build_data(config, tokenizer, told.append)
    assert told == ["train: waiting for another run that prepares the same rows"]
    assert counted.times == 0
    assert other.result() == [1, data.train.digest(), len(ROWS_MADE)]
    assert len(entries(tmp_path / "cache")) == 1


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_used(
    tmp_path: Path, file: str, counted: Counted, others: list[Other]
) -> None:
    cache = tmp_path / "cache"
    other = others.pop().ready(*chosen(file, cache), slow=60)
    begun(other, cache)
    other.process.kill()
    other.process.join(10)
    assert other.process.exitcode == -signal.SIGKILL
    assert [entry.suffix for entry in entries(cache)] == [".tmp"]
    data = built(admitted(*chosen(file, cache)).config)
    assert counted.times == 1
    assert [row[2] for row in rows_of(data.train)] == [row["prompt"] for row in ROWS_MADE]
    assert [entry.suffix for entry in entries(cache)] == [""]


def test_without_a_folder_nothing_is_left_behind(file: str, others: list[Other]) -> None:
    other = others.pop().ready(*chosen(file, None))
    other.pipe.send("go")
    assert other.result()[2] == len(ROWS_MADE)
    assert list(other.tmp.glob("towline*")) == []


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config

    def broken(*given: Any) -> Iterator[Any]:
        yield next(iter(encode_chunks(*given)))
        raise KeyboardInterrupt

    monkeypatch.setattr(caching, "encode_chunks", broken)
    with pytest.raises(KeyboardInterrupt):
        built(config)
    assert entries(tmp_path / "cache") == []


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "rows cut": lambda entry: os.truncate(entry / ROWS, os.path.getsize(entry / ROWS) - 100),
    "rows cut in the middle": lambda entry: os.truncate(entry / ROWS, os.path.getsize(entry / ROWS) // 2),
    "rows empty": lambda entry: os.truncate(entry / ROWS, 0),
    "rows gone": lambda entry: os.unlink(entry / ROWS),
    "rows other": lambda entry: (entry / ROWS).write_text("not Arrow at all, but long enough to look for a footer"),
    "account gone": lambda entry: os.unlink(entry / STATS),
    "account empty": lambda entry: (entry / STATS).write_text(""),
    "account of nothing": lambda entry: (entry / STATS).write_text("{}"),
    "account no object": lambda entry: (entry / STATS).write_text("[]"),
    "account of another version": lambda entry: (entry / STATS).write_text('{"dropped": [], "more": 1}'),
    "account of bytes": lambda entry: (entry / STATS).write_bytes(b"\xff"),
    "a folder of nothing": lambda entry: [os.unlink(entry / name) for name in (ROWS, STATS)],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, file: str, counted: Counted, damage: Callable[[Path], Any]
) -> None:
    config = admitted(*chosen(file, tmp_path / "cache")).config
    first = rows_of(built(config).train)
    (entry,) = entries(tmp_path / "cache")
    damage(entry)
    told: list[str] = []
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    assert rows_of(build_data(config, tokenizer, told.append).train) == first
    assert counted.since() == 2
    assert "damaged and prepared again" in told[0]
    assert rows_of(built(config).train) == first
    assert counted.since() == 0


# Folders that can't be written


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path, file: str) -> None:
    (tmp_path / "cache").write_text("a file")
    for folder in (tmp_path / "cache", tmp_path / "cache" / "inside"):
        with pytest.raises(DataError, match=rf"data\.cache_dir = {folder} can't be made: .*; set another"):
            config = admitted(*chosen(file, tmp_path / "other")).config
            built(dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(folder))))
    assert (tmp_path / "cache").read_text() == "a file"


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caching.FileLock, "acquire", denied)  # a test may run as root, to whom nothing is denied
    with pytest.raises(DataError, match=r"data\.cache_dir = .*cache can't be written: Permission denied"):
        built(admitted(*chosen(file, tmp_path / "cache")).config)


@pytest.mark.parametrize("left", ["for some rows", "for none"])
def test_a_full_disk_is_told_and_no_entry_left(tmp_path: Path, small_disk: Callable[[str], Path], left: str) -> None:
    disk = small_disk("size=1m")
    rows = [{"prompt": "ab" * 50, "completion": "c" * 50}] * 6000
    file = write_lines(tmp_path / "rows.jsonl", rows)
    if left == "for none":
        (disk / "filler").write_bytes(bytes(1024 * 1024 - 4096))
    with pytest.raises(DataError) as caught:
        built(admitted(*chosen(file, disk / "cache")).config)
    for words in ("no space left", str(disk / "cache"), "data.cache_dir=DIR"):
        assert words in str(caught.value)
    assert entries(disk / "cache") == []
    config = admitted(*chosen(file, tmp_path / "cache")).config
    assert len(built(config).train) == 6000


# Worker processes


def test_worker_processes_make_the_same_rows(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS_MADE * 150)  # three chunks
    one, two = (
        built(admitted(*chosen(file, None, f"data.preprocessing_num_workers={workers}")).config) for workers in (1, 2)
    )
    assert rows_of(two.train) == rows_of(one.train)
    assert two.reports["train"].as_dict() == one.reports["train"].as_dict()


def test_worker_processes_tell_the_same_of_bad_rows(tmp_path: Path) -> None:
    rows = ROWS_MADE * 150
    for i in range(1990, 5000, 200):
        rows = [*rows[:i], {"prompt": i}, *rows[i:]]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    messages = []
    for workers in (1, 2):
        with pytest.raises(DataError) as caught:
            built(admitted(*chosen(file, tmp_path / "c", f"data.preprocessing_num_workers={workers}")).config)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("16 rows can't be used")
    assert entries(tmp_path / "c") == []


class _Deadly:
    """Ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_worker_process_that_dies_is_told(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str) -> Iterator[Record]:
        for i in range(9000):
            yield Record({"prompt": "a", "completion": "b"} | ({"x": _Deadly()} if i == 4500 else {}), name, i + 1)

    monkeypatch.setattr(sources, "read_file", rows)
    with pytest.raises(DataError, match=r"a process that prepares rows died .*data\.preprocessing_num_workers"):
        built(admitted(*chosen(file, tmp_path / "cache", "data.preprocessing_num_workers=2")).config)
    assert entries(tmp_path / "cache") == []
    assert multiprocessing.active_children() == []


def test_rows_to_predict_have_entries_of_their_own(tmp_path: Path, file: str, counted: Counted) -> None:
    recipe = recipe_of(admitted(*chosen(file, tmp_path / "cache")).config)
    cache = RowCache(str(tmp_path / "cache"), lambda _: None)
    for to_predict, times in ((False, 1), (True, 1), (False, 0), (True, 0)):
        shard = cache.shard("rows", file_source([file], None), replace(recipe, to_predict=to_predict))
        assert (len(shard), counted.since()) == (40, times)


# Memory


def peak(work: Callable[[], Any]) -> int:
    """Give the most memory that Python holds meanwhile, in bytes."""
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def recipe_of(config: RunConfig) -> EncodingConfig:
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    lengths = Lengths(config.data.max_seq_length, None, config.data.overflow)
    return EncodingConfig(config.data, config.tokens, tokenizer, lengths, is_chat=False)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    few, many = (write_lines(tmp_path / f"{n}.jsonl", [{"prompt": "a", "completion": "b"}] * n) for n in (6000, 26_000))
    config = admitted(*chosen(few, tmp_path / "cache", "tokens=none")).config
    recipe, cache = recipe_of(config), RowCache(str(tmp_path / "cache"), lambda _: None)
    cache.shard("train", file_source([few], 9), recipe)  # what is made once
    small, large = (peak(lambda f=file: cache.shard("train", file_source([f], None), recipe)) for file in (few, many))
    assert (large - small) / 20_000 < 64  # a few numbers of each row

    def build(file: str) -> int:
        data = dataclasses.replace(config.data, train_files=[file])
        return peak(lambda: build_data(dataclasses.replace(config, data=data), recipe.tokenizer))

    small, large = build(few), build(many)  # found again: numbers of each row, no texts and no Python objects
    assert (large - small) / 20_000 < 128


def test_a_part_is_mapped_into_memory_and_not_read(tmp_path: Path, file: str) -> None:
    recipe = recipe_of(admitted(*chosen(file, tmp_path / "cache")).config)
    cache = RowCache(str(tmp_path / "cache"), lambda _: None)
    cache.shard("train", file_source([file], None), recipe)
    before = pyarrow.total_allocated_bytes()
    part = cache.shard("train", file_source([file], None), recipe)
    assert pyarrow.total_allocated_bytes() - before < 1000
    assert len(part) == 40


def encode_without_end(going: Connection) -> None:
    def forever() -> Iterator[Record]:
        while True:
            yield Record({"prompt": "a", "completion": "b"}, "rows", 1)

    for _ in encode_chunks(forever(), recipe_of(admitted("tokens=none").config), 2):
        going.send(os.getpid())
        time.sleep(0.2)


def test_workers_end_with_a_parent_that_was_killed() -> None:
    going, theirs = FORKS.Pipe()
    parent = FORKS.Process(target=encode_without_end, args=(theirs,))
    parent.start()
    workers = psutil.Process(going.recv()).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
