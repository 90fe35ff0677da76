"""A sweep in MLflow: a parent run with its trials nested under it, brought up to date from the folder alone."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from src.config.frozen import read_status
from src.config.schema import MlflowConfig
from src.config.schema.tracking import NoTrackingConfig
from src.errors import DamagedFileError, Pruned
from src.tracking.console import Console
from src.tracking.export_thread import WaitLimits
from src.tracking.exporters import exhaust
from src.tracking.lock import hold
from src.tracking.mlflow_sweep import MlflowSweepExporter, sweep_tracking
from src.tracking.tracker import open_sweep_tracking
from src.trials.trial import run_name
from tests.conftest import write_lines
from tests.sweeps import planned, states
from tests.test_tracking import FROZEN, closed_port, count_calls, do_step, stopped, track, tracked

LONG = ",".join(str(value) for value in range(200))
STARTED = "2026-01-01T00:00:00+00:00"
AT = 1_767_225_600_000
"""The same in MLflow's milliseconds."""
ENDED = {"state": "FINISHED", "counts": {"FINISHED": 2, "FAILED": 1, "PRUNED": 0}}


def config(uri: str) -> MlflowConfig:
    return MlflowConfig("mlflow", uri, "towline", "run", {"team": "a"}, False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has its tables and nothing in them: making one takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write(tmp_path / "rates")
    return tmp_path / "rates"


def write(place: Path, second: int = 0, **changes: Any) -> None:
    """Write sweep.json, so many seconds after the start, and trials.jsonl."""
    place.mkdir(exist_ok=True)
    history = [
        {"trial": 0, "value": 0.5, "best": 0.5, "elapsed_seconds": 1.5},
        {"trial": 1, "value": 0.7, "best": 0.5, "elapsed_seconds": 2.5},
    ]
    sweep = {
        "name": "rates", "state": "RUNNING", "started": STARTED, "updated": STARTED.replace("00+", f"{second:02}+"),
        "space": {"optimizer.lr": "1e-3,1e-2", "seed": LONG},
        "sweep": {"metric": "eval/validation/loss", "n_trials": None},
        "counts": {"FINISHED": 2, "FAILED": 0, "PRUNED": 0}, "history": history,
    }  # fmt: skip
    (place / "sweep.json").write_text(json.dumps(sweep | changes))
    trials = [{"number": n, "identity": f"identity{n}", "setting": "same", "config": FROZEN} for n in range(3)]
    write_lines(place / "trials.jsonl", trials)


def exporter_of(uri: str, place: Path, *, is_over: bool = False) -> MlflowSweepExporter:
    return MlflowSweepExporter(config(uri), place, is_over=is_over, warn=print)


def deliver(place: Path, uri: str) -> Any:
    """Deliver as another process would, and give the sweep's run."""
    exhaust(exporter_of(uri, place).deliver())
    return run_of(uri)


def run_of(uri: str, name: str = "rates") -> Any:
    (found,) = MlflowClient(uri).search_runs(["1"], filter_string=f"attributes.run_name = '{name}'")
    return found


def points(uri: str, name: str) -> list[tuple[int, float, int]]:
    history = MlflowClient(uri).get_metric_history(run_of(uri).info.run_id, name)
    return sorted((point.step, point.value, point.timestamp - AT) for point in history)


def nested(uri: str) -> dict[str, Any]:
    """Give the runs under the sweep's by the number of their trial."""
    under = f"tags.`mlflow.parentRunId` = '{run_of(uri).info.run_id}'"
    found = MlflowClient(uri).search_runs(["1"], filter_string=under)
    return {child.data.tags["towline.trial"]: child for child in found}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optimizer.lr=0.00085432", "seed=1"], "lr=8.54e-4 seed=1"),
        (["training.num_train_epochs=2.0", "optimizer.lr=3e-05"], "num_train_epochs=2 lr=3e-5"),
        (["a.r=0.123456", "b.r=123456"], "a.r=0.123 b.r=123456"),
        (["optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.0"], "betas=[0.9,0.95] weight_decay=0"),
        (["a.b=" + "\n안<script>" * 9], "b=\\n안<script>\\n안<script>\\n안<script>\\n안<…"),
        ([], ""),
    ],
)
def test_a_trial_is_named_by_what_varies_rounded(overrides: list[str], name: str) -> None:
    assert run_name(overrides) == name


