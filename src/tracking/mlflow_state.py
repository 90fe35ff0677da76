"""tracking.json: what of a folder MLflow has, and which runs the folder had before.

It may be wrong: damaged, or older or newer than the store, which somebody may have restored, emptied or lost.

    uri, run_id        the store, as files have its address, and the run there; null before it was begun
    lines, samples     how many lines of metrics and how many samples of a run were delivered
    points             values that MLflow has of lines that were cut off since, see `Points`
    history, counts    how many values of a sweep were delivered, and the last numbers of trials by state
    judged, trials     metric and direction of a sweep; run and state of each trial that is nested under it
    files              size and time of change of each file that was uploaded
    summary            numbers of the run as a whole, as they were delivered
    ended, running     the end that was delivered, or null; false: MLflow says that the run ended, and it resumed
    params, tags, inputs, former, table, model    whether, or for which version, this part was delivered
    replaced           runs here that this one replaces, still to be ended
    elsewhere          the same in other stores, each with uri and run_id
    creating, retried  a run was asked for and no answer came; so there may be a second one, to be removed
    doubtful           what the store has must be looked up before anything is delivered
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from src.errors import DamagedFileError
from src.records import NUMBER, OPTIONAL_TEXT, Types, check_keys, damaged, read_json
from src.tracking.mlflow_names import plain_name
from src.tracking.step_logs import is_timing, metrics_of

TRACKING = "tracking.json"
TRACKING_KEYS: Mapping[str, Types] = {
    "uri": str,
    "run_id": OPTIONAL_TEXT,
    **dict.fromkeys(("lines", "samples", "history"), int),
    **dict.fromkeys(("points", "trials", "files"), dict),
    **dict.fromkeys(("replaced", "elsewhere", "judged"), list),
    "counts": (dict, NoneType),
}
RUN_ID = re.compile(r"[a-zA-Z0-9][\w\-]{0,255}", re.ASCII)  # the form of a run's id in MLflow
PreviousRun = tuple[str, str]
"""A run that a folder had before: its store's address as files have it, and its id there."""


def read_tracking(folder: Path) -> dict[str, Any]:
    """Return what tracking.json of a folder says; FileNotFoundError or DamagedFileError as `read_json`."""
    state = read_json(folder / TRACKING, TRACKING_KEYS, optional=[key for key in TRACKING_KEYS if key != "uri"])
    try:
        _check_points(state.get("points", {}))
        if any(state.get(name, 0) < 0 for name in ("lines", "samples", "history")):
            raise ValueError("a number of lines is negative")
        ids = [state.get("run_id"), *state.get("replaced", [])]
        for one in state.get("elsewhere", []):
            check_keys({"elsewhere": one}, {"elsewhere": dict})
            check_keys(one, {"uri": str, "run_id": str})
            ids.append(one["run_id"])
        for run_id in ids:
            if run_id is not None and not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
                raise ValueError(f"{json.dumps(run_id)} is no id of a run")
        check_keys(state.get("counts") or {}, dict.fromkeys(state.get("counts") or {}, NUMBER))
    except ValueError as error:
        raise damaged(folder / TRACKING, str(error), "") from error
    return {"run_id": None} | state


def _check_points(points: Mapping[str, Any]) -> None:
    for step, by_name in points.items():
        int(step)
        check_keys(points, {step: dict})
        check_keys(by_name, dict.fromkeys(by_name, list))
        for values in by_name.values():
            by_place = {str(place): value for place, value in enumerate(values)}
            check_keys(by_place, dict.fromkeys(by_place, NUMBER))


def tracked_before(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's tracking.json says, which a start may remove; None where it has or says nothing."""
    try:
        return read_tracking(folder)
    except (FileNotFoundError, DamagedFileError):
        return None


def runs_left(state: Mapping[str, Any]) -> list[PreviousRun]:
    """Return the runs that may still say RUNNING, by what a tracking.json says."""
    is_open = state["run_id"] is not None and not state.get("ended")
    own = [(state["uri"], state["run_id"])] if is_open else []
    return [*((one["uri"], one["run_id"]) for one in state.get("elsewhere", [])), *own]


Points = dict[str, dict[str, list[float]]]


def add_line(points: Points, line: Mapping[str, Any]) -> None:
    """Add the values of a line of metrics."""
    at_step = points.setdefault(str(line["step"]), {})
    for name, value in metrics_of(line).items():
        values = at_step.setdefault(plain_name(name), [])
        if float(value) not in values:
            values.append(float(value))


def without_lines(points: Points, lines: Iterable[Mapping[str, Any]]) -> Points:
    """Return the points without those of these lines: what remains are values of an earlier attempt at a step."""
    if not points:
        return points
    of_lines: Points = {}
    for line in lines:
        add_line(of_lines, line)
    remaining = {step: _without(metrics, of_lines.get(step, {})) for step, metrics in points.items()}
    return {step: metrics for step, metrics in remaining.items() if metrics}


def _without(metrics: Mapping[str, list[float]], of_lines: Mapping[str, list[float]]) -> dict[str, list[float]]:
    remaining = {
        name: [value for value in values if value not in of_lines.get(name, ())]
        for name, values in metrics.items()
        if not (is_timing(name) and name in of_lines)
    }
    return {name: values for name, values in remaining.items() if values}


def undelivered(points: Points, line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line that are not among the points; a timing counts as delivered with any value."""
    delivered = points.get(str(line["step"]), {})
    return {
        name: float(value)
        for name, value in metrics_of(line).items()
        if (known := delivered.get(plain_name(name))) is None or not (is_timing(name) or float(value) in known)
    }
