"""Tracking: the folder is the truth, MLflow a mirror that may be slow, gone, or late."""

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
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from src.errors import Interrupted, RunFolderError
from src.evaluation.samples import Sample
from src.tracking.console import Console, clock
from src.tracking.journal import FILES, RunFolder, open_run_folder, read_status
from src.tracking.mlflow_mirror import Delivery, MlflowMirror, distinct_names, flat, plain_name
from src.tracking.provenance import config_hash, git_state, provenance
from src.tracking.tracker import deliver_pending, open_tracking
from tests.conftest import ROOT, admitted, read_lines


def mlflow_config(uri: str, *overrides: str) -> Any:
    return admitted("tracking=mlflow", f"tracking.uri='{uri}'", *overrides).config.tracking


def track(config: Any, run_dir: Path, *, steps: int = 3) -> None:
    console = Console(io.StringIO())
    with open_tracking(config, run_dir, {"seed": 1, "long": "x" * 600}, console, force=False) as tracking:
        tracking.record("provenance.json", provenance({"seed": 1}, {"a.jsonl": "00"}, "cpu", ROOT))
        report = {"digest": "abc", "rows_kept": 1, "tokens": 2, "supervised_tokens": 1}
        tracking.record("data_report.json", {"train": report, "validation": report})
        for step in range(1, steps + 1):
            tracking.log(step, {"train/loss": 1.0 / step, "eval/validation/exact_match": step / 10})
            tracking.samples([Sample(step, "1+1=", "<ToW>2</ToW>2", "2", "2", "eos", 1, 1, "?")])
        tracking.finish({"steps": steps})


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
    assert (status["pid"], status["host"]) == (os.getpid(), socket.gethostname())
    (start,) = read_lines(run / "starts.jsonl")
    assert start["config_hash"] == config_hash({"seed": 1, "long": "x" * 600})


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


