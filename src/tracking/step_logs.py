"""metrics.jsonl and samples.jsonl: files that grow by lines of a step. How they are read, checked and compared.

A line of metrics says that its step is complete, evaluation and samples included. Only a last line that a dying process
did not finish may be missing: a file that is otherwise not as it was written is refused before anything is changed,
because which evaluation was the best is read from it.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from src.errors import DamagedFileError
from src.records import Digest, LogLine, begins_with, check_keys, damaged, read_bytes, read_lines

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
STEP_LOGS = (METRICS, SAMPLES)


class LogDigest:
    """The digest of a log: of all of it, and without the lines of its last step, which may be repeated."""

    def __init__(self) -> None:
        self.digest = Digest()
        self._last_step = -1
        self._without_last = self.digest.as_dict()

    def add(self, step: int, raw: bytes) -> None:
        if step > self._last_step:
            self._last_step, self._without_last = step, self.digest.as_dict()
        self.digest.add(raw)

    def before(self, step: int) -> dict[str, Any]:
        """Return the digest of the lines of earlier steps; `step` is the last one, or one that is still to come."""
        return self._without_last if step <= self._last_step else self.digest.as_dict()

    def check_size(self, file: Path) -> None:
        """Raise DamagedFileError where a log is not as long as it was left: another line would hide the hole in it."""
        size = file.stat().st_size if file.exists() else 0
        if size != self.digest.num_bytes:
            raise _changed_meanwhile(file, f"it has {size:,} bytes instead of {self.digest.num_bytes:,}")

    def check_content(self, file: Path) -> None:
        """Raise DamagedFileError where a log does not have the content that was written."""
        try:
            content = read_bytes(file, None)
        except FileNotFoundError:
            content = b""
        except ValueError as error:
            raise _changed_meanwhile(file, str(error)) from error
        if Digest(content).as_dict() != self.digest.as_dict():
            raise _changed_meanwhile(file, "its content does not have the checksum of what was written")


def _changed_meanwhile(file: Path, reason: str) -> DamagedFileError:
    remedy = "Restore it from a copy; or resume without what it said, with checkpoint.allow_changed=true"
    return damaged(file, reason, f"It was changed or removed while the run was training. {remedy}")


def read_step_log(path: Path, name: str) -> list[LogLine]:
    """Return the lines of a run's metrics.jsonl or samples.jsonl, without a last one that was not finished.

    DamagedFileError names file and line, and how to repair it.
    """
    remedy = (
        "Nothing was changed. Restore the line from a copy; or remove it "
        f"(sed -i '{{number}}d' {shlex.quote(str(path / name))}) and resume without what it said, with "
        "checkpoint.allow_changed=true"
    )
    return read_lines(path / name, _check_metrics if name == METRICS else _check_sample, remedy=remedy)


def _check_metrics(line: dict[str, Any], before: dict[str, Any] | None) -> None:
    check_keys(line, {"step": int})
    if line["step"] <= (before["step"] if before else -1):
        raise ValueError(f"step {line['step']} comes after step {before['step'] if before else 0}")
    check_keys(line, dict.fromkeys(line, (int, float, NoneType)))


def _check_sample(line: dict[str, Any], before: dict[str, Any] | None) -> None:
    check_keys(line, {"step": int, "prompt": str, "text": str})
    if line["step"] < (before["step"] if before else 0):
        raise ValueError(f"step {line['step']} comes after step {before['step'] if before else 0}")


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line by name, without those that are null."""
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def is_timing(name: str) -> bool:
    """Return whether a metric is a time, a speed or a use of the machine, which no two runs have alike."""
    return name.startswith(("perf/", "system/"))  # the latter is MLflow's name of perf/system/


def metrics_at(path: Path, step: int | None) -> dict[str, Any] | None:
    """Return the line of metrics of a step, as `read_step_log`; None where there is none."""
    lines = read_step_log(path, METRICS) if step is not None else []
    return next((line.content for line in lines if line.content["step"] == step), None)


def compare_logs(
    path: Path, saved: Mapping[str, Mapping[str, Any]], last: Mapping[str, Any], step: int | None
) -> list[DamagedFileError]:
    """Return an error for each log that is not as it was written.

    Each must begin with the bytes it had when the checkpoint of `step` was `saved`, and with the `last` ones that
    status.json knows.
    """
    remedy = "Restore it from a copy; or resume with it as it is, with checkpoint.allow_changed=true"
    found = []
    for name in STEP_LOGS:
        content = b"".join(line.raw for line in read_step_log(path, name))
        at_save, at_status, reason = saved.get(name), last.get(name), ""
        if at_save is not None and not begins_with(content, at_save):
            size = at_save["num_bytes"]
            reason = f"it does not begin with the {size:,} bytes that it had when step {step} was saved"
        elif at_status is not None and not begins_with(content, at_status):
            reason = "its content does not have the checksum that it was written with (status.json)"
        if reason:
            found.append(damaged(path / name, reason, remedy))
    return found
