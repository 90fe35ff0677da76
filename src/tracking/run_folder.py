"""The run's folder: the truth about a run, readable while it runs and whole after it died. No torch here.

A lock guards the folder against a second process; the operating system lets go of it when the process ends, however
that happens. Every file but those that grow is written beside and renamed, so that none is ever seen half written.

A line of metrics.jsonl says that its step is over, evaluation and samples included. A run that goes on from a
checkpoint cuts off what was logged of later steps, and does again what was not over. Only a last line that a dying
process did not finish may be missing: a file that is otherwise not as it was written is refused before anything is
changed, because which evaluation was the best is read from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

import psutil
import yaml

from src import secrets
from src.config import trust
from src.config.frozen import CONFIG, STARTS, STATUS, read_starts, read_status
from src.config.places import CHECKPOINTS
from src.errors import DamagedFileError, Interrupted, Pruned, RunFolderError, report
from src.records import (
    Digest,
    Line,
    begins_with,
    check_keys,
    damaged,
    file_digest,
    read_bytes,
    read_lines,
)
from src.util import finite, write_atomically, write_json

FILES = (
    "config.yaml",
    "deepspeed.json",
    "starts.jsonl",
    "status.json",
    "metrics.jsonl",
    "data_report.json",
    "samples.jsonl",
    "provenance.json",
    "summary.json",
    "tracking.json",
    CHECKPOINTS,
    "model",
    "predictions",
)
"""What a run's folder holds; `force=true` removes these and nothing else."""

FOLDERS = (CHECKPOINTS, "model", "predictions")
LOCK = "lock"
LONGEST_HOLDER = 500
"""Characters that are read of what a lock says."""


GROWING = ("metrics.jsonl", "samples.jsonl")
"""Files that grow, a line or more a step."""


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins.

    `step` is that of the checkpoint it goes on from; None: it begins at the beginning. `changed` are keys of the
    configuration that are other ones than in that checkpoint, with their new values. `may_begin_again` allows to do a
    run again that was stopped before there was a checkpoint. `is_own` is false where the checkpoint is another run's.
    """

    step: int | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)
    may_begin_again: bool = True
    is_own: bool = True
    force: bool = False
    journal: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the files that grow began with when the checkpoint was saved, see RunFolder.journal_before."""
    allow_changed: bool = False


class _Growing:
    """What a file that grows has got: all of it, and without the lines of its last step, which may be done again."""

    def __init__(self) -> None:
        self.digest = Digest()
        self._last_step = -1
        self._without_last = self.digest.as_dict()

    def add(self, step: int, raw: bytes) -> None:
        if step > self._last_step:
            self._last_step, self._without_last = step, self.digest.as_dict()
        self.digest.add(raw)

    def before(self, step: int) -> dict[str, Any]:
        return self._without_last if step <= self._last_step else self.digest.as_dict()


