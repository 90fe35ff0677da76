"""The run's folder: the truth about a run, readable while it runs and whole after it died. No torch here.

A lock guards the folder against a second process; the operating system lets go of it when the process ends, however
that happens. Every file but those that grow is written beside and renamed, so that none is ever seen half written.

A line of metrics.jsonl says that its step is over, evaluation and samples included. A run that goes on from a
checkpoint cuts off what was logged of later steps, and does again what was not over.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from src.errors import Interrupted, Pruned, RunFolderError
from src.records import finite, write_atomically, write_json

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
    "checkpoints",
    "model",
    "predictions",
)
"""What a run's folder holds; `force=true` removes these and nothing else."""

LOCK = "lock"


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


class RunFolder:
    """A run's folder that this process holds. Built by `open_run_folder`."""

    def __init__(self, path: Path, config_hash: str) -> None:
        self.path = path
        self.step = 0
        self.num_steps: int | None = None
        """How many steps there will be; None as long as that is not known."""
        self._config_hash = config_hash
        self._status: dict[str, Any] = {}
        self.at_end: list[Callable[[], None]] = []
        """Called once status.json says how the run ended, while the folder is still held."""

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file at once."""
        write_json(self.path / name, content)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file that grows; it is on its way to the disk when this returns."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n")

    def set_status(self, **changes: Any) -> None:
        """Change what status.json says."""
        known = {} if self.num_steps is None else {"num_steps": self.num_steps}
        self._status |= changes | {"step": self.step, **known, "updated": now()}
        self.write_json("status.json", self._status)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Give the lines of a file that grows, without one that a dying process did not finish."""
        try:
            text = (self.path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found = []
        for line in text.split("\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:  # nothing behind it counts: lines are written in order
                break
        return found

    def cut(self, name: str, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Take the lines of steps behind `last` out of a file that grows; gives those that stay, and those taken."""
        if not (self.path / name).exists():
            return [], []
        lines = self.lines(name)
        kept = [line for line in lines if line["step"] <= last]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in kept)
        write_atomically(self.path / name, text)
        return kept, [line for line in lines if line["step"] > last]

    def sync(self) -> None:
        """Have all lines be on the disk when this returns."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())

    def begin(self, frozen: Mapping[str, Any], start: Start) -> None:
        """Write down that a run starts here, and with what."""
        self.step, began = start.step or 0, now()
        before = read_status(self.path)
        kept = {key: before[key] for key in ("started", "tracker_run_id") if key in before}
        fresh = {"state": "RUNNING", "cause": None, "how_to_go_on": None, "started": began, "ended": None}
        self.set_status(**(fresh | kept | _identity()))  # first: it is what makes the folder a run's
        if not (self.path / "config.yaml").exists():
            text = yaml.safe_dump(dict(frozen), sort_keys=False, allow_unicode=True)
            write_atomically(self.path / "config.yaml", text)
        line = {"time": began, "command": sys.orig_argv, "config_hash": self._config_hash}
        _end_last_line(self.path / "starts.jsonl")
        self.append("starts.jsonl", line | {"resumed_step": start.step, "changed": dict(start.changed)})

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
        try:
            self.set_status(state=state, cause=cause, how_to_go_on=how, ended=now())
            for call in self.at_end:
                call()
        except OSError as problem:
            if error is None:
                raise
            print(f"status.json could not be written: {problem}", file=sys.stderr)


def how_to_go_on(path: Path) -> str:
    """Give the command that goes on with a run."""
    return f"make resume run={shlex.quote(str(path))}"


def read_status(path: Path) -> dict[str, Any]:
    """Give what status.json of a folder says; empty where there is none."""
    try:
        return json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def last_config_hash(path: Path) -> str | None:
    """Give the configuration's hash of the last start in a folder; None where there is none."""
    file = path / "starts.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    for line in reversed(lines):
        with suppress(ValueError, LookupError, TypeError):  # one that a dying process did not finish
            return json.loads(line)["config_hash"]
    return None


def _end_last_line(file: Path) -> None:
    """Have a line that a dying process did not finish be a line of its own."""
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        with open(file, "ab") as ended:
            ended.write(b"\n")


def note_end(path: Path, reason: BaseException) -> None:
    """Write down how a run ended whose own process can't say so any more, or does not know why it failed."""
    status = read_status(path)
    is_stop = isinstance(reason, (Interrupted, KeyboardInterrupt))
    if status.get("state") in ("RUNNING", "FAILED"):
        ended = {
            "state": "PREEMPTED" if is_stop else "FAILED",
            "cause": f"stopped by {str(reason) or 'Ctrl-C'}" if is_stop else str(reason).split("\n")[0].rstrip(":"),
            "how_to_go_on": how_to_go_on(path),
            "ended": now(),
        }
        write_atomically(path / "status.json", json.dumps(status | ended, indent=2, ensure_ascii=False) + "\n")


def is_finished(path: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return read_status(path).get("state") == "FINISHED"


@contextmanager
def hold(path: Path) -> Iterator[int]:
    """Hold a run's folder against every other process, until the block ends or the process dies; makes it.

    Gives the descriptor that holds it: processes that inherit it hold it too, as long as they live.

    Raises:
        RunFolderError: where it can't be made, or naming the process that holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / LOCK).touch()
    except OSError as error:
        raise RunFolderError(f"the run's folder {path} can't be made: {error.strerror}") from error
    with open(path / LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            left = "" if _is_alive(holder) else "; it has died, but processes that it started are still at work"
            raise RunFolderError(f"{path} is in use by another process: {holder}{left}") from error
        lock.truncate(0)
        identity = _identity()
        lock.write(f"process {identity['pid']} on {identity['host']} (boot {identity['boot_id']})\n")
        lock.flush()
        yield lock.fileno()


def holder_of(path: Path) -> str:
    """Name the process that holds a folder with a lock in it; '' where none does. Nothing is written."""
    with open(path / LOCK, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip() or "unknown"
    return ""


@contextmanager
def open_run_folder(path: Path, frozen: Mapping[str, Any], config_hash: str, start: Start) -> Iterator[RunFolder]:
    """Begin in a run's folder that is held; how the block ends is how the run ended, in status.json.

    Raises:
        RunFolderError: where the folder holds another run, or one that is not to be gone on with.
    """
    _clear(path, config_hash, start)
    folder = RunFolder(path, config_hash)
    try:
        folder.begin(frozen, start)
        yield folder
    except BaseException as error:
        folder.end(error)
        raise
    folder.end(None)


def _clear(path: Path, config_hash: str, start: Start) -> None:
    """Make room for a start: remove what an earlier one left that is of no use to it.

    Raises:
        RunFolderError: where that would cost what somebody may want.
    """
    there = [name for name in FILES if (path / name).exists()]
    if not there:
        return
    if not (path / "status.json").exists():
        raise RunFolderError(f"{path} is no run's folder, but holds {', '.join(there)}; choose another hydra.run.dir")
    if start.force:
        _remove(path, there)
        return
    status = read_status(path)
    step = status.get("step", 0)
    is_same = last_config_hash(path) == config_hash
    if start.step is not None and (start.is_own or is_same):
        return
    if not start.may_begin_again or (step and not is_same):
        other = "it was made with another configuration (its config.yaml)"
        why = other if start.may_begin_again else "checkpoint.resume=never"
        raise RunFolderError(
            f"{path} holds a run that did not finish ({ending(status)}), and {why}.\n"
            f"force=true starts again and removes what is there ({', '.join(there)}); or choose another hydra.run.dir."
        )
    if not is_same:  # it failed before it trained: what it was asked for has been mended since
        _remove(path, [name for name in there if name != "starts.jsonl"])


def ending(status: Mapping[str, Any]) -> str:
    """Say how a run that nobody works on ended."""
    state = status.get("state", "UNKNOWN")  # nobody holds the folder: what was running has died
    how = f"{'killed' if state == 'RUNNING' else state} at step {status.get('step', 0)}"
    return how + (f", {status['cause'].splitlines()[0]}" if status.get("cause") else "")


def _remove(path: Path, names: Iterable[str]) -> None:
    for name in sorted(names, key=lambda name: name == "status.json"):  # last: it is what makes the folder a run's
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink()


def now() -> str:
    """Give the time, UTC, as ISO 8601 with seconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def _is_alive(holder: str) -> bool:
    """Whether the process that a lock names lives; of another machine's that is not known, so it does."""
    words = holder.split()
    if len(words) < 4 or words[3] != socket.gethostname():
        return True
    return psutil.pid_exists(int(words[1]))


def _identity() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.is_file() else None,
    }
