"""A sweep's folder in MLflow: a run of the sweep's own, and its trials' runs nested under it."""

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from src.config.frozen import CONFIG, SWEEP, read_status
from src.config.schema import MlflowConfig
from src.errors import DamagedFileError
from src.records import Types, check_keys, check_times, damaged, read_json, read_lines, read_yaml
from src.tracking.exporters import SWEEP_EXPORTERS, DeliveryError, exhaust
from src.tracking.lock import hold
from src.tracking.mlflow_client import KILLED, MLFLOW_STATES
from src.tracking.mlflow_exporter import MlflowExporter
from src.tracking.mlflow_names import flat, milliseconds
from src.tracking.mlflow_run import MlflowRunExporter
from src.tracking.mlflow_state import read_tracking
from src.tracking.own_files import FIGURES, PAGE
from src.tracking.sweep_files import check_checksum, holds_another, read_sweep
from src.util import as_tuple, value_at

LEADERBOARD = "leaderboard.json"
ARTIFACTS = (SWEEP, "leaderboard.csv", LEADERBOARD, "leaderboard.md", PAGE)
COUNTED = ("FINISHED", "FAILED", "PRUNED")
TRIALS_AT_ONCE = 100
# Keys of the tracker's configuration that a trial may have values of its own for.
OF_A_TRIAL: Mapping[str, Types] = {"experiment_name": str, "run_name": str, "tags": dict, "log_model": bool}
TRIAL_KEYS: Mapping[str, Types] = {"number": int, "identity": str, "setting": str, "config": dict}


