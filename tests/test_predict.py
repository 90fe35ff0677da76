"""Predictions: what the model writes for every row, whole after any stop, and never mixed with others."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import predict
from src.cli.start import run_job as train
from src.config.gate import admit_finished
from src.config.schema import RunConfig
from src.data.answers import strip_thoughts
from src.data.dataset import build_data, build_prompts
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError
from src.evaluation import predicted_set
from src.metrics import THOUGHTS
from src.runtime.signals import StopRequest
from src.tracking.lock import hold
from tests.conftest import ROOT, ForkedCommand, admitted, write_config, write_lines

LEARNED = [
    {"prompt": "ab" * (i % 5) + f"{i % 7}=", "completion": f"<ToW>{i % 7}</ToW>{'xyz'[i % 3] * (1 + i % 7)}"}
    for i in range(105)
]
ODD = [
    {"prompt": 'she said "a, b"\n=', "completion": 'x "y", z'},
    {"prompt": "line\u2028one\r\ntwo=", "completion": "안녕\u0085"},
    {"prompt": ",", "completion": "'"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run, finished, that learned to think and to stop; the file that it was trained on is gone."""
    base = tmp_path_factory.mktemp("finished")
    file, tests = write_lines(base / "train.jsonl", LEARNED), write_lines(base / "test.jsonl", LEARNED[:20])
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        train(
            admitted(f"data.train_files=['{file}']", "data.validation_files=null", f"data.test_files=['{tests}']",
                     "data.limit=90", "training.per_device_train_batch_size=16", "training.max_train_steps=40",
                     "data.batching=padded",
                     "evaluation.eval_steps=null", "evaluation.sample_prompts=0", "generation.max_new_tokens=12",
                     "training.per_device_eval_batch_size=5", f"hydra.run.dir={base / 'run'}"),
            StopRequest(),
        )  # fmt: skip
    finally:
        os.chdir(before)
    Path(file).unlink()
    return base / "run"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A file of 43 rows: two whole blocks of 4 x 5 rows, and three rows."""
    return write_lines(tmp_path / "rows.jsonl", [*LEARNED[:40], *ODD])


Command = Callable[..., str]


@pytest.fixture
def said(run: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Predict the 43 rows into tmp_path/out, unless the overrides say otherwise; give what was printed."""

    def command(*overrides: str, code: int = 0) -> str:
        defaults = {"data.test_files": f"['{rows}']", "predict.output": str(tmp_path / "out")}
        chosen = {override.partition("=")[0] for override in overrides}
        given = [f"{key}={value}" for key, value in defaults.items() if key not in chosen]
        assert predict.main([f"run={run}", *given, *overrides]) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out

    return command


