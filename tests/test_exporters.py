"""Exporters of one's own, and how several share a thread: a slow or failing one holds up no other."""

from __future__ import annotations

import csv
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src import sync
from src.config.frozen import config_hash, read_status
from src.config.gate import parse_stored
from src.config.schema.tracking import TrackingConfig, WandbConfig
from src.errors import ConfigError, DamagedFileError, Interrupted
from src.records import file_digest
from src.tracking import export_thread, outage
from src.tracking.console import Console
from src.tracking.export_thread import ExportThread, WaitLimits
from src.tracking.exporters import EXPORTERS, DeliveryError
from src.tracking.late_metrics import add_to_summary
from src.tracking.line_exporter import LineExporter
from src.tracking.outage import OutageWatch
from src.tracking.run_folder import Start
from src.tracking.tracker import deliver_pending
from src.util import write_json
from tests.conftest import admitted, read_lines, write_config, write_lines
from tests.test_tracking import do_step, stopped, track, tracked

BRIEF = WaitLimits(call_seconds=0.5, total_seconds=20.0)


@dataclass
class CsvConfig(TrackingConfig):
    file: str = "metrics.csv"


class CsvExporter(LineExporter):
    """A row a value: step, name, value."""

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with open(self.folder / self.config.file, "a", newline="") as file:
            for line in lines:
                csv.writer(file).writerows((line["step"], name, line[name]) for name in line if name != "step")

    def rewind_to(self, step: int) -> None:
        kept = [row for row in self.rows() if int(row[0]) <= step]
        with open(self.folder / self.config.file, "w", newline="") as file:
            csv.writer(file).writerows(kept)

    def close(self, state: str) -> None:
        (self.folder / "ended").write_text(state)

    def rows(self) -> list[list[str]]:
        file = self.folder / self.config.file
        return list(csv.reader(file.read_text().splitlines())) if file.exists() else []


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> CsvConfig:
    monkeypatch.setitem(EXPORTERS, "csv", CsvExporter)
    return CsvConfig("csv")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_thread, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(export_thread, "TURN_SECONDS", 0.05)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = csv.reader((run / "metrics.csv").read_text().splitlines())
    return [(int(step), float(value)) for step, name, value in rows if name == "train/loss"]


def test_a_tracker_of_ones_own_gets_every_line_once_and_how_the_run_ended(tmp_path: Path, config: CsvConfig) -> None:
    track(config, tmp_path / "run")
    assert losses(tmp_path / "run") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert (tmp_path / "run" / "ended").read_text() == "FINISHED"
    known = json.loads((tmp_path / "run" / "tracking-csv.json").read_text())
    assert (known["lines"], known["ended"]) == (3, "FINISHED")
    assert read_status(tmp_path / "run")["tracker_run_id"] is None


def test_a_run_that_is_resumed_has_each_step_once(tmp_path: Path, config: CsvConfig) -> None:
    run = tmp_path / "run"
    stopped(config, run, steps=5)
    assert (run / "ended").read_text() == "PREEMPTED"
    with tracked(config, run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        do_step(tracking, 4, 0.7)
        tracking.finish({"steps": 4})
    assert losses(run) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.7)]
    assert (run / "ended").read_text() == "FINISHED"
    with tracked(config, run, Start(force=True)) as tracking:
        assert json.loads((run / "tracking-csv.json").read_text())["lines"] == 0
        do_step(tracking, 1, 0.9)
    assert losses(run) == [(1, 0.9)]


