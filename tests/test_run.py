"""Whole runs, started as a user starts them."""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from src import predict
from src.checkpoint.manifest import is_resumable, newest_resumable, problems_of
from src.cli.start import run_job as train
from src.config.places import folder_of, steps_in
from src.errors import ConfigError, Interrupted, ModelError, RunFolderError
from src.runtime.signals import StopRequest
from tests.conftest import GSM8K, ROOT, ForkedCommand, admitted, read_lines, towline, write_lines

SMALL = ["debug=smoke", "tracking=none"]


def comparable(run: Path) -> list[dict[str, Any]]:
    """Give metrics.jsonl without what may differ between two identical runs."""
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/") and not key.endswith("_seconds")}
        for line in read_lines(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run with MLflow, finished."""
    base = tmp_path_factory.mktemp("finished")
    done = towline("debug=smoke", f"tracking.uri='sqlite:///{base}/mlflow.db'", f"hydra.run.dir={base / 'run'}")
    assert done.returncode == 0, done.stderr
    (base / "run" / "stdout.txt").write_text(done.stdout)
    (base / "run" / "stderr.txt").write_text(done.stderr)
    return base / "run"


def test_the_folder_is_complete(finished: Path) -> None:
    for name in ("config.yaml", "starts.jsonl", "status.json", "metrics.jsonl", "data_report.json", "samples.jsonl",
                 "provenance.json", "summary.json", "model/config.json", "model/model.safetensors",
                 "model/tokenizer.json", "model/generation_config.json",
                 "checkpoints/step-00000004/manifest.json"):  # fmt: skip
        assert (finished / name).is_file(), name
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["step"], status["how_to_go_on"]) == ("FINISHED", 4, None)
    assert yaml.safe_load((finished / "config.yaml").read_text())["training"]["max_train_steps"] == 4


def test_metrics_have_a_line_a_step_with_the_evaluation_in_it(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second"} <= line.keys()
        assert 2**20 < line["perf/memory_bytes"] <= line["perf/peak_memory_bytes"]
        assert ("eval/validation/exact_match" in line) == (line["step"] in (2, 4))
        assert ("eval/test/loss" in line) == (line["step"] == 4)


def test_the_summary_has_last_best_and_totals(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    lines = read_lines(finished / "metrics.jsonl")
    assert summary["train/loss"] == lines[-1]["train/loss"]
    assert summary["best/eval/validation/loss"] == min(lines[i]["eval/validation/loss"] for i in (1, 3))
    assert (summary["steps"], summary["examples_seen"]) == (4, 16)
    assert summary["tokens_seen"] == json.loads((finished / "data_report.json").read_text())["train"]["tokens"]
    assert {"train_seconds", "tokens_per_second", "peak_memory_bytes"} <= summary.keys()
    peaks = [line["perf/peak_memory_bytes"] for line in lines]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= summary["peak_memory_bytes"]


def test_the_terminal_says_what_was_assembled_and_where_things_lie(finished: Path) -> None:
    text = (finished / "stdout.txt").read_text()
    for words in ("707,456 parameters", "<ToW>, </ToW> initialised from", "train: 16 of 16 rows",
                  "tokens supervised", "for checkpoints (", "step 4/4",
                  "left", "evaluated at step 4", "expected", "of it in steps", str(finished / "model"),
                  f"python -m src.report dir={finished}"):  # fmt: skip
        assert words in text
    assert (finished / "stderr.txt").read_text() == ""


def test_mlflow_has_the_run(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished.parent}/mlflow.db")
    run = client.get_run(json.loads((finished / "status.json").read_text())["tracker_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.002"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
    assert "samples.jsonl" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"train", "validation", "test"}


def test_plain_transformers_loads_the_model_and_writes_the_same_samples(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model, info = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in ("<ToW>", "</ToW>")] == [[259], [260]]
    for sample in [line for line in read_lines(finished / "samples.jsonl") if line["step"] == 4]:
        inputs = tokenizer(sample["prompt"], return_tensors="pt")
        generated = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        assert tokenizer.decode([i for i in generated if i > 2]) == sample["text"]


def test_a_finished_folder_is_left_as_it_is_and_force_starts_again(finished: Path, tmp_path: Path) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    assert towline(*SMALL, where).returncode == 0
    before = (tmp_path / "run" / "status.json").read_text()
    done = towline(*SMALL, where)
    assert (done.returncode, "is finished" in done.stdout) == (0, True)
    assert (tmp_path / "run" / "status.json").read_text() == before
    assert towline(*SMALL, where, "force=true", "seed=1").returncode == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 4


def test_the_same_command_and_a_rerun_give_the_same_metrics_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    assert towline(*SMALL, f"hydra.run.dir={tmp_path / 'again'}").returncode == 0
    assert towline(f"rerun={tmp_path / 'again'}", f"hydra.run.dir={tmp_path / 'rerun'}").returncode == 0
    assert comparable(tmp_path / "again") == comparable(finished)
    assert comparable(tmp_path / "rerun") == comparable(finished)


def stopped_by(number: signal.Signals, run: Path, *arguments: str) -> str:
    """Start a run, send it a signal once it trains, and give what it wrote to the error stream."""
    errors = run.with_name("errors.txt")
    process = ForkedCommand([*arguments, f"hydra.run.dir={run}"], Path(os.devnull), errors)
    try:
        while not (run / "metrics.jsonl").is_file():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == 75
    finally:
        process.kill()
    return errors.read_text(encoding="utf-8")


def status_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


LONG = [
    *SMALL,
    "training.max_train_steps=100",
    "evaluation.eval_steps=null",
    "evaluation.sample_steps=null",
    "evaluation.metrics=[]",
    "checkpoint.checkpointing_steps=null",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_a_run_cleanly_and_it_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    here = f"hydra.run.dir={run}"
    errors = stopped_by(number, run, *LONG)
    assert "Traceback" not in errors
    status = status_of(run)
    assert (status["state"], status["cause"]) == ("PREEMPTED", f"stopped by {number.name}")
    assert status["how_to_go_on"] == f"make resume run={run}"
    step = status["step"]
    assert f"Stopped by {number.name}. Step {step} is saved: make resume run={run}, or the same command with" in errors
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert steps_in(run / "checkpoints") == [step]
    checkpoint = folder_of(run / "checkpoints", step)
    assert is_resumable(checkpoint)
    assert not list(problems_of(checkpoint))

    again = {
        signal.SIGINT: [*LONG, here],
        signal.SIGTERM: [f'rerun="{run}"', f'hydra.run.dir="{run}"'],
        signal.SIGUSR1: [*LONG, here, "training.max_train_steps=110"],
    }[number]
    done = towline(*again)
    assert done.returncode == 0, done.stderr
    num_steps = 110 if number is signal.SIGUSR1 else 100
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, num_steps + 1))
    assert read_lines(run / "metrics.jsonl")[:step] == lines
    changed = {"training.max_train_steps": 110} if number is signal.SIGUSR1 else {}
    starts = [
        (start["resumed_step"], {k: v for k, v in start["changed"].items() if k != "checkpoint.allow_changed"})
        for start in read_lines(run / "starts.jsonl")
    ]
    assert starts == [(None, {}), (step, changed)]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_train_steps"] == 100
    assert status_of(run)["state"] == "FINISHED"


class After(StopRequest):
    """A signal that comes after so many steps, each of one micro-batch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def check(self) -> None:
        if self.is_deferred:
            self.left -= 1
            if self.left < 0:
                self.name = "SIGTERM"
        super().check()


class Touches(StopRequest):
    """Makes a file in the run's folder when so many steps have begun."""

    def __init__(self, run: Path, files: dict[int, str]) -> None:
        super().__init__()
        self.run, self.files, self.begun = run, files, 0

    def check(self) -> None:
        self.begun += self.is_deferred
        super().check()
        if name := self.files.pop(self.begun, ""):
            (self.run / name).touch()


SIX = [
    *SMALL,
    "training.max_train_steps=6",
    "evaluation.eval_steps=null",
    "evaluation.sample_steps=null",
    "evaluation.metrics=[]",
    "scheduler=constant",
]


def stopped_after(steps: int, run: Path, *overrides: str) -> None:
    with pytest.raises(Interrupted):
        train(admitted(*overrides, f"hydra.run.dir={run}"), After(steps))
    assert status_of(run)["step"] == newest_resumable(run / "checkpoints")


def test_files_ask_a_run_to_save_and_to_stop(tmp_path: Path) -> None:
    run, overrides = tmp_path / "run", (*SIX, "checkpoint.checkpointing_steps=null")
    run.mkdir()
    for name in ("save", "stop"):  # too early: they are of an earlier start
        (run / name).touch()
    with pytest.raises(Interrupted):
        train(admitted(*overrides, f"hydra.run.dir={run}"), Touches(run, {2: "save", 5: "stop"}))
    assert steps_in(run / "checkpoints") == [3, 5]
    assert not {"save", "stop"} & set(os.listdir(run))
    status = status_of(run)
    assert (status["state"], status["cause"], status["step"]) == ("PREEMPTED", "stopped by the file stop", 5)


def test_a_file_with_content_is_no_request(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("numbers of mine")
    (tmp_path / "save").mkdir()
    stop = StopRequest()
    stop.follow_files(tmp_path)
    stop.note_saved()
    assert not stop.asked()
    assert not stop.is_save_asked()
    assert (tmp_path / "stop").read_text() == "numbers of mine"


def test_a_run_goes_on_as_it_last_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_after(2, run, *SIX)
    lr = read_lines(run / "metrics.jsonl")[0]["train/lr"]
    changed = ["optimizer.lr=0.001", "checkpoint.allow_changed=true"]
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.002 → 0\.001"):
        train(admitted(*SIX, changed[0], f"hydra.run.dir={run}"), StopRequest())
    stopped_after(2, run, *SIX, *changed)
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000009.mine")
    done = towline(f'rerun="{run}"', f'hydra.run.dir="{run}"')
    assert done.returncode == 0, done.stderr
    assert [line["train/lr"] for line in read_lines(run / "metrics.jsonl")] == [lr, lr, *4 * [0.001]]
    starts = [(start["resumed_step"], start["changed"]) for start in read_lines(run / "starts.jsonl")]
    own = {"optimizer.lr": 0.001}
    assert starts == [(None, {}), (2, own | {"checkpoint.allow_changed": True}), (4, own)]
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == lr == 0.002


def test_a_change_that_was_refused_is_not_taken_up_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_after(2, run, *SIX)
    with pytest.raises(ConfigError, match="the train rows changed: 16 then, 12 now"):
        train(admitted(*SIX, "data.limit=12", f"hydra.run.dir={run}"), StopRequest())
    train(admitted(f"rerun={run}", f"hydra.run.dir={run}"), StopRequest())
    assert status_of(run)["state"] == "FINISHED"


def test_a_line_holds_the_means_since_the_line_before_also_behind_a_checkpoint(tmp_path: Path) -> None:
    overrides = [*SIX, "training.logging_steps=2", "checkpoint.checkpointing_steps=2"]
    train(admitted(*overrides, f"hydra.run.dir={tmp_path / 'straight'}"), StopRequest())
    stopped_after(2, tmp_path / "stopped", *overrides)
    assert [line["step"] for line in read_lines(tmp_path / "stopped" / "metrics.jsonl")] == [2]
    train(admitted(*overrides, f"hydra.run.dir={tmp_path / 'stopped'}"), StopRequest())
    assert comparable(tmp_path / "stopped") == comparable(tmp_path / "straight")


def test_a_folder_with_an_unfinished_run_is_refused_where_nothing_may_be_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped_after(2, run, *SIX)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name != "lock"}
    with pytest.raises(RunFolderError, match=r"PREEMPTED at step 2(.|\n)*force=true"):
        train(admitted(*SIX, "checkpoint.resume=never", f"hydra.run.dir={run}"), StopRequest())
    after = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name != "lock"}
    assert after == before
    train(admitted(*SIX, "checkpoint.resume=never", "force=true", f"hydra.run.dir={run}"), StopRequest())
    assert [start["resumed_step"] for start in read_lines(run / "starts.jsonl")] == [None]