def test_a_failed_run_is_failed_in_mlflow_too(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ValueError, match="broken"), open_tracking(
        mlflow_config(uri), tmp_path / "run", {"seed": 1}, Console(), force=False
    ):  # fmt: skip
        raise ValueError("broken")
    status = read_status(tmp_path / "run")
    assert (status["state"], status["cause"]) == ("FAILED", "ValueError: broken")
    assert MlflowClient(uri).get_run(Delivery(mlflow_config(uri), tmp_path / "run").run_id).info.status == "FAILED"


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
    assert f"hydra.run.dir={tmp_path / 'run'}" in warning
    assert read_status(tmp_path / "run")["state"] == "FINISHED"
    back = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db")
    for _ in range(2):  # the second time there is nothing left to deliver
        deliver_pending(back, tmp_path / "run", Console())
    run_id = Delivery(back, tmp_path / "run").run_id
    client = MlflowClient(back.uri)
    assert len(client.get_metric_history(run_id, "train/loss")) == 3
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_tracker_that_never_answers_does_not_hold_the_run(tmp_path: Path, silent_server: str) -> None:
    mirror = MlflowMirror(mlflow_config(silent_server), tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    started = time.monotonic()
    for _ in range(1000):
        mirror.poke()
    undelivered = mirror.close()
    assert "not delivered" in undelivered
    assert time.monotonic() - started < 8  # the call that hangs has a time-out of 10 s


def count_calls(delivery: Delivery, failing: dict[str, int]) -> list[str]:
    """Have the client's calls listed, and let the ones named fail as often as said, after they were carried out."""
    calls: list[str] = []
    delivery._connect()
    client = delivery._client

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

    delivery._client = Flaky()
    return calls


def test_what_is_delivered_twice_is_there_once_and_dated_by_its_line(tmp_path: Path) -> None:
    track(admitted().config.tracking, tmp_path / "run")
    config = mlflow_config(f"sqlite:///{tmp_path}/mlflow.db")
    delivery = Delivery(config, tmp_path / "run")
    count_calls(delivery, {"log_batch": 3})
    for _ in range(3):
        with pytest.raises(ConnectionError):
            delivery.deliver()
    delivery.deliver()
    history = MlflowClient(config.uri).get_metric_history(delivery.run_id, "train/loss")
    assert [metric.value for metric in history] == [1.0, 0.5, 1 / 3]
    assert [metric.timestamp for metric in history] == sorted(metric.timestamp for metric in history)


def test_many_lines_take_few_calls(tmp_path: Path) -> None:
    track(admitted().config.tracking, tmp_path / "run", steps=350)
    delivery = Delivery(mlflow_config(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run")
    calls = count_calls(delivery, {})
    delivery.deliver()
    assert calls.count("log_batch") == 2 + 4  # params, tags, and 350 lines by the hundred
    assert delivery.num_pending == 0


def test_another_server_gets_a_run_of_its_own(tmp_path: Path) -> None:
    first, second = (mlflow_config(f"sqlite:///{tmp_path}/{name}.db") for name in "ab")
    track(first, tmp_path / "run")
    deliver_pending(second, tmp_path / "run", Console())
    delivery = Delivery(second, tmp_path / "run")
    assert len(MlflowClient(second.uri).get_metric_history(delivery.run_id, "train/loss")) == 3


def test_params_get_names_of_their_own() -> None:
    names = distinct_names(["t.<a>", "t.[a]", "t.</a>", "plain"])
    assert list(names.values()) == ["t._a_", "t._a__2", "t.__a_", "plain"]


def test_three_processes_can_start_on_a_fresh_store(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from tests.test_tracking import mlflow_config, track
track(mlflow_config(sys.argv[1]), Path(sys.argv[2]))
"""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, str(tmp_path / f"run{i}")], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "warning" not in errors
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("towline")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 3


def open_folder(path: Path, *, force: bool = False) -> AbstractContextManager[RunFolder]:
    return open_run_folder(path, {"seed": 1}, "hash", force=force)


def test_a_second_process_is_refused_with_the_id_of_the_first(tmp_path: Path) -> None:
    with open_folder(tmp_path), pytest.raises(RunFolderError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        open_folder(tmp_path).__enter__()


def test_how_a_run_ended_is_in_its_status(tmp_path: Path) -> None:
    for error, state in (
        (Interrupted("SIGINT"), "PREEMPTED"),
        (KeyboardInterrupt(), "PREEMPTED"),
        (OSError(), "FAILED"),
    ):
        run = tmp_path / type(error).__name__
        with pytest.raises(type(error)), open_folder(run) as folder:
            folder.step = 5
            raise error
        assert (read_status(run)["state"], read_status(run)["step"]) == (state, 5)
        assert read_status(run)["cause"] in ("stopped by SIGINT", "stopped by Ctrl-C, at once", "OSError: no message")


def test_a_folder_with_an_unfinished_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), open_folder(tmp_path) as folder:
        folder.append("metrics.jsonl", {"step": 1})
        raise Interrupted("SIGTERM")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(RunFolderError, match=r"PREEMPTED at step 0, stopped by SIGTERM(.|\n)*force=true"):
        open_folder(tmp_path).__enter__()
    assert (tmp_path / "metrics.jsonl").read_text() == before
    with open_folder(tmp_path, force=True):
        assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_runs_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(RunFolderError, match=r"no run's folder, but holds config\.yaml, model"):
        open_folder(tmp_path, force=True).__enter__()
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_numbers_that_json_can_not_hold_are_null(tmp_path: Path) -> None:
    with open_folder(tmp_path / "run") as folder:
        folder.append("metrics.jsonl", {"step": 1, "a": float("inf"), "b": float("nan"), "c": 1.5})
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.5}]


def test_a_line_that_was_begun_is_written_when_the_run_is_stopped(tmp_path: Path) -> None:
    class Step:
        number, lr, loss, tokens_per_second = 1, 0.1, 2.0, 1.0

        def collect(self) -> dict[str, float]:
            return {"train/loss": 2.0}

    run = tmp_path / "run"
    with pytest.raises(Interrupted), open_tracking(
        admitted().config.tracking, run, {"seed": 1}, Console(io.StringIO()), force=False
    ) as tracking, tracking.line(Step(), due=True) as metrics:  # fmt: skip
        metrics["eval/easy/loss"] = 1.0
        raise Interrupted("SIGINT")
    (line,) = read_lines(run / "metrics.jsonl")
    assert (line["train/loss"], line["eval/easy/loss"]) == (2.0, 1.0)


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


def test_nested_settings_become_flat_names_that_mlflow_takes() -> None:
    assert dict(flat({"a": {"<ToW>": "x", "b": [1, 2]}, "c": {}, "d": None})) == {
        "a.<ToW>": "x",
        "a.b": "[1, 2]",
        "c": "{}",
        "d": "null",
    }
    assert plain_name("tokens/</ToW>/norm") == "tokens/_/ToW_/norm"


@pytest.mark.parametrize(("seconds", "shown"), [(7.4, "0:07"), (750, "12:30"), (11100, "3:05:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start MLflow's own server on a store in `folder`, and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
               "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
               "--workers", "1"]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder
    )
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
        with open_tracking(config, run, {"seed": 1}, console, force=False) as tracking:
            tracking.log(1, {"train/loss": 1.0})
            while Delivery(config, run).num_pending:
                time.sleep(0.1)
            stop_server(server)
            tracking.log(2, {"train/loss": 0.5})
            tracking.finish({"steps": 2})
        assert read_status(run)["state"] == "FINISHED"
        server = start_server(tmp_path, port)
        client = MlflowClient(uri)
        run_id = read_status(run)["tracker_run_id"]
        for _ in range(20):  # each attempt has a few seconds, of which a busy machine may need more
            deliver_pending(config, run, console)
            if client.get_run(run_id).info.status == "FINISHED":
                break
        assert [metric.value for metric in client.get_metric_history(run_id, "train/loss")] == [1.0, 0.5]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert "summary.json" in {file.path for file in client.list_artifacts(run_id)}
    finally:
        stop_server(server)
