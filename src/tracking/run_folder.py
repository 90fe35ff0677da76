"""The run's folder: the truth about a run, readable while it trains and whole after it died. No torch here.

A lock guards the folder against a second process (`tracking.lock`). Every file but the step logs is written under
another name and renamed, so that none is ever seen half written. A run that resumes from a checkpoint cuts off what was
logged of later steps, and repeats what was not complete.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from src import secrets
from src.config import trust
from src.config.frozen import CONFIG, PROVENANCE, STARTS, STATUS, read_starts, read_status
from src.config.places import CHECKPOINTS, remove_tree
from src.errors import DamagedFileError, Interrupted, Pruned, RunFolderError, report
from src.records import Digest, damaged, file_digest
from src.tracking.lock import process_identity
from src.tracking.own_files import RESULTS, remove_report, remove_results
from src.tracking.step_logs import METRICS, STEP_LOGS, LogDigest, compare_logs, read_step_log
from src.util import finite, sync, write_atomically, write_json

DATA_REPORT, SUMMARY = "data_report.json", "summary.json"
FOLDERS = (CHECKPOINTS, "model", *RESULTS, "tensorboard", "wandb", "profile")
FILES = (
    *(CONFIG, "deepspeed.json", STARTS, STATUS, *STEP_LOGS),
    *(DATA_REPORT, PROVENANCE, SUMMARY, "tracking.json", *FOLDERS),
)
"""What a run's folder holds; `force=true` removes these, a report of the run, and what other trackers remember
(`tracking-*.json`); in RESULTS only what commands wrote there."""


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins, and what it may do with what is in the folder."""

    step: int | None = None  # of the checkpoint that it resumes from; None: it starts from scratch
    changed: Mapping[str, Any] = field(default_factory=dict)  # keys that differ from that checkpoint's, and new values
    may_begin_again: bool = True  # whether a run that was stopped before its first checkpoint may be started again
    is_own: bool = True  # whether the checkpoint is this run's, not another one's
    force: bool = False
    journal: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # `RunFolder.journal_before` of that checkpoint
    allow_changed: bool = False


def make_room(path: Path, config_hash: str, start: Start) -> list[str]:
    """Remove what an earlier start left and this one can't use; return warnings.

    RunFolderError where that would cost what somebody may want, DamagedFileError where what the run resumes with can't
    be read.
    """
    found = [name for name in FILES if os.path.lexists(path / name)]
    if not found:
        return []
    if STATUS not in found and not {CONFIG, STARTS} <= set(found):
        raise RunFolderError(f"{path} is no run's folder, but holds {', '.join(found)}; choose another hydra.run.dir")
    states = [file.name for file in path.glob("tracking-*.json")]
    if start.force:
        _remove(path, [*found, *states])
        return []
    for name in found:
        kind, is_kind = ("folder", Path.is_dir) if name in FOLDERS else ("plain file", Path.is_file)
        if not is_kind(path / name):
            raise damaged(path / name, f"it is no {kind}", "Move it away: the same command writes it anew")
    status = read_status(path)
    step = status.get("step", 1)  # not known: it may have trained
    is_same = last_config_hash(path) == config_hash
    if start.step is not None and (start.is_own or is_same):
        return check_step_logs(path, status, start)
    if not start.may_begin_again or (step and not is_same):
        other = "it was made with another configuration (its config.yaml)"
        why = other if start.may_begin_again else "checkpoint.resume=never"
        raise RunFolderError(
            f"{path} holds a run that did not finish ({ending(status)}), and {why}.\n"
            f"Resume it as it was ({resume_command(path)}), or choose another hydra.run.dir; force=true removes what "
            f"is there ({', '.join(found)}) and starts again."
        )
    if not is_same:  # it failed before it trained, and its configuration was fixed since
        _remove(path, [name for name in (*found, *states) if name != STARTS])
        return []
    return [*check_step_logs(path, status, start), *_warn_of_repeat(path)]


def check_step_logs(path: Path, status: Mapping[str, Any], start: Start) -> list[str]:
    """Return warnings of step logs that are not as they were written; without checkpoint.allow_changed raise them."""
    found = compare_logs(path, start.journal, status.get("journal") or {}, start.step)
    if found and not start.allow_changed:
        raise found[0]
    return [str(error) for error in found]


