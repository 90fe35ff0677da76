"""A sweep's folder: what it was made of, which trials it has, and the status of each. No torch here.

`sweep.json` says what the sweep is and how far, `trials.jsonl` holds every trial with its frozen configuration, `conf/`
the options that it was composed of, and each trial's own folder is the truth about that run.
"""

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
from src.config.frozen import STATUS, SWEEP, config_hash, read_starts, read_status
from src.config.options import option_files
from src.errors import DamagedFileError, SweepError
from src.metrics import greater_is_better
from src.records import (
    LARGEST_YAML_BYTES,
    NUMBER,
    Digest,
    Types,
    begins_with,
    damaged,
    file_digest,
    names_in,
    read_bytes,
    read_json,
    read_lines,
)
from src.sweep.trial import Trial, check_trial
from src.sweep.workers import log_file
from src.tracking.lock import LOCK, holder_of
from src.tracking.run_folder import SUMMARY
from src.tracking.step_logs import METRICS, read_step_log
from src.tracking.sweep_files import holds_another, read_sweep
from src.util import listed, write_atomically, write_json

REMEDY = "Restore it from a copy; or another sweep.name begins another, force=true removes this one and begins anew."
MORE_KEYS: Mapping[str, Types] = {"id": str, "elapsed_seconds": NUMBER}
"""Keys of sweep.json that only the sweep itself reads."""
MANIFEST = "manifest.json"
"""The file in the folder of kept options that has size and checksum of each."""
TRIALS, CONF = "trials.jsonl", "conf"
TRIAL_STATES = ("FINISHED", "FAILED", "PRUNED", "PREEMPTED", "RUNNING", "WAITING")


