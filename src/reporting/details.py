"""All that a run's folder says, for the pages; what can't be read is left out and said."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from src.config.frozen import PROVENANCE, read_starts
from src.errors import DamagedFileError
from src.records import read_json
from src.reporting.runs import Run, read_run
from src.tracking.step_logs import METRICS, SAMPLES, read_step_log

DATA_REPORT = "data_report.json"
EVALUATION = "evaluations/evaluation.json"
EVALUATION_KEYS = dict.fromkeys(("metrics", "comparisons"), dict)
Read = TypeVar("Read")


@dataclass
class Details:
    """A run with its logs and records; `name` is what the page calls it."""

    run: Run
    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # what src.evaluate wrote; empty where it did not run
    problems: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.run.folder


def read_details(folder: Path, name: str = "") -> Details:
    """Read a run's folder."""
    run = read_run(folder)
    found = Details(run, name or str(folder))
    if run.facts["state"] == "DAMAGED":
        found.problems.append(str(run.facts["cause"]))

    def read(reader: Callable[[], Read], otherwise: Read) -> Read:
        try:
            return reader()
        except FileNotFoundError as error:
            found.problems.append(f"{error.filename} is missing")
        except DamagedFileError as error:
            found.problems += [str(error)] if str(error) not in " ".join(found.problems) else []
        return otherwise

    found.lines = read(lambda: [line.content for line in read_step_log(folder, METRICS)], [])
    found.samples = read(lambda: [line.content for line in read_step_log(folder, SAMPLES)], [])
    found.data = read(lambda: read_json(folder / DATA_REPORT), {})
    found.provenance = read(lambda: read_json(folder / PROVENANCE), {})
    found.starts = read(lambda: read_starts(folder), [])
    if os.path.lexists(folder / EVALUATION):
        found.evaluation = read(lambda: read_json(folder / EVALUATION, EVALUATION_KEYS), {})
    return found