@pytest.mark.parametrize("state", ["{", '{"lines": "3"}', '{"lines": 1}', '{"lines": 9}', None])
def test_what_an_exporter_remembers_may_be_wrong(tmp_path: Path, config: CsvConfig, state: str | None) -> None:
    run = tmp_path / "run"
    track(config, run)
    if state is None:
        (run / "tracking-csv.json").unlink()
        (run / "tracking.json").write_text("{}")  # so that it is known to have had a tracker
    else:
        (run / "tracking-csv.json").write_text(state)
    deliver_pending(config, run, Console())
    assert losses(run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_an_exporter_that_fails_costs_a_warning_and_is_delivered_later(
    tmp_path: Path, config: CsvConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("no such column")

    with monkeypatch.context() as patched:
        patched.setattr(CsvExporter, "write", fail)
        track(config, tmp_path / "run")
    warning = capsys.readouterr().err
    assert "3 lines of metrics are not delivered (no such column)" in warning
    assert "hydra.run.dir" in warning
    assert "make sync" not in warning
    assert read_status(tmp_path / "run")["state"] == "FINISHED"
    deliver_pending(config, tmp_path / "run", Console())
    assert losses(tmp_path / "run") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is stopped after 300 steps."""
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "train/loss": 1.0} for step in range(1, 301)])
    (tmp_path / "status.json").write_text(json.dumps({"state": "FINISHED", "step": 300}))
    return tmp_path


class Fake(LineExporter):
    """Calls `on_write` and lists the steps that it is handed."""

    def __init__(self, folder: Path, name: str, on_write: Callable[[], Any] = lambda: None) -> None:
        super().__init__(None, folder, name=name, warn=print)
        self.on_write = on_write
        self.steps: list[int] = []
        self.ended = ""

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.on_write()
        self.steps += [line["step"] for line in lines]

    def close(self, state: str) -> None:
        self.ended = state


def test_what_is_measured_later_is_in_the_summary_and_is_delivered_once(run: Path) -> None:
    summary = {"eval/test/loss": 1.5}
    write_json(run / "summary.json", summary)
    write_json(run / "status.json", {"state": "FINISHED", "step": 300, "summary": file_digest(run / "summary.json")})
    late = {"benchmark/a/acc": 0.5, "benchmark/a/num_samples": 7}
    add_to_summary(run, late)
    assert json.loads((run / "summary.json").read_text()) == summary | late
    assert read_status(run)["summary"] == file_digest(run / "summary.json")
    for _ in range(2):
        first = Fake(run, "first")
        assert ExportThread([first], warn=print).close(BRIEF) == []
    assert first.steps == []
    second = Fake(run, "second")
    assert ExportThread([second], warn=print).close(BRIEF) == []
    assert second.steps == [*range(1, 301), 300]


class Died(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("num_writes", range(3))
def test_a_summary_is_good_wherever_its_replacement_ends_and_a_foreign_one_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    write_json(run / "summary.json", before := {"eval/test/loss": 1.5})
    write_json(run / "status.json", {"state": "FINISHED", "step": 300, "summary": file_digest(run / "summary.json")})
    replace, left = os.replace, iter(range(num_writes))

    def replace_and_die(*files: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise Died
        replace(*files, **options)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(os, "replace", replace_and_die)
        add_to_summary(run, {"benchmark/a/acc": 0.5})
    is_written = num_writes == 2
    assert json.loads((run / "summary.json").read_text()) == before | ({"benchmark/a/acc": 0.5} if is_written else {})
    assert read_status(run)["summary"] in (None, file_digest(run / "summary.json"))
    add_to_summary(run, {"benchmark/b/acc": 0.25})
    assert json.loads((run / "summary.json").read_text())["benchmark/b/acc"] == 0.25
    assert read_status(run)["summary"] == file_digest(run / "summary.json")
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("1.5", "2.5"))
    with pytest.raises(DamagedFileError, match="checksum"):
        add_to_summary(run, {"benchmark/a/acc": 0.5})


@pytest.fixture
def hanging() -> Iterator[Callable[[], Any]]:
    """A call that does not return as long as the test runs."""
    over = threading.Event()
    yield over.wait
    over.set()


def test_an_exporter_that_hangs_is_given_up_and_the_others_are_delivered(run: Path, hanging: Callable[[], Any]) -> None:
    first, second, third = Fake(run, "first"), Fake(run, "second", hanging), Fake(run, "third")
    exports = ExportThread([second, first, third], warn=print)
    (left,) = exports.close(BRIEF)
    assert str(left).startswith(f"second at {run}: 300 lines of metrics are not delivered (no answer)")
    assert first.steps == third.steps == list(range(1, 301))
    assert (first.ended, second.ended, third.ended) == ("FINISHED", "", "FINISHED")


def test_others_are_delivered_while_one_hangs_which_is_given_up_at_the_end(
    run: Path, hanging: Callable[[], Any]
) -> None:
    slow, quick = Fake(run, "slow", hanging), Fake(run, "quick")
    exports = ExportThread([slow, quick], warn=print)
    for _ in range(1000):
        exports.notify()
        if quick.ended:
            break
        time.sleep(0.01)
    assert (quick.steps, quick.ended) == (list(range(1, 301)), "FINISHED")
    (left,) = exports.close(BRIEF)
    assert "no answer" in left.reason


def test_a_call_that_lasts_longer_than_a_turn_is_delivered_once(run: Path) -> None:
    slow, quick = Fake(run, "slow", lambda: time.sleep(0.3)), Fake(run, "quick")
    exports = ExportThread([slow, quick], warn=print)
    for _ in range(40):
        exports.notify()
        time.sleep(0.01)
    assert exports.close(WaitLimits(call_seconds=20.0)) == []
    assert slow.steps == quick.steps == list(range(1, 301))
    assert threading.active_count() < 10


def test_a_slow_exporter_holds_up_another_for_no_longer_than_its_turn(run: Path) -> None:
    order: list[str] = []

    def note(name: str, seconds: float) -> Callable[[], Any]:
        return lambda: (order.append(name), time.sleep(seconds))

    slow, quick = Fake(run, "slow", note("slow", 0.2)), Fake(run, "quick", note("quick", 0.0))
    exports = ExportThread([slow, quick], warn=print)
    assert exports.close(BRIEF) == []
    assert slow.steps == quick.steps == list(range(1, 301))
    assert order.index("quick") == 1, order


def test_an_exporter_that_fails_is_tried_again_and_holds_up_no_other(run: Path) -> None:
    failures = iter([DeliveryError("busy", is_lasting=False), DeliveryError("busy", is_lasting=False)])

    def fail() -> None:
        for error in failures:
            raise error

    def refuse() -> None:
        raise DeliveryError("no such key")

    flaky, other = Fake(run, "flaky", fail), Fake(run, "other")
    broken = Fake(run, "broken", refuse)
    warned: list[str] = []
    exports = ExportThread([broken, flaky, other], warn=warned.append)
    exports.notify()
    left = exports.close(WaitLimits(call_seconds=5.0, attempts=4))
    assert [(one.tracker.partition(" ")[0], one.needs_user_action) for one in left] == [("broken", True)]
    assert flaky.steps == other.steps == list(range(1, 301))
    assert set(warned) <= {"broken: no such key"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as an outage sees it: `now`, which the test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_an_outage_is_said_once_and_so_is_its_end_even_if_the_tracker_comes_and_goes(
    run: Path, clock: SimpleNamespace
) -> None:
    watch = OutageWatch(Fake(run, "own"))

    def at(now: float, event: Callable[[], None], problem: str = "") -> tuple[str, str]:
        clock.now = 1000.0 + now
        event()
        return watch.warning(problem), watch.good_news()

    assert at(0, watch.expect) == at(0, watch.note_failure, "refused") == ("", "")
    assert at(29.9, watch.note_failure, "refused") == ("", "")
    said, news = at(30, watch.note_failure, "refused")
    assert (said.startswith(f"own at {run} has taken nothing for 30 seconds (refused)."), news) == (True, "")
    assert at(100, watch.note_failure, "refused") == at(101, watch.note_success) == ("", "")
    assert at(102, watch.expect) == at(150, watch.note_failure, "refused") == ("", "")  # gone again
    assert at(160, watch.note_success) == at(219.9, watch.expect) == ("", "")
    assert at(220, watch.note_success) == ("", f"own at {run} works again: what was missing is delivered")
    assert at(221, watch.expect) == at(300, watch.note_success) == ("", "")
    assert at(301, watch.expect) == at(330.9, watch.note_failure, "refused") == ("", "")
    assert "for 30 seconds (refused)" in at(331, watch.note_failure, "refused")[0]  # a new outage
    assert at(332, watch.note_success) == ("", "")
    assert "works again" in watch.good_news(is_last=True)


def test_a_call_that_hangs_is_an_outage_and_a_slow_tracker_or_work_of_its_own_is_none(
    run: Path, clock: SimpleNamespace
) -> None:
    fake = Fake(run, "own")
    watch, activity = OutageWatch(fake), fake.activity
    activity.since, activity.is_calling = 1010.0, True
    watch.expect()
    for activity.extra_seconds, last in ((0.0, 1040.0), (100.0, 1140.0)):  # those that a large file may take
        clock.now = last - 0.1
        assert watch.warning("") == ""
    activity.is_calling = False
    clock.now = 2000.0
    assert watch.warning("") == ""
    for number in range(20):  # each delivery brings something before it fails
        clock.now += 25.0
        activity.note_delivered(number)
        assert watch.warning("no answer in time") == ""
    activity.since, activity.is_calling, activity.extra_seconds = clock.now, True, 0.0
    clock.now += 30.0
    assert "has taken nothing for 30 seconds (no answer)." in watch.warning("")
    assert watch.warning("") == ""


@pytest.mark.parametrize("kind", ["hangs", "fails"])
def test_an_outage_that_ends_before_the_run_does_is_said_with_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0.05)
    is_well = threading.Event()

    def be_out() -> None:
        if kind == "hangs":
            is_well.wait()
        elif not is_well.is_set():
            raise DeliveryError("refused", is_lasting=False)

    fake, warned, said = Fake(run, "own", be_out), list[str](), list[str]()
    exports = ExportThread([fake], warn=warned.append, say=said.append)
    for _ in range(1000):
        exports.notify()
        if warned:
            break
        time.sleep(0.01)
    for _ in range(20):
        exports.notify()
    is_well.set()
    assert exports.close(BRIEF) == []
    assert fake.steps == list(range(1, 301))
    assert [text.partition(")")[0].partition("(")[2] for text in warned] == [
        {"hangs": "no answer", "fails": "refused"}[kind]
    ]
    assert said == [f"own at {run} works again: what was missing is delivered"]


def test_lines_that_were_written_and_not_remembered_are_written_again_after_a_rewind(run: Path) -> None:
    done: list[int] = []

    class Dying(Fake):
        def _save_state(self, **changes: Any) -> None:
            if changes.get("lines") == 200:
                raise Interrupted("killed")
            super()._save_state(**changes)

        def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
            done.extend(line["step"] for line in lines)

        def rewind_to(self, step: int) -> None:
            done[:] = [one for one in done if one <= step]

    with pytest.raises(Interrupted):
        list(Dying(run, "own").deliver())
    assert len(done) == 200

    class Well(Dying):
        _save_state = Fake._save_state

    list(Well(run, "own").deliver())
    assert done == list(range(1, 301))
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 300


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["tracking=mlflow", "tracking.also=[tensorbord]"], "did you mean tensorboard?"),
        (["tracking=mlflow", "tracking.also=[mlflow]"], "names mlflow, which is no further tracker"),
        (["tracking=mlflow", "tracking.also=[none]"], "names none"),
        (["tracking=tensorboard", "tracking.also=[mlflow]"], "choose tracking=mlflow tracking.also=[tensorboard]"),
        (["tracking=wandb", "tracking.mode=of"], "not online, offline or null"),
    ],
)
def test_further_trackers_are_checked_before_anything_starts(given: list[str], word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        admitted(*given)
    assert word in str(refused.value)


def test_further_trackers_share_the_keys_of_the_one_that_is_chosen() -> None:
    job = admitted("tracking=mlflow", "tracking.also=[wandb,tensorboard]", "tracking.run_name=mine")
    chosen, wandb, board = job.config.tracking.trackers()
    assert [one.type for one in (chosen, wandb, board)] == ["mlflow", "wandb", "tensorboard"]
    assert isinstance(wandb, WandbConfig)
    assert (wandb.run_name, wandb.experiment_name, wandb.mode) == ("mine", "towline", None)
    plain = admitted("tracking=mlflow", "tracking.run_name=mine")
    assert config_hash(job.frozen) == config_hash(plain.frozen)
    del plain.frozen["tracking"]["also"]  # as an earlier version froze it
    assert parse_stored(plain.frozen).tracking == plain.config.tracking


def test_sync_delivers_to_all_trackers_and_the_trials_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = admitted("tracking=tensorboard")
    for number in (0, 1):
        track(job.config.tracking, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number) / "tensorboard")
        write_config(tmp_path / str(number), job.frozen)
    (tmp_path / "sweep.json").write_text("{}")
    write_lines(tmp_path / "trials.jsonl", [{"trial": 0, "config": job.frozen}])
    assert sync.main([f"run={tmp_path}"]) == 0, capsys.readouterr()
    assert capsys.readouterr().out.count("3 lines of metrics") == 2
    assert len(list(tmp_path.glob("?/tensorboard/*"))) == 2


def test_the_first_delivery_waits_for_the_first_line(run: Path) -> None:
    fake = Fake(run, "fake")
    exports = ExportThread([fake], pause_seconds=3600.0, warn=print)
    exports.notify()
    time.sleep(0.2)
    assert fake.steps == []
    exports.rewind(0, [])
    time.sleep(0.2)
    assert fake.steps == []
    exports.release()
    exports.notify()
    ends = time.monotonic() + 60
    while len(fake.steps) < 300 and time.monotonic() < ends:
        time.sleep(0.01)
    assert exports.close(BRIEF) == []
    assert fake.steps == list(range(1, 301))


def test_a_run_that_ends_before_it_begins_is_delivered(run: Path) -> None:
    fake = Fake(run, "fake")
    assert ExportThread([fake], pause_seconds=3600.0, warn=print).close(BRIEF) == []
    assert fake.steps == list(range(1, 301))