def _warn_of_repeat(path: Path) -> list[str]:
    """Return a warning where a run without a checkpoint has logged steps, which will be repeated."""
    return [
        f"there is no checkpoint in {path / CHECKPOINTS}, so the run begins again: what was logged up to step "
        f"{last.content['step']} is removed, and those steps are repeated"
        for last in read_step_log(path, METRICS)[-1:]
    ]


def last_config_hash(path: Path) -> str | None:
    """Return the configuration's hash of the last start in a folder, as `read_starts`; None where there is none."""
    starts = read_starts(path)
    return starts[-1]["config_hash"] if starts else None


def ending(status: Mapping[str, Any]) -> str:
    """Return how a run ended that no process is training."""
    state = status.get("state", "RUNNING")  # nobody holds the folder: what was running has died
    how = f"{'killed' if state == 'RUNNING' else state} at step {status.get('step', 0)}"
    return how + (f", {status['cause'].splitlines()[0]}" if status.get("cause") else "")


def resume_command(path: Path) -> str:
    """Return the command that resumes a run."""
    return f"make resume run={shlex.quote(str(path))}"


def _remove(path: Path, names: Iterable[str]) -> None:
    remove_report(path)
    for name in sorted(names, key=lambda name: name == STATUS):  # last: it is what makes the folder a run's
        (remove_results if name in RESULTS else remove_tree)(path / name)