@SWEEP_EXPORTERS.register("mlflow")
class MlflowSweepExporter(MlflowExporter):
    """Delivers a sweep's folder.

    A trial's run is written by the trial's own process, but for the tags that tie it to the sweep. What that process
    did not deliver is delivered here when the sweep is over and no process holds the trial. Where the sweep is known to
    be over because none holds it, what the store has of each trial is looked at, and not only of those that lack some.
    """

    main_file = "trials.jsonl"
    may_show_older = True  # where trials were run again

    @property
    def _run_name(self) -> str:
        return self._sweep["name"]

    @property
    def _recorded_start(self) -> str:
        return self._sweep["started"]

    @property
    def _own_tags(self) -> Mapping[str, str]:
        return {"towline.sweep": self._run_name}

    @property
    def _exceeds_folder(self) -> bool:
        return self._num_delivered > len(self._sweep["history"])

    @property
    def _identity(self) -> dict[str, str]:
        return super()._identity | {"towline.judged": json.dumps(self._judged)}

    @property
    def _sweep(self) -> dict[str, Any]:
        sweep = read_sweep(self.folder)
        check_times(self.folder / SWEEP, sweep, ("started", "updated"))
        return sweep

    @property
    def _judged(self) -> list[Any]:
        sweep = self._sweep["sweep"]
        return [sweep.get("metric"), sweep.get("direction")]

    @property
    def pending(self) -> str:
        try:
            new = len(self._sweep["history"]) - self._num_delivered
        except (OSError, DamagedFileError):
            return "values of the sweep"
        return f"values of {max(0, new)} trials, or what became of the sweep or a trial,"

    @property
    def progress(self) -> str:
        return f"values of {self._num_delivered:,} trials, {self.activity.num_calls:,} calls"

    @property
    def _num_delivered(self) -> int:
        return int(self._state.get("history", 0))

    def _connect(self) -> None:
        """Find the sweep's run, or begin one; judged by another metric it is another run, with the same trials."""
        if self._state.get("judged", self._judged) != self._judged:
            kept = {name: self._state[name] for name in ("elsewhere",) if name in self._state}
            replaced = [*self._state.get("replaced", []), *([] if self.run_id is None else [self.run_id])]
            self._state = {"uri": self.stored_uri, "run_id": None, "replaced": replaced} | kept
        super()._connect()
        self._save_state(judged=self._judged)

    def _deliver_folder(self) -> Iterator[None]:
        sweep = self._sweep
        version = f"{sweep['state']} {sweep['updated']}"
        state = MLFLOW_STATES.get(sweep["state"], KILLED if self._is_over else None)
        if state is not None:  # first: whatever else does not arrive, a sweep that is over must not say RUNNING
            self._deliver_once("ended", lambda: self._run.set_ended(state, sweep["updated"]), version)
        elif self._state.get("ended"):  # it was resumed
            self._run.set_running()
            self._save_state(ended=None)
        self._deliver_once("former", self._end_earlier_sweep)
        self._deliver_once("params", lambda: self._log_search(sweep))
        self._log_history(sweep)
        self._deliver_once("counts", lambda: self._log_counts(sweep), self._counts(sweep))
        if state is not None:
            yield from self._log_artifacts()
            self._end_replaced()
        yield from self._part_in_turns(self._deliver_trials(is_over=state is not None))

    def _last_values(self) -> Mapping[str, set[float]]:
        sweep, values = self._sweep, dict[str, set[float]]()
        for point in sweep["history"][: self._num_delivered]:
            values |= {name: {float(value)} for name, value in _values_of(point, sweep)}
        return values | {name: {float(value)} for name, value in (self._state.get("counts") or {}).items()}

    def _query_store(self, client: Any, run: Any) -> dict[str, Any]:
        """Return the counts that the store has; values are dated by themselves, so that a repeat is no second point."""
        has = {name: run.data.metrics[name] for name in self._counts(self._sweep) if name in run.data.metrics}
        return {"counts": has or None, "judged": self._judged}

    def _end_earlier_sweep(self) -> None:
        """End runs of a sweep that was in this folder before: it was begun anew, so no process trains them."""
        folder, before = str(self.folder.resolve()), milliseconds(self._recorded_start)
        if "'" in folder or "%" in folder:
            return
        running = f"attributes.status = 'RUNNING' and attributes.start_time < {before}"
        here = f"{running} and tags.`towline.host` = '{socket.gethostname()}' and tags.`towline.folder`"
        for which in (f"= '{folder}'", f"LIKE '{folder}/%'"):
            for one in self._run.client.search_runs([self._run.experiment_id], f"{here} {which}"):
                self._run.client.set_terminated(one.info.run_id, KILLED)

    def _log_search(self, sweep: Mapping[str, Any]) -> None:
        """Log what is searched and how; what is longer than a param may be is in sweep.json, an artifact."""
        self._run.log_params({name: text for key in ("space", "sweep") for name, text in flat(sweep[key], key)})

    def _log_history(self, sweep: Mapping[str, Any]) -> None:
        """Log the values that are new and the best so far; the step is the number of trials that have finished."""
        history = sweep["history"]
        for first in range(self._num_delivered, len(history), TRIALS_AT_ONCE):
            some = history[first : first + TRIALS_AT_ONCE]
            self._run.log_points(
                (name, value, milliseconds(sweep["started"], trial["elapsed_seconds"]), step)
                for step, trial in enumerate(some, first + 1)
                for name, value in _values_of(trial, sweep)
            )
            self._save_state(history=first + len(some))

    def _counts(self, sweep: Mapping[str, Any]) -> dict[str, int]:
        return {f"trials_{state.lower()}": sweep["counts"].get(state, 0) for state in COUNTED}

    def _log_counts(self, sweep: Mapping[str, Any]) -> None:
        """Log those numbers of trials that have changed; they are dated by the file, as they may become less again."""
        before, at, step = self._state.get("counts") or {}, milliseconds(sweep["updated"]), len(sweep["history"])
        now = self._counts(sweep)
        self._run.log_points((name, now[name], at, step) for name in now if now[name] != before.get(name))

    def _log_artifacts(self) -> Iterator[None]:
        yield from self._log_files([*ARTIFACTS, *self._files_in("plots"), *self._files_in(FIGURES)])
        self._part(self._log_leaderboard)

    def _log_leaderboard(self) -> None:
        file = self.folder / LEADERBOARD
        rows = read_json(file).get("rows", []) if file.exists() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise damaged(file, "rows is no list of objects", "Move it away: the sweep's own command writes it anew.")
        if rows:
            columns = list(dict.fromkeys(chain.from_iterable(rows)))
            table = [[_cell(row.get(column)) for column in columns] for row in rows]
            version = (self._state.get("files") or {}).get(LEADERBOARD)
            self._deliver_once("table", lambda: self._run.log_table("leaderboard_table.json", columns, table), version)

    def _deliver_trials(self, *, is_over: bool) -> Iterator[None]:
        """Deliver what is new of each trial; one that can't be does not stop the others: its error is raised last."""
        problems = []
        for trial in self._lines(self.main_file, lambda place, name: read_lines(place / name, _check_trial)):
            folder = self.folder / str(trial["number"])
            try:
                if is_over:
                    self._deliver_rest_of(folder)
                self._tie(trial, folder)
            except Exception as error:  # whatever MLflow raises, of a run that somebody deleted for example
                problems.append(error)
                self.activity.check()
                if isinstance(error, DeliveryError):  # the store's, and so every trial's
                    break
            yield
        if problems:
            raise problems[0]

    def _deliver_rest_of(self, folder: Path) -> None:
        """Deliver what a trial's own process did not, in one turn: its folder is held meanwhile."""
        try:
            own = _tracking_of(folder)
        except FileNotFoundError:
            return
        state = self._tracking(folder)
        if not self._is_over and (state is None or (self.is_its_store(state["uri"]) and state.get("ended"))):
            return
        if state is None and own.get("type") != "mlflow":
            return
        with hold(folder):
            config: MlflowConfig = replace(self._config, **{key: own[key] for key in OF_A_TRIAL if key in own})
            trial = MlflowRunExporter(config, folder, parent=self, is_over=True, warn=self.warn_once)
            exhaust(trial.deliver())

    def _tie(self, trial: Mapping[str, Any], folder: Path) -> None:
        """Nest a trial's run under the sweep's, with tags that say which trial it is and how it ended."""
        state, number = self._tracking(folder), str(trial["number"])
        if state is None or not self.is_its_store(state["uri"]) or not state.get("run_id"):
            return
        tied = {"run_id": state["run_id"], "state": read_status(folder).get("state")}
        known = self._state.get("trials", {})
        if known.get(number) == tied:
            return
        if reason := holds_another(folder, trial["config"]):
            raise DamagedFileError(f"{folder} is not the folder of trial {number}: {reason}. Rename it back")
        which = {"towline.identity": trial["identity"], "towline.setting": trial["setting"], "towline.trial": number}
        tags = {"mlflow.parentRunId": self.run_id, **self._own_tags, **which, "towline.state": tied["state"]}
        self._run.log_tags(tags, run_id=tied["run_id"])
        self._save_state(trials=known | {number: tied})

    @staticmethod
    def _tracking(folder: Path) -> dict[str, Any] | None:
        """Return what a trial's tracking.json says; None where there is none, and nothing where it is damaged."""
        try:
            return read_tracking(folder)
        except FileNotFoundError:
            return None
        except DamagedFileError:
            return {"uri": "", "run_id": None}