def test_a_line_is_what_plain_transformers_generates_for_the_row_alone(
    said: Command, run: Path, rows: str, tmp_path: Path
) -> None:
    said()
    lines = read_jsonl(tmp_path / "out" / "test.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert [line["row"] for line in lines] == list(range(43))
    given = [*LEARNED[:40], *ODD]
    for i, line in enumerate(lines):
        ids = torch.tensor([tokenizer(given[i]["prompt"])["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        new = made[0, ids.shape[1] :].tolist()
        ended = tokenizer.eos_token_id in new
        new = new[: new.index(tokenizer.eos_token_id)] if ended else new
        text = tokenizer.decode(new)
        assert (line["text"], line["stop_reason"]) == (text, "eos" if ended else "length")
        assert (line["prompt"], line["source"]) == (given[i]["prompt"], f"{rows}:{i + 1}")
        assert line["reference"] == given[i]["completion"].rpartition("</ToW>")[2]
        assert line["answer"] == strip_thoughts(text, ("<ToW>", "</ToW>"))
        signs = "".join({"<ToW>": "<", "</ToW>": ">"}.get(one, "x") for one in tokenizer.convert_ids_to_tokens(new))
        thoughts = re.findall("<([^>]*)(>?)", signs)
        assert line["thoughts"] == [{"num_tokens": len(x), "is_closed": bool(end)} for x, end in thoughts]
    assert {line["stop_reason"] for line in lines} == {"eos", "length"}
    assert len({line["answer"] for line in lines}) > 5


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def test_the_table_holds_the_same_and_the_metrics_compare_answers(said: Command, tmp_path: Path) -> None:
    text = said()
    lines = read_jsonl(tmp_path / "out" / "test.jsonl")
    with open(tmp_path / "out" / "test.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: str(value) for key, value in line.items() if key != "thoughts"} for line in lines]
    assert table[40]["prompt"] == 'she said "a, b"\n='
    assert table[41]["prompt"] == "line\u2028one\r\ntwo="
    hits = sum(line["answer"].strip() == line["reference"].strip() for line in lines)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == {"eval/test/exact_match": hits / 43} | counted([line["thoughts"] for line in lines])
    assert "eval/test/exact_match" in text


def counted(texts: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Return the metrics of the thoughts in texts, of which at least one has a thought."""
    thoughts = [thought for text in texts for thought in text]
    num_texts, count = len(texts), len(thoughts)
    return {
        "eval/test/thoughts_per_row": count / num_texts,
        "eval/test/thoughts_opened": sum(len(text) > 0 for text in texts) / num_texts,
        "eval/test/thoughts_closed": sum(thought["is_closed"] for thought in thoughts) / count,
        "eval/test/thought_tokens": sum(thought["num_tokens"] for thought in thoughts) / count,
    }


def whole(said: Command, folder: Path, *overrides: str) -> bytes:
    said(f"predict.output={folder}", *overrides)
    return (folder / "test.jsonl").read_bytes()


@pytest.mark.parametrize("sampling", [[], ["generation.do_sample=true", "generation.temperature=2.0"]])
def test_a_file_cut_anywhere_is_gone_on_with_to_the_same_file(
    said: Command, tmp_path: Path, sampling: list[str]
) -> None:
    expected = whole(said, tmp_path / "out", *sampling)
    ends = [i + 1 for i, byte in enumerate(expected) if byte == ord("\n")]
    for size, going_on in ((0, 0), (5, 0), (ends[19] - 1, 0), (ends[19], 20), (ends[20] + 7, 20), (ends[41], 40)):
        os.truncate(tmp_path / "out" / "test.jsonl", size)
        (tmp_path / "out" / "test.csv").unlink()
        text = said(*sampling)
        assert (f"{going_on} of 43 rows are there already" in text) == (going_on > 0)
        assert (tmp_path / "out" / "test.jsonl").read_bytes() == expected
        assert (tmp_path / "out" / "test.csv").is_file()


def test_sampling_draws_by_seed_and_by_row(said: Command, tmp_path: Path) -> None:
    drawn = ["generation.do_sample=true", "generation.temperature=2.0"]
    same = write_lines(tmp_path / "same.jsonl", [LEARNED[0]] * 25)
    first = whole(said, tmp_path / "first", *drawn, f"data.test_files=['{same}']")
    assert whole(said, tmp_path / "again", *drawn, f"data.test_files=['{same}']") == first
    assert whole(said, tmp_path / "other", *drawn, f"data.test_files=['{same}']", "seed=7") != first
    for size in (1, 7):
        sized = f"predict.batch_size={size}"
        assert whole(said, tmp_path / str(size), *drawn, sized, f"data.test_files=['{same}']") == first
    texts = [line["text"] for line in read_jsonl(tmp_path / "first" / "test.jsonl")]
    assert len(set(texts)) > 20  # rows don't repeat one another


def test_several_samples_of_a_row_are_in_its_line(said: Command, tmp_path: Path) -> None:
    drawn = ["generation.do_sample=true", "generation.temperature=2.0"]
    first = whole(said, tmp_path / "first", *drawn)
    metrics = ["exact_match", "pass_at_1", "pass_at_2", "pass_at_3", "majority"]
    several = [*drawn, "generation.num_return_sequences=3", f"evaluation.metrics={metrics}"]
    expected = whole(said, tmp_path / "out", *several)
    lines, thoughts = read_jsonl(tmp_path / "out" / "test.jsonl"), list[list[dict[str, Any]]]()
    for line, alone in zip(lines, read_jsonl(tmp_path / "first" / "test.jsonl"), strict=True):
        samples = line.pop("samples")
        assert (line, len(samples)) == (alone, 3)
        assert samples[0] == {key: line[key] for key in ("text", "answer", "stop_reason", "thoughts")}
        thoughts += [one["thoughts"] for one in samples]
        line["right"] = sum(sample["answer"].strip() == line["reference"].strip() for sample in samples)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    scores = {name: written.pop(f"eval/test/{name}") for name in metrics}
    assert written == counted(thoughts)
    for k in (1, 2, 3):
        chance = [1 - math.comb(3 - line["right"], k) / math.comb(3, k) for line in lines]
        assert scores[f"pass_at_{k}"] == pytest.approx(sum(chance) / 43, abs=1e-12)
    assert 0 < scores["pass_at_1"] < scores["pass_at_2"] < scores["pass_at_3"]
    assert (tmp_path / "out" / "test.csv").read_bytes() == (tmp_path / "first" / "test.csv").read_bytes()
    os.truncate(tmp_path / "out" / "test.jsonl", expected.index(b"\n", len(expected) // 2) + 9)
    assert "20 of 43 rows are there already" in said(*several, "predict.batch_size=5")
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == expected
    assert "generation.num_return_sequences   3 there, 1 now" in said(*drawn, code=2)
    assert (tmp_path / "first" / "test.jsonl").read_bytes() == first


def test_thoughts_are_written_as_the_command_says(said: Command, tmp_path: Path) -> None:
    whole(said, tmp_path / "none", "generation.thoughts=none")
    assert not any("<ToW>" in line["text"] for line in read_jsonl(tmp_path / "none" / "test.jsonl"))
    forced = ["generation.thoughts=forced", "generation.max_thought_tokens=1"]
    whole(said, tmp_path / "forced", *forced)
    assert all(line["thoughts"] == [] for line in read_jsonl(tmp_path / "none" / "test.jsonl"))
    for line in read_jsonl(tmp_path / "forced" / "test.jsonl"):
        assert re.match(r"<ToW>.{0,1}</ToW>", line["text"], re.DOTALL)
        assert line["text"].count("<ToW>") == line["text"].count("</ToW>") == len(line["thoughts"])
        assert all(thought["is_closed"] and thought["num_tokens"] <= 1 for thought in line["thoughts"])


@pytest.fixture(scope="module")
def never_stopped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """48 rows, and the file of what is predicted for them without a stop."""
    folder = tmp_path_factory.mktemp("never stopped")
    many = write_lines(folder / "many.jsonl", LEARNED[:48])
    own = [f"data.test_files=['{many}']", "predict.batch_size=1", f"predict.output={folder}"]
    assert predict.main([f"run={run}", *own]) == 0
    return many, (folder / "test.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_stop_in_the_middle_is_gone_on_from(
    said: Command, run: Path, never_stopped: tuple[str, bytes], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    many, expected = never_stopped
    own = [f"data.test_files=['{many}']", "predict.batch_size=1"]
    file = tmp_path / "out" / "test.jsonl"
    asked = [f"run={run}", f"predict.output={tmp_path / 'out'}", *own]
    process = ForkedCommand(asked, Path(os.devnull), tmp_path / "err", main=predict.main)
    try:
        while not file.is_file() or not file.stat().st_size:
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
    errors = (tmp_path / "err").read_text()
    if number is not signal.SIGKILL:
        assert f"Stopped by {number.name}" in errors
        assert "the same command resumes there" in errors
        assert "Traceback" not in errors
    there = file.read_bytes()
    assert 0 < there.count(b"\n") < 48
    assert "rows are there already" in said(*own)
    after = file.read_bytes()
    assert after.startswith(there)
    assert after == expected


def test_a_set_that_is_whole_is_left_as_it_is(said: Command, tmp_path: Path) -> None:
    said()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir() if file.name != "lock"}
    text = said("predict.batch_size=1")  # decides nothing
    assert "left as it is" in text
    assert "exact_match" in text
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir() if file.name != "lock"} == before


def test_other_metrics_of_a_whole_set_need_no_model(said: Command, tmp_path: Path) -> None:
    said("evaluation.metrics=[]")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "left as it is" in said("evaluation.metrics=[exact_match,chrf]")
    names = {"exact_match", "chrf", *THOUGHTS}
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())) == {f"eval/test/{name}" for name in names}


def test_what_something_else_decided_is_not_gone_on_with(said: Command, rows: str, run: Path, tmp_path: Path) -> None:
    expected = whole(said, tmp_path / "out")
    os.truncate(tmp_path / "out" / "test.jsonl", 100)
    for override, told in (
        ("generation.max_new_tokens=4", "generation.max_new_tokens   12 there, 4 now"),
        ("data.prompt_template='{prompt} '", 'data.prompt_template   null there, "{prompt} " now'),
        ("data.limit=3", "data.limit   null there, 3 now"),
        ("generation.do_sample=true", "seed   null there, 42 now"),
        ("model.dtype=bfloat16", 'model.dtype   "float32" there, "bfloat16" now'),
    ):
        assert told in said(override, code=2)
    assert (tmp_path / "out" / "test.jsonl").stat().st_size == 100
    said("seed=7", "generation.temperature=3.0")  # where no word is drawn they decide nothing
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == expected
    said("generation.max_new_tokens=4", "force=true")
    assert all(len(line["text"]) < 24 for line in read_jsonl(tmp_path / "out" / "test.jsonl"))
    with open(rows, "a", encoding="utf-8") as file:
        file.write(json.dumps(LEARNED[0]) + "\n")
    assert "data.test_files   other content than now" in said("generation.max_new_tokens=4", code=2)


def test_another_model_is_not_gone_on_with(said: Command, run: Path, rows: str, tmp_path: Path) -> None:
    said()
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("predictions"))
    arguments = [f"run={tmp_path / 'run'}", f"data.test_files=['{rows}']", f"predict.output={tmp_path / 'out'}"]
    assert predict.main(arguments) == 0  # a copy is the same model
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert predict.main(arguments) == 2


def test_a_line_that_was_changed_is_told(said: Command, tmp_path: Path) -> None:
    said()
    file = tmp_path / "out" / "test.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:6], b'{"row": 99}', *lines[7:]]))
    assert "test.jsonl, line 7" in said(code=2)
    said("force=true")
    assert read_jsonl(file)[6]["row"] == 6


def test_files_that_are_no_predictions_are_never_overwritten(said: Command, rows: str, tmp_path: Path) -> None:
    shutil.copy(rows, tmp_path / "test.jsonl")
    own = [f"data.test_files=['{tmp_path / 'test.jsonl'}']", f"predict.output={tmp_path}"]
    for force in ([], ["force=true"]):  # it would even be what is predicted
        assert "no predictions of the set test: test.jsonl" in said(*own, *force, code=2)
    assert (tmp_path / "test.jsonl").read_bytes() == Path(rows).read_bytes()


def test_rows_without_an_answer_are_predicted_and_not_scored(said: Command, tmp_path: Path) -> None:
    said()
    expected = read_jsonl(tmp_path / "out" / "test.jsonl")
    bare: list[dict[str, Any]] = [{"prompt": row["prompt"]} for row in LEARNED[:3]]
    bare += [{"prompt": LEARNED[3]["prompt"], "completion": None}, {"prompt": LEARNED[4]["prompt"], "completion": ""}]
    some = write_lines(tmp_path / "some.jsonl", [*bare, *LEARNED[5:8]])
    text = said(f"data.test_files={{some: ['{some}'], all: ['{write_lines(tmp_path / 'all.jsonl', LEARNED[:8])}']}}")
    found = read_jsonl(tmp_path / "out" / "some.jsonl")
    for key in ("prompt", "text", "answer", "stop_reason"):
        assert [line[key] for line in found] == [line[key] for line in expected[:8]]
    assert [line["reference"] for line in found] == [None] * 5 + [line["reference"] for line in expected[5:8]]
    assert "answers are not scored: 5 rows have no reference" in text
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name for name in metrics if name.rpartition("/")[2] not in THOUGHTS} == {
        "eval/test/exact_match",
        "eval/all/exact_match",
    }
    assert metrics["eval/some/thought_tokens"] == metrics["eval/all/thought_tokens"]
    table = (tmp_path / "out" / "some.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[5] for line in table[1:]][:5] == [""] * 5


def test_rows_can_be_a_table_without_the_column_of_answers(said: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,id\n"0=",1\n"ab1=",2\n')
    said(f"data.test_files=['{tmp_path / 'rows.csv'}']")
    assert [line["source"] for line in read_jsonl(tmp_path / "out" / "test.jsonl")] == [
        f"{tmp_path / 'rows.csv'}:{line}" for line in (2, 3)
    ]


def test_rows_that_are_too_long_are_told(said: Command, tmp_path: Path) -> None:
    long = "x" * 150
    rows = [LEARNED[0], {"prompt": long + "0=", "completion": "y"}, {"prompt": "0=", "completion": long}]
    own = [f"data.test_files=['{write_lines(tmp_path / 'long.jsonl', rows)}']", "data.max_dropped_fraction=0.5"]
    text = said(*own)
    assert "long.jsonl:2 cut at the start of the prompt: too long" in text
    lines = read_jsonl(tmp_path / "out" / "test.jsonl")
    assert lines[0]["text"] == lines[2]["text"]  # its answer took no room
    assert "long.jsonl:2 left out: too long" in said(*own, "data.overflow=drop", "force=true")
    assert [line["row"] for line in read_jsonl(tmp_path / "out" / "test.jsonl")] == [0, 2]
    assert "longer than data.max_seq_length = 128" in said(*own, "data.overflow=error", "force=true", code=2)
    message = said("generation.max_new_tokens=1020", "force=true", code=2)
    assert "rows.jsonl:" in message
    assert "the model's 1024 positions" in message


def test_one_process_at_a_time_writes(said: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"):
        assert f"in use by another process: process {os.getpid()}" in said(code=2)


def test_a_disk_that_is_full_is_told(said: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(said, tmp_path / "elsewhere")
    append = predicted_set.PredictedSet.append

    def full(one: predicted_set.PredictedSet, lines: list[Any]) -> None:
        append(one, lines[:7])
        if one.lines.read_bytes().count(b"\n") > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(one, lines[7:])

    monkeypatch.setattr(predicted_set.PredictedSet, "append", full)
    message = said(code=1)
    assert "The disk is full" in message
    assert "resumes there" in message
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert "20 of 43 rows are there already" in said()
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == expected


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        admit_finished(overrides, "predict")
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.test_files=null"], ["data.test_files", "nothing to predict", "1 problem\n"]),
        (["data.test_files=[nope.jsonl]"], ["data.test_files = nope.jsonl", "no such file"]),
        (["data.test_files={metrics: [data/tow_addition]}"], ["data.test_files", "metrics.json is written"]),
        (["generation.max_new_token=4"], ["unknown key; did you mean generation.max_new_tokens?"]),
        (["optimizer=sgd"], ["optimizer = sgd", "a run keeps the options of its frozen config"]),
        (["tokens=none", "seed=x", "generation.foo=1"], ["3 problems", "tokens = none", "seed = x", "generation.foo"]),
        (["predict.batch_size=0", "predict.outputs=x"], ["2 problems", "at least 1", "did you mean predict.output?"]),
        (["predict.output=pyproject.toml/x"], ["pyproject.toml is a file"]),
        (["optimizer.lr=1"], ["optimizer.lr = 1", "python -m src.predict does not read it"]),
        (["model.checkpoint=x", "hydra.run.dir=y"], ["2 problems", "model.checkpoint = x", "hydra.run.dir = y"]),
        (["data.format=text", "data.columns={text: prompt}"], ["plain text has no prompt", "data.columns={prompt:"]),
        (["seed=1,2"], ["several values are a sweep"]),
        (["-m"], ["-m", "KEY=VALUE, and --help"]),
        (["generation.min_new_tokens=99"], ["more than generation.max_new_tokens, 12"]),
        (["generation.num_return_sequences=2"], ["the most likely token each time gives one text"]),
        (["generation.num_return_sequences=3", "generation.num_beams=2"], ["there are 2: generation.num_beams=3"]),
        (["generation.thoughts=none", "generation.max_thought_tokens=1"], ["generation.thoughts is none"]),
        (["generation.thoughts=forced", "generation.max_thought_tokens=1", "generation.max_new_tokens=1"],
         ["takes 2 tokens"]),
        (["generation.thoughts=forced", "generation.max_thought_tokens=1", "data.thoughts=drop"],
         ["2 problems", "generation.thoughts = forced   ", "no thoughts are written: see tokens"]),
        (["evaluation.metrics=[pass_at_1,pass_at_2,majority]"],
         ["2 problems", "pass_at_2 takes 2 samples of each row at least: generation.num_return_sequences is 1"]),
        (["evaluation.metrics=[pass_at_x]"], ["pass_at_<k>; did you mean pass_at_<k>?"]),
        (["rerun=x"], ["python -m src.predict does not read it"]),
    ],
)  # fmt: skip
def test_each_problem_is_told(run: Path, rows: str, overrides: list[str], told: list[str]) -> None:
    files = [] if any("test_files" in override for override in overrides) else [f"data.test_files=['{rows}']"]
    message = refusal(f"run={run}", *files, *overrides)
    assert message.startswith("Configuration refused: ")
    for words in told:
        assert words in message


def test_a_folder_that_is_no_finished_run_is_told(run: Path, rows: str, tmp_path: Path) -> None:
    other = tmp_path / "run"
    own = [f"run={other}", f"data.test_files=['{rows}']"]
    assert "run   needs a value: the folder of a finished run" in refusal()
    assert "2 problems" in refusal("run=", "optimizer.lr=1")
    assert "no run there" in refusal(*own)
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("predictions"))
    assert f"run = {other}" not in str(admit_finished(own, "predict"))
    message = refusal(*own, f"predict.output={other}", "seed=-1")
    assert "2 problems" in message
    assert "a run's folder" in message
    (other / "status.json").write_text(json.dumps({"state": "PREEMPTED", "step": 3}))
    message = refusal(*own, "generation.max_new_token=4")
    assert "not finished: it is PREEMPTED at step 3" in message
    assert "did you mean generation.max_new_tokens?" in message
    shutil.copy(run / "status.json", other)
    shutil.rmtree(other / "model")
    assert "there is no model/ in it" in refusal(*own)
    (other / "config.yaml").write_text("- 1\n")
    assert "config.yaml is damaged: no mapping" in refusal(*own)


def test_the_runs_own_test_set_gets_the_score_of_its_evaluation(run: Path) -> None:
    assert predict.main([f"run={run}"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    expected = {name: summary[name] for name in (f"eval/test/{one}" for one in ("exact_match", *THOUGHTS))}
    assert json.loads((run / "predictions" / "metrics.json").read_text()) == expected
    assert [name for name in summary if name.startswith("best/") and name.rpartition("/")[2] in THOUGHTS] == []
    assert 0 < expected["eval/test/exact_match"] < 1


def test_what_was_for_training_is_let_go(run: Path, rows: str, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("predictions"))
    frozen = yaml.safe_load((other / "config.yaml").read_text())
    gone = ["gone.jsonl"]
    frozen["data"] |= {"validation_files": {"mine": gone}, "mixture": {"a": {"train_files": gone}}, "streaming": True}
    frozen["model"]["checkpoint"] = "./gone"
    write_config(other, frozen)
    data = admit_finished([f"run={other}", f"data.test_files={{mine: ['{rows}']}}"], "predict").config.data
    assert (data.test_sets(), data.limit) == ({"mine": [rows]}, None)
    assert admit_finished([f"run={other}", "data.limit=3"], "predict").config.data.limit == 3
    assert predict.main([f"run={other}", f"data.test_files={{mine: ['{rows}']}}", "data.limit=3"]) == 0
    assert len(read_jsonl(other / "predictions" / "mine.jsonl")) == 3


def test_a_refusal_and_help_cost_nothing(run: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from src.predict import main
codes = [main(['run={run}', 'predict.output={tmp_path / "out"}', 'seed=x']), main(['--help'])]
print(codes, [name for name in ('torch', 'transformers', 'mlflow', 'pyarrow') if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("[2, 0] []")
    assert "predict.batch_size=N" in done.stdout
    assert not (tmp_path / "out").exists()


FIRST, SECOND = {"role": "user", "content": "low"}, {"role": "assistant", "content": "er <s>"}
CHATS: list[tuple[list[str], dict[str, Any], dict[str, Any]]] = [
    (["data=messages"], {"messages": [FIRST, SECOND, FIRST, SECOND]}, {"messages": [FIRST, SECOND, FIRST]}),
    (["data=messages"], {"messages": [FIRST, SECOND]}, {"messages": [FIRST, SECOND | {"content": None}]}),
    (
        ["data=messages", "data.columns={messages: conversations}", "data.supervised_turns=last"],
        {"conversations": [{"from": "human", "value": "low"}, {"from": "gpt", "value": "er"}]},
        {"conversations": [{"from": "human", "value": "low"}]},
    ),
    (
        ["data=prompt_completion", "data.system_prompt='Add.'"],
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "1+1="},
    ),
    (["data=dialogue_summary"], {"dialogue": "a:  b\n", "summary": "c"}, {"dialogue": "a:  b\n", "summary": ""}),
    (
        ["data=dialogue_summary", "model=tiny_bart", "tokens=dialogue"],
        {"dialogue": "#Person1#: b", "summary": "c"},
        {"dialogue": "#Person1#: b"},
    ),
    (["data=query_response", "tokens=hcot"], {"query": "a", "response": "b"}, {"query": "a"}),
]


def prepared(tmp_path: Path, *overrides: str) -> tuple[RunConfig, Any]:
    config = admitted(f"data.test_files=['{tmp_path / 'rows.jsonl'}']", *overrides).config
    return config, load_tokenizer(config.model, config.tokens)[0]


@pytest.mark.parametrize(("options", "answered", "bare"), CHATS)
def test_prompts_are_those_of_training(
    tmp_path: Path, options: list[str], answered: dict[str, Any], bare: dict[str, Any]
) -> None:
    file = write_lines(tmp_path / "train.jsonl", [answered])
    options = [*options, f"data.train_files=['{file}']"]
    write_lines(tmp_path / "rows.jsonl", [answered])
    data = build_data(*prepared(tmp_path, *options))
    write_lines(tmp_path / "rows.jsonl", [bare, answered])
    prompts = build_prompts(*prepared(tmp_path, *options))
    trained, found = data.test["test"], prompts.sets["test"]
    for i in range(2):
        assert found.prompt_ids(i) == trained.prompt_ids(0)
        assert found.prompt(i) == trained.prompt(0)
    assert (found.completion(0), found.completion(1)) == ("", trained.completion(0))
    assert found.reference(1) == trained.reference(0)
    assert prompts.stop_ids == data.stop_ids


def test_the_last_message_is_predicted_whatever_its_weight(tmp_path: Path) -> None:
    chat = [FIRST, SECOND, FIRST, {"role": "assistant", "content": "low", "weight": 0}]
    write_lines(tmp_path / "rows.jsonl", [{"messages": chat}])
    found = build_prompts(*prepared(tmp_path, "data=messages", "data.train_files=[data/tow_addition/train.jsonl]"))
    assert found.sets["test"].reference(0) == "low"
    assert found.sets["test"].prompt(0).count("User:") == 2


def test_a_row_without_its_prompt_is_told_by_its_line(said: Command, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "bad.jsonl", [LEARNED[0], {"question": "1+1="}])
    message = said(f"data.test_files=['{file}']", code=2)
    assert "bad.jsonl:2  no field 'prompt'; there are 'question' (name yours" in message


@pytest.mark.parametrize("messages", [[], "low", [{"role": "system", "content": "a"}], [FIRST, {"content": "b"}], [3]])
def test_chats_that_are_none_are_told_by_their_line(tmp_path: Path, messages: Any) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        build_prompts(*prepared(tmp_path, "data=messages", "data.train_files=[data/tow_addition/train.jsonl]"))


def test_an_encoder_decoders_prompt_is_cut_at_its_start(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"dialogue": "abcdefgh", "summary": "x" * 500}])
    options = ["data=dialogue_summary", "model=tiny_bart", "data.train_files=[data/tow_addition/train.jsonl]"]
    config, tokenizer = prepared(tmp_path, *options, "data.max_seq_length=6", "data.max_target_length=4",
                                 "data.prompt_template=null")  # fmt: skip
    found = build_prompts(config, tokenizer).sets["test"]
    assert tokenizer.decode(found.prompt_ids(0), skip_special_tokens=True) == "efgh"
    assert len(found.reference(0)) == 500


def test_predictions_that_were_changed_are_not_taken_for_what_was_written(run: Path, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = [f"run={run}", f"data.test_files=['{rows}']", f"predict.output={out}"]
    assert predict.main(own) == 0
    lines, table = (out / "test.jsonl").read_bytes(), (out / "test.csv").read_bytes()
    (out / "test.csv").write_text("other")
    assert predict.main(own) == 0
    assert (out / "test.csv").read_bytes() == table
    (out / "test.jsonl").write_bytes(lines.replace(b'"stop_reason": "', b'"stop_reason": "x', 1))
    assert predict.main(own) == 2
    assert predict.main([*own, "force=true"]) == 0
    assert (out / "test.jsonl").read_bytes() == lines
    record = (out / "test.json").read_text()
    (out / "test.json").write_text(record.replace('"data.prompt_template": null', '"data.Prompt_template": null'))
    assert predict.main(own) == 2
    (out / "test.json").write_text(record)
    assert predict.main(own) == 0


def make_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def make_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def make_dangling(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.with_name("nowhere"))


IN_ITS_PLACE: dict[str, Callable[[Path], Any]] = {"pipe": make_pipe, "folder": make_folder, "dangling": make_dangling}
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def predicted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the predictions of a whole set."""
    base = tmp_path_factory.mktemp("predicted")
    rows = write_lines(base / "rows.jsonl", LEARNED[:6])
    assert predict.main([f"run={run}", f"data.test_files=['{rows}']", f"predict.output={base / 'out'}"]) == 0
    return base


def again(run: Path, predicted: Path, out: Path, *overrides: str) -> int:
    """Predict the same once more, where a copy of what was predicted lies; it is over in a minute."""
    signal.alarm(60)
    try:
        rows = predicted / "rows.jsonl"
        return predict.main([f"run={run}", f"data.test_files=['{rows}']", f"predict.output={out}", *overrides])
    finally:
        signal.alarm(0)


def kinds_of(folder: Path) -> dict[str, Any]:
    """Give what lies in a folder, without following anything."""
    return {
        file.name: (file.lstat().st_mode, file.read_bytes() if file.is_file() else None)
        for file in folder.iterdir()
        if file.name != "lock"
    }


@pytest.mark.parametrize("force", [[], ["force=true"]])
@pytest.mark.parametrize("place", IN_ITS_PLACE)
@pytest.mark.parametrize("name", ["test.jsonl", "test.csv", "test.json", "metrics.json", "lock"])
def test_what_is_no_plain_file_is_told_and_nothing_waits_for_it(
    run: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, place: str, force: list[str],
) -> None:  # fmt: skip
    out = Path(shutil.copytree(predicted / "out", tmp_path / "out"))
    IN_ITS_PLACE[place](out / name)
    before = kinds_of(out)
    if (name, place) == ("lock", "dangling"):
        return  # it becomes a file where it leads to
    assert again(run, predicted, out, *force) == 2
    told = capsys.readouterr().err
    assert str(out / name) in told
    assert "ove it" in told
    assert kinds_of(out) == before


BROKEN = {
    "deep": DEEP,
    "deep in an object": f'{{"a": {DEEP}',
    "cut": '{"rows": 6, "dec',
    "a list": "[]",
    "NaN": '{"eval/test/exact_match": NaN}',
    "a text": '{"decided_by": {}, "rows": "6", "written": null, "eval/test/exact_match": "1"}',
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["test.json", "metrics.json"])
def test_a_damaged_json_file_is_told_and_kept(
    run: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    out = Path(shutil.copytree(predicted / "out", tmp_path / "out"))
    (out / name).write_bytes(text.encode(errors="surrogateescape"))
    before = kinds_of(out)
    assert again(run, predicted, out) == 2
    told = capsys.readouterr().err
    assert f"{out / name} {'holds' if 'no predictions' in told else 'is damaged'}" in told or "no predictions" in told
    assert kinds_of(out) == before
    for one in (name, *(("test.jsonl", "test.csv") if name == "test.json" else ())):
        (out / one).unlink()  # as it was told
    assert again(run, predicted, out) == 0
    for one in ("test.jsonl", "test.csv", "test.json", "metrics.json"):
        assert (out / one).read_bytes() == (predicted / "out" / one).read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [("answer", 3), ("reference", 3), ("row", True), ("source", None), ("text", []), ("prompt", {}), ("answer", "x")],
)
@pytest.mark.parametrize("number", [0, 5])
def test_a_line_of_wrong_shape_is_not_scored_whatever_the_record_says(
    run: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, number: int
) -> None:
    out = Path(shutil.copytree(predicted / "out", tmp_path / "out"))
    lines = read_jsonl(out / "test.jsonl")
    lines[number][key] = value
    write_lines(out / "test.jsonl", lines)
    record = json.loads((out / "test.json").read_text())
    (out / "test.json").write_text(json.dumps(record | {"written": None}))
    assert again(run, predicted, out) == 2
    told = capsys.readouterr().err
    assert "test.json is damaged: it does not say what was written" in told
    assert again(run, predicted, out, "force=true") == 0
    assert (out / "test.jsonl").read_bytes() == (predicted / "out" / "test.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "model.safetensors", "README.md"])
def test_a_pipe_among_the_files_of_the_model_is_told(
    run: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("predictions")))
    make_pipe(other / "model" / name)
    assert again(other, predicted, tmp_path / "out") == 2
    assert f"{other / 'model' / name} is damaged: not a plain file" in capsys.readouterr().err


def test_metrics_of_other_sets_stay(run: Path, predicted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(predicted / "out", tmp_path / "out"))
    others = {"eval/other/exact_match": 0.5, "eval/none/bleu": None}
    (out / "metrics.json").write_text(json.dumps(others))
    assert again(run, predicted, out) == 0
    assert others.items() < json.loads((out / "metrics.json").read_text()).items()


def small_run(folder: Path, *overrides: str) -> Path:
    rows = write_lines(folder.parent / "rows.jsonl", LEARNED[:16])
    train(
        admitted(f"data.train_files=['{rows}']", "data.validation_files=null", f"data.test_files=['{rows}']",
                 "training.max_train_steps=2", "training.per_device_train_batch_size=8", "evaluation.eval_steps=null",
                 "evaluation.sample_prompts=0", "generation.max_new_tokens=4", f"hydra.run.dir={folder}", *overrides),
        StopRequest(),
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("by_init_from", [False, True])
def test_an_adapter_is_used_on_the_base_that_it_was_trained_on_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by_init_from: bool
) -> None:
    base = Path(shutil.copytree(small_run(tmp_path / "whole", "optimizer.lr=0.1") / "model", tmp_path / "base"))
    start = [f"model.checkpoint={base}", "model.weights=pretrained"]
    if by_init_from:
        start.append(f"init_from={small_run(tmp_path / 'tuned', *start, 'seed=7', 'optimizer.lr=0.1')}")
        base = tmp_path / "tuned" / "model"
    run = small_run(tmp_path / "run", *start, "adapter=lora", "export.merge=false")
    arguments = [f"run={run}", f"predict.output={tmp_path / 'out'}"]
    assert predict.main(arguments) == 0
    told = read_jsonl(tmp_path / "out" / "test.jsonl")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    for line in told:
        ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert line["text"] == tokenizer.decode(made[0, ids.shape[1] :]).removesuffix("</s>")
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + b"\1")
    capsys.readouterr()
    assert predict.main([*arguments[:1], f"predict.output={tmp_path / 'other'}"]) == 2
    told = capsys.readouterr().err
    assert f"{weights} is damaged" in told
    weights.write_bytes(before)
    assert predict.main(arguments) == 0
    make_pipe(base / "config.json")
    assert predict.main(arguments) == 2
    (base / "config.json").unlink()
    capsys.readouterr()
    assert predict.main(arguments) == 2
    assert f"{base / 'config.json'} is damaged: it is missing" in capsys.readouterr().err
