"""A folder held by one process, by a lock that the operating system releases when the process ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from src.config.places import remove_tree
from src.errors import RunFolderError

LOCK = "lock"
LONGEST_HOLDER = 500  # characters that are read of what a lock says


@contextmanager
def hold(path: Path) -> Iterator[int]:
    """Hold a run's folder against every other process, until the block ends or the process dies; makes the folder.

    Yields the descriptor that holds it: processes that inherit it hold the folder too, as long as they live.
    RunFolderError says why it can't be made or held, or names the process that holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"the run's folder {path} can't be made: {error.strerror}") from error
    with closing(_open_lock(path / LOCK)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read(LONGEST_HOLDER).strip() or "unknown"
            left = "" if _is_alive(holder) else "; it has died, but processes that it started are still running"
            raise RunFolderError(f"{path} is in use by another process: {holder}{left}") from error
        except OSError as error:  # a file system without locks
            raise _can_not_be_held(path / LOCK, error) from error
        identity = process_identity()
        try:
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), "process {pid} on {host} (boot {boot_id})\n".format(**identity).encode())
        except OSError as error:
            raise _can_not_be_held(path / LOCK, error, " can't be written") from error
        yield lock.fileno()


@contextmanager
def held_beside(path: Path) -> Iterator[None]:
    """Hold a folder that is written under another name and then renamed, by a folder beside it; raises as `hold`."""
    guard = path.with_name(f".{path.name}.lock")
    with hold(guard):
        try:
            yield
        finally:
            remove_tree(guard)


def _open_lock(file: Path) -> TextIO:
    """Open a lock, which is made where there is none."""
    try:
        file.touch()
        if not file.is_file():
            raise RunFolderError(f"{file} is no plain file: remove it, it holds nothing")
        return open(file, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _can_not_be_held(file, error) from error


def _can_not_be_held(file: Path, error: OSError, what: str = "") -> RunFolderError:
    return RunFolderError(f"the run's folder can't be held: {file}{what}: {error.strerror}")


def holder_of(path: Path) -> str:
    """Return the process that holds a folder with a lock in it; '' where none does. Nothing is written."""
    if not (path / LOCK).is_file():
        return ""
    with open(path / LOCK, encoding="utf-8", errors="replace") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read(LONGEST_HOLDER).strip() or "unknown"
    return ""


def _is_alive(holder: str) -> bool:
    """Return whether the process that a lock names lives; of another machine's that is not known, so it may."""
    words = holder.split()
    if len(words) < 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return True
    return psutil.pid_exists(int(words[1]))


def process_identity() -> dict[str, Any]:
    """Return what identifies this process: its id, the machine, and that machine's boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.is_file() else None,
    }
