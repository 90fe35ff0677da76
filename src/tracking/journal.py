"""The run's folder: the truth about a run, readable while it runs and whole after it died. No torch here.

A lock guards the folder against a second process; the operating system lets go of it when the process ends, however
that happens. Every file but the two that grow is written beside and renamed, so that none is ever seen half written.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from src.errors import Interrupted, RunFolderError

FILES = (
    "config.yaml",
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


class RunFolder:
    """A run's folder that this process holds. Built by `open_run_folder`."""

    def __init__(self, path: Path, config_hash: str) -> None:
        self.path = path
        self.step = 0
        self._config_hash = config_hash
        self._status: dict[str, Any] = {}
        self.at_end: list[Callable[[], None]] = []
        """Called once status.json says how the run ended, while the folder is still held."""

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a whole file at once."""
        text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / name, text + "\n")

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to a file that grows; it is on its way to the disk when this returns."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n")

    def set_status(self, **changes: Any) -> None:
        """Change what status.json says."""
        self._status |= changes | {"step": self.step, "updated": now()}
        self.write_json("status.json", self._status)

    def begin(self, frozen: Mapping[str, Any]) -> None:
        """Write down that a run starts here, and with what."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(frozen), sort_keys=False, allow_unicode=True))
        self.append(
            "starts.jsonl",
            {"time": now(), "command": sys.orig_argv, "config_hash": self._config_hash, "resumed_step": None},
        )
        self.set_status(state="RUNNING", cause=None, started=now(), ended=None, **_identity())

    def end(self, error: BaseException | None) -> None:
        """Write down how the run ended; a disk that is full must not hide the error that ended it."""
        if error is None:
            state, cause = "FINISHED", None
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            state, cause = "PREEMPTED", f"stopped by {error if isinstance(error, Interrupted) else 'Ctrl-C, at once'}"
        else:
            state, cause = "FAILED", f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        try:
            self.set_status(state=state, cause=cause, ended=now())
            for call in self.at_end:
                call()
        except OSError as problem:
            if error is None:
                raise
            print(f"status.json could not be written: {problem}", file=sys.stderr)


def read_status(path: Path) -> dict[str, Any]:
    """Give what status.json of a folder says; empty where there is none."""
    try:
        return json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def last_config_hash(path: Path) -> str | None:
    """Give the configuration's hash of the last start in a folder; None where there is none."""
    file = path / "starts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return json.loads(lines[-1])["config_hash"] if lines else None


def is_finished(path: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return read_status(path).get("state") == "FINISHED"


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a folder that exists against every other process, until the block ends or the process dies.

    Raises:
        RunFolderError: naming the process that holds it.
    """
    with open(path / LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RunFolderError(f"{path} is in use by another process: {holder}") from error
        lock.truncate(0)
        identity = _identity()
        lock.write(f"process {identity['pid']} on {identity['host']} (boot {identity['boot_id']})\n")
        lock.flush()
        yield


@contextmanager
def open_run_folder(path: Path, frozen: Mapping[str, Any], config_hash: str, *, force: bool) -> Iterator[RunFolder]:
    """Make and hold a run's folder; how the block ends is how the run ended, in status.json.

    Raises:
        RunFolderError: where the folder can't be made, another process holds it, or it holds another run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / LOCK).touch()
    except OSError as error:
        raise RunFolderError(f"the run's folder {path} can't be made: {error.strerror}") from error
    with hold(path):
        _refuse_leftovers(path, force=force)
        folder = RunFolder(path, config_hash)
        folder.begin(frozen)
        try:
            yield folder
        except BaseException as error:
            folder.end(error)
            raise
        folder.end(None)


def _refuse_leftovers(path: Path, *, force: bool) -> None:
    there = [name for name in FILES if (path / name).exists()]
    if not there:
        return
    if not (path / "status.json").exists():
        raise RunFolderError(f"{path} is no run's folder, but holds {', '.join(there)}; choose another hydra.run.dir")
    if not force:
        status = read_status(path)
        state = status.get("state", "UNKNOWN")  # nobody holds the folder: what was running has died
        how = f"{'killed' if state == 'RUNNING' else state} at step {status.get('step', 0)}"
        cause = f", {status['cause']}" if status.get("cause") else ""
        raise RunFolderError(
            f"{path} holds a run that did not finish ({how}{cause}).\n"
            "This version keeps no checkpoints to go on from: force=true starts it again and removes what is there "
            f"({', '.join(there)}), or choose another hydra.run.dir."
        )
    for name in there:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that nobody sees half of it."""
    beside = path.with_name(f".{path.name}.part")  # one writer a file: the lock's holder
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def finite(node: Any) -> Any:
    """Put null in place of numbers that JSON can't hold: inf and nan."""
    if isinstance(node, Mapping):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, float) and not math.isfinite(node):
        return None
    return node


def now() -> str:
    """Give the time, UTC, as ISO 8601 with seconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def _identity() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.is_file() else None,
    }
