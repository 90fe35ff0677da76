"""Weights & Biases offline: its files hold each step of metrics.jsonl once, also after stops, kills and full disks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.config.schema.tracking import WandbConfig
from src.tracking import export_thread, tracker, wandb_exporter
from src.tracking.console import Console
from src.tracking.export_thread import WaitLimits
from src.tracking.run_folder import Start
from src.tracking.tracker import deliver_pending
from src.tracking.wandb_exporter import _records
from tests.conftest import read_lines
from tests.test_tracking import closed_port, do_step, stopped, track, tracked

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
HOSTILE = "<script>alert(1)</script>\x00\u202e'\"🤖" + "x" * 3000
OFFLINE = WandbConfig("wandb", "a/b", HOSTILE, {HOSTILE: HOSTILE}, "offline")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_thread, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(tracker, "END_OF_RUN", WaitLimits(call_seconds=60.0))


@pytest.fixture(scope="module", autouse=True)
def _over() -> Iterator[None]:
    """End wandb's own process."""
    yield
    wandb.teardown()


def records_in(run: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return [Record.FromString(raw) for raw in _records(file.read_bytes())]


def logged_offline(run: Path) -> list[dict[str, float]]:
    """Return the lines that the files hold, without wandb's own metrics."""
    items = [one.history.item for one in records_in(run) if one.WhichOneof("record_type") == "history"]
    lines = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in line}
        for line in items
    ]
    own = {"_timestamp", "_runtime"}
    return [{"step" if name == "_step" else name: line[name] for name in line if name not in own} for line in lines]


def same(run: Path) -> bool:
    return logged_offline(run) == read_lines(run / "metrics.jsonl")


def test_the_files_hold_the_metrics_under_harmless_names(tmp_path: Path) -> None:
    track(OFFLINE, tmp_path)
    assert same(tmp_path)
    (begun,) = (one.run for one in records_in(tmp_path) if one.WhichOneof("record_type") == "run")
    assert begun.project == "a-b"
    assert begun.display_name.startswith("<script>alert(1)</script>\\x00\\u202e'\"🤖")
    assert len(begun.display_name) <= 128
    assert all(len(tag) <= 64 for tag in begun.tags)
    assert json.loads((tmp_path / "status.json").read_text())["tracker_run_id"] == begun.run_id
    (ended,) = (one.exit for one in records_in(tmp_path) if one.WhichOneof("record_type") == "exit")
    assert ended.exit_code == 0


@pytest.mark.parametrize("died_before_it_was_remembered", [False, True])
def test_a_run_that_is_resumed_is_the_same_run_and_has_each_step_once(
    tmp_path: Path, died_before_it_was_remembered: bool
) -> None:
    stopped(OFFLINE, tmp_path, steps=5)
    before = json.loads((tmp_path / "tracking-wandb.json").read_text())
    if died_before_it_was_remembered:
        (tmp_path / "tracking-wandb.json").write_text(json.dumps(before | {"lines": 3, "ended": None}))
    with tracked(OFFLINE, tmp_path, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        do_step(tracking, 4, 0.7)
        tracking.finish({"steps": 4})
    assert same(tmp_path)
    assert json.loads((tmp_path / "tracking-wandb.json").read_text())["run_id"] == before["run_id"]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    deliver_pending(OFFLINE, tmp_path, Console())
    assert list(tmp_path.glob("wandb/offline-run-*")) == [folder]


def test_a_full_disk_costs_a_warning_and_is_delivered_later(
    tmp_path: Path, small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with tracked(OFFLINE, run) as tracking:
        (run / "wandb").symlink_to(small_disk("size=64k"))
        for step in range(1, 400):
            do_step(tracking, step, 1 / step)
        tracking.finish({"steps": 60})
    warning = capsys.readouterr().err
    assert "not delivered" in warning
    assert f"make sync run={run}" in warning
    small_disk("size=8m")
    deliver_pending(OFFLINE, run, Console())
    assert same(run)


def test_a_server_that_refuses_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", closed_port())
    monkeypatch.setattr(wandb_exporter, "SECONDS", 1)
    wandb.teardown()  # what it knows of the environment
    track(WandbConfig("wandb", "towline", "run", {}, "online"), tmp_path)
    assert capsys.readouterr().err.count("connection refused") == 1
    deliver_pending(OFFLINE, tmp_path, Console())
    assert same(tmp_path)