def test_what_was_delivered_is_not_delivered_again(place: Path, uri: str) -> None:
    for _ in range(2):
        run = deliver(place, uri)
    assert run.data.params == {
        "space.optimizer.lr": "1e-3,1e-2",  # the long one is in sweep.json
        "sweep.metric": "eval/validation/loss",
        "sweep.n_trials": "null",
    }
    tags = {"team": "a", "towline.sweep": "rates", "towline.folder": str(place), "mlflow.source.name": "src.run"}
    assert tags.items() <= run.data.tags.items()
    assert points(uri, "value") == [(1, 0.5, 1500), (2, 0.7, 2500)]
    assert points(uri, "best") == [(1, 0.5, 1500), (2, 0.5, 2500)]
    assert points(uri, "trials_finished") == [(2, 2, 0)]
    write(place, second=9, counts={"FINISHED": 2, "FAILED": 1, "PRUNED": 0})
    deliver(place, uri)
    assert points(uri, "trials_finished") == [(2, 2, 0)]
    assert points(uri, "trials_failed") == [(2, 0, 0), (2, 1, 9000)]


def test_values_of_several_metrics_are_curves_of_each(place: Path, uri: str) -> None:
    history = [
        {"trial": 0, "value": [0.5, 0.1], "best": [0.5, 0.1], "elapsed_seconds": 1.5},
        {"trial": 1, "value": [0.7, 0.2], "best": [0.5, 0.2], "elapsed_seconds": 2.5},
    ]
    judged = {"metric": ["eval/test/loss", "eval/test/exact_match"], "direction": ["minimize", "maximize"]}
    write(place, history=history, sweep=judged)
    for _ in range(2):
        run = deliver(place, uri)
    assert points(uri, "value/eval/test/loss") == [(1, 0.5, 1500), (2, 0.7, 2500)]
    assert points(uri, "best/eval/test/exact_match") == [(1, 0.1, 1500), (2, 0.2, 2500)]
    assert run.data.params["sweep.direction"] == '["minimize", "maximize"]'


def test_judged_by_another_metric_it_is_another_run_with_the_same_trials(place: Path, uri: str) -> None:
    track(config(uri), place / "0")
    write(place, **ENDED)
    before = deliver(place, uri).info.run_id
    other = [{"trial": 0, "value": 0.25, "best": 0.25, "elapsed_seconds": 1.5}]
    write(place, history=other, sweep={"metric": "eval/test/exact_match", "direction": "maximize"})
    exhaust(exporter_of(uri, place).deliver())
    client = MlflowClient(uri)
    runs = client.search_runs(["1"], filter_string="tags.`towline.sweep` = 'rates' and attributes.run_name = 'rates'")
    (now,) = (run for run in runs if run.info.run_id != before)
    assert now.data.params["sweep.metric"] == "eval/test/exact_match"
    assert [point.value for point in client.get_metric_history(now.info.run_id, "value")] == [0.25]
    assert [point.value for point in client.get_metric_history(before, "value")] == [0.5, 0.7]
    under = f"tags.`mlflow.parentRunId` = '{now.info.run_id}'"
    assert len(client.search_runs(["1"], filter_string=under)) == 1


def test_an_answer_that_was_lost_makes_no_second_point(place: Path, uri: str) -> None:
    exporter = exporter_of(uri, place)
    count_calls(exporter, {"log_batch": 3})
    for _ in range(3):  # params, history, counts
        with pytest.raises(ConnectionError):
            exhaust(exporter.deliver())
    exhaust(exporter.deliver())
    assert [len(points(uri, name)) for name in ("value", "best", "trials_failed")] == [2, 2, 1]


