"""Tracking: the folder is the truth, MLflow follows, and may be slow, gone, or late."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.config.frozen import config_hash, read_status
from src.config.quoting import shell_override
from src.errors import Interrupted, RunFolderError
from src.evaluation.samples import Sample
from src.tracking import tracker
from src.tracking.console import Console
from src.tracking.export_thread import WaitLimits
from src.tracking.exporters import exhaust
from src.tracking.live import clock
from src.tracking.lock import hold
from src.tracking.mlflow_exporter import MlflowExporter
from src.tracking.mlflow_model import mlmodel
from src.tracking.mlflow_names import distinct_names, flat, plain_name
from src.tracking.mlflow_run import MlflowRunExporter
from src.tracking.provenance import git_state, provenance
from src.tracking.run_folder import FILES, RunFolder, Start, last_config_hash, open_run_folder
from src.tracking.system_metrics import SystemMetrics
from src.tracking.tracker import FolderTracker, deliver_pending, open_tracking, start_exporters
from tests.conftest import FORKS, ROOT, admitted, read_lines, write_lines


def mlflow_config(uri: str, *overrides: str) -> Any:
    return admitted("tracking=mlflow", f"tracking.uri='{uri}'", *overrides).config.tracking


def exporter_of(config: Any, folder: Path, *, is_over: bool = False) -> MlflowRunExporter:
    return MlflowRunExporter(config, folder, is_over=is_over, warn=print)


@pytest.fixture(autouse=True)
def _long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to arrive may take as long as a busy machine needs."""
    for name in ("END_OF_RUN", "AFTER_STOP"):
        monkeypatch.setattr(tracker, name, WaitLimits(call_seconds=60.0, total_seconds=240.0))


FROZEN = {"seed": 1, "long": "x" * 600}
FROM_THE_BEGINNING = Start()


class Done:
    """A training step that is over."""

    lr, tokens_per_second = 0.1, 1.0

    def __init__(self, number: int, loss: float) -> None:
        self.number, self.loss = number, loss

    def pop_metrics(self) -> dict[str, float]:
        return {"train/loss": self.loss}


@contextmanager
def tracked(
    config: Any, run_dir: Path, start: Start = FROM_THE_BEGINNING, frozen: Mapping[str, Any] = FROZEN
) -> Iterator[FolderTracker]:
    console = Console(io.StringIO())
    with (
        patch.object(tracker, "START_SECONDS", 0.0),
        hold(run_dir),
        open_tracking(config, run_dir, frozen, console, start) as tracking,
    ):
        yield tracking


def do_step(tracking: FolderTracker, step: int, loss: float, text: str = "<ToW>2</ToW>2") -> None:
    """Write what follows a step: its line, with an evaluation in it, and a sample."""
    with tracking.line(Done(step, loss), due=True) as line:
        line.metrics["eval/validation/exact_match"] = step / 10
        line.samples = [Sample(step, "1+1=", text, "2", "2", "eos", 1, 1, "?")]


def track(config: Any, run_dir: Path, *, steps: int = 3) -> None:
    with tracked(config, run_dir) as tracking:
        tracking.write_file("provenance.json", provenance({"seed": 1}, {"a.jsonl": "00"}, "cpu", ROOT))
        report = {"digest": "abc", "rows_kept": 1, "tokens": 2, "supervised_tokens": 1}
        tracking.write_file("data_report.json", {"train": report, "validation": report})
        for step in range(1, steps + 1):
            do_step(tracking, step, 1.0 / step)
        tracking.finish({"steps": steps})


def stopped(config: Any, run_dir: Path, *, steps: int) -> None:
    """Have a run that is stopped after so many steps."""
    with pytest.raises(Interrupted), tracked(config, run_dir) as tracking:
        for step in range(1, steps + 1):
            do_step(tracking, step, 1.0 / step)
        raise Interrupted("SIGTERM")


def killed(config: Any, run_dir: Path, *, steps: int) -> None:
    """Have a run whose process died while it wrote lines behind those of so many steps."""
    stopped(config, run_dir, steps=steps)
    status = read_status(run_dir) | {"state": "RUNNING", "cause": None, "how_to_go_on": None, "ended": None}
    (run_dir / "status.json").write_text(json.dumps(status))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run_dir / name, "a") as file:
            file.write(f'{{"step": {steps + 1}, "tra')
    done = json.loads((run_dir / "tracking.json").read_text())
    MlflowClient(config.uri).update_run(done["run_id"], status="RUNNING")
    (run_dir / "tracking.json").write_text(json.dumps(done | {"ended": False, "artifacts": False}))


def steps_of(run_dir: Path, name: str = "metrics.jsonl") -> list[int]:
    return [line["step"] for line in read_lines(run_dir / name)]