@dataclass(eq=False)
class RunFolder:
    """A run's folder that this process holds. Built by `open_run_folder`."""

    path: Path
    _config_hash: str
    warnings: Sequence[str] = ()  # what has changed in the files that the run resumes with
    step: int = 0
    num_steps: int | None = None  # None as long as it is not known how many there will be
    steps_per_epoch: int | None = None
    early_cause: str | None = None  # why the run ends before that
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called once status.json says how the run ended, while the folder is still held."""
    _status: dict[str, Any] = field(default_factory=dict)
    _logs: dict[str, LogDigest] = field(default_factory=dict)
    _finished: Mapping[str, Any] | None = None  # what status.json said before this start, of a run that is finished

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file at once."""
        write_json(self.path / name, content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a log, on its way to the disk; DamagedFileError where the log is not as long as it was left."""
        if name in self._logs and self.path.is_dir():  # of a folder that is gone, the write below says so
            self._logs[name].check_size(self.path / name)
        raw = (json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with open(self.path / name, "ab") as file:
            file.write(raw)
        if name in self._logs:
            self._logs[name].add(line["step"], raw)

    def check_step_logs(self) -> None:
        """Raise DamagedFileError where a step log is not what was written, OSError where the folder is gone."""
        os.listdir(self.path)  # a folder that is gone is reported as that
        for name, log in self._logs.items():
            log.check_content(self.path / name)

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        """Return size and checksum of what the step logs have of earlier steps; nothing before a `cut`."""
        return {name: log.before(step) for name, log in self._logs.items()}

    def set_status(self, **changes: Any) -> None:
        """Change what status.json says."""
        known = {"num_steps": self.num_steps, "steps_per_epoch": self.steps_per_epoch} if self.num_steps else {}
        journal = {"journal": {name: log.digest.as_dict() for name, log in self._logs.items()}}
        self._status |= changes | {"step": self.step, **known, "updated": now(), **(journal if self._logs else {})}
        self.sync()  # what it says of the step logs is on the disk before it says so
        self.write_json(STATUS, self._status)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a step log, as `read_step_log`."""
        return [line.content for line in read_step_log(self.path, name)]

    def announce_cut(self, last: int) -> None:
        """Record in status.json what `cut` will leave, so that it never says more than there is."""
        kept = {
            name: b"".join(line.raw for line in read_step_log(self.path, name) if line.content["step"] <= last)
            for name in STEP_LOGS
        }
        self.set_status(journal={name: Digest(raw).as_dict() for name, raw in kept.items()})

    def cut(self, name: str, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Cut the lines of steps after `last` off a step log; return those that stay, and those cut off."""
        lines = read_step_log(self.path, name)
        kept = [line for line in lines if line.content["step"] <= last]
        raw = b"".join(line.raw for line in kept)
        if (self.path / name).exists():
            write_atomically(self.path / name, raw.decode())
        self._logs[name] = LogDigest()
        for line in kept:
            self._logs[name].add(line.content["step"], line.raw)
        return [line.content for line in kept], [line.content for line in lines[len(kept) :]]

    def sync(self) -> None:
        """Flush the step logs to the disk."""
        for name in STEP_LOGS:
            if (self.path / name).exists():
                sync(self.path / name)

    def begin(self, frozen: Mapping[str, Any], start: Start) -> None:
        """Record that a run starts here, and with what."""
        self.step, began = start.step or 0, now()
        before = read_status(self.path)
        self._finished = before if before.get("state") == "FINISHED" else None
        kept = {key: before[key] for key in ("started", "tracker_run_id", "journal", "num_steps") if key in before}
        fresh = {"state": "RUNNING", "cause": None, "how_to_go_on": None, "started": began, "ended": None}
        self.set_status(**(fresh | kept | process_identity()))  # first: it is what makes the folder a run's
        line = {"time": began, "command": secrets.cleaned(sys.orig_argv), "config_hash": self._config_hash}
        signed = {} if (signature := trust.signature(self.path, frozen)) is None else {"signature": signature}
        _cut_torn_line(self.path / STARTS)
        self.append(STARTS, line | {"resumed_step": start.step, "changed": dict(start.changed)} | signed)
        if not (self.path / CONFIG).exists():  # last: its hash is among the starts, see config.frozen.read_config
            text = yaml.safe_dump(dict(frozen), sort_keys=False, allow_unicode=True)
            write_atomically(self.path / CONFIG, text)

    def end(self, error: BaseException | None) -> None:
        """Record how the run ended; a disk that is full must not hide the error that ended it."""
        state, cause = _ending_of(error) if error is not None else ("FINISHED", self.early_cause)
        ended: dict[str, Any] = {
            "state": state,
            "cause": cause and secrets.clean(cause),
            "how_to_go_on": None if error is None else resume_command(self.path),
            "ended": now(),
        }
        if error is None and (self.path / SUMMARY).is_file():
            ended["summary"] = file_digest(self.path / SUMMARY)
        if self._finished is not None and not self._logs:  # nothing was changed yet: it is as finished as before
            self.step, self.num_steps, ended = self._finished["step"], None, dict(self._finished)
        try:
            self.set_status(**ended)
            for call in self.at_end:
                call()
        except OSError as problem:
            if error is None:
                raise
            report(f"status.json could not be written: {problem}")


def _ending_of(error: BaseException) -> tuple[str, str]:
    """Return the state of a run that this error ended, and the cause."""
    if isinstance(error, Pruned):
        return "PRUNED", str(error)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "PREEMPTED", f"stopped by {error if isinstance(error, Interrupted) else 'Ctrl-C, at once'}"
    return "FAILED", f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _cut_torn_line(file: Path) -> None:
    """Remove a last line that a dying process did not finish."""
    content = file.read_bytes() if file.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(file, content.rfind(b"\n") + 1)


def note_end(path: Path, reason: BaseException) -> None:
    """Record how a run ended whose own process can't any more, or does not know why it failed."""
    try:
        status = read_status(path)
    except DamagedFileError:  # reported when the folder is next read
        return
    state, _ = _ending_of(reason)
    if status.get("state") in ("RUNNING", "FAILED", "PREEMPTED" if state == "PRUNED" else None):
        cause = secrets.clean(str(reason)).split("\n")[0].rstrip(":")
        ended = {
            "state": state,
            "cause": f"stopped by {str(reason) or 'Ctrl-C'}" if state == "PREEMPTED" else cause,
            "how_to_go_on": resume_command(path),
            "ended": now(),
        }
        write_json(path / STATUS, status | ended)


@contextmanager
def open_run_folder(path: Path, frozen: Mapping[str, Any], config_hash: str, start: Start) -> Iterator[RunFolder]:
    """Start a run in its folder, which is held; how the block ends is how the run ended, in status.json.

    Raises as `make_room`.
    """
    folder = RunFolder(path, config_hash, make_room(path, config_hash, start))
    try:
        folder.begin(frozen, start)
        yield folder
    except BaseException as error:
        folder.end(error)
        raise
    folder.end(None)


def now() -> str:
    """Return the time, UTC, as ISO 8601 with seconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
