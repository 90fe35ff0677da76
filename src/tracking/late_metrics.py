"""Metrics that are measured of a run after its end: they go into its summary, and from there to its tracker.

Their names begin as no other's do, LATE. A run that is extended writes its summary anew, without them: its model is
another one then.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.config.frozen import STATUS, read_status
from src.records import Digest, damaged, file_digest, read_json
from src.tracking.lock import hold
from src.tracking.run_folder import SUMMARY
from src.util import json_text, write_atomically, write_json

LATE = ("benchmark/",)
REMEDY = "Restore it from a copy; or move it away: then it will hold only what is measured from now on."


def late_metrics(run_dir: Path) -> dict[str, float]:
    """Return what was measured of a run after its end; DamagedFileError where its summary can't be read."""
    return {name: value for name, value in read_summary(run_dir).items() if name.startswith(LATE)}


def summary_metrics(run_dir: Path) -> dict[str, float]:
    """Return the numbers of a run's summary that no line of metrics has; DamagedFileError as `late_metrics`."""
    return {name: value for name, value in read_summary(run_dir).items() if is_of_summary(name)}


def is_of_summary(name: str) -> bool:
    """Return whether a metric is one of a run as a whole: late, the best of an evaluation, or a total."""
    return name.startswith((*LATE, "best/")) or "/" not in name


def read_summary(run_dir: Path) -> dict[str, float]:
    """Return the finite numbers of a run's summary, empty where there is none; DamagedFileError as `late_metrics`."""
    try:
        summary = read_json(run_dir / SUMMARY, remedy=REMEDY)
    except FileNotFoundError:
        return {}
    return {name: value for name, value in summary.items() if isinstance(value, int | float) and math.isfinite(value)}


def add_to_summary(run_dir: Path, metrics: Mapping[str, Any]) -> None:
    """Put metrics into the summary of a finished run, in place of those of the same names.

    RunFolderError where a process uses the folder; DamagedFileError where the summary is not the one that was written.
    """
    with hold(run_dir):
        status, file = read_status(run_dir), run_dir / SUMMARY
        before = read_json(file, remedy=REMEDY) if file.exists() else {}
        text = json_text(before | dict(metrics))
        digest = Digest(text.encode()).as_dict()
        if before and status.get("summary") not in (None, digest, file_digest(file)):
            raise damaged(file, f"it does not have the checksum that it was written with ({STATUS})", REMEDY)
        if not before or file_digest(file) != digest or status.get("summary") != digest:
            # without a checksum meanwhile: a process that dies here leaves the summary as it was, or as it is to be
            write_json(run_dir / STATUS, status | {"summary": None})
            write_atomically(file, text)
            write_json(run_dir / STATUS, status | {"summary": digest})