def test_the_folder_holds_what_was_logged(tmp_path: Path) -> None:
    track(admitted().config.tracking, tmp_path / "run")
    run = tmp_path / "run"
    line = read_lines(run / "metrics.jsonl")[2]
    assert line.pop("perf/elapsed_seconds") >= 0
    assert line == {"step": 3, "train/loss": 1 / 3, "eval/validation/exact_match": 0.3}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train/loss"] == 1 / 3
    assert summary["best/eval/validation/exact_match"] == 0.3
    status = read_status(run)
    assert (status["state"], status["step"], status["cause"]) == ("FINISHED", 3, None)
    assert status["how_to_go_on"] is None
    assert (status["pid"], status["host"]) == (os.getpid(), socket.gethostname())
    (start,) = read_lines(run / "starts.jsonl")
    assert start["config_hash"] == config_hash(FROZEN)
    assert (start["resumed_step"], start["changed"]) == (None, {})


def test_mlflow_gets_params_metrics_inputs_tags_and_artifacts(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    track(mlflow_config(uri, "tracking.tags={team:a}", "tracking.run_name=mine"), tmp_path / "run")
    client = MlflowClient(uri)
    run = client.get_run(read_status(tmp_path / "run")["tracker_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mine"
    assert run.data.params == {"seed": "1"}  # the long one is in config.yaml
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs} == {
        "train": "abc",
        "validation": "abc",
    }
    assert run.data.tags["git_commit"] == git_state(ROOT)["commit"]
    assert run.data.tags["git_dirty"] in ("True", "False")
    assert run.data.tags["team"] == "a"
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    files = {"config.yaml", "provenance.json", "data_report.json", "summary.json", "samples.jsonl"}
    assert artifacts == files | {"samples.json"}
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_text())
    assert table["columns"] == list(read_lines(tmp_path / "run" / "samples.jsonl")[0])
    assert [row[0] for row in table["data"]] == [1, 2, 3]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    assert (tmp_path / "store" / "mlartifacts").is_dir()


def test_numbers_of_the_run_as_a_whole_and_its_report_reach_mlflow_once(tmp_path: Path) -> None:
    run, config = tmp_path / "run", mlflow_config(f"sqlite:///{tmp_path}/mlflow.db")
    with tracked(config, run) as tracking:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5)):
            tracking.log(step, {"train/loss": loss, "eval/validation/loss": loss})
        figures = {f"report_figures/loss.{kind}" for kind in ("png", "csv")}
        (run / "report_figures").mkdir()
        for name in ("report.html", *figures):
            (run / name).write_text("x")
        tracking.finish({"train_seconds": 4.5, "num_parameters": 7, "peak_memory_bytes": 3 * 2**29})
    client, run_id = MlflowClient(config.uri), read_status(run)["tracker_run_id"]
    assert {file.path for file in client.list_artifacts(run_id, "report_figures")} == figures
    assert "report.html" in {file.path for file in client.list_artifacts(run_id)}
    whole = {"best/eval/validation/loss": 1.0, "train_seconds": 4.5, "num_parameters": 7.0, "peak_memory_gib": 1.5}
    lines = {"train/loss", "eval/validation/loss", "perf/elapsed_seconds"}
    for damage in ("{}", (run / "tracking.json").read_text()):  # and what the store has is looked up
        assert {name: history(client, run_id, name) for name in whole} == {n: [(3, v)] for n, v in whole.items()}
        assert client.get_run(run_id).data.metrics.keys() == lines | whole.keys()
        (run / "tracking.json").write_text(damage)
        deliver_pending(config, run, Console(io.StringIO()))