def test_a_sweep_that_goes_on_is_running_again_and_ends_again(place: Path, uri: str) -> None:
    client = MlflowClient(uri)
    for second, (state, status) in enumerate(
        [("PREEMPTED", "KILLED"), ("RUNNING", "RUNNING"), ("FAILED", "FAILED"), ("FINISHED", "FINISHED")]
    ):
        write(place, second, state=state)
        run = deliver(place, uri)
        assert run.info.status == status
        logged = json.loads(Path(client.download_artifacts(run.info.run_id, "sweep.json")).read_text())
        assert logged["state"] == ("PREEMPTED" if state == "RUNNING" else state)


def test_the_end_brings_the_leaderboard(place: Path, uri: str) -> None:
    rows = [{"label": "lr=1e-3", "mean": 0.5, "trials": [0, 1]}, {"label": "lr=1e-2", "mean": None, "trials": []}]
    (place / "leaderboard.json").write_text(json.dumps({"metric": "loss", "rows": rows}))
    (place / "plots").mkdir()
    (place / "plots" / "history.png").write_bytes(b"picture")
    assert not MlflowClient(uri).list_artifacts(deliver(place, uri).info.run_id)
    write(place, **ENDED)
    run = deliver(place, uri)
    client = MlflowClient(uri)
    found = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert found == {"sweep.json", "leaderboard.json", "leaderboard_table.json", "plots"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/history.png"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "leaderboard_table.json")).read_text())
    assert table["columns"] == ["label", "mean", "trials"]
    assert table["data"] == [["lr=1e-3", 0.5, "[0, 1]"], ["lr=1e-2", None, "[]"]]
    shown = [{"path": "leaderboard_table.json", "type": "table"}]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == shown


def test_trials_are_nested_and_say_what_became_of_them(place: Path, uri: str) -> None:
    track(config(uri), place / "0")
    stopped(config(uri), place / "1", steps=1)
    track(NoTrackingConfig("none"), place / "2")
    deliver(place, uri)
    children = nested(uri)
    assert {number: child.data.tags["towline.state"] for number, child in children.items()} == {
        "0": "FINISHED",
        "1": "PREEMPTED",
    }
    tags = {"towline.sweep": "rates", "towline.identity": "identity1", "towline.setting": "same"}
    assert tags.items() <= children["1"].data.tags.items()
    (place / "1" / "status.json").write_text(json.dumps(read_status(place / "1") | {"state": "FAILED"}))
    exporter = exporter_of(uri, place)
    calls = count_calls(exporter, {})
    for _ in range(2):
        exhaust(exporter.deliver())
    assert calls == ["log_batch"]  # the one that has changed
    assert nested(uri)["1"].data.tags["towline.state"] == "FAILED"


def test_a_run_in_the_folder_of_another_trial_is_not_tagged_as_that_trial(place: Path, uri: str) -> None:
    track(config(uri), place / "0")
    with tracked(config(uri), place / "1", frozen=FROZEN | {"seed": 5}) as tracking:
        do_step(tracking, 1, 1.0)
    with pytest.raises(DamagedFileError, match=r"1 is not the folder of trial 1: config\.yaml"):
        deliver(place, uri)
    assert list(nested(uri)) == ["0"]


def test_a_trial_whose_run_was_deleted_does_not_stop_the_others(place: Path, uri: str) -> None:
    for number in "01":
        track(config(uri), place / number)
    MlflowClient(uri).delete_run(read_status(place / "0")["tracker_run_id"])
    write(place, **ENDED)
    exporter = exporter_of(uri, place)
    with pytest.raises(Exception, match="deleted"):
        exhaust(exporter.deliver())
    assert list(nested(uri)) == ["1"]
    assert run_of(uri).info.status == "FINISHED"


def test_a_store_that_is_gone_costs_a_warning_and_everything_is_caught_up_with(
    place: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = config(closed_port())
    track(gone, place / "0")
    write(place, **ENDED)
    capsys.readouterr()
    started = time.monotonic()
    with open_sweep_tracking(gone, place, Console(io.StringIO())) as tracker:
        tracker.connect()
    assert time.monotonic() - started < 6  # two seconds, and what a busy machine adds
    warning = capsys.readouterr().err
    assert "values of 2 trials, or what became of the sweep or a trial, are not delivered" in warning
    assert f"Everything is in {place}; to deliver it later" in warning
    assert "same command" in warning
    for _ in range(2):
        with open_sweep_tracking(config(uri), place, Console(io.StringIO())) as tracker:
            tracker.connect()
            assert (place / "tracking.json").exists()
    assert capsys.readouterr().err == ""
    assert run_of(uri).info.status == "FINISHED"
    assert len(points(uri, "best")) == 2
    (child,) = nested(uri).values()  # what its own process could not deliver
    assert (child.info.status, child.data.tags["towline.state"]) == ("FINISHED", "FINISHED")
    assert len(MlflowClient(uri).get_metric_history(child.info.run_id, "train/loss")) == 3


def test_a_trial_that_a_process_is_at_is_left_to_it(place: Path, uri: str) -> None:
    track(config(closed_port()), place / "0")
    write(place, **ENDED)
    with hold(place / "0"), pytest.raises(Exception, match="in use by another process"):
        deliver(place, uri)
    assert run_of(uri).info.status == "FINISHED"
    deliver(place, uri)
    assert list(nested(uri)) == ["0"]


def test_a_store_that_never_answers_does_not_hold_the_sweep(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tracking.tracker.END_OF_RUN", WaitLimits(call_seconds=1.0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = config(f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        with open_sweep_tracking(silent, place, Console(io.StringIO())) as tracker:
            tracker.connect()
            for _ in range(100):
                tracker.notify()
        assert time.monotonic() - started < 20  # a minute is the call's own limit
    assert "not delivered (no answer)" in capsys.readouterr().err


def test_without_a_tracker_nothing_is_done(place: Path) -> None:
    before = sorted(place.iterdir())
    with open_sweep_tracking(NoTrackingConfig("none"), place, Console()) as tracker:
        tracker.connect()
        tracker.notify()
    assert sorted(place.iterdir()) == before


def test_a_run_that_ended_early_is_killed_in_mlflow(tmp_path: Path, uri: str) -> None:
    with pytest.raises(Pruned), tracked(config(uri), tmp_path / "run") as tracking:
        do_step(tracking, 1, 1.0)
        raise Pruned("others look better")
    assert read_status(tmp_path / "run")["state"] == "PRUNED"
    run = run_of(uri, "run")
    assert run.info.status == "KILLED"
    assert "config.yaml" in {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}


def test_trials_that_start_together_on_a_fresh_store_are_nested(
    swept_and_drawn: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert swept_and_drawn("tracking=mlflow", f"tracking.uri={uri}", "seed=1,2,3", "sweep.n_jobs=3") == 0
    assert states(folder) == ["FINISHED"] * 3
    client = MlflowClient(uri)
    parent = run_of(uri, "sweep")
    children = client.search_runs(["1"], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.data.tags["towline.trial"] for child in children} == {"0", "1", "2"}
    assert {child.data.tags["towline.state"] for child in children} == {"FINISHED"}
    assert {child.data.tags["towline.identity"] for child in children} == {
        t.identity for t in planned("seed=1,2,3").trials
    }
    assert len({child.data.tags["towline.setting"] for child in children}) == 1
    assert parent.info.status == "FINISHED"
    values = [child.data.metrics["eval/validation/loss"] for child in children]
    assert parent.data.metrics["best"] == pytest.approx(min(values))
    artifacts = {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.json", "leaderboard.csv", "leaderboard.md", "plots", "leaderboard_table.json"} <= artifacts


@pytest.mark.parametrize("rows", [3, [3], {"a": 1}, "x"])
def test_a_leaderboard_of_another_shape_is_told_and_holds_up_nothing_else(place: Path, uri: str, rows: Any) -> None:
    write(place, **ENDED)
    (place / "leaderboard.json").write_text(json.dumps({"rows": rows}))
    (place / "leaderboard.md").write_text("best")
    with pytest.raises(DamagedFileError, match=r"leaderboard\.json is damaged: rows"):
        exhaust(exporter_of(uri, place, is_over=True).deliver())
    assert run_of(uri).info.status == "FINISHED"
    assert points(uri, "value") == [(1, 0.5, 1500), (2, 0.7, 2500)]
    assert {"leaderboard.md", "sweep.json"} <= {
        file.path for file in MlflowClient(uri).list_artifacts(run_of(uri).info.run_id)
    }
    (place / "leaderboard.json").unlink()
    exhaust(exporter_of(uri, place, is_over=True).deliver())


@pytest.mark.parametrize("tracking", ["3", "{type: 3}", "{type: mlflow, tags: 3}", "{type: mlflow, run_name: [a]}"])
def test_a_trial_with_a_damaged_configuration_is_told_and_the_others_are_brought(
    place: Path, uri: str, tracking: str
) -> None:
    write(place, **ENDED)
    for number in (0, 1):
        track(NoTrackingConfig("none"), place / str(number))
        (place / str(number) / "config.yaml").write_text("seed: 1\ntracking: {type: mlflow, run_name: trial}\n")
    (place / "0" / "config.yaml").write_text(f"seed: 1\ntracking: {tracking}\n")
    with pytest.raises(DamagedFileError, match=r"0/config\.yaml is damaged: tracking"):
        exhaust(exporter_of(uri, place, is_over=True).deliver())
    assert run_of(uri, "trial").info.status == "FINISHED"


@pytest.mark.parametrize("key", ["started", "updated"])
@pytest.mark.parametrize("value", ["x", "0001-01-01T00:00:00"])
def test_a_sweep_with_a_time_that_is_none_is_told(place: Path, uri: str, key: str, value: str) -> None:
    write(place, **{key: value})
    with pytest.raises(DamagedFileError, match=rf"sweep\.json is damaged: {key} can't be"):
        exhaust(exporter_of(uri, place, is_over=True).deliver())


def test_the_tracker_of_a_sweep_is_found_behind_lines_that_have_none(place: Path) -> None:
    lines = [{"number": 0, "config": 3}, {"number": 1, "config": {"tracking": [1]}}]
    write_lines(place / "trials.jsonl", [*lines, {"number": 2, "config": {"tracking": {"type": "mlflow"}}}])
    assert sweep_tracking(place) == {"type": "mlflow"}


@pytest.mark.parametrize("has_other", [True, False], ids=["another store", "none"])
def test_a_sweep_that_goes_on_elsewhere_does_not_stay_running_where_it_was(
    place: Path, uri: str, tmp_path: Path, empty_store: Path, has_other: bool
) -> None:
    other = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
    exhaust(exporter_of(uri, place).deliver())
    assert run_of(uri).info.status == "RUNNING"
    tracker = config(other) if has_other else NoTrackingConfig("none")
    with open_sweep_tracking(tracker, place, Console(io.StringIO())):
        write(place, second=9, **ENDED)
    assert run_of(uri).info.status == "KILLED"
    if has_other:
        assert run_of(other).info.status == "FINISHED"
    exhaust(exporter_of(uri, place, is_over=True).deliver())
    assert run_of(uri).info.status == "FINISHED"


def test_a_sweep_that_is_judged_anew_leaves_no_run_that_runs(place: Path, uri: str) -> None:
    exhaust(exporter_of(uri, place).deliver())
    write(place, second=9, sweep={"metric": "eval/validation/exact_match"}, **ENDED)
    exhaust(exporter_of(uri, place, is_over=True).deliver())
    found = MlflowClient(uri).search_runs(["1"], filter_string="attributes.run_name = 'rates'")
    assert sorted(run.info.status for run in found) == ["FINISHED", "KILLED"]
