"""A sweep's folder: what it was made of, which trials it has, and how each of them stands. No torch here.

`sweep.json` says what the sweep is and how far, `trials.jsonl` holds every trial with its frozen configuration, `conf/`
the options that it was composed of, and each trial's own folder is the truth about that run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import secrets
from src.config.frozen import SWEEP, read_status
from src.config.options import option_files
from src.errors import DamagedFileError, SweepError
from src.records import (
    LARGEST_YAML_BYTES,
    Types,
    damaged,
    read_bytes,
    read_json,
    read_lines,
    write_atomically,
    write_json,
)
from src.sweep.trial import Trial, check_trial
from src.sweep.workers import log_file
from src.tracking.journal import LOCK, holder_of, read_growing

REMEDY = "Restore it from a copy; or another sweep.name begins another, force=true removes this one and begins anew."
SWEEP_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("name", "id", "state", "started", "updated"), str),
    **dict.fromkeys(("space", "sweep", "counts"), dict),
    "history": list,
    "elapsed_seconds": (int, float),
}
HISTORY_KEYS = {"value", "best", "elapsed_seconds"}
TRIALS, CONF = "trials.jsonl", "conf"
STATES = ("FINISHED", "FAILED", "PRUNED", "PREEMPTED", "RUNNING", "WAITING")


@dataclass(frozen=True)
class Standing:
    """How a trial stands, by its folder."""

    state: str
    """One of STATES."""
    value: float | None = None
    cause: str = ""
    log: Path | None = None
    step: int = 0
    num_steps: int | None = None
    last: float | None = None
    """The newest value of the metric, of one that has not finished."""
    elapsed_seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to run."""
        return self.state in ("FINISHED", "PRUNED")


class Record:
    """The folder of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_dir(self, number: int) -> Path:
        return self.folder / str(number)

    def read(self) -> dict[str, Any]:
        """Give what sweep.json says; empty where there is no sweep.

        Raises:
            SweepError: where the folder is something else.
            DamagedFileError: where it can't be read.
        """
        try:
            content = read_json(self.folder / SWEEP, SWEEP_KEYS, remedy=REMEDY)
        except FileNotFoundError:
            self.refuse_other()
            return {}
        if not isinstance(content.get("signatures", []), list):
            raise damaged(self.folder / SWEEP, "signatures is no list", REMEDY)
        for entry in content["history"]:
            if not isinstance(entry, dict) or HISTORY_KEYS - entry.keys():
                raise damaged(self.folder / SWEEP, f"history holds {str(entry)[:40]}", REMEDY)
        return content

    def refuse_other(self) -> None:
        """Refuse a folder that is no sweep's.

        Raises:
            SweepError: naming what it holds.
        """
        if os.path.lexists(self.folder / SWEEP):
            return
        others = [one.name for one in self.folder.glob("*") if one.name not in (LOCK, CONF) and one.suffix != ".part"]
        if others and not (self.folder / TRIALS).exists():
            held = ", ".join(sorted(others)[:5])
            raise SweepError(f"{self.folder} is no sweep's folder, but holds {held}; choose another sweep.name")

    def numbers(self) -> list[int]:
        """Return the numbers of the trials that have a folder."""
        return sorted(int(one.name) for one in self.folder.glob("[0-9]*") if one.name.isdecimal() and one.is_dir())

    def write(self, content: Mapping[str, Any]) -> None:
        write_json(self.folder / SWEEP, secrets.masked(content))

    def trials(self) -> list[Trial]:
        """Return the trials that were written down.

        Raises:
            DamagedFileError: naming the line that is none, or not the one that was written.
        """
        return [Trial.from_dict(line.content) for line in read_lines(self.folder / TRIALS, check_trial, remedy=REMEDY)]

    def write_trials(self, trials: Sequence[Trial]) -> None:
        text = "".join(json.dumps(trial.as_dict(), ensure_ascii=False) + "\n" for trial in trials)
        write_atomically(self.folder / TRIALS, text)

    def keep_conf(self, roots: Sequence[Path]) -> None:
        """Keep the options that this sweep is composed of, unless they are those that were kept."""
        if list(roots) == self.conf():
            return
        beside = self.folder / f".{CONF}.part"
        shutil.rmtree(beside, ignore_errors=True)
        for number, root in enumerate(roots):
            (beside / str(number)).mkdir(parents=True)
            for name, content in _contents(root).items():
                file = beside / str(number) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(_without_secrets(content))
        shutil.rmtree(self.folder / CONF, ignore_errors=True)
        beside.rename(self.folder / CONF)

    def conf(self) -> list[Path]:
        """Give the kept options, one folder a root; empty where there are none."""
        found = [one for one in (self.folder / CONF).resolve().glob("[0-9]*") if one.name.isdecimal()]
        return sorted(found, key=lambda one: int(one.name))

    def clear(self) -> None:
        """Remove everything: the sweep is done anew."""
        last = (self.folder / SWEEP, self.folder / TRIALS)  # they are what makes the folder a sweep's
        for one in [*(one for one in self.folder.glob("*") if one not in last), *last]:
            if one.is_dir():
                shutil.rmtree(one)
            elif one.name != LOCK:
                one.unlink(missing_ok=True)

    def standing(self, number: int, metric: str, *, is_running: bool = False) -> Standing:
        """Tell how a trial stands.

        Args:
            metric: the objective, by its name in summary.json.
            is_running: whether its process lives; a status that says so by itself may be a dead one's.
        """
        run_dir = self.run_dir(number)
        log = log_file(run_dir) if log_file(run_dir).exists() else None
        try:
            status = read_status(run_dir)
        except DamagedFileError as error:
            return Standing("FAILED", None, str(error), log)
        state = status.get("state", "WAITING")
        step, num_steps = status.get("step", 0), status.get("num_steps")
        cause = " ".join(line.strip() for line in (status.get("cause") or "").strip().split("\n")[:2]).rstrip(":")
        if is_running:
            return Standing("RUNNING", None, "", log, step, num_steps, *_newest(run_dir, metric))
        if state == "FINISHED":
            value, missing = _objective(run_dir, metric)
            return Standing("FAILED" if missing else state, value, missing, log, step, num_steps)
        if state == "RUNNING":
            state, cause = "FAILED", f"killed at step {step}"
        return Standing(
            state, None, cause, log, step, num_steps, *(_newest(run_dir, metric) if state != "WAITING" else ())
        )

    def held(self, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Give the trials whose folder a living process holds, and which."""
        for number in numbers:
            if (self.run_dir(number) / LOCK).exists() and (holder := holder_of(self.run_dir(number))):
                yield number, f"{self.run_dir(number)} is in use by another process: {holder}"