class RunFolder:
    """A run's folder that this process holds. Built by `open_run_folder`."""

    def __init__(self, path: Path, config_hash: str, warnings: Sequence[str] = ()) -> None:
        self.path = path
        self.warnings = warnings
        """What is not as it was in what the run goes on with."""
        self.step = 0
        self.num_steps: int | None = None
        """How many steps there will be; None as long as that is not known."""
        self.steps_per_epoch: int | None = None
        self._config_hash = config_hash
        self._status: dict[str, Any] = {}
        self._growing: dict[str, _Growing] = {}
        self._finished: Mapping[str, Any] | None = None
        """What status.json said before this start, where it said that the run is finished."""
        self.at_end: list[Callable[[], None]] = []
        """Called once status.json says how the run ended, while the folder is still held."""

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file at once."""
        write_json(self.path / name, content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file that grows; it is on its way to the disk when this returns.

        Raises:
            DamagedFileError: where the file is not as long as it was left: a line more would hide that it has a hole.
        """
        if name in self._growing and self.path.is_dir():  # else writing tells that the folder is gone
            there = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if there != (written := self._growing[name].digest.num_bytes):
                raise _changed_meanwhile(self.path / name, f"it has {there:,} bytes instead of {written:,}")
        raw = (json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with open(self.path / name, "ab") as file:
            file.write(raw)
        if name in self._growing:
            self._growing[name].add(line["step"], raw)

    def check_growing(self) -> None:
        """Check that the files that grow are what was written, at the end of a run.

        Raises:
            DamagedFileError: naming the one that is not.
            OSError: where the folder is not there any more.
        """
        os.listdir(self.path)  # a folder that is gone is told as that
        for name, file in self._growing.items():
            try:
                there = Digest(read_bytes(self.path / name, None)).as_dict()
            except FileNotFoundError:
                there = Digest().as_dict()
            except ValueError as error:
                raise _changed_meanwhile(self.path / name, str(error)) from error
            if there != file.digest.as_dict():
                raise _changed_meanwhile(self.path / name, "its content does not have the checksum of what was written")

    def journal_before(self, step: int) -> dict[str, dict[str, Any]]:
        """Return size and checksum of what the files that grow have of the steps before; nothing before a `cut`."""
        return {name: file.before(step) for name, file in self._growing.items()}

    def set_status(self, **changes: Any) -> None:
        """Change what status.json says."""
        known = {"num_steps": self.num_steps, "steps_per_epoch": self.steps_per_epoch} if self.num_steps else {}
        journal = {"journal": {name: file.digest.as_dict() for name, file in self._growing.items()}}
        self._status |= changes | {"step": self.step, **known, "updated": now(), **(journal if self._growing else {})}
        self.sync()  # what it says of the files that grow is on the disk before it says so
        self.write_json(STATUS, self._status)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file that grows, without one that a dying process did not finish.

        Raises:
            DamagedFileError: naming another line that can't be read.
        """
        return [line.content for line in read_growing(self.path, name)]

    def announce_cut(self, last: int) -> None:
        """Have status.json know what `cut` will leave, so that it never says more than there is."""
        kept = {
            name: [line for line in read_growing(self.path, name) if line.content["step"] <= last] for name in GROWING
        }
        self.set_status(journal={name: Digest(b"".join(one.raw for one in kept[name])).as_dict() for name in GROWING})

    def cut(self, name: str, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Cut the lines of steps after `last` off a file that grows; return those that stay, and those cut off."""
        lines = read_growing(self.path, name)
        kept = [line for line in lines if line.content["step"] <= last]
        raw = b"".join(line.raw for line in kept)
        if (self.path / name).exists():
            write_atomically(self.path / name, raw.decode())
        self._growing[name] = _Growing()
        for line in kept:
            self._growing[name].add(line.content["step"], line.raw)
        return [line.content for line in kept], [line.content for line in lines[len(kept) :]]

    def sync(self) -> None:
        """Have all lines be on the disk when this returns."""
        for name in GROWING:
            if (self.path / name).exists():
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())

    def begin(self, frozen: Mapping[str, Any], start: Start) -> None:
        """Write down that a run starts here, and with what."""
        self.step, began = start.step or 0, now()
        before = read_status(self.path)
        self._finished = before if before.get("state") == "FINISHED" else None
        kept = {key: before[key] for key in ("started", "tracker_run_id", "journal") if key in before}
        fresh = {"state": "RUNNING", "cause": None, "how_to_go_on": None, "started": began, "ended": None}
        self.set_status(**(fresh | kept | _identity()))  # first: it is what makes the folder a run's
        line = {"time": began, "command": secrets.cleaned(sys.orig_argv), "config_hash": self._config_hash}
        signed = {} if (signature := trust.signature(self.path, frozen)) is None else {"signature": signature}
        _cut_torn_line(self.path / STARTS)
        self.append(STARTS, line | {"resumed_step": start.step, "changed": dict(start.changed)} | signed)
        if not (self.path / CONFIG).exists():  # last: its hash is among the starts, see config.frozen.read_config
            text = yaml.safe_dump(dict(frozen), sort_keys=False, allow_unicode=True)
            write_atomically(self.path / CONFIG, text)

    def end(self, error: BaseException | None) -> None:
        """Write down how the run ended; a disk that is full must not hide the error that ended it."""
        if error is None:
            state, cause = "FINISHED", None
        elif isinstance(error, Pruned):
            state, cause = "PRUNED", str(error)
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            state, cause = "PREEMPTED", f"stopped by {error if isinstance(error, Interrupted) else 'Ctrl-C, at once'}"
        else:
            state, cause = "FAILED", f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        how = None if error is None else how_to_go_on(self.path)
        ended: dict[str, Any] = {
            "state": state,
            "cause": cause and secrets.clean(cause),
            "how_to_go_on": how,
            "ended": now(),
        }
        if error is None and (self.path / "summary.json").is_file():
            ended["summary"] = file_digest(self.path / "summary.json")
        if self._finished is not None and not self._growing:  # nothing was changed yet: it is as finished as before
            self.step, self.num_steps, ended = self._finished["step"], None, dict(self._finished)
        try:
            self.set_status(**ended)
            for call in self.at_end:
                call()
        except OSError as problem:
            if error is None:
                raise
            report(f"status.json could not be written: {problem}")


