"""One face for everything that keeps or shows what a run does: the folder, MLflow and the terminal."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from src.config.frozen import config_hash, read_status
from src.config.quoting import shell_override
from src.config.schema import MlflowConfig, TrackingConfig
from src.metrics import greater_is_better
from src.tracking.console import Console
from src.tracking.folder_start import Start
from src.tracking.former import WAIT_SECONDS, end_all_of
from src.tracking.lock import hold
from src.tracking.mirror import AT_THE_END, TO_THE_END, WHEN_STOPPED
from src.tracking.mlflow_mirror import MlflowMirror, tracked_before
from src.tracking.mlflow_store import TRACKING
from src.tracking.run_folder import RunFolder, open_run_folder

UNSHOWN = ("best/", "tokens/")
"""Metrics that summary.json has and the table at the end of a run leaves out."""


class StepLike(Protocol):
    """What is shown and written of a training step."""

    @property
    def number(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def loss(self) -> float: ...

    @property
    def tokens_per_second(self) -> float: ...

    def collect(self) -> dict[str, float]: ...


@dataclass
class Line:
    """What is measured and sampled after a step."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Sequence[Any] = ()


class Tracker:
    """Built by `open_tracking`. What is logged is in the folder when a method returns; MLflow follows by itself."""

    def __init__(self, folder: RunFolder, console: Console, mirror: MlflowMirror | None) -> None:
        self.console = console
        self._folder = folder
        self._mirror = mirror
        self._started = time.monotonic()
        self._last: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self.cut_line: dict[str, Any] | None = None
        """The line of metrics of the step that is done again, as it was; see `rewind_to`."""

    @property
    def folder(self) -> Path:
        return self._folder.path

    @property
    def tracker_run_id(self) -> str | None:
        """The run's id in MLflow; None where it has none yet."""
        return self._mirror.run_id if self._mirror else None

    def sync(self) -> None:
        """Have all that was logged be on the disk when this returns."""
        self._folder.sync()

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        """Return size and checksum of what was logged of the steps before, by which a damaged journal is noticed."""
        return self._folder.journal_before(step)

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every metric so far."""
        return dict(self._last)

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a whole file, such as provenance.json."""
        self._folder.write_json(name, content)
        self._poke()

    def record_once(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a whole file, unless an earlier start of this run did."""
        if not (self.folder / name).exists():
            self.record(name, content)

    def describe(self, overview: Mapping[str, str]) -> None:
        """Show what was assembled."""
        for label, text in overview.items():
            self.console.label(label, text)
        if self._mirror:
            self.console.label("tracking", f"MLflow, {self._mirror.uri}")
        self.console.say()

    def warn(self, warnings: Sequence[str]) -> None:
        """Show warnings."""
        for warning in warnings:
            self.console.warn(warning)

    def expect(self, num_steps: int, steps_per_epoch: int | None) -> None:
        """Take note of how long the run will be; steps_per_epoch is None where nobody knows."""
        self._folder.num_steps, self._folder.steps_per_epoch = num_steps, steps_per_epoch

    def progress(self, step: StepLike, num_steps: int, logging_steps: int) -> None:
        """Show how far training is."""
        self._folder.step = step.number
        logged = step.number % logging_steps == 0 or step.number == num_steps
        self.console.progress(step.number, num_steps, step.loss, step.lr, step.tokens_per_second, logged=logged)

    def rewind_to(self, step: int, *, is_end: bool) -> list[dict[str, Any]]:
        """Take out of the journal what comes again: all behind a step, and of the step itself what was not over.

        Args:
            is_end: whether it is the run's last step, or was; it is done with only when the run is.
        Returns: the lines of metrics that stay.
        """
        is_over = not is_end and any(line["step"] == step for line in self._folder.lines("metrics.jsonl"))
        last = step if is_over else step - 1
        self._folder.announce_cut(last)
        self._folder.cut("samples.jsonl", last)
        kept, taken = self._folder.cut("metrics.jsonl", last)
        self.cut_line = next((line for line in taken if line["step"] == step), None)
        if self._mirror:
            self._mirror.rewind(len(kept), taken)
        for line in kept:
            self._note({name: value for name, value in line.items() if name != "step" and value is not None})
        self._started -= self._last.get("perf/elapsed_seconds", 0.0)
        self._folder.step = step
        self._folder.set_status()  # before lines come again: what it says of the journals must not be older than they
        return kept

    @contextmanager
    def line(self, step: StepLike, *, due: bool) -> Iterator[Line]:
        """Collect what is measured and sampled after a step; it is written when the block has come to its end.

        Args:
            due: whether there is a line of metrics even if nothing was measured.
        """
        line = Line()
        yield line
        for sample in line.samples:  # before the line of metrics, which says that the step is over
            self._folder.append("samples.jsonl", sample.as_dict())
        if line.metrics or due:
            self.log(step.number, step.collect() | line.metrics)
        self.console.samples(line.samples)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics; called once a step, when the step is over, evaluation included."""
        elapsed = time.monotonic() - self._started
        metrics = {**metrics, "perf/elapsed_seconds": elapsed}
        self._folder.append("metrics.jsonl", {"step": step, **metrics})
        self._folder.step = step
        if evaluated := {name: value for name, value in metrics.items() if name.startswith("eval/")}:
            self.console.evaluation(step, evaluated)
        self._note(metrics)
        self._folder.set_status()
        self._poke()

    def _note(self, metrics: Mapping[str, float]) -> None:
        self._last |= metrics
        for name, value in metrics.items():
            if name.startswith("eval/"):
                better = max if greater_is_better(name) else min
                self._best[f"best/{name}"] = better(self._best.get(f"best/{name}", value), value)

    def finish(
        self,
        totals: Mapping[str, float],
        exported: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Write summary.json: the last value of every metric, the best ones, and the run's totals.

        Args:
            exported: size and checksum of each file of model/, for status.json.
            base: the same of the local model that an adapter in model/ stands on.
        Raises:
            DamagedFileError: where what was logged is not in the folder any more.
        """
        self._folder.check_step_logs()
        summary = self._last | self._best | dict(totals)
        self._folder.write_json("summary.json", summary)
        self._folder.set_status(model=exported, base=base)
        self.console.say()
        self.console.table({name: value for name, value in summary.items() if not name.startswith(UNSHOWN)})
        self.console.say()
        for what, name in (("model", "model"), ("numbers", "summary.json"), ("samples", "samples.jsonl")):
            self.console.label(what, str(self._folder.path / name))
        return summary

    def _poke(self) -> None:
        if self._mirror:
            self._mirror.notify()


class NullTracker(Tracker):
    """The tracker of a process that is not the first: it keeps and shows nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.cut_line = None

    def expect(self, num_steps: int, steps_per_epoch: int | None) -> None:
        pass

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        return {}

    @property
    def latest(self) -> dict[str, float]:
        return {}

    @property
    def tracker_run_id(self) -> str | None:
        return None

    def sync(self) -> None:
        pass

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        pass

    def record_once(self, name: str, content: Mapping[str, Any]) -> None:
        pass

    def describe(self, overview: Mapping[str, str]) -> None:
        pass

    def warn(self, warnings: Sequence[str]) -> None:
        pass

    def progress(self, step: StepLike, num_steps: int, logging_steps: int) -> None:
        pass

    def rewind_to(self, step: int, *, is_end: bool) -> list[dict[str, Any]]:
        return []

    @contextmanager
    def line(self, step: StepLike, *, due: bool) -> Iterator[Line]:
        line = Line()
        yield line
        if line.metrics or due:
            step.collect()

    def finish(
        self,
        totals: Mapping[str, float],
        exported: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        return {}


@contextmanager
def open_tracking(
    config: TrackingConfig, run_dir: Path, frozen: Mapping[str, Any], console: Console, start: Start
) -> Iterator[Tracker]:
    """Follow a run to its end, however it ends, in a folder that is held.

    Raises:
        RunFolderError: where the folder holds another run, or one that is not to be gone on with.
    """
    former = tracked_before(run_dir)
    with open_run_folder(run_dir, frozen, config_hash(frozen), start) as folder:
        mirror = None
        if isinstance(config, MlflowConfig):
            is_known = os.path.lexists(run_dir / TRACKING)
            waits = is_known or (run_dir / "metrics.jsonl").exists()  # until it is known which lines stay
            replaced = None if is_known else former
            mirror = MlflowMirror(config, run_dir, waits=waits, former=replaced, tell=console.warn)
            folder.at_end.append(lambda: _close(mirror, folder, console))
        elif former is not None:
            wait = end_all_of(former, run_dir, console.warn)
            folder.at_end.append(lambda: wait(WAIT_SECONDS))
        tracker = Tracker(folder, console, mirror)
        tracker.warn(folder.warnings)
        yield tracker


def _close(mirror: MlflowMirror, folder: RunFolder, console: Console) -> None:
    is_stopped = read_status(folder.path).get("state") == "PREEMPTED"
    if undelivered := mirror.close(WHEN_STOPPED if is_stopped else AT_THE_END, console.working):
        console.warn(
            f"MLflow at {mirror.uri}: {undelivered}.\n"
            f"Everything is in {folder.path}; to deliver it later: {how_to_deliver(folder.path)}, or the same command "
            f"with {shell_override('hydra.run.dir', str(folder.path))}"
        )
    folder.set_status(tracker_run_id=mirror.run_id)


def how_to_deliver(folder: Path) -> str:
    """Return the command that brings MLflow what it lacks of a run or sweep."""
    return f"make sync run={shlex.quote(str(folder))}"


def deliver_pending(config: TrackingConfig, run_dir: Path, console: Console) -> None:
    """Bring MLflow what it did not get of a run that is finished, and wait for it as long as calls succeed.

    Raises:
        RunFolderError: where another process is at it.
    """
    if not isinstance(config, MlflowConfig):
        return
    if not os.path.lexists(run_dir / TRACKING) and not read_status(run_dir).get("tracker_run_id"):
        return
    if not os.access(run_dir, os.W_OK):
        console.warn(f"{run_dir} can't be written to: whether MLflow has everything of it is not looked at")
        return
    with hold(run_dir):
        mirror = MlflowMirror(config, run_dir, is_over=True, tell=console.warn)
        mirror.notify()
        if undelivered := mirror.close(TO_THE_END, console.working):
            console.warn(f"MLflow at {mirror.uri}: {undelivered}; to try again: {how_to_deliver(run_dir)}")
