"""A run's folder in MLflow."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import filterfalse
from pathlib import Path
from typing import Any

from src.config.frozen import CONFIG, STATUS, read_starts, read_status
from src.errors import DamagedFileError
from src.records import Types, begins_with, check_keys, damaged, is_time, read_json, read_yaml
from src.tracking.exporters import EXPORTERS, Exporter, Warn
from src.tracking.late_metrics import is_of_summary, summary_metrics
from src.tracking.mlflow_client import KILLED, MLFLOW_STATES
from src.tracking.mlflow_exporter import MlflowExporter
from src.tracking.mlflow_model import MODEL, log_description, mlmodel
from src.tracking.mlflow_names import flat, milliseconds, plain_name
from src.tracking.mlflow_state import RUN_ID, TRACKING, Points, add_line, undelivered, without_lines
from src.tracking.own_files import FIGURES, PAGE
from src.tracking.previous_runs import PreviousRuns
from src.tracking.run_folder import DATA_REPORT, PROVENANCE, SUMMARY
from src.tracking.step_logs import METRICS, SAMPLES, metrics_of, read_step_log

ARTIFACTS = (CONFIG, PROVENANCE, DATA_REPORT, SAMPLES, SUMMARY, PAGE)
LINES_AT_ONCE = 100
LARGEST = 1 << 53  # the largest step, and the largest time in milliseconds, that every store takes
STATUS_REMEDY = "Move it away, and repeat the run's own command: it resumes from the last checkpoint and writes it."

PROVENANCE_KEYS: Mapping[str, Types] = {"git": dict, "hardware": dict}
REPORT_KEYS: Mapping[str, Types] = {"digest": str, "rows_kept": int, "tokens": int, "supervised_tokens": int}


@EXPORTERS.register("mlflow")
class MlflowRunExporter(MlflowExporter):
    """Delivers a run's folder."""

    main_file = METRICS

    @property
    def _run_name(self) -> str:
        return self._config.run_name

    @property
    def _recorded_start(self) -> str:
        try:
            return str(read_status(self.folder).get("started") or "")
        except DamagedFileError:  # reported where it says how the run ended
            return ""

    @property
    def _start_time(self) -> str:
        if began := self._recorded_start:
            return began
        try:
            times = [start["time"] for start in read_starts(self.folder)]
        except DamagedFileError:
            return ""
        return next(filter(is_time, times), "")

    @property
    def _exceeds_folder(self) -> bool:
        try:
            samples = self._lines(SAMPLES, read_step_log)
            return self._num_delivered > len(self._metrics()) or self._state.get("samples", 0) > len(samples)
        except DamagedFileError:  # reported where it is delivered
            return False

    def _id_elsewhere(self) -> str | None:
        try:
            found = read_status(self.folder).get("tracker_run_id")
        except DamagedFileError:
            return None
        return found if isinstance(found, str) and RUN_ID.fullmatch(found) else None

    def rewind(self, num_kept: int, cut: Sequence[Mapping[str, Any]]) -> None:
        """Remember what MLflow has of lines that were cut off: of a repeated step only what differs is delivered."""
        points: Points = self._state.get("points", {})
        for line in cut[: max(0, self._num_delivered - num_kept)]:
            add_line(points, line)
        lines = min(self._num_delivered, num_kept)
        self._save_state(lines=lines, samples=0, points=points, ended=None, running=False)

    @property
    def num_pending(self) -> int:
        """How many lines of metrics MLflow does not have yet."""
        return max(0, len(self._metrics()) - self._num_delivered)

    @property
    def pending(self) -> str:
        try:
            left = self.num_pending
        except DamagedFileError:
            return "lines of metrics"
        return f"{left:,} lines of metrics" if left else "what became of the run, or files of it,"

    @property
    def progress(self) -> str:
        try:
            return f"{self._num_delivered:,} of {len(self._metrics()):,} lines of metrics"
        except DamagedFileError:
            return f"{self._num_delivered:,} lines of metrics"

    def _readable_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics; none where they are damaged, which is reported where they are delivered."""
        try:
            return self._metrics()
        except DamagedFileError:
            return []

    def _deliver_folder(self) -> Iterator[None]:
        self._is_ended = self._is_over
        self._part(self._deliver_state)  # first: whatever else does not arrive, a run that is over must not say RUNNING
        self._describe("params", CONFIG, self._log_config)
        self._describe("tags", PROVENANCE, self._log_provenance)
        self._describe("inputs", DATA_REPORT, self._log_reports)
        yield from self._part_in_turns(self._log_metrics())
        self._part(self._log_samples)
        if self._is_ended:
            self._part(self._log_summary)
            yield from self._log_files([*ARTIFACTS, *self._files_in(FIGURES)])
            if self._config.log_model:
                yield from self._log_model()
            self._end_replaced()

    def _deliver_state(self) -> None:
        status = read_status(self.folder)
        state = MLFLOW_STATES.get(str(status.get("state")), KILLED if self._is_over else None)
        if state is not None:
            self._is_ended = True
            self._deliver_once("ended", lambda: self._run.set_ended(state, status.get("ended")), state)
        elif self._state.get("running") is False:  # it had ended before
            self._deliver_once("running", self._run.set_running)

    def _describe(self, what: str, name: str, do: Callable[[], None]) -> None:
        """Log what describes the run, from a file that is there."""
        if os.path.lexists(self.folder / name):
            self._part(lambda: self._deliver_once(what, do))

    def _last_values(self) -> Mapping[str, set[float]]:
        lines, num = self._readable_metrics(), self._num_delivered
        points: Points = deepcopy(self._state.get("points", {}))
        for line in lines[:num]:
            add_line(points, line)
        newest: dict[str, list[float]] = {}
        for step in sorted(points, key=int):
            newest |= points[step]
        for line in lines[num : num + LINES_AT_ONCE]:  # they may have arrived, and only the answer be lost
            for name, value in metrics_of(line).items():
                newest.get(plain_name(name), []).append(float(value))
        return {name: set(values) for name, values in newest.items()}

    def _query_store(self, client: Any, run: Any) -> dict[str, Any]:
        points: Points = {}
        for name in filterfalse(is_of_summary, run.data.metrics):
            for point in client.get_metric_history(run.info.run_id, name):
                add_line(points, {"step": point.step, name: point.value})
        lines = self._readable_metrics()
        num = next((place for place, line in enumerate(lines) if undelivered(points, line)), len(lines))
        return {"lines": num, "points": without_lines(points, lines[:num]), "running": run.info.status == "RUNNING"}

    def _log_config(self) -> None:
        self._run.log_params(dict(flat(read_yaml(self.folder / CONFIG))))

    def _log_provenance(self) -> None:
        optional = (*PROVENANCE_KEYS, "config_hash")
        made = read_json(self.folder / PROVENANCE, {**PROVENANCE_KEYS, "config_hash": str}, optional=optional)
        git, device = made.get("git", {}), made.get("hardware", {}).get("device")
        commits = dict.fromkeys(("mlflow.source.git.commit", "git_commit"), git.get("commit"))
        own = {"git_dirty": git.get("dirty"), "config_hash": made.get("config_hash"), "device": device}
        self._run.log_tags(commits | own)

    def _log_reports(self) -> None:
        reports = read_json(self.folder / DATA_REPORT)
        for name, report in reports.items():
            try:
                check_keys(report if isinstance(report, dict) else {}, REPORT_KEYS)
            except ValueError as error:
                raise damaged(self.folder / DATA_REPORT, f"{name}: {error}", "") from error
        self._run.log_inputs(reports)

    def _log_metrics(self) -> Iterator[None]:
        """Log the lines that are new, many in a call; each is dated by itself, so that a repeat is no second point."""
        self._check_written(METRICS)
        lines, began = self._metrics(), self._start_time
        if lines and not began:
            raise damaged(self.folder / STATUS, "started is missing, so no line of metrics can be dated", STATUS_REMEDY)
        known: Points = self._state.get("points", {})
        while batch := lines[self._num_delivered : self._num_delivered + LINES_AT_ONCE]:
            points = []
            for line in batch:
                at = milliseconds(began, line.get("perf/elapsed_seconds") or 0.0)
                if max(at, line["step"]) > LARGEST:
                    reason = f"step {line['step']} or its perf/elapsed_seconds is larger than any store takes"
                    raise damaged(self.folder / METRICS, reason, "Restore it from a copy.")
                points += [(name, value, at, line["step"]) for name, value in undelivered(known, line).items()]
            self._run.log_points(points)
            known = without_lines(known, batch)
            self._save_state(lines=self._num_delivered + len(batch), points=known)
            yield

    def _check_written(self, name: str) -> None:
        """Raise DamagedFileError where no process writes any more and a step log lacks what status.json says it has."""
        if not self._is_over:
            return
        try:
            written = (read_status(self.folder).get("journal") or {}).get(name)
        except DamagedFileError:  # reported where it says how the run ended
            return
        if written and not begins_with(b"".join(line.raw for line in read_step_log(self.folder, name)), written):
            remedy = f"Restore it from a copy; or have it delivered as it is: move {STATUS} away."
            reason = f"its content does not have the checksum that it was written with ({STATUS})"
            raise damaged(self.folder / name, reason, remedy)

    def _log_summary(self) -> None:
        """Log the numbers of the run as a whole, at its last step, dated by when they were written."""
        if numbers := summary_metrics(self.folder):
            if (size := numbers.pop("peak_memory_bytes", None)) is not None:
                numbers["peak_memory_gib"] = round(size / 2**30, 3)  # MLflow shows every digit
            at = (self.folder / SUMMARY).stat().st_mtime_ns // 10**6
            step = max((line["step"] for line in self._readable_metrics() if line["step"] <= LARGEST), default=0)
            points = [(name, value, at, step) for name, value in numbers.items()]
            self._deliver_once("summary", lambda: self._run.log_points(points), numbers)

    def _log_model(self) -> Iterator[None]:
        """Log the files of model/, and once they are there what MLflow reads them by."""
        if names := self._files_in(MODEL):
            yield from self._log_files(names)
            version = [self._state.get("files", {}).get(name) for name in names]
            self._part(lambda: self._deliver_once("model", self._describe_model, version))

    def _describe_model(self) -> None:
        described = self.activity.call(mlmodel, self.folder, self._run.id)  # which imports what takes seconds
        log_description(self._run, self.folder, described)

    def _log_samples(self) -> None:
        """Log the samples as a table, anew when there are more."""
        self._check_written(SAMPLES)
        rows = self._lines(SAMPLES, read_step_log)
        if len(rows) > self._state.get("samples", 0):
            columns = list(rows[-1])
            self._run.log_table("samples.json", columns, [[row.get(column) for column in columns] for row in rows])
            self._save_state(samples=len(rows))


def end_previous(
    exporters: Sequence[Exporter], folder: Path, before: Mapping[str, Any] | None, warn: Warn
) -> PreviousRuns:
    """Return what ends the runs that a folder had in MLflow and that its exporters don't continue.

    `before` is what its tracking.json said before this start, which may have removed it.
    """
    previous = PreviousRuns(warn)
    in_mlflow = [one for one in exporters if isinstance(one, MlflowExporter)]
    for one in in_mlflow:
        one.previous = previous
        if before is not None and not os.path.lexists(folder / TRACKING):
            one.supersede(before)
    if before is not None and not in_mlflow:
        previous.end_all(before, folder)
    return previous