def test_what_was_mended_needs_no_force(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ModelError, match="1024 positions"):
        train(admitted(*SIX, "data.max_seq_length=5000", f"hydra.run.dir={run}"), StopRequest())
    train(admitted(*SIX, f"hydra.run.dir={run}"), StopRequest())
    assert status_of(run)["state"] == "FINISHED"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["max_seq_length"] != 5000


def broken(tmp_path: Path, kind: str) -> tuple[list[str], list[str]]:
    """Give the overrides of a run that can't be, and what its message must say."""
    file = tmp_path / "rows.jsonl"
    good = {"prompt": "1+1=", "completion": "2"}
    rows = [f"data.train_files=['{file}']"]
    if kind == "a line that is not JSON":
        file.write_text(json.dumps(good) + "\n{broken\n")
        return rows, ["rows.jsonl:2", "not JSON"]
    if kind == "a missing field":
        write_lines(file, [good, {"question": "1+1="}])
        return rows, ["rows.jsonl:2", "'prompt'", "'question'"]
    if kind == "no rows":
        file.write_text("")
        return rows, ["no rows", "rows.jsonl"]
    if kind == "prompts that are too long":
        write_lines(file, [good, {"prompt": "x" * 200, "completion": "y"}])
        return rows, ["1 of 2 rows", "max_dropped_fraction", "max_seq_length"]
    if kind == "more positions than the model has":
        return ["data.max_seq_length=5000"], ["1024 positions", "data.max_seq_length = 5000"]
    write_lines(file, [good])
    return [*rows, "model.checkpoint='nobody/nothing'"], ["nobody/nothing", "can't be loaded"]


