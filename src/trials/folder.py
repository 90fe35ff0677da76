"""A sweep's folder: what it was made of, which trials it has, and the status of each. No torch here.

`sweep.json` says what the sweep is and how far, `trials.jsonl` holds every trial with its frozen configuration, `conf/`
the options that it was composed of, and each trial's own folder is the truth about that run.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src import records, secrets
from src.config.frozen import SWEEP, config_hash, read_starts, read_status
from src.errors import DamagedFileError, SweepError
from src.records import read_bytes, read_lines
from src.tracking.lock import LOCK, holder_of
from src.tracking.objective import foreign_journal, objectives, reported
from src.tracking.sweep_files import holds_another, read_sweep
from src.trials.trial import Trial, check_trial
from src.util import listed, write_atomically, write_json

REMEDY = "Restore it from a copy; or another sweep.name begins another, force=true removes this one and begins anew."
MORE_KEYS: Mapping[str, records.Types] = {"id": str, "elapsed_seconds": records.NUMBER}  # read by sweeps only
TRIALS, CONF = "trials.jsonl", "conf"
TRIAL_STATES = ("FINISHED", "FAILED", "PRUNED", "PREEMPTED", "RUNNING", "WAITING")


@dataclass(frozen=True)
class TrialStatus:
    """The status of a trial, by its folder."""

    state: str  # one of TRIAL_STATES
    values: tuple[float, ...] = ()  # of each metric of the sweep; empty where one is missing
    cause: str = ""
    log: Path | None = None
    step: int = 0
    num_steps: int | None = None
    last: tuple[float | None, ...] = ()  # the newest value of each metric, of one that has not finished
    elapsed_seconds: float = 0.0
    warning: str = ""  # what is damaged of a trial that counts nevertheless
    was_killed: bool = False  # whether its process ended without a word, so that its folder still says RUNNING
    is_damaged: bool = False  # whether its cause is something in its folder that the user must fix first

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to run."""
        return self.state in ("FINISHED", "PRUNED")

    @property
    def newest(self) -> tuple[float | None, ...]:
        """Its values, or of one that has not finished the newest of each metric."""
        return self.values or self.last


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_dir(self, number: int) -> Path:
        return self.folder / str(number)

    def read(self) -> dict[str, Any]:
        """Return what sweep.json says, empty where there is no sweep; SweepError: the folder is something else."""
        try:
            return read_sweep(self.folder, MORE_KEYS, REMEDY)
        except FileNotFoundError:
            self.refuse_other()
            return {}

    def refuse_other(self) -> None:
        """Raise SweepError for a folder that is no sweep's, naming what it holds."""
        if os.path.lexists(self.folder / SWEEP):
            return
        others = [one.name for one in self.folder.glob("*") if one.name not in (LOCK, CONF) and one.suffix != ".part"]
        if others and not (self.folder / TRIALS).exists():
            held = ", ".join(sorted(others)[:5])
            raise SweepError(f"{self.folder} is no sweep's folder, but holds {held}; choose another sweep.name")

    @property
    def conf(self) -> Path:
        """Where the options are kept that the sweep is composed of, see src.config.kept."""
        return self.folder / CONF

    def numbers(self) -> list[int]:
        """Return the numbers of the trials that have a folder."""
        return sorted(int(one.name) for one in self.folder.glob("[0-9]*") if one.name.isdecimal() and one.is_dir())

    def write(self, content: Mapping[str, Any]) -> None:
        write_json(self.folder / SWEEP, secrets.masked(content))

    def trials(self) -> list[Trial]:
        """Return the trials that were written down; DamagedFileError names a line that is not as it was written."""
        return [Trial.from_dict(line.content) for line in read_lines(self.folder / TRIALS, check_trial, remedy=REMEDY)]

    def write_trials(self, trials: Sequence[Trial]) -> None:
        write_atomically(self.folder / TRIALS, "".join(map(_line, trials)))

    def add_trials(self, trials: Sequence[Trial]) -> None:
        """Write down trials after those that are there; an unfinished line of a dying process counts as none."""
        with open(self.folder / TRIALS, "a", encoding="utf-8") as file:
            file.writelines(map(_line, trials))
            file.flush()
            os.fsync(file.fileno())

    def check_places(self, trials: Sequence[Trial]) -> None:
        """Check that each trial's folder holds its run, or none yet; DamagedFileError says which don't, and whose."""
        owners = {config_hash(trial.config): trial.number for trial in trials}
        found = []
        for trial in trials:
            folder = self.run_dir(trial.number)
            with suppress(DamagedFileError):  # it is that trial's failure, see `status`
                if reason := holds_another(folder, trial.config):
                    starts = read_starts(folder)
                    owner = owners.get(starts[-1]["config_hash"]) if starts else None
                    found.append(f"{folder}: {reason}{'' if owner is None else f', that of trial {owner}'}")
        if found:
            raise DamagedFileError(
                f"{len(found)} of the folders of {self.folder} are not those of their trials by {TRIALS}:\n"
                f"{listed(found)}\nNothing was changed. Give each its name again; or move one away, and the same "
                "command runs that trial anew."
            )

    def obstacle(self, number: int) -> str:
        """Return what is in the way of a trial's folder, and what to do; '' where nothing is."""
        log = log_file(self.run_dir(number))
        is_right = {"folder": os.path.isdir, "plain file": os.path.isfile}
        for place, kind in {self.run_dir(number): "folder", log.parent: "folder", log: "plain file"}.items():
            if os.path.lexists(place) and not is_right[kind](place):
                return f"{place} is no {kind}. Move it away: the same command then runs the trial"
        return ""

    def make_room(self, number: int) -> str:
        """Make the place for what a trial prints; return why that can't be done, or ''."""
        log = log_file(self.run_dir(number))
        if reason := self.obstacle(number):
            return reason
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("ab").close()
        except OSError as error:
            return f"{error.filename or log} can't be written: {error.strerror}"
        return ""

    def clear(self) -> None:
        """Remove everything, what makes the folder a sweep's last: the sweep is done anew."""
        for one in sorted(self.folder.glob("*"), key=lambda one: one.name in (SWEEP, TRIALS)):
            if one.is_dir():
                shutil.rmtree(one)
            elif one.name != LOCK:
                one.unlink(missing_ok=True)

    def status(self, number: int, metrics: tuple[str, ...], *, is_running: bool = False) -> TrialStatus:
        """Return the status of a trial with its values of metrics, by their names in summary.json.

        `is_running`: its process lives; a status that says so by itself may be a dead one's.
        """
        run_dir = self.run_dir(number)
        log = log_file(run_dir) if os.path.isfile(log_file(run_dir)) else None
        obstacle = self.obstacle(number)
        obstructed = TrialStatus("FAILED", (), obstacle, is_damaged=True)
        if obstacle and not run_dir.is_dir():
            return obstructed
        try:
            status = read_status(run_dir)
        except DamagedFileError as error:
            return TrialStatus("FAILED", (), str(error), log, is_damaged=True)
        cause = " ".join(line.strip() for line in (status.get("cause") or "").strip().split("\n")[:2]).rstrip(":")
        state, step = status.get("state", "WAITING"), status.get("step", 0)
        found = TrialStatus(state, (), cause, log, step, status.get("num_steps"))
        if is_running:
            found = replace(found, state="RUNNING", cause="")
        elif obstacle and not found.is_over:
            return obstructed
        elif found.is_over and (problem := foreign_journal(run_dir, status)):
            return replace(found, state="FAILED", cause=problem, is_damaged=True)
        elif found.state == "FINISHED":
            values, problem, warning = objectives(run_dir, metrics, status)
            state = "FAILED" if problem else "FINISHED"
            return replace(found, state=state, values=values, cause=problem, warning=warning)
        elif found.state == "RUNNING":
            found = replace(found, state="FAILED", cause=f"killed at step {found.step}", was_killed=True)
        if found.state == "WAITING":
            return found
        reports, elapsed_seconds = reported(run_dir, metrics)
        last = tuple(values[-1] if values else None for values in reports)
        return replace(found, last=last, elapsed_seconds=elapsed_seconds)

    def reports(self, number: int, metric: str) -> list[float]:
        """Return what a trial has reported: its values of the metric at its evaluations."""
        return reported(self.run_dir(number), [metric])[0][0]

    def held(self, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield the trials whose folder a living process holds, and which."""
        for number in numbers:
            if holder := holder_of(self.run_dir(number)):
                yield number, f"{self.run_dir(number)} is in use by another process: {holder}"


def log_file(run_dir: Path) -> Path:
    """Return the file that holds what a trial prints."""
    return run_dir / "logs" / "output.log"


def _line(trial: Trial) -> str:
    return json.dumps(trial.as_dict(), ensure_ascii=False) + "\n"


def written_ns(file: Path) -> int | None:
    """Return when a file was last written, in nanoseconds; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def last_words(log: Path | None) -> str:
    """Return the last line that a trial printed."""
    try:
        lines = read_bytes(log).decode(errors="replace").split("\n") if log is not None else []
    except (OSError, ValueError):  # it is gone by now, or not a file
        return ""
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