def _contents(root: Path) -> dict[str, bytes]:
    """Return what the option files in a folder hold, by their names in it; those that can't be read are left out."""
    found = {}
    for file in option_files(root):
        with suppress(OSError, ValueError):  # it was a warning when the command was checked, or nothing can choose it
            found[str(file.relative_to(root))] = read_bytes(file, LARGEST_YAML_BYTES)
    return found


def _without_secrets(content: bytes) -> bytes:
    """Mask credentials of URLs in a file's content; they come back as those of a frozen configuration do."""
    return secrets.without_credentials(content.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def differing(kept: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """Return the option files of `roots` that are others now than those that were kept."""
    if len(kept) != len(roots):
        return [str(root) for root in roots]
    return [name for pair in zip(kept, roots, strict=True) for name in _differing(*map(_contents, pair))]


def _differing(kept: Mapping[str, bytes], now: Mapping[str, bytes]) -> list[str]:
    """Return the names of files that are not the same; what was kept has no credentials."""
    names = sorted(kept.keys() | now.keys())
    return [name for name in names if name not in kept or name not in now or kept[name] != _without_secrets(now[name])]


def _objective(run_dir: Path, metric: str) -> tuple[float | None, str]:
    """Give a finished run's value of the metric, or why it has none."""
    try:
        summary = read_json(run_dir / "summary.json")
    except FileNotFoundError:
        return None, "summary.json is missing"
    except DamagedFileError as error:
        return None, str(error)
    value = summary.get(metric)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value), ""
    if metric in summary:
        return None, f"{metric} is no finite number"
    known = ", ".join(name for name in summary if name.startswith(metric.split("/")[0]))
    return None, f"no {metric} came of it{f'; there are {known}' if known else ''}"


def _newest(run_dir: Path, metric: str) -> tuple[float | None, float]:
    """Give the newest value of the metric, and how many seconds the run had taken by its last line."""
    value, elapsed = None, 0.0
    name = metric.removeprefix("best/")
    try:
        lines = read_growing(run_dir, "metrics.jsonl")
    except DamagedFileError:  # told by the run itself, when it goes on
        lines = []
    for line in (one.content for one in reversed(lines)):
        elapsed = max(elapsed, line.get("perf/elapsed_seconds") or 0.0)
        if line.get(name) is not None:
            value = float(line[name])
            break
    return value, elapsed
