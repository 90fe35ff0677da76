"""What keeps and shows what a run does: its folder, the terminal, and by exporters other trackers."""

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from src import secrets
from src.config.frozen import config_hash, read_config, read_status
from src.config.quoting import shell_override
from src.config.schema import SECTIONS, TrackingConfig
from src.config.sections import parse_section
from src.progress import TimeLeft
from src.tracking import mlflow_run, mlflow_sweep, tensorboard_exporter, wandb_exporter  # noqa: F401 - registers
from src.tracking.console import Console
from src.tracking.end_summary import MetricHistory, show_end
from src.tracking.export_thread import AFTER_STOP, END_OF_RUN, UNTIL_DELIVERED, ExportThread
from src.tracking.exporters import EXPORTERS, SWEEP_EXPORTERS, Exporter, Warn, exporters_of
from src.tracking.line_exporter import state_file
from src.tracking.lock import hold
from src.tracking.mlflow_run import end_previous
from src.tracking.mlflow_state import TRACKING, tracked_before
from src.tracking.run_folder import SUMMARY, RunFolder, Start, open_run_folder
from src.tracking.step_logs import METRICS, SAMPLES, metrics_of
from src.tracking.system_metrics import Measure, system_metrics_of

Digests = Mapping[str, Any] | None
START_SECONDS = 30.0  # at most, that a tracker waits for the first line before its library is imported