def _values_of(point: Mapping[str, Any], sweep: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an entry of the history by their names: `value`, `best`; of several metrics one of each."""
    for name in ("value", "best"):
        metrics = sweep["sweep"].get("metric")
        names = [f"{name}/{metric}" for metric in metrics] if isinstance(metrics, list) else [name]
        yield from ((one, value) for one, value in zip(names, as_tuple(point[name]), strict=True) if value is not None)


def sweep_tracking(folder: Path) -> dict[str, Any]:
    """Return the tracker's configuration of a sweep's trials, as it is stored; empty where there is no trial."""
    found = (value_at(line.content, "config.tracking") for line in read_lines(folder / "trials.jsonl"))
    return next((one for one in found if isinstance(one, dict)), {})


def _tracking_of(folder: Path) -> dict[str, Any]:
    """Return the tracker's configuration of a trial; FileNotFoundError or DamagedFileError as `read_yaml`."""
    file = folder / CONFIG
    own = read_yaml(file).get("tracking", {})
    try:
        check_keys({"tracking": own}, {"tracking": dict})
        check_keys(own, {"type": str, **OF_A_TRIAL}, optional=("type", *OF_A_TRIAL))
    except ValueError as error:
        raise damaged(file, f"tracking: {error}", "Restore it from a copy.") from error
    return dict(own)


def _check_trial(line: dict[str, Any], _before: Any) -> None:
    check_keys(line, TRIAL_KEYS)
    check_checksum(line)


def _cell(value: Any) -> Any:
    """Return what a cell of a table shows: a text in place of what has parts."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
