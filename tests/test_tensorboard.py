"""TensorBoard's event files: they hold metrics.jsonl in 32 bits, each step once, also after stops and full disks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy import float32
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util.tensor_util import make_ndarray

from src.config.schema.tracking import TensorBoardConfig
from src.tracking import export_thread, tracker
from src.tracking.console import Console
from src.tracking.export_thread import WaitLimits
from src.tracking.late_metrics import add_to_summary
from src.tracking.run_folder import Start
from src.tracking.tracker import deliver_pending
from tests.conftest import read_lines
from tests.test_tracking import do_step, stopped, track, tracked

CONFIG = TensorBoardConfig("tensorboard")
HOSTILE = "<script>alert(1)</script> ```\n</code> \"'` \x00 \u202eabc 🤖 [a](javascript:alert(1)) " + "x" * 3000


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_thread, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(tracker, "END_OF_RUN", WaitLimits(call_seconds=60.0))


def events_in(run: Path) -> list[Any]:
    (file,) = (run / "tensorboard").glob("*tfevents*")
    return list(EventFileLoader(str(file)).Load())


def scalars_in(run: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, make_ndarray(value.tensor).item())
        for event in events_in(run)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    ]


def logged(run: Path) -> list[tuple[int, str, float]]:
    lines = read_lines(run / "metrics.jsonl")
    return [(line["step"], name, float32(line[name]).item()) for line in lines for name in line if name != "step"]


def test_what_is_read_back_equals_the_metrics(tmp_path: Path) -> None:
    track(CONFIG, tmp_path)
    assert scalars_in(tmp_path) == logged(tmp_path)
    assert {"train/loss", "eval/validation/exact_match"} <= {name for _, name, _ in scalars_in(tmp_path)}
    began = events_in(tmp_path)[0].wall_time
    assert all(0 <= event.wall_time - began < 60 for event in events_in(tmp_path))


@pytest.mark.parametrize("died_before_it_was_remembered", [False, True])
def test_a_run_that_is_resumed_has_each_step_once(tmp_path: Path, died_before_it_was_remembered: bool) -> None:
    stopped(CONFIG, tmp_path, steps=5)
    if died_before_it_was_remembered:
        (tmp_path / "tracking-tensorboard.json").write_text('{"lines": 3}')
    with tracked(CONFIG, tmp_path, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        do_step(tracking, 4, 0.7)
        tracking.finish({"steps": 4})
    assert scalars_in(tmp_path) == logged(tmp_path)
    assert [step for step, name, _ in scalars_in(tmp_path) if name == "train/loss"] == [1, 2, 3, 4]
    with tracked(CONFIG, tmp_path, Start(force=True)) as tracking:
        do_step(tracking, 1, 0.9)
    assert scalars_in(tmp_path) == logged(tmp_path)


def test_files_that_are_whole_stay_and_others_are_written_again(tmp_path: Path) -> None:
    track(CONFIG, tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    deliver_pending(CONFIG, tmp_path, Console())
    assert list((tmp_path / "tensorboard").iterdir()) == [file]
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 5)
    deliver_pending(CONFIG, tmp_path, Console())
    assert scalars_in(tmp_path) == logged(tmp_path)
    next((tmp_path / "tensorboard").iterdir()).unlink()
    (tmp_path / "tracking-tensorboard.json").write_text('{"lines": 3, "file": 7, "bytes": "?"}')
    deliver_pending(CONFIG, tmp_path, Console())
    assert scalars_in(tmp_path) == logged(tmp_path)


def test_a_file_that_is_removed_meanwhile_is_written_again(tmp_path: Path) -> None:
    with tracked(CONFIG, tmp_path) as tracking:
        do_step(tracking, 1, 0.5)
        while json.loads((tmp_path / "tracking-tensorboard.json").read_text())["lines"] < 1:
            time.sleep(0.01)
        (tmp_path / "tensorboard" / "events.out.tfevents.0000000001.towline").unlink()
        do_step(tracking, 2, 0.4)
        tracking.finish({"steps": 2})
    assert scalars_in(tmp_path) == logged(tmp_path)


def test_a_full_disk_costs_a_warning_and_is_delivered_later(
    tmp_path: Path, small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=12k")
    run = tmp_path / "run"
    with tracked(CONFIG, run) as tracking:
        (run / "tensorboard").symlink_to(disk)
        for step in range(1, 61):
            do_step(tracking, step, 1 / step)
        tracking.finish({"steps": 60})
    warning = capsys.readouterr().err
    assert "No space left on device" in warning
    assert f"make sync run={run}" in warning
    assert json.loads((run / "status.json").read_text())["state"] == "FINISHED"
    small_disk("size=1m")
    deliver_pending(CONFIG, run, Console())
    assert scalars_in(run) == logged(run)


def test_hostile_texts_are_shown_as_texts(tmp_path: Path) -> None:
    name = "tokens/<script>alert(1)</script>\u202e/norm"
    with tracked(CONFIG, tmp_path, frozen={"name": HOSTILE}) as tracking:
        do_step(tracking, 1, 0.5, HOSTILE)
        tracking.log(2, {name: 1.5})
        tracking.finish({"steps": 2})
    assert (2, name, 1.5) in scalars_in(tmp_path)
    texts = {
        value.tag: make_ndarray(value.tensor)
        for event in events_in(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    }
    assert texts.keys() == {"config", "samples/1"}
    for text in texts.values():
        page = text_array_to_html(text, True)
        assert "alert(1)" in page
        assert "<script" not in page
        assert "<a" not in page
        assert "\u202e" not in page


def test_what_is_measured_after_the_end_is_there_once(tmp_path: Path) -> None:
    track(CONFIG, tmp_path)
    add_to_summary(tmp_path, {"benchmark/sums/acc": 0.5})
    for _ in range(2):
        deliver_pending(CONFIG, tmp_path, Console())
    late = (3, "benchmark/sums/acc", 0.5)
    assert scalars_in(tmp_path) == [*logged(tmp_path), late]
    next((tmp_path / "tensorboard").iterdir()).unlink()
    deliver_pending(CONFIG, tmp_path, Console())
    assert scalars_in(tmp_path) == [*logged(tmp_path), late]