def how_to_go_on(path: Path) -> str:
    """Give the command that goes on with a run."""
    return f"make resume run={shlex.quote(str(path))}"


def read_growing(path: Path, name: str) -> list[Line]:
    """Return the lines of a run's metrics.jsonl or samples.jsonl, without one that was not finished.

    Raises:
        DamagedFileError: naming file and line, and how to repair it.
    """
    remedy = (
        "Nothing was changed. Restore the line from a copy; or remove it "
        f"(sed -i '{{number}}d' {shlex.quote(str(path / name))}) and go on without what it said, with "
        "checkpoint.allow_changed=true"
    )
    return read_lines(path / name, _check_metrics if name == "metrics.jsonl" else _check_sample, remedy=remedy)


def _check_metrics(line: dict[str, Any], before: dict[str, Any] | None) -> None:
    check_keys(line, {"step": int})
    if line["step"] <= (before["step"] if before else -1):
        raise ValueError(f"step {line['step']} comes after step {before['step'] if before else 0}")
    check_keys(line, dict.fromkeys(line, (int, float, NoneType)))


def _check_sample(line: dict[str, Any], before: dict[str, Any] | None) -> None:
    check_keys(line, {"step": int, "prompt": str, "text": str})
    if line["step"] < (before["step"] if before else 0):
        raise ValueError(f"step {line['step']} comes after step {before['step'] if before else 0}")


def metrics_at(path: Path, step: int | None) -> dict[str, Any] | None:
    """Return the line of metrics of a step; None where there is none.

    Raises:
        DamagedFileError: as `read_growing`.
    """
    lines = read_growing(path, "metrics.jsonl") if step is not None else []
    return next((line.content for line in lines if line.content["step"] == step), None)


def _changed_meanwhile(file: Path, reason: str) -> DamagedFileError:
    """Return the error that tells a file that grows which somebody else changed or removed while the run went on."""
    remedy = (
        "It was changed or removed while the run went on. Restore it from a copy; or go on without what it said, with "
        "checkpoint.allow_changed=true"
    )
    return damaged(file, reason, remedy)