@pytest.mark.parametrize(
    "kind",
    [
        "a line that is not JSON",
        "a missing field",
        "no rows",
        "prompts that are too long",
        "more positions than the model has",
        "a model that is nowhere",
    ],
)
def test_bad_input_is_a_short_message_and_exit_2(tmp_path: Path, kind: str) -> None:
    overrides, told = broken(tmp_path, kind)
    done = towline(*SMALL, *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 15
    for words in told:
        assert words in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "FAILED"
    assert told[0] in status["cause"]


def test_hydras_own_sweeper_runs_every_point_in_its_own_folder(tmp_path: Path) -> None:
    done = towline(
        "-m",
        "hydra/sweeper=basic",
        *SMALL,
        "training.max_train_steps=1",
        "seed=1,2",
        f"hydra.sweep.dir={tmp_path}",
        "evaluation.metrics=[]",
    )
    assert done.returncode == 0, done.stderr
    seeds = [yaml.safe_load((tmp_path / str(i) / "config.yaml").read_text())["seed"] for i in range(2)]
    assert seeds == [1, 2]
    assert comparable(tmp_path / "0") != comparable(tmp_path / "1")


def _signal_comes_before(where: str) -> None:
    """Have a function raise SIGTERM when it is called."""
    module, _, name = where.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def signal_comes(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*given)

    setattr(importlib.import_module(module), name, signal_comes)


@pytest.mark.parametrize("where", ["src.cli.hydra_main.parse_stored", "src.training.saving.export"])
def test_a_signal_between_the_runs_of_a_sweep_stops_it_at_once(tmp_path: Path, where: str) -> None:
    asked = ["-m", "hydra/sweeper=basic", "seed=1,2", *SIX, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    errors = tmp_path / "errors.txt"
    code = ForkedCommand(asked, Path(os.devnull), errors, functools.partial(_signal_comes_before, where)).wait(300)
    assert "Traceback" not in errors.read_text(encoding="utf-8")
    assert code == 75
    assert not (tmp_path / "sweep" / "1" / "status.json").exists()
    if where == "src.training.saving.export":
        assert status_of(tmp_path / "sweep" / "0")["state"] == "FINISHED"


def test_one_bad_run_does_not_stop_hydras_own_sweeper(tmp_path: Path) -> None:
    arguments = [*SMALL, "data.max_seq_length=128,5000,64", "evaluation.metrics=[]", "training.max_train_steps=1"]
    done = towline("-m", "hydra/sweeper=basic", *arguments, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2
    assert "1 of 3 runs failed: number 1 of the sweep" in done.stderr
    states = [json.loads((tmp_path / str(i) / "status.json").read_text())["state"] for i in range(3)]
    assert states == ["FINISHED", "FAILED", "FINISHED"]


def test_a_thought_pattern_that_finds_nothing_is_told(tmp_path: Path) -> None:
    done = towline(*SMALL, "data.thought_pattern='<zz>(.*?)</zz>'", "data.limit=4", "training.max_train_steps=1",
                   "data.train_files=[data/tow_addition/train.jsonl]", "tokens=hcot",
                   f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 0
    assert "<hCoT>, </hCoT> are in no training row" in done.stderr


def test_a_rate_that_spoils_the_weights_fails_the_run(tmp_path: Path) -> None:
    overrides = ["optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant", "training.max_grad_norm=null"]
    done = towline(*SMALL, *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "FAILED"
    assert not (tmp_path / "run" / "model").exists()


def test_the_best_weights_are_exported_when_asked_for(tmp_path: Path) -> None:
    # with a learning rate this high the first evaluation is the best one
    kept = ["checkpoint.checkpointing_steps=1", "checkpoint.keep_last=2"]
    overrides = [*SMALL, *kept, "optimizer.lr=1", "scheduler=constant", f"hydra.run.dir={tmp_path / 'run'}"]
    done = towline(*overrides, "checkpoint.load_best_model_at_end=true", "evaluation.metrics=[]")
    assert done.returncode == 0, done.stderr
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/validation/loss"] > first["eval/validation/loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.isfinite(model.get_input_embeddings().weight).all()
    checkpoints = {step: folder_of(tmp_path / "run" / "checkpoints", step) for step in (2, 3, 4)}
    assert {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()} == {
        place.name for place in checkpoints.values()
    }
    assert {step: is_resumable(place) for step, place in checkpoints.items()} == {2: False, 3: True, 4: True}
    assert not [problem for place in checkpoints.values() for problem in problems_of(place)]
    from src.data.dataset import build_data
    from src.data.tokenizer import load_tokenizer
    from src.training.head import ModelWithLoss

    config = admitted("debug=smoke", "data.limit=4").config
    rows = build_data(config, load_tokenizer(config.model, config.tokens)[0]).validation["validation"]
    from src.data.batching import collate

    batch = collate(rows, [[i] for i in range(4)], 0)
    with torch.no_grad():
        loss = ModelWithLoss(model)(batch.input_ids, batch.labels).objective / batch.num_supervised
    assert loss.item() == pytest.approx(first["eval/validation/loss"], rel=1e-5)


WORD_PROBLEMS = [
    {
        "question": f"Ann has {a} pens and buys {b} more. How many pens has she now?",
        "answer": f"Ann has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}",
    }
    for a in range(10, 30)
    for b in (3, 14, 25)
]
"""Rows in the form of GSM8K, for where its own file is not at hand."""


def make_bpe_model(_arguments: list[str]) -> int:
    runpy.run_path("assets/make_bpe_model.py", run_name="__main__")
    return 0


@pytest.fixture(scope="module", params=["rows of its form", "its own rows"])
def local_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A local model folder with a BPE tokenizer trained on rows like GSM8K's, or on its first 300, and these rows."""
    base = tmp_path_factory.mktemp("local")
    rows = base / "train.jsonl"
    if request.param == "rows of its form":
        write_lines(rows, WORD_PROBLEMS)
    elif GSM8K.is_file():
        rows.write_text("\n".join(GSM8K.read_text(encoding="utf-8").splitlines()[:300]) + "\n", encoding="utf-8")
    else:
        pytest.skip("the GSM8K file is not beside this checkout")
    asked = ("--text", str(rows), "--fields", "question,answer", "--vocab-size", "300",
             "--hidden-size", "32", "--layers", "1", "--heads", "2", "--out", str(base / "model"))  # fmt: skip
    assert towline(*asked, main=make_bpe_model).returncode == 0
    return base / "model", rows


EXPERIMENTS = {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
OF_ITS_OWN = "dialogue_summary"
"""The experiment that the test of both families runs."""


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS - {OF_ITS_OWN}))
def test_every_experiment_runs_small(experiment: str, local_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = local_model
    own = [f"model.checkpoint={model}"] if experiment.startswith(("gsm8k", "smollm2")) else []
    own += [f"data.train_files=['{rows}']"] if experiment == "gsm8k_tow" else []
    own += ["data.thought_schedule.smoothing=0.5"] if experiment.endswith("faded") else []  # four steps are one epoch
    done = towline(f"experiment={experiment}", *SMALL, *own, f"hydra.run.dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"eval/{'test' if experiment.startswith('smollm2') else 'validation'}/exact_match" in summary
    if experiment == "gsm8k_tow":
        report = json.loads((tmp_path / "run" / "data_report.json").read_text())
        assert report["train"]["new_tokens"]["<ToW>"]["supervised"] > 10
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").convert_tokens_to_ids("<ToW>") == 300


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_one_experiment_file_goes_all_the_way_with_both_families(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = towline(f"experiment={OF_ITS_OWN}", f"model={model}", *SMALL, f"hydra.run.dir={run}")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((run / "summary.json").read_text())
    assert {f"eval/test/{name}" for name in ("loss", "rouge1", "rouge2", "rougeL")} <= summary.keys()
    assert "eval/validation/rougeL" in summary
    assert summary["num_trained_parameters"] == summary["num_parameters"]
    sampled = read_lines(run / "samples.jsonl")
    assert [line["step"] for line in sampled] == [2, 2, 4, 4]
    assert all(isinstance(line["untrained"], str) and line["num_opened"] == 0 for line in sampled)
    auto = AutoModelForSeq2SeqLM if model == "tiny_bart" else AutoModelForCausalLM
    plain, tokenizer = auto.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    written = plain.generate(**tokenizer([sampled[2]["prompt"]], return_tensors="pt"))[0]
    new = written[2:] if model == "tiny_bart" else written[len(tokenizer(sampled[2]["prompt"])["input_ids"]) :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if model == "tiny_bart":  # what stands in front of its targets is forced, and counts as one of its new tokens
        assert written[:2].tolist() == [2, 0]
        assert sampled[2]["text"].startswith(text)
    else:
        assert text == sampled[2]["text"]
    given = (f"run={run}", "data.test_files=[data/dialogues/test.jsonl]", "data.limit=3")
    predicted = towline(*given, main=predict.main)
    assert (predicted.returncode, predicted.stderr) == (0, "")
    lines = read_lines(run / "predictions" / "test.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert "rougeL" in (run / "predictions" / "metrics.json").read_text()


def test_weights_that_are_damaged_or_missing_are_refused(local_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = local_model
    damaged, lacking = tmp_path / "damaged", tmp_path / "lacking"
    for folder in (damaged, lacking):
        shutil.copytree(model, folder)
    (damaged / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "down_proj" not in k}, lacking / "model.safetensors", {"format": "pt"}
    )
    for folder, told in ((damaged, "can't be loaded"), (lacking, "down_proj")):
        done = towline("experiment=gsm8k_tow", *SMALL, f"model.checkpoint={folder}", f"data.train_files=['{rows}']",
                       f"hydra.run.dir={tmp_path / 'run' / folder.name}")  # fmt: skip
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