class LoggedStep(Protocol):
    """What is shown and written of a training step."""

    @property
    def number(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def loss(self) -> float: ...

    @property
    def tokens_per_second(self) -> float: ...

    @property
    def seconds(self) -> float: ...

    def pop_metrics(self) -> dict[str, float]: ...


class Ahead(Protocol):
    """What a run does besides its steps."""

    def time_left(self, step: int, seconds_per_step: float, pace: Mapping[str, float]) -> TimeLeft: ...


@dataclass
class StepSeconds:
    """The mean time of the steps of this start."""

    _sum: float = 0.0
    _count: int = 0

    def add(self, seconds: float) -> float:
        """Count one more step, unless an earlier start computed it (0); return the mean, 0 where there is none.

        The first step is left out as soon as there is another: much is done in it for the first time.
        """
        if seconds:
            self._count += 1
            self._sum = seconds if self._count <= 2 else self._sum + seconds
        return self._sum / max(1, self._count - 1)


@dataclass
class MetricsLine:
    """What is measured and sampled after a step."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Sequence[Any] = ()


class Tracker:
    """What a run logs to. This one keeps and shows nothing: the tracker of a process that is not the first.

    What was logged is written when a method returns.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.latest: dict[str, float] = {}  # the last value of every metric so far

    @property
    def tracker_run_id(self) -> str | None:
        """The run's id in MLflow; None where it has none yet."""
        return None

    def sync(self) -> None:
        """Flush all that was logged to the disk."""

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        """Return size and checksum of what was logged of earlier steps, by which a damaged log is noticed."""
        return {}

    def write_file(self, name: str, content: Mapping[str, Any], *, once: bool = False) -> None:
        """Keep a whole file, such as provenance.json; `once`: unless an earlier start of this run did."""

    def show_overview(self, overview: Mapping[str, str], ahead: Ahead | None = None) -> None:
        """Show what was assembled; `ahead` is what the run does besides its steps, by which the time left is judged."""

    def warn(self, *warnings: str) -> None:
        """Show warnings."""

    def set_length(self, num_steps: int, steps_per_epoch: int | None) -> None:
        """Record how long the run will be; steps_per_epoch is None where that is unknown."""

    def end_early(self, cause: str) -> None:
        """Record that the present step is the run's last, and why, before its line is written."""

    def progress(self, step: LoggedStep, num_steps: int, *, is_logged: bool) -> None:
        """Show how far training is; `is_logged`: the step has a line where only some are printed."""

    def rewind_to(self, step: int, *, is_end: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Cut metrics and samples that will be produced again: of later steps, and of this one if it is incomplete.

        A step that `is_end`, the run's last or what was that, is complete only when the run is.
        Returns: the lines of metrics that stay, and the one of this step that was cut off.
        """
        return [], None

    @contextmanager
    def line(self, step: LoggedStep, *, due: bool) -> Iterator[MetricsLine]:
        """Collect what is measured and sampled after a step; written when the block ends if anything was, or due."""
        line = MetricsLine()
        yield line
        if line.metrics or due:
            step.pop_metrics()  # the sums begin anew here too: checkpoints hold them

    def finish(self, totals: Mapping[str, float], exported: Digests = None, base: Digests = None) -> dict[str, float]:
        """Write and return the summary: the last value of every metric, the best ones, and the run's totals.

        DamagedFileError where what was logged is not in the folder any more.

        Args:
            exported: size and checksum of each file of model/, for status.json.
            base: the same of the local model that an adapter in model/ is based on.
        """
        return {}


class FolderTracker(Tracker):
    """Keeps a run in its folder and shows it in the terminal. Built by `open_tracking`."""

    def __init__(
        self, folder: RunFolder, console: Console, exports: ExportThread, measure_system: Measure = dict
    ) -> None:
        super().__init__(console)
        self._folder = folder
        self._exports = exports
        self._measure_system = measure_system
        self._started = time.monotonic()
        self._history = MetricHistory()
        self._ahead: Ahead | None = None
        self._step_seconds = StepSeconds()

    @property
    def tracker_run_id(self) -> str | None:
        return self._exports.run_id

    def sync(self) -> None:
        self._folder.sync()

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        return self._folder.journal_before(step)

    def write_file(self, name: str, content: Mapping[str, Any], *, once: bool = False) -> None:
        if not (once and (self._folder.path / name).exists()):
            self._folder.write_json(name, content)
            self._exports.notify()

    def show_overview(self, overview: Mapping[str, str], ahead: Ahead | None = None) -> None:
        self._ahead = ahead
        for label, text in overview.items():
            self.console.label(label, text)
        for exporter in self._exports.exporters:
            self.console.label("tracking", f"{exporter.name}, {exporter.where}")
        self.console.say()

    def warn(self, *warnings: str) -> None:
        for warning in warnings:
            self.console.warn(warning)

    def set_length(self, num_steps: int, steps_per_epoch: int | None) -> None:
        self._folder.num_steps, self._folder.steps_per_epoch = num_steps, steps_per_epoch
        self._folder.set_status()
        self.console.begin_training(self._folder.step, num_steps)

    def end_early(self, cause: str) -> None:
        self._folder.num_steps, self._folder.early_cause = self._folder.step, cause
        self._folder.set_status()
        self.console.begin_training(self._folder.step, self._folder.step)
        self.console.label("stopped", cause.removeprefix("stopped "))

    def progress(self, step: LoggedStep, num_steps: int, *, is_logged: bool) -> None:
        self._folder.step = step.number
        seconds, left = self._step_seconds.add(step.seconds), None
        self._history.add_step(step.number, step.loss)
        if self._ahead is not None and seconds:
            left = self._ahead.time_left(step.number, seconds, self.console.pace)
        speed = step.tokens_per_second
        self.console.progress(step.number, num_steps, step.loss, step.lr, speed, left, logged=is_logged)

    def rewind_to(self, step: int, *, is_end: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        is_complete = not is_end and any(line["step"] == step for line in self._folder.lines(METRICS))
        last = step if is_complete else step - 1
        self._folder.announce_cut(last)
        self._folder.cut(SAMPLES, last)
        kept, cut = self._folder.cut(METRICS, last)
        self._exports.rewind(len(kept), cut)
        for line in kept:
            self._note(line["step"], metrics_of(line))
        self._started -= self.latest.get("perf/elapsed_seconds", 0.0)
        self._folder.step = step
        self._folder.set_status()  # before lines are added again: what it says of the logs must not be older than they
        return kept, next((line for line in cut if line["step"] == step), None)

    @contextmanager
    def line(self, step: LoggedStep, *, due: bool) -> Iterator[MetricsLine]:
        line = MetricsLine()
        yield line
        for sample in line.samples:  # before the line of metrics, which says that the step is complete
            self._folder.append(SAMPLES, asdict(sample))
        if line.metrics or due:
            self.log(step.number, step.pop_metrics() | line.metrics)
        self.console.samples(line.samples)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics; called once a step, when the step is complete, evaluation included."""
        elapsed = time.monotonic() - self._started
        metrics = {**metrics, **self._measure_system(), "perf/elapsed_seconds": elapsed}
        self._folder.append(METRICS, {"step": step, **metrics})
        self._folder.step = step
        if evaluated := {name: value for name, value in metrics.items() if name.startswith("eval/")}:
            self.console.evaluation(step, evaluated)
        self._note(step, metrics)
        self._folder.set_status()
        self._exports.release()
        self._exports.notify()

    def _note(self, step: int, metrics: Mapping[str, float]) -> None:
        self.latest |= metrics
        self._history.add(step, metrics)

    def finish(self, totals: Mapping[str, float], exported: Digests = None, base: Digests = None) -> dict[str, float]:
        self._folder.check_step_logs()
        summary = self.latest | self._history.best_metrics() | dict(totals)
        self._folder.write_json(SUMMARY, summary)
        self._folder.set_status(model=exported, base=base)
        show_end(self.console, self._folder.path, self._history, summary, self._folder.lines(SAMPLES))
        return summary


@contextmanager
def open_tracking(
    config: TrackingConfig, run_dir: Path, frozen: Mapping[str, Any], console: Console, start: Start
) -> Iterator[FolderTracker]:
    """Follow a run to its end, however it ends, in a folder that is held; raises as `open_run_folder`."""
    before = tracked_before(run_dir)
    with open_run_folder(run_dir, frozen, config_hash(frozen), start) as folder:
        is_known = any(os.path.lexists(run_dir / name) for name in (METRICS, *_state_files(config)))
        exporters = exporters_of(config.trackers(), run_dir, kinds=EXPORTERS, warn=console.warn)
        exports = start_exporters(
            exporters,
            run_dir,
            before=before,
            waits=is_known,
            pause_seconds=START_SECONDS,
            warn=console.warn,
            say=console.say,
        )
        folder.at_end.append(lambda: _close(exports, folder, console))
        tracker = FolderTracker(folder, console, exports, system_metrics_of(config, console.warn))
        tracker.warn(*folder.warnings)
        yield tracker


def _state_files(config: TrackingConfig) -> list[str]:
    """Return the files in which the trackers of a run remember what was delivered."""
    return [TRACKING, *(state_file(one.type) for one in config.trackers())]


def start_exporters(
    exporters: Sequence[Exporter],
    folder: Path,
    *,
    before: Mapping[str, Any] | None = None,
    waits: bool = False,
    pause_seconds: float = 0.0,
    warn: Warn,
    say: Callable[[str], None] = print,
) -> ExportThread:
    """Start delivering a folder, see ExportThread; end runs elsewhere that it had `before`, by its tracking.json."""
    cleanup = end_previous(exporters, folder, before, warn)
    return ExportThread(exporters, cleanup=cleanup, waits=waits, pause_seconds=pause_seconds, warn=warn, say=say)


def _close(exports: ExportThread, folder: RunFolder, console: Console) -> None:
    is_stopped = read_status(folder.path).get("state") == "PREEMPTED"
    leaving = exports.close(AFTER_STOP if is_stopped else END_OF_RUN, console.working)
    console.close()
    for left in leaving:
        by_sync = f"{sync_command(folder.path)}, or " if left.can_be_synced else ""
        console.warn(
            f"{left}.\nEverything is in {folder.path}; to deliver it later: {by_sync}the same command with "
            f"{shell_override('hydra.run.dir', str(folder.path))}"
        )
    if exports.exporters:
        folder.set_status(tracker_run_id=exports.run_id)


def sync_command(folder: Path) -> str:
    """Return the command that delivers what MLflow lacks of a run or sweep."""
    return f"make sync run={shlex.quote(str(folder))}"


def deliver_pending(config: TrackingConfig, run_dir: Path, console: Console) -> None:
    """Deliver what is missing of a run that is finished, and wait for it as long as calls succeed; raises as `hold`."""
    if all(one.type not in EXPORTERS for one in config.trackers()):
        return
    is_known = any(os.path.lexists(run_dir / name) for name in _state_files(config))
    if not is_known and not read_status(run_dir).get("tracker_run_id"):
        return
    if not os.access(run_dir, os.W_OK):
        console.warn(f"{run_dir} can't be written to: whether all of it is delivered is not checked")
        return
    with hold(run_dir):
        exporters = exporters_of(config.trackers(), run_dir, kinds=EXPORTERS, is_over=True, warn=console.warn)
        exports = start_exporters(exporters, run_dir, warn=console.warn)
        for left in exports.close(UNTIL_DELIVERED, console.working):
            console.warn(f"{left}; to try again: {sync_command(run_dir) if left.can_be_synced else 'the same command'}")


def deliver_late(run_dir: Path, console: Console) -> None:
    """Deliver what was measured of a finished run after its end to the tracker that its frozen config names.

    Raises as `hold`; a tracker that can't be used costs a warning.
    """
    missing: list[tuple[str, str]] = []
    given = secrets.reveal({"tracking": read_config(run_dir).get("tracking")}, missing)["tracking"]
    kinds = SECTIONS["tracking"]
    assert not isinstance(kinds, type)
    kind = given.get("type") if isinstance(given, dict) else None
    config = parse_section(kinds[kind], given, "tracking").value if kind in kinds else None
    if config is not None and not missing:
        deliver_pending(config, run_dir, console)
    elif kind != "none":
        reason = "; ".join(f"{key}: {why}" for key, why in missing) or "its settings can't be used here"
        console.warn(f"{kind}: {reason}; {sync_command(run_dir)} delivers it later")


@contextmanager
def open_sweep_tracking(config: TrackingConfig, folder: Path, console: Console) -> Iterator[ExportThread]:
    """Follow a sweep in a folder that is held to the end that its sweep.json says when the block is left."""
    exporters = exporters_of(config.trackers(), folder, kinds=SWEEP_EXPORTERS, warn=console.warn)
    exports = start_exporters(exporters, folder, before=tracked_before(folder), warn=console.warn, say=console.say)
    try:
        yield exports
    finally:
        for left in exports.close(END_OF_RUN, console.working):
            console.warn(
                f"{left}.\nEverything is in {folder}; to deliver it later, repeat the same command, or "
                f"{sync_command(folder)}"
            )