def check_journal(path: Path, status: Mapping[str, Any], start: Start) -> list[str]:
    """Check that the files that grow are as they were written, before a run goes on with them; return warnings.

    Each must begin with what the checkpoint says that it had of the steps before, and with all that status.json says.

    Raises:
        DamagedFileError: naming the file, where checkpoint.allow_changed does not allow it.
    """
    found = []
    for name in GROWING:
        content = b"".join(line.raw for line in read_growing(path, name))
        saved, last = start.journal.get(name), (status.get("journal") or {}).get(name)
        reason = ""
        if saved is not None and not begins_with(content, saved):
            size = saved["num_bytes"]
            reason = f"it does not begin with the {size:,} bytes that it had when step {start.step} was saved"
        elif last is not None and not begins_with(content, last):
            reason = "its content does not have the checksum that it was written with (status.json)"
        if reason:
            remedy = "Restore it from a copy; or go on with it as it is, with checkpoint.allow_changed=true"
            found.append(damaged(path / name, reason, remedy))
    if found and not start.allow_changed:
        raise found[0]
    return [str(error) for error in found]


def last_config_hash(path: Path) -> str | None:
    """Return the configuration's hash of the last start in a folder; None where there is none.

    Raises:
        DamagedFileError: naming the line of starts.jsonl that can't be read.
    """
    starts = read_starts(path)
    return starts[-1]["config_hash"] if starts else None


def _cut_torn_line(file: Path) -> None:
    """Remove a last line that a dying process did not finish."""
    content = file.read_bytes() if file.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(file, content.rfind(b"\n") + 1)


def note_end(path: Path, reason: BaseException) -> None:
    """Write down how a run ended whose own process can't say so any more, or does not know why it failed."""
    try:
        status = read_status(path)
    except DamagedFileError:  # told when the folder is next looked at
        return
    is_stop = isinstance(reason, (Interrupted, KeyboardInterrupt))
    if status.get("state") in ("RUNNING", "FAILED"):
        ended = {
            "state": "PREEMPTED" if is_stop else "FAILED",
            "cause": f"stopped by {str(reason) or 'Ctrl-C'}" if is_stop else _cause(reason),
            "how_to_go_on": how_to_go_on(path),
            "ended": now(),
        }
        write_json(path / STATUS, status | ended)


def _cause(reason: BaseException) -> str:
    return secrets.clean(str(reason)).split("\n")[0].rstrip(":")


