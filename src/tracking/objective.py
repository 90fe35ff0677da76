"""A finished or unfinished run's values of one metric, as its folder says: what sweeps compare runs by."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src import records
from src.errors import DamagedFileError
from src.metrics import greater_is_better
from src.records import Digest, damaged, read_bytes, read_json
from src.tracking.run_folder import SUMMARY
from src.tracking.step_logs import METRICS, read_step_log


def foreign_journal(run_dir: Path, status: Mapping[str, Any]) -> str:
    """Return why a status.json is not the one of the run whose metrics lie next to it; '' where it is."""
    digest = (status.get("journal") or {}).get(METRICS)
    try:
        if digest is None or records.begins_with(read_bytes(run_dir / METRICS, None), digest):
            return ""
        reason = "its content does not have the checksum that it was written with (status.json)"
    except FileNotFoundError:
        return ""
    except ValueError as error:
        reason = str(error)
    return str(damaged(run_dir / METRICS, reason, _remedy(run_dir)))


def objectives(run_dir: Path, metrics: Sequence[str], status: Mapping[str, Any]) -> tuple[tuple[float, ...], str, str]:
    """Return a finished run's values of metrics, or none and why one is missing, and a warning, as `_objective`."""
    found = [_objective(run_dir, metric, status) for metric in metrics]
    values = tuple(value for value, _, _ in found if value is not None)
    problem = next((problem for _, problem, _ in found if problem), "")
    warnings = dict.fromkeys(warning for _, _, warning in found if warning)
    return () if problem else values, problem, "; ".join(warnings)


def _objective(run_dir: Path, metric: str, status: Mapping[str, Any]) -> tuple[float | None, str, str]:
    """Return a finished run's value of the metric, or why it has none, and a warning.

    Where summary.json is damaged or missing, the value is that of metrics.jsonl, which has the same.
    """
    file = run_dir / SUMMARY
    try:
        summary = read_json(file)
        if status.get("summary") not in (None, records.file_digest(file)):
            raise damaged(file, "it does not have the checksum that it was written with (status.json)", "")
    except (FileNotFoundError, DamagedFileError) as error:
        problem = str(error).rstrip(".") if isinstance(error, DamagedFileError) else f"{file} is missing"
        if (logged := _logged(run_dir, metric, status)) is not None:
            return logged, "", f"{problem}; its value is that of {run_dir / METRICS}"
        return None, f"{problem}. {_remedy(run_dir)}", ""
    value = summary.get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value), "", ""
    if metric in summary:
        return None, f"{metric} is no finite number", ""
    known = ", ".join(name for name in summary if name.startswith(metric.split("/")[0]))
    return None, f"it has no value of {metric}{f'; it has {known}' if known else ''}", ""


def _logged(run_dir: Path, metric: str, status: Mapping[str, Any]) -> float | None:
    """Return a finished run's value of a metric by its journal; None where that has none, or is not whole."""
    try:
        lines = read_step_log(run_dir, METRICS)
    except DamagedFileError:
        return None
    if (status.get("journal") or {}).get(METRICS) != Digest(b"".join(line.raw for line in lines)).as_dict():
        return None
    name = metric.removeprefix("best/")
    values = [line.content[name] for line in lines if name in line.content]
    if not values or None in values:
        return None
    best = max if greater_is_better(name) else min
    return float(values[-1] if name == metric else best(values))


def reported(run_dir: Path, metrics: Sequence[str]) -> tuple[list[list[float]], float]:
    """Return a run's values of each metric at its evaluations, and how many seconds it had taken by its last line."""
    names = [metric.removeprefix("best/") for metric in metrics]
    try:
        lines = [line.content for line in read_step_log(run_dir, METRICS)]
    except DamagedFileError:  # the run itself reports it, when it resumes
        lines = []
    values = [[float(line[name]) for line in lines if line.get(name) is not None] for name in names]
    return values, max((line.get("perf/elapsed_seconds") or 0.0 for line in lines), default=0.0)


def _remedy(run_dir: Path) -> str:
    return f"Restore it from a copy; or move {run_dir} away: the same command then runs the trial anew"
