"""Several processes from one command: start them, watch them, end them together.

The parent has composed, checked and frozen the configuration, and holds the run's folder; workers get the frozen file.
Each worker has a session of its own, so that Ctrl-C reaches the parent only, which passes each request on once. A
worker whose parent dies is asked to stop, and holds the run's folder until it has.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from src.config.schema import RuntimeConfig
from src.errors import Interrupted, TrainingError
from src.runtime.signals import StopRequest

GRACE_SECONDS = 5.0
"""How long the others may take to end by themselves once one process has ended in failure."""
LEAVE_SECONDS = 20.0
"""How long the others may take once one process has stopped, as it was asked to. They save together, so one that takes
longer waits for what will not come."""
ORPHAN_SECONDS = 300.0
"""How long a process may take to save and end whose parent died."""
POLL_SECONDS = 0.02
TAIL_LINES = 30
PORT = 29500
"""Where the processes of several machines meet, unless the configuration says where."""


@dataclass(frozen=True)
class ProcessPlace:
    """Where a process stands among all of a run."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place_of(environment: Mapping[str, str] = os.environ) -> ProcessPlace | None:
    """Return the place that a launcher (ours, torchrun, accelerate launch) set for this process; None: it is alone."""
    if int(environment.get("WORLD_SIZE", "1")) < 2:
        return None
    return ProcessPlace(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


def has_lost_a_peer(error: Exception) -> bool:
    """Return whether an error of one of several processes says that another one is gone.

    NCCL's errors have a class of their own; gloo's are plain RuntimeErrors, which name its source file.
    """
    if place_of() is None:
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (isinstance(error, RuntimeError) and "by peer" in str(error))


def num_processes() -> int:
    """Return how many processes the run has."""
    place = place_of()
    return 1 if place is None else place.world_size


def log_file(run_dir: Path, rank: int) -> Path:
    """Return the path of the file that holds what a process prints."""
    return run_dir / "logs" / f"rank-{rank}.log"


def _open_log(run_dir: Path, rank: int) -> IO[str]:
    file = log_file(run_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    return open(file, "a", encoding="utf-8", buffering=1)


def is_launched(config: RuntimeConfig) -> bool:
    """Return whether this process starts others that train, rather than training by itself."""
    return place_of() is None and config.num_processes * config.num_machines > 1


_CONTROL = re.compile(r"\r|\x1b\[[0-9;?]*([@-~])")


class CopiedStream:
    """A stream that is also written to a file, as plain text; all else is the stream's."""

    def __init__(self, stream: Any, log: Any) -> None:
        self._stream, self._log = stream, log
        self._is_copied, self._num_drawn = True, 0

    def write(self, text: str) -> int:
        if self._is_copied:
            self._log.write(_plain(text, self._num_drawn))
        return self._stream.write(text)

    @contextmanager
    def drawing(self, num_lines: int) -> Iterator[None]:
        """Keep what is written in the block out of the file: it draws so many lines in place of those drawn before.

        They are drawn again below what is written afterwards, until others are drawn.
        """
        self._is_copied, self._num_drawn = False, num_lines
        try:
            yield
        finally:
            self._is_copied = True

    def flush(self) -> None:
        self._log.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _plain(text: str, num_drawn: int) -> str:
    """Return what stays of a text for a terminal: without colours, and without the lines drawn at its end, which it has
    where it moves the cursor.
    """
    if any(found[1] != "m" for found in _CONTROL.finditer(text)):
        text = "".join(f"{line}\n" for line in text.split("\n")[: -max(1, num_drawn)])
    return _CONTROL.sub("", text)


def copy_output(run_dir: Path) -> None:
    """Write the first process's output into its log too; the others write nowhere else."""
    log = _open_log(run_dir, 0)  # closed with the process
    sys.stdout, sys.stderr = CopiedStream(sys.stdout, log), CopiedStream(sys.stderr, log)


def follow_parent() -> None:
    """Ask this process to stop when its parent dies, and end it where it does not."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS * 10)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(Interrupted.exit_code)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def launch(
    config: RuntimeConfig, command: Sequence[str], run_dir: Path, stop: StopRequest, locks: Sequence[int] = ()
) -> int:
    """Start a run's processes of this machine, wait for their end, and return the exit code that they agree on.

    Args:
        command: starts one process.
        stop: is passed on to all of them, once.
        locks: descriptors that hold something as long as one of the processes lives.
    Raises:
        TrainingError: where one ended in failure; the others are ended, and the end of its output is in the message.
        Interrupted: where they were asked to stop, and one could not follow and is ended.
    """
    given = config.main_process_port or (PORT if config.num_machines > 1 else None)
    first, count = config.machine_rank * config.num_processes, config.num_processes
    shared = {
        "WORLD_SIZE": str(config.num_machines * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": config.main_process_ip or "127.0.0.1",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
    places = [{"RANK": str(first + i), "LOCAL_RANK": str(i)} for i in range(count)]
    with nullcontext(given) if given else reserved_port() as port:
        shared["MASTER_PORT"] = str(port)
        with _processes(command, [os.environ | shared | place for place in places], run_dir, locks) as workers:
            return _watch(workers, first, run_dir, stop)


@contextmanager
def _processes(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], run_dir: Path, locks: Sequence[int]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            rank = int(environment["RANK"])
            with _open_log(run_dir, rank) if rank else nullcontext() as log:
                worker = subprocess.Popen(
                    command, env=environment, start_new_session=True, pass_fds=locks, stdout=log, stderr=log
                )
                workers.append(worker)
        yield workers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        for worker in workers:
            worker.wait()


def _watch(workers: Sequence[subprocess.Popen[bytes]], first: int, run_dir: Path, stop: StopRequest) -> int:
    """Wait until all have ended, or one has failed; those that are left then are ended."""
    passed_on, deadline = 0, float("inf")
    while True:
        codes = [worker.poll() for worker in workers]
        stopped = (0, Interrupted.exit_code, *([-passed_on] if passed_on else []))  # one that had hardly begun
        failed = {first + i: code for i, code in enumerate(codes) if code is not None and code not in stopped}
        if failed or all(code is not None for code in codes) or time.monotonic() > deadline:
            break
        if stop.name and not passed_on:
            passed_on = stop.number
            for worker in workers:
                worker.send_signal(stop.number)
        if passed_on and deadline == float("inf") and any(code is not None for code in codes):
            deadline = time.monotonic() + LEAVE_SECONDS
        time.sleep(POLL_SECONDS)
    if None in codes and not failed:
        raise Interrupted(stop.name)
    if not failed:
        return Interrupted.exit_code if any(codes) else 0
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(POLL_SECONDS)
    if passed_on and Interrupted.exit_code in [worker.poll() for worker in workers]:
        return Interrupted.exit_code  # one that could not follow is no cause
    rank, code = min(failed.items(), key=lambda one: (one[1] >= 0, one[0]))  # one that a signal killed is the cause
    return _failure(rank, code, run_dir)


def _failure(rank: int, code: int, run_dir: Path) -> int:
    """Return the exit code of the first process, which has reported its failure; of another one, raise the error."""
    if code > 0 and rank == 0:
        return code
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    words = ""
    if rank and (file := log_file(run_dir, rank)).exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        words = f"; the end of {file}:\n" + "\n".join(f"  {line}" for line in lines)
    raise TrainingError(f"process {rank} {how}, so the others were ended too{words}")


@contextmanager
def reserved_port() -> Iterator[int]:
    """Hold a free TCP port of this machine: nobody else is given it, and whoever reuses addresses can listen on it.

    The store where processes meet does, in each of torch's backends.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