@contextmanager
def hold(path: Path) -> Iterator[int]:
    """Hold a run's folder against every other process, until the block ends or the process dies; makes it.

    Gives the descriptor that holds it: processes that inherit it hold it too, as long as they live.

    Raises:
        RunFolderError: where it can't be made, or naming the process that holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"the run's folder {path} can't be made: {error.strerror}") from error
    try:
        (path / LOCK).touch()
    except OSError as error:
        raise RunFolderError(f"the run's folder can't be held: {path / LOCK}: {error.strerror}") from error
    if not (path / LOCK).is_file():
        raise RunFolderError(f"{path / LOCK} is no plain file: remove it, it holds nothing")
    try:
        lock = open(path / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RunFolderError(f"the run's folder can't be held: {path / LOCK}: {error.strerror}") from error
    with closing(lock):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read(LONGEST_HOLDER).strip() or "unknown"
            left = "" if _is_alive(holder) else "; it has died, but processes that it started are still at work"
            raise RunFolderError(f"{path} is in use by another process: {holder}{left}") from error
        except OSError as error:  # a file system without locks
            raise RunFolderError(f"the run's folder can't be held: {path / LOCK}: {error.strerror}") from error
        _say_who_holds(lock, path / LOCK)
        yield lock.fileno()


def _say_who_holds(lock: TextIO, file: Path) -> None:
    """Write into a lock which process holds it.

    Raises:
        RunFolderError: where it can't be written.
    """
    identity = _identity()
    try:
        os.ftruncate(lock.fileno(), 0)
        os.write(
            lock.fileno(), f"process {identity['pid']} on {identity['host']} (boot {identity['boot_id']})\n".encode()
        )
    except OSError as error:
        raise RunFolderError(f"the run's folder can't be held: {file} can't be written: {error.strerror}") from error


def holder_of(path: Path) -> str:
    """Name the process that holds a folder with a lock in it; '' where none does. Nothing is written."""
    if not (path / LOCK).is_file():
        return ""
    with open(path / LOCK, encoding="utf-8", errors="replace") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read(LONGEST_HOLDER).strip() or "unknown"
    return ""


@contextmanager
def open_run_folder(path: Path, frozen: Mapping[str, Any], config_hash: str, start: Start) -> Iterator[RunFolder]:
    """Begin in a run's folder that is held; how the block ends is how the run ended, in status.json.

    Raises:
        RunFolderError: where the folder holds another run, or one that is not to be gone on with.
    """
    warnings = _clear(path, config_hash, start)
    folder = RunFolder(path, config_hash, warnings)
    try:
        folder.begin(frozen, start)
        yield folder
    except BaseException as error:
        folder.end(error)
        raise
    folder.end(None)


def _clear(path: Path, config_hash: str, start: Start) -> list[str]:
    """Make room for a start: remove what an earlier one left that is of no use to it; return warnings.

    Raises:
        RunFolderError: where that would cost what somebody may want.
        DamagedFileError: where what it goes on with can't be read.
    """
    there = [name for name in FILES if os.path.lexists(path / name)]
    if not there:
        return []
    if STATUS not in there and not {CONFIG, STARTS} <= set(there):
        raise RunFolderError(f"{path} is no run's folder, but holds {', '.join(there)}; choose another hydra.run.dir")
    if start.force:
        _remove(path, there)
        return []
    for name in there:
        is_folder = name in FOLDERS
        if not ((path / name).is_dir() if is_folder else (path / name).is_file()):
            kind = "folder" if is_folder else "plain file"
            raise damaged(path / name, f"it is no {kind}", "Move it away: the same command writes it anew")
    status = read_status(path)
    step = status.get("step", 1)  # not known: it may have trained
    is_same = last_config_hash(path) == config_hash
    if start.step is not None and (start.is_own or is_same):
        return check_journal(path, status, start)
    if not start.may_begin_again or (step and not is_same):
        other = "it was made with another configuration (its config.yaml)"
        why = other if start.may_begin_again else "checkpoint.resume=never"
        raise RunFolderError(
            f"{path} holds a run that did not finish ({ending(status)}), and {why}.\n"
            f"Give it as it was ({how_to_go_on(path)}), or choose another hydra.run.dir; force=true removes what is "
            f"there ({', '.join(there)}) and starts again."
        )
    if not is_same:  # it failed before it trained: what it was asked for has been mended since
        _remove(path, [name for name in there if name != STARTS])
        return []
    return [*check_journal(path, status, start), *_begins_again(path)]


def _begins_again(path: Path) -> list[str]:
    """Report what was logged of a run without a checkpoint: it is done again."""
    lines = read_growing(path, "metrics.jsonl")
    if not lines:
        return []
    return [
        f"there is no checkpoint in {path / CHECKPOINTS}, so the run begins again: what was logged up to step "
        f"{lines[-1].content['step']} is removed, and comes again"
    ]


def ending(status: Mapping[str, Any]) -> str:
    """Say how a run that nobody works on ended."""
    state = status.get("state", "RUNNING")  # nobody holds the folder: what was running has died
    how = f"{'killed' if state == 'RUNNING' else state} at step {status.get('step', 0)}"
    return how + (f", {status['cause'].splitlines()[0]}" if status.get("cause") else "")


def _remove(path: Path, names: Iterable[str]) -> None:
    for name in sorted(names, key=lambda name: name == STATUS):  # last: it is what makes the folder a run's
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink()


def now() -> str:
    """Give the time, UTC, as ISO 8601 with seconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def _is_alive(holder: str) -> bool:
    """Whether the process that a lock names lives; of another machine's that is not known, so it does."""
    words = holder.split()
    if len(words) < 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return True
    return psutil.pid_exists(int(words[1]))


def _identity() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.is_file() else None,
    }