@dataclass(frozen=True)
class TrialStatus:
    """The status of a trial, by its folder."""

    state: str  # one of TRIAL_STATES
    value: float | None = None
    cause: str = ""
    log: Path | None = None
    step: int = 0
    num_steps: int | None = None
    last: float | None = None  # the newest value of the metric, of one that has not finished
    elapsed_seconds: float = 0.0
    warning: str = ""  # what is damaged of a trial that counts nevertheless
    is_damaged: bool = False  # whether its cause is something in its folder that the user must fix first

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to run."""
        return self.state in ("FINISHED", "PRUNED")


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_dir(self, number: int) -> Path:
        return self.folder / str(number)

    def read(self) -> dict[str, Any]:
        """Return what sweep.json says; empty where there is no sweep.

        Raises:
            SweepError: where the folder is something else.
            DamagedFileError: where it can't be read.
        """
        try:
            return read_sweep(self.folder, MORE_KEYS, REMEDY)
        except FileNotFoundError:
            self.refuse_other()
            return {}

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

    def check_places(self, trials: Sequence[Trial]) -> None:
        """Check that the folder of each trial holds that trial's run, or none yet.

        Raises:
            DamagedFileError: naming those that hold another one, and whose.
        """
        owners = {config_hash(trial.config): trial.number for trial in trials}
        found = []
        for trial in trials:
            folder = self.run_dir(trial.number)
            try:
                if reason := holds_another(folder, trial.config):
                    starts = read_starts(folder)
                    owner = owners.get(starts[-1]["config_hash"]) if starts else None
                    found.append(f"{folder}: {reason}{'' if owner is None else f', that of trial {owner}'}")
            except DamagedFileError:
                continue  # it is that trial's failure, see `status`
        if found:
            raise DamagedFileError(
                f"{len(found)} of the folders of {self.folder} are not those of their trials by {TRIALS}:\n"
                f"{listed(found)}\nNothing was changed. Give each its name again; or move one away, and the same "
                "command runs that trial anew."
            )

    def obstacle(self, number: int) -> str:
        """Return what is in the way of a trial's folder, and what to do; '' where nothing is."""
        log = log_file(self.run_dir(number))
        for place, is_right, kind in (
            (self.run_dir(number), os.path.isdir, "folder"),
            (log.parent, os.path.isdir, "folder"),
            (log, os.path.isfile, "plain file"),
        ):
            if os.path.lexists(place) and not is_right(place):
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

    def keep_conf(self, roots: Sequence[Path]) -> None:
        """Keep the options that this sweep is composed of, unless they are those that were kept."""
        if list(roots) == self.conf():
            return
        part = self.folder / f".{CONF}.part"
        shutil.rmtree(part, ignore_errors=True)
        digests = {}
        for number, root in enumerate(roots):
            (part / str(number)).mkdir(parents=True)
            for name, content in _contents(root).items():
                file, kept = part / str(number) / name, _without_secrets(content)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(kept)
                digests[f"{number}/{name}"] = Digest(kept).as_dict()
        write_json(part / MANIFEST, {"files": digests})
        shutil.rmtree(self.folder / CONF, ignore_errors=True)
        part.rename(self.folder / CONF)

    def check_conf(self) -> None:
        """Check that the kept options are those that were kept; an earlier version did not write down what they were.

        Raises:
            DamagedFileError: naming those that are not.
        """
        folder = self.folder / CONF
        remedy = f"Restore it from a copy; or move {folder} away: the same command is then composed of conf/ as it is"
        try:
            kept = read_json(folder / MANIFEST, {"files": dict}, remedy=remedy)["files"]
        except FileNotFoundError:
            return
        found = {
            f"{root.name}/{name}": Digest(content).as_dict()
            for root in self.conf()
            for name, content in _contents(root).items()
        }
        if others := sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name)):
            raise damaged(folder, f"not as it was written: {', '.join(others[:5])}", remedy)

    def conf(self) -> list[Path]:
        """Return the kept options, one folder a root; empty where there are none.

        Raises:
            DamagedFileError: where they can't be looked into, so that others would be taken for them.
        """
        place = self.folder / CONF
        try:
            return [place.resolve() / name for name in sorted(filter(str.isdecimal, names_in(place)), key=int)]
        except ValueError as error:
            raise damaged(place, f"it can't be looked into: {error}", REMEDY) from error

    def clear(self) -> None:
        """Remove everything: the sweep is done anew."""
        last = (self.folder / SWEEP, self.folder / TRIALS)  # they are what makes the folder a sweep's
        for one in [*(one for one in self.folder.glob("*") if one not in last), *last]:
            if one.is_dir():
                shutil.rmtree(one)
            elif one.name != LOCK:
                one.unlink(missing_ok=True)

    def status(self, number: int, metric: str, *, is_running: bool = False) -> TrialStatus:
        """Return the status of a trial.

        Args:
            metric: the objective, by its name in summary.json.
            is_running: whether its process lives; a status that says so by itself may be a dead one's.
        """
        run_dir = self.run_dir(number)
        obstacle = self.obstacle(number)
        if obstacle and not run_dir.is_dir():
            return TrialStatus("FAILED", None, obstacle, is_damaged=True)
        log = log_file(run_dir) if os.path.isfile(log_file(run_dir)) else None
        try:
            status = read_status(run_dir)
        except DamagedFileError as error:
            return TrialStatus("FAILED", None, str(error), log, is_damaged=True)
        state = status.get("state", "WAITING")
        step, num_steps = status.get("step", 0), status.get("num_steps")
        cause = " ".join(line.strip() for line in (status.get("cause") or "").strip().split("\n")[:2]).rstrip(":")
        if is_running:
            return TrialStatus("RUNNING", None, "", log, step, num_steps, *_newest(run_dir, metric))
        if obstacle and state not in ("FINISHED", "PRUNED"):
            return TrialStatus("FAILED", None, obstacle, is_damaged=True)
        if state in ("FINISHED", "PRUNED") and (problem := _foreign_journal(run_dir, status)):
            return TrialStatus("FAILED", None, problem, log, step, num_steps, is_damaged=True)
        if state == "FINISHED":
            value, problem, warning = _objective(run_dir, metric, status)
            state = "FAILED" if problem else state
            return TrialStatus(state, value, problem, log, step, num_steps, warning=warning)
        if state == "RUNNING":
            state, cause = "FAILED", f"killed at step {step}"
        return TrialStatus(
            state, None, cause, log, step, num_steps, *(_newest(run_dir, metric) if state != "WAITING" else ())
        )

    def held(self, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield the trials whose folder a living process holds, and which."""
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


def _remedy(run_dir: Path) -> str:
    return f"Restore it from a copy; or move {run_dir} away: the same command then runs the trial anew"


def _foreign_journal(run_dir: Path, status: Mapping[str, Any]) -> str:
    """Return why a status.json is not the one of the run whose metrics lie next to it; '' where it is."""
    digest = (status.get("journal") or {}).get(METRICS)
    try:
        if digest is None or begins_with(read_bytes(run_dir / METRICS, None), digest):
            return ""
        reason = "its content does not have the checksum that it was written with (status.json)"
    except FileNotFoundError:
        return ""
    except ValueError as error:
        reason = str(error)
    return str(damaged(run_dir / METRICS, reason, _remedy(run_dir)))


def _objective(run_dir: Path, metric: str, status: Mapping[str, Any]) -> tuple[float | None, str, str]:
    """Return a finished run's value of the metric, or why it has none, and a warning.

    Where summary.json is damaged or missing, the value is that of metrics.jsonl, which has the same.
    """
    file = run_dir / SUMMARY
    try:
        summary = read_json(file)
        if status.get("summary") not in (None, file_digest(file)):
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
    if name == metric:
        return float(values[-1])
    return float((max if greater_is_better(name) else min)(values))


def _newest(run_dir: Path, metric: str) -> tuple[float | None, float]:
    """Return the newest value of the metric, and how many seconds the run had taken by its last line."""
    value, elapsed = None, 0.0
    name = metric.removeprefix("best/")
    try:
        lines = read_step_log(run_dir, METRICS)
    except DamagedFileError:  # the run itself reports it, when it resumes
        lines = []
    for line in (one.content for one in reversed(lines)):
        elapsed = max(elapsed, line.get("perf/elapsed_seconds") or 0.0)
        if line.get(name) is not None:
            value = float(line[name])
            break
    return value, elapsed


def status_written_ns(run_dir: Path) -> int | None:
    """Return when a run's status.json was last written, in nanoseconds; None where there is none."""
    try:
        return (run_dir / STATUS).stat().st_mtime_ns
    except OSError:
        return None


def last_words(log: Path | None) -> str:
    """Return the last line that a trial printed."""
    content = b""
    if log is not None:
        with suppress(OSError, ValueError):  # it is gone by now, or not a file
            content = read_bytes(log)
    lines = content.decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