def test_the_use_of_the_machine_is_measured_on_request_under_mlflows_names(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for is_asked_for in (False, True):
        run = tmp_path / str(is_asked_for)
        with tracked(mlflow_config(uri, f"tracking.log_system_metrics={str(is_asked_for).lower()}"), run) as tracking:
            tracking.log(1, {"train/loss": 1.0})
            tracking.log(2, {"train/loss": 0.5})
        measured = [name for name in read_lines(run / "metrics.jsonl")[1] if name.startswith("perf/system/")]
        has = MlflowClient(uri).get_run(read_status(run)["tracker_run_id"]).data.metrics
        assert [plain_name(name) in has for name in measured] == [True] * len(measured)
        assert ("system/cpu_utilization_percentage" in has) == is_asked_for
        assert ("perf/system/system_memory_usage_megabytes" in measured) == is_asked_for


def test_a_monitor_that_fails_costs_a_warning_once() -> None:
    class Broken:
        def collect_metrics(self) -> None:
            raise OSError("no such sensor")

    told: list[str] = []
    system = SystemMetrics(told.append)
    system._monitors["disk"] = Broken()
    values = [system.measure() for _ in range(2)]
    assert told == ["the disk is not measured any more: no such sensor"]
    assert all("perf/system/cpu_utilization_percentage" in one for one in values)


def test_a_model_is_logged_with_a_signature_and_mlflow_loads_it(tmp_path: Path) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db", "tracking.log_model=true"), tmp_path / "run"
    tiny = AutoConfig.from_pretrained("assets/tiny_llama", hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    with tracked(config, run) as tracking:
        AutoModelForCausalLM.from_config(tiny).save_pretrained(run / "model")
        AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(run / "model")
        tracking.finish({"steps": 0})
    run_id = read_status(run)["tracker_run_id"]
    place = MlflowClient(config.uri).download_artifacts(run_id, "model", str(tmp_path))
    signature = mlflow.models.get_model_info(place).signature
    assert [column.type for column in signature.inputs] == [mlflow.types.DataType.string]
    (answer,) = mlflow.transformers.load_model(place)("1+2=", max_new_tokens=2)
    assert answer["generated_text"].startswith("1+2=")


def test_an_adapter_is_logged_with_a_signature_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    described = mlmodel(tmp_path, "0" * 32)
    assert (described.flavors, described.signature.inputs.input_types()) == ({}, [mlflow.types.DataType.string])


def test_a_failed_run_is_failed_in_mlflow_too(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ValueError, match="broken"), tracked(mlflow_config(uri), tmp_path / "run"):
        raise ValueError("broken")
    status = read_status(tmp_path / "run")
    assert (status["state"], status["cause"]) == ("FAILED", "ValueError: broken")
    assert MlflowClient(uri).get_run(exporter_of(mlflow_config(uri), tmp_path / "run").run_id).info.status == "FAILED"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_tracker_that_is_gone_costs_a_warning_and_is_told_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = mlflow_config(closed_port())
    track(gone, tmp_path / "run")
    warning = capsys.readouterr().err
    assert "3 lines of metrics are not delivered" in warning
    assert shell_override("hydra.run.dir", str(tmp_path / "run")) in warning
    assert read_status(tmp_path / "run")["state"] == "FINISHED"
    back = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db")
    for _ in range(2):  # the second time there is nothing left to deliver
        deliver_pending(back, tmp_path / "run", Console())
    run_id = exporter_of(back, tmp_path / "run").run_id
    client = MlflowClient(back.uri)
    assert len(client.get_metric_history(run_id, "train/loss")) == 3
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_tracker_that_never_answers_does_not_hold_the_run(tmp_path: Path, silent_server: str) -> None:
    exports = start_exporters([exporter_of(mlflow_config(silent_server), tmp_path)], tmp_path, warn=print)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    started = time.monotonic()
    for _ in range(1000):
        exports.notify()
    (undelivered,) = exports.close(WaitLimits(call_seconds=1.0))
    assert "not delivered (no answer)" in undelivered.reason
    assert time.monotonic() - started < 20  # a minute is the call's own limit


def count_calls(exporter: MlflowExporter, failing: dict[str, int]) -> list[str]:
    """Have the client's calls listed, and let the ones named fail as often as said, after they were carried out."""
    calls: list[str] = []
    exporter._connect()
    client = exporter._run.client

    class Flaky:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                calls.append(name)
                result = getattr(client, name)(*arguments, **named)
                if failing.get(name, 0) > 0:
                    failing[name] -= 1
                    raise ConnectionError(f"{name}: the answer was lost")
                return result

            return call

    exporter._run.client = Flaky()
    return calls


def test_what_is_delivered_twice_is_there_once_and_dated_by_its_line(tmp_path: Path) -> None:
    track(admitted().config.tracking, tmp_path / "run")
    config = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db")
    exporter = exporter_of(config, tmp_path / "run")
    count_calls(exporter, {"log_batch": 3})
    for _ in range(3):
        with pytest.raises(ConnectionError):
            exhaust(exporter.deliver())
    exhaust(exporter.deliver())
    history = MlflowClient(config.uri).get_metric_history(exporter.run_id, "train/loss")
    assert [metric.value for metric in history] == [1.0, 0.5, 1 / 3]
    assert [metric.timestamp for metric in history] == sorted(metric.timestamp for metric in history)


def test_many_lines_take_few_calls(tmp_path: Path) -> None:
    track(admitted().config.tracking, tmp_path / "run", steps=350)
    exporter = exporter_of(mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run")
    calls = count_calls(exporter, {})
    exhaust(exporter.deliver())
    assert calls.count("log_batch") == 3 + 4  # params, tags, summary, and 350 lines by the hundred
    assert exporter.num_pending == 0


def test_another_server_gets_a_run_of_its_own(tmp_path: Path) -> None:
    first, second = (mlflow_config(f"sqlite:///{tmp_path}/{name}.db") for name in "ab")
    track(first, tmp_path / "run")
    deliver_pending(second, tmp_path / "run", Console())
    exporter = exporter_of(second, tmp_path / "run")
    assert len(MlflowClient(second.uri).get_metric_history(exporter.run_id, "train/loss")) == 3


def test_params_get_names_of_their_own() -> None:
    names = distinct_names(["t.<a>", "t.[a]", "t.</a>", "plain"])
    assert list(names.values()) == ["t._a_", "t._a__2", "t.__a_", "plain"]


def _track_aside(uri: str, folder: Path, errors: Path) -> None:
    """Track a run in this process, which writes its errors to a file."""
    with open(errors, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    track(mlflow_config(uri), folder)


def test_three_processes_can_start_on_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    errors = [tmp_path / f"errors{i}.txt" for i in range(3)]
    started = [
        FORKS.Process(target=_track_aside, args=(uri, tmp_path / f"run{i}", file)) for i, file in enumerate(errors)
    ]
    for process in started:
        process.start()
    for process, file in zip(started, errors, strict=True):
        process.join(120)
        assert process.exitcode == 0, file.read_text(encoding="utf-8")
        assert "warning" not in file.read_text(encoding="utf-8")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("towline")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 3


@contextmanager
def open_folder(path: Path, start: Start = FROM_THE_BEGINNING, seed: int = 1) -> Iterator[RunFolder]:
    with hold(path), open_run_folder(path, {"seed": seed}, f"hash of {seed}", start) as folder:
        yield folder


def stopped_folder(path: Path, step: int) -> None:
    """Have a run that was stopped after a step, whose line is there."""
    with pytest.raises(Interrupted), open_folder(path) as folder:
        folder.step = step
        folder.append("metrics.jsonl", {"step": step})
        raise Interrupted("SIGTERM")


def test_a_second_process_is_refused_with_the_id_of_the_first(tmp_path: Path) -> None:
    with open_folder(tmp_path), pytest.raises(RunFolderError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        open_folder(tmp_path).__enter__()


def test_a_folder_is_held_before_anything_is_written_into_it(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with hold(run):
        assert [file.name for file in run.iterdir()] == ["lock"]
        with pytest.raises(RunFolderError, match="in use by another process"), hold(run):
            pass
    with hold(run):
        pass


def test_how_a_run_ended_is_in_its_status(tmp_path: Path) -> None:
    for error, state in (
        (Interrupted("SIGINT"), "PREEMPTED"),
        (KeyboardInterrupt(), "PREEMPTED"),
        (OSError(), "FAILED"),
    ):
        run = tmp_path / type(error).__name__
        with pytest.raises(type(error)), open_folder(run) as folder:
            assert read_status(run)["how_to_go_on"] is None
            folder.step = 5
            raise error
        assert (read_status(run)["state"], read_status(run)["step"]) == (state, 5)
        assert read_status(run)["cause"] in ("stopped by SIGINT", "stopped by Ctrl-C, at once", "OSError: no message")
        assert read_status(run)["how_to_go_on"] == f"make resume run={run}"


def test_a_folder_with_an_unfinished_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    stopped_folder(tmp_path, 3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: (tmp_path / name).read_text() for name in ("metrics.jsonl", "config.yaml", "starts.jsonl")}
    another = r"PREEMPTED at step 3, stopped by SIGTERM\), and it was made with another configuration(.|\n)*force=true"
    with pytest.raises(RunFolderError, match=another):
        open_folder(tmp_path, seed=2).__enter__()
    with pytest.raises(RunFolderError, match=r"PREEMPTED at step 3(.|\n)*checkpoint\.resume=never(.|\n)*force=true"):
        open_folder(tmp_path, Start(may_begin_again=False)).__enter__()
    assert {name: (tmp_path / name).read_text() for name in before} == before
    with open_folder(tmp_path, Start(force=True, may_begin_again=False), seed=2):
        assert not (tmp_path / "metrics.jsonl").exists()
        assert not (tmp_path / "checkpoints").exists()
        assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"
        assert len(read_lines(tmp_path / "starts.jsonl")) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_is_refused_where_nothing_may_be_gone_on_with(tmp_path: Path) -> None:
    stopped_folder(tmp_path, 0)
    for seed in (1, 2):
        with pytest.raises(RunFolderError, match=r"PREEMPTED at step 0(.|\n)*checkpoint\.resume=never"):
            open_folder(tmp_path, Start(may_begin_again=False), seed=seed).__enter__()
    assert steps_of(tmp_path) == [0]


def test_a_run_that_died_is_told_as_one_that_was_killed(tmp_path: Path) -> None:
    stopped_folder(tmp_path, 3)
    status = read_status(tmp_path) | {"state": "RUNNING", "cause": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    with pytest.raises(RunFolderError, match=r"killed at step 3\)"):
        open_folder(tmp_path, seed=2).__enter__()


def test_a_run_that_goes_on_leaves_what_is_there_and_says_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(f"2026-01-01T00:{minute}:00+00:00" for minute in range(10, 60))
    monkeypatch.setattr("src.tracking.run_folder.now", lambda: next(times))
    with pytest.raises(Interrupted), open_folder(tmp_path) as folder:
        folder.set_status(tracker_run_id="abc")
        folder.step = 5
        folder.append("metrics.jsonl", {"step": 5})
        raise Interrupted("SIGTERM")
    started = read_status(tmp_path)["started"]
    with pytest.raises(ValueError, match="broken"), open_folder(tmp_path, Start(4, {"seed": 2}), seed=2):
        status = read_status(tmp_path)
        assert (status["state"], status["step"], status["cause"], status["ended"]) == ("RUNNING", 4, None, None)
        assert (status["how_to_go_on"], status["tracker_run_id"], status["started"]) == (None, "abc", started)
        assert status["updated"] > started
        raise ValueError("broken")
    assert read_status(tmp_path)["step"] == 4
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    assert steps_of(tmp_path) == [5]  # what comes again is not known before it trains
    first, second = read_lines(tmp_path / "starts.jsonl")
    assert (first["resumed_step"], first["changed"], first["config_hash"]) == (None, {}, "hash of 1")
    assert (second["resumed_step"], second["changed"], second["config_hash"]) == (4, {"seed": 2}, "hash of 2")
    assert second["time"] > first["time"]
    assert first["command"] == second["command"] == sys.orig_argv


def test_a_run_that_failed_before_it_trained_begins_anew_with_what_was_mended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), open_folder(tmp_path) as folder:
        folder.write_json("data_report.json", {"train": {}})
        raise ValueError("broken")
    (tmp_path / "notes.txt").write_text("mine")
    with open_folder(tmp_path, seed=2):
        assert not (tmp_path / "data_report.json").exists()
        assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"
    assert [start["config_hash"] for start in read_lines(tmp_path / "starts.jsonl")] == ["hash of 1", "hash of 2"]
    assert read_status(tmp_path)["state"] == "FINISHED"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_start_that_was_not_written_to_its_end_is_no_problem(tmp_path: Path) -> None:
    stopped_folder(tmp_path, 3)
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": "2026-')
    assert last_config_hash(tmp_path) == "hash of 1"
    with open_folder(tmp_path, Start(3), seed=2):
        pass
    assert last_config_hash(tmp_path) == "hash of 2"


def test_lines_behind_a_step_are_cut_and_one_that_was_not_finished_is_none(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with open_folder(tmp_path) as folder:
        assert folder.lines("metrics.jsonl") == []
        assert folder.cut("metrics.jsonl", 3) == ([], [])
        assert not file.exists()
        whole = [{"step": step, "a": 0.1 * step, "안녕": step / 7 if step % 2 else None} for step in range(1, 6)]
        for line in whole:
            folder.append("metrics.jsonl", line)
        before = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(file.read_bytes() + '{"step": 6, "안'.encode()[:-1])
        assert folder.lines("metrics.jsonl") == whole
        assert folder.cut("metrics.jsonl", 3) == (whole[:3], whole[3:])
        assert file.read_bytes() == b"".join(before[:3])
        assert folder.cut("metrics.jsonl", 3) == (whole[:3], [])
        folder.append("metrics.jsonl", {"step": 4})
        assert folder.lines("metrics.jsonl") == [*whole[:3], {"step": 4}]
        assert folder.cut("metrics.jsonl", -1) == ([], [*whole[:3], {"step": 4}])
        assert file.read_bytes() == b""


ODD = "one\u2028two\u2029three\u0085four\x1cfive\r\nsix\x0b"
"""A text with all that may be taken for the end of a line."""


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        written = [{"step": step, "prompt": ODD, "text": ODD} for step in (1, 2, 3)]
        for line in written:
            folder.append("samples.jsonl", line)
        assert folder.lines("samples.jsonl") == written
        assert folder.cut("samples.jsonl", 2) == (written[:2], written[2:])


def test_lines_are_on_the_disk_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with open_folder(tmp_path) as folder, monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        folder.sync()
        assert synced == []
        for name in ("samples.jsonl", "metrics.jsonl"):
            folder.append(name, {"step": 1})
        folder.sync()
    assert set(synced) == {(tmp_path / name).stat().st_ino for name in ("metrics.jsonl", "samples.jsonl")}


def test_a_folder_that_is_no_runs_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(RunFolderError, match=r"no run's folder, but holds config\.yaml, model"):
        open_folder(tmp_path, Start(force=True)).__enter__()
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_numbers_that_json_can_not_hold_are_null(tmp_path: Path) -> None:
    with open_folder(tmp_path / "run") as folder:
        folder.append("metrics.jsonl", {"step": 1, "a": float("inf"), "b": float("nan"), "c": 1.5})
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.5}]


def test_a_line_whose_step_was_not_over_is_not_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted), tracked(admitted().config.tracking, run) as tracking:
        do_step(tracking, 1, 2.0)
        with tracking.line(Done(2, 1.0), due=True) as line:
            line.metrics["eval/easy/loss"] = 1.0
            line.samples = [Sample(2, "1+1=", "2", "2", "2", "eos", 0, 0, "?")]
            raise Interrupted("SIGINT")
    assert steps_of(run) == steps_of(run, "samples.jsonl") == [1]


def test_samples_are_written_before_the_line_that_says_that_their_step_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    real = RunFolder.append

    def append(self: RunFolder, name: str, line: Mapping[str, Any]) -> None:
        written.append(name)
        real(self, name, line)

    monkeypatch.setattr(RunFolder, "append", append)
    with tracked(admitted().config.tracking, tmp_path / "run") as tracking:
        written.clear()
        do_step(tracking, 1, 2.0)
        assert written == ["samples.jsonl", "metrics.jsonl"]


def test_a_step_that_is_not_due_has_a_line_only_where_something_was_measured(tmp_path: Path) -> None:
    with tracked(admitted().config.tracking, tmp_path / "run") as tracking:
        for step, due in ((1, False), (2, True), (3, False)):
            with tracking.line(Done(step, 2.0), due=due) as line:
                if step == 3:
                    line.metrics["eval/easy/loss"] = 1.0
    assert steps_of(tmp_path / "run") == [2, 3]


@pytest.mark.parametrize(
    ("step", "is_end", "kept"),
    [(3, False, [1, 2, 3]), (5, False, [1, 2, 3, 5]), (5, True, [1, 2, 3]), (4, False, [1, 2, 3]), (0, False, [])],
)
def test_what_comes_again_is_taken_out(tmp_path: Path, step: int, is_end: bool, kept: list[int]) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted), tracked(admitted().config.tracking, run) as tracking:
        for number in (1, 2, 3, 5, 6):
            do_step(tracking, number, 1 / number)
        raise Interrupted("SIGTERM")
    with open(run / "samples.jsonl", "a") as file:  # step 7 was stopped between its samples and its line
        file.write(json.dumps({"step": 7, "prompt": "1+1=", "text": "2"}) + "\n")
    with tracked(admitted().config.tracking, run, Start(step=step or None)) as tracking:
        assert [line["step"] for line in tracking.rewind_to(step, is_end=is_end)[0]] == kept
        assert steps_of(run) == steps_of(run, "samples.jsonl") == kept
        do_step(tracking, 8, 1.0)
        assert steps_of(run) == [*kept, 8]


def test_numbers_go_on_from_the_lines_that_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(admitted().config.tracking, run, steps=5)
    lines = read_lines(run / "metrics.jsonl")
    lines[0]["eval/validation/exact_match"] = 0.9  # the best
    lines[2] |= {"perf/elapsed_seconds": 1000.0, "eval/validation/loss": None}
    write_lines(run / "metrics.jsonl", lines)
    with tracked(admitted().config.tracking, run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        latest = {"train/loss": 1 / 3, "eval/validation/exact_match": 3 / 10, "perf/elapsed_seconds": 1000.0}
        assert tracking.latest == latest
        do_step(tracking, 4, 0.1)
        summary = tracking.finish({"steps": 4})
    assert read_lines(run / "metrics.jsonl")[-1]["perf/elapsed_seconds"] >= 1000.0
    assert summary.pop("perf/elapsed_seconds") >= 1000.0
    own = {"train/loss": 0.1, "eval/validation/exact_match": 0.4, "best/eval/validation/exact_match": 0.9, "steps": 4}
    assert summary == own
    assert read_status(run)["step"] == 4


def test_a_file_that_says_how_a_run_began_is_written_once(tmp_path: Path) -> None:
    with tracked(admitted().config.tracking, tmp_path) as tracking:
        for device in ("first", "second"):
            tracking.write_file("provenance.json", {"device": device}, once=True)
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"device": "first"}


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def logged_samples(client: MlflowClient, run_id: str) -> list[tuple[int, str]]:
    table = json.loads(Path(client.download_artifacts(run_id, "samples.json")).read_text())
    return [(row[0], row[table["columns"].index("text")]) for row in table["data"]]


def logged_in(config: Any) -> list[str]:
    """Give the ids of all runs that a store has."""
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name(config.experiment_name)
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


@pytest.mark.parametrize(("end", "state"), [(stopped, "KILLED"), (killed, "RUNNING")])
def test_a_run_that_goes_on_is_the_same_run_in_mlflow_and_nothing_is_there_twice(
    tmp_path: Path, end: Callable[..., None], state: str
) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    client = MlflowClient(config.uri)
    end(config, run, steps=5)
    run_id = read_status(run)["tracker_run_id"]
    assert client.get_run(run_id).info.status == state
    with tracked(config, run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        assert tracking.tracker_run_id == run_id
        while client.get_run(run_id).info.status != "RUNNING":
            time.sleep(0.05)
        do_step(tracking, 4, 1 / 4)
        do_step(tracking, 5, 0.9, text="another")
        do_step(tracking, 6, 1 / 6)
        tracking.finish({"steps": 6})
    assert steps_of(run) == steps_of(run, "samples.jsonl") == [1, 2, 3, 4, 5, 6]
    assert (read_status(run)["tracker_run_id"], logged_in(config)) == (run_id, [run_id])
    assert client.get_run(run_id).info.status == "FINISHED"
    expected = [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 1 / 5), (5, 0.9), (6, 1 / 6)]
    assert history(client, run_id, "train/loss") == expected
    scores = [(step, step / 10) for step in range(1, 7)]
    assert history(client, run_id, "eval/validation/exact_match") == scores
    assert [step for step, _ in history(client, run_id, "perf/elapsed_seconds")] == [1, 2, 3, 4, 5, 6]
    own = [(step, "another" if step == 5 else "<ToW>2</ToW>2") for step in range(1, 7)]
    assert logged_samples(client, run_id) == own
    assert "summary.json" in {file.path for file in client.list_artifacts(run_id)}


def test_a_run_that_goes_on_again_and_again_behind_one_step_has_everything_once(tmp_path: Path) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    stopped(config, run, steps=5)
    for last in (4, 5, 6):
        with pytest.raises(Interrupted), tracked(config, run, Start(step=2)) as tracking:
            tracking.rewind_to(2, is_end=False)
            for step in range(3, last + 1):
                do_step(tracking, step, 0.7 if step == 4 else 1 / step)
            raise Interrupted("SIGTERM")
    (run_id,) = logged_in(config)
    expected = sorted([(step, 1 / step) for step in range(1, 7)] + [(4, 0.7)])
    assert history(MlflowClient(config.uri), run_id, "train/loss") == expected


def test_what_mlflow_did_not_get_of_the_first_start_it_gets_of_the_second(tmp_path: Path) -> None:
    uri, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    stopped(mlflow_config(closed_port()), run, steps=5)
    done = json.loads((run / "tracking.json").read_text())
    (run / "tracking.json").write_text(json.dumps(done | {"uri": uri}))  # the server is back
    config = mlflow_config(uri)
    with tracked(config, run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        do_step(tracking, 4, 0.7)
        tracking.finish({"steps": 4})
    (run_id,) = logged_in(config)
    client = MlflowClient(uri)
    assert history(client, run_id, "train/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 0.7)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_without_checkpoints_begins_anew_by_itself_and_is_the_same_run_in_mlflow(tmp_path: Path) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    stopped(config, run, steps=2)
    run_id = read_status(run)["tracker_run_id"]
    with tracked(config, run) as tracking:
        assert steps_of(run) == [1, 2]
        assert tracking.rewind_to(0, is_end=False)[0] == []
        assert steps_of(run) == steps_of(run, "samples.jsonl") == []
        for step in (1, 2, 3):
            do_step(tracking, step, 1 / step)
        tracking.finish({"steps": 3})
    assert [start["resumed_step"] for start in read_lines(run / "starts.jsonl")] == [None, None]
    assert logged_in(config) == [run_id] == [read_status(run)["tracker_run_id"]]
    client = MlflowClient(config.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert history(client, run_id, "train/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert [step for step, _ in logged_samples(client, run_id)] == [1, 2, 3]


@pytest.mark.parametrize("step", [None, 7])
def test_a_run_that_was_stopped_before_its_first_line_ends_in_mlflow_too(tmp_path: Path, step: int | None) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    stopped(config, run, steps=0)
    with tracked(config, run, Start(step=step)) as tracking:
        tracking.rewind_to(step or 0, is_end=False)
        do_step(tracking, 8, 1 / 8)
        tracking.finish({"steps": 8})
    (run_id,) = logged_in(config)
    client = MlflowClient(config.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert history(client, run_id, "train/loss") == [(8, 1 / 8)]
    assert "summary.json" in {file.path for file in client.list_artifacts(run_id)}


def test_a_mended_configuration_is_a_run_of_its_own_in_mlflow(tmp_path: Path) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    with pytest.raises(ValueError, match="broken"), tracked(config, run):
        raise ValueError("broken")
    with tracked(config, run, frozen={"seed": 2}) as tracking:
        do_step(tracking, 1, 1.0)
    client = MlflowClient(config.uri)
    runs = [client.get_run(run_id) for run_id in logged_in(config)]
    assert {one.data.params["seed"]: one.info.status for one in runs} == {"1": "FAILED", "2": "FINISHED"}
    assert client.get_run(read_status(run)["tracker_run_id"]).data.params["seed"] == "2"


def test_a_start_that_fails_before_it_trains_leaves_what_mlflow_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    client = MlflowClient(config.uri)
    killed(config, run, steps=3)
    with pytest.raises(ValueError, match="broken"), tracked(config, run, Start(step=2)):
        raise ValueError("broken")
    (run_id,) = logged_in(config)
    assert "not delivered" not in capsys.readouterr().err
    assert client.get_run(run_id).info.status == "FAILED"
    with tracked(config, run, Start(step=2)) as tracking:
        tracking.rewind_to(2, is_end=False)
        do_step(tracking, 3, 1 / 3)
        tracking.finish({"steps": 3})
    assert history(client, run_id, "train/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_samples_of_any_text_reach_mlflow(tmp_path: Path) -> None:
    config, run = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run"
    with tracked(config, run) as tracking:
        do_step(tracking, 1, 1.0, text=ODD)
        do_step(tracking, 2, 1.0)
    (run_id,) = logged_in(config)
    assert logged_samples(MlflowClient(config.uri), run_id) == [(1, ODD), (2, "<ToW>2</ToW>2")]


def test_a_folder_that_can_not_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="can't be made"):
        open_folder(tmp_path / "file" / "run").__enter__()


def test_the_config_hash_is_that_of_what_is_computed() -> None:
    first = admitted("seed=1").frozen
    assert config_hash(first) == config_hash(admitted("seed=1", "name=other", "tracking=mlflow").frozen)
    assert config_hash(first) != config_hash(admitted("seed=2").frozen)
    assert "tracking.json" in FILES


def test_git_state_outside_a_checkout_is_unknown(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None, "diff": None}
    assert len(git_state(ROOT)["commit"]) == 40


HOSTILE = ["<ToW>", "</ToW>", "[ToW]", "<|ToW|>", "<script>alert(1)</script>", "\"'`", "\0", "\u202eabc", "😀", "😁"]
HOSTILE += ["..", ".", "", "/", "<..>", "</>", "\n", "x" * 400, "x" * 401, "\ud800"]


def test_nested_settings_become_flat_names_that_mlflow_takes() -> None:
    assert dict(flat({"a": {"<ToW>": "x", "b": [1, 2]}, "c": {}, "d": None})) == {
        "a.<ToW>": "x",
        "a.b": "[1, 2]",
        "c": "{}",
        "d": "null",
    }


@pytest.mark.parametrize("token", HOSTILE)
def test_metrics_of_any_token_have_a_name_of_their_own_that_mlflow_takes(token: str) -> None:
    names = [plain_name(f"tokens/{one}/norm") for one in HOSTILE]
    plain = plain_name(f"tokens/{token}/norm")
    _validate_metric_name(plain)
    assert plain_name(plain) == plain
    assert names.count(plain) == 1


def test_names_of_tokens_are_readable() -> None:
    names = ["eval/validation/loss", "tokens/<ToW>/norm", "tokens/</ToW>/norm", "tokens/안녕/norm"]
    assert [plain_name(name) for name in names] == [
        "eval/validation/loss",
        "tokens/ToW/norm",
        "tokens/ToW end/norm",
        "tokens/안녕/norm",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(7.4, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's own server on a store in `folder`, and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
               "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
               "--workers", "1"]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # six processes that nothing here asks
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder,
        env=environment,
    )  # fmt: skip
    while True:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server
        except OSError:
            time.sleep(0.2)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_server_that_dies_during_a_run_and_comes_back_has_everything_once(tmp_path: Path) -> None:
    uri = closed_port()
    port = int(uri.rpartition(":")[2])
    config = mlflow_config(uri)
    run = tmp_path / "run"
    console = Console(io.StringIO())
    server = start_server(tmp_path, port)
    try:
        with tracked(config, run) as tracking:
            tracking.log(1, {"train/loss": 1.0, "tokens/</ToW>/norm": 0.1})
            while exporter_of(config, run).num_pending:
                time.sleep(0.1)
            stop_server(server)
            tracking.log(2, {"train/loss": 0.5, "tokens/</ToW>/norm": 0.2})
            tracking.finish({"steps": 2})
        assert read_status(run)["state"] == "FINISHED"
        server = start_server(tmp_path, port)
        client = MlflowClient(uri)
        run_id = read_status(run)["tracker_run_id"]
        for _ in range(20):  # each attempt has a few seconds, of which a busy machine may need more
            deliver_pending(config, run, console)
            if client.get_run(run_id).info.status == "FINISHED":
                break
        lines = read_lines(run / "metrics.jsonl")
        for name in {"train/loss", "tokens/</ToW>/norm", "perf/elapsed_seconds"}:
            assert history(client, run_id, plain_name(name)) == [(line["step"], line[name]) for line in lines]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert "summary.json" in {file.path for file in client.list_artifacts(run_id)}
    finally:
        stop_server(server)


@pytest.mark.parametrize("killed_at", range(6))
def test_a_start_that_is_killed_while_it_begins_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    class Killed(BaseException):
        pass

    written = iter(range(100))

    def dying(*given: Any, **named: Any) -> None:
        if next(written) == killed_at:
            raise Killed
        real(*given, **named)

    from src.tracking import run_folder

    real = run_folder.write_atomically
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_atomically", dying)
        with suppress(Killed), open_folder(tmp_path):
            pass
    with open_folder(tmp_path):
        assert read_status(tmp_path)["state"] == "RUNNING"
    assert (tmp_path / "config.yaml").exists()
