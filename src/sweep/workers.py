"""Trials as processes of this machine: forked from a server that has imported what takes seconds. No torch here.

Nothing heavy is imported in the process that leads the sweep, so no CUDA begins there; where the system has no fork
server, each trial is a process from nothing. Every trial leads a session of its own, so that Ctrl-C reaches the sweep
only, which passes it on once; one whose sweep dies is asked to stop and saves.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from src.config.schema import MlflowConfig, RunConfig
from src.errors import DamagedFileError, SweepError, one_line
from src.records import read_json
from src.runtime.collector import rest_while_importing
from src.runtime.devices import shares, threads_each, visible_gpus

RunTrial = Callable[[dict[str, Any], str, Mapping[str, Any] | None], int]
"""Runs a frozen configuration in a folder, with a link to the study (see src.sweep.pruning); returns the exit code."""
PRELOAD_MODULE = "src.sweep.preload"
"""What the fork server imports before the first trial."""
OPTIONAL_MODULES = {
    "adapter": ("peft",),
    "mlflow": (
        *("mlflow", "mlflow.store.tracking.sqlalchemy_workspace_store", "mlflow.store.tracking.rest_store"),
        *("alembic.command", "sqlalchemy.dialects.sqlite"),
    ),
    "pruning": ("optuna", "optuna.storages._rdb.storage"),
    "hub": ("datasets",),
}
"""Modules that only some trials need, imported after PRELOAD_MODULE."""
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
GRACE_SECONDS = 5.0
"""How long trials may take to end at once, when asked twice."""


def modules_of_run(config: RunConfig, varied: Collection[str] = (), *, is_pruned: bool = False) -> list[str]:
    """Return the modules that a run imports besides those of PRELOAD_MODULE.

    Args:
        varied: sections that a sweep varies.
        is_pruned: whether a sweep may end it early.
    """
    wanted = {
        "adapter": config.adapter.is_on or "adapter" in varied,
        "mlflow": isinstance(config.tracking, MlflowConfig),
        "pruning": is_pruned,
        "hub": any(source.data.dataset_name for source in config.data.train_sources().values()) or "data" in varied,
    }
    modules = [module for need, is_wanted in wanted.items() if is_wanted for module in OPTIONAL_MODULES[need]]
    with suppress(OSError, DamagedFileError):  # no file here, or none that can be used: the run reports it
        kind = read_json(Path(config.model.checkpoint, "config.json"), {"model_type": str})["model_type"]
        modules.append(f"transformers.models.{kind}.modeling_{kind}")
    return modules


def log_file(run_dir: Path) -> Path:
    """Return the file that holds what a trial prints."""
    return run_dir / "logs" / "output.log"


@dataclass
class TrialJob:
    """A trial that is to run, or runs."""

    number: int
    config: dict[str, Any]
    run_dir: Path
    link: Mapping[str, Any] | None = None


@dataclass
class _Worker:
    job: TrialJob
    slot: int
    process: BaseProcess


def start_fork_server(needs: Sequence[str]) -> None:
    """Start the fork server, which begins its imports; return at once. What libraries say of themselves is not shown.

    Args:
        needs: modules that trials will import besides those that all do.
    """
    if not CAN_FORK:
        return
    multiprocessing.set_forkserver_preload([PRELOAD_MODULE, *needs])
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = [os.dup(number) for number in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it must outlive a Ctrl-C while it imports
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        os.close(nowhere)


def end_fork_server() -> None:
    """End the fork server, if there is one; what it forked has ended, or ends by itself."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)  # it may be in the middle of its imports
        server._stop()


class Workers:
    """Runs up to `n_jobs` trials at the same time, each with its share of threads and GPUs.

    Args:
        gpus_each: how many processes a trial has, and so how many GPUs it computes on, where it uses any.
    """

    def __init__(self, run_trial: RunTrial, n_jobs: int, gpus_each: int, *, uses_gpus: bool) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
        self._run_trial, self._n_jobs = run_trial, n_jobs
        self._threads = threads_each(n_jobs, gpus_each)
        self._gpus = shares(visible_gpus() if uses_gpus else [], n_jobs, gpus_each)
        self._working: dict[int, _Worker] = {}
        self._first: threading.Thread | None = None

    @property
    def room(self) -> int:
        """How many trials may be started now."""
        return self._n_jobs - len(self._working)

    @property
    def running(self) -> list[int]:
        """The numbers of the trials at work."""
        return [worker.job.number for worker in self._working.values()]

    def get_ready(self) -> None:
        """Nothing is left of an earlier start."""

    def is_ready(self, seconds: float) -> bool:
        """Wait until trials start at once, or so long; whether they do."""
        if self._first is None:
            self._first = threading.Thread(target=self._start_nothing, name="fork-server", daemon=True)
            self._first.start()
        self._first.join(seconds)
        return not self._first.is_alive()

    def _start_nothing(self) -> None:
        with suppress(EOFError, OSError):  # it has died: the first trial reports it
            process = self._context.Process(target=_nothing)
            process.start()
            process.join()

    def start(self, jobs: Sequence[TrialJob]) -> None:
        """Start trials, no more than there is room for."""
        for job in jobs:
            slot = next(i for i in range(self._n_jobs) if i not in self._working)
            settings = _Settings(
                {**os.environ, **self._environment(slot)}, self._threads, str(Path.cwd()), list(sys.orig_argv)
            )
            given = (self._run_trial, settings, job.config, str(job.run_dir), job.link)
            process = self._context.Process(target=_work, args=given, name=f"trial-{job.number}")
            try:
                process.start()
            except (EOFError, OSError) as error:
                raise SweepError(f"the process that trials are forked from has died ({one_line(error)})") from error
            self._working[slot] = _Worker(job, slot, process)

    def _environment(self, slot: int) -> dict[str, str]:
        own = {} if self._threads is None else {"OMP_NUM_THREADS": str(self._threads)}
        return own | ({"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[slot])} if self._gpus[slot] else {})

    def go(self) -> None:
        """Trials run as soon as they are started."""

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        """Wait until a trial ends, or so long; return those that have ended, with their exit codes."""
        multiprocessing.connection.wait([worker.process.sentinel for worker in self._working.values()], seconds)
        ended = [worker for worker in self._working.values() if worker.process.exitcode is not None]
        for worker in ended:
            worker.process.join()
            del self._working[worker.slot]
        return [(worker.job, worker.process.exitcode or 0) for worker in ended]

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Ask every trial to save and end."""
        for worker in self._working.values():
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, number)

    def stop_at_once(self) -> None:
        """End every trial, and all that they started."""
        processes = []
        for worker in self._working.values():
            with suppress(psutil.NoSuchProcess):
                leader = psutil.Process(worker.process.pid)
                processes += [leader, *leader.children(recursive=True)]
        self.ask_to_stop(signal.SIGINT)
        _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)


def _nothing() -> None:
    """Do nothing: a process that starts shows that others can."""
    _detach_from_fork_server()


@dataclass(frozen=True)
class _Settings:
    environment: dict[str, str]
    threads: int | None
    folder: str
    command: list[str]


def _work(
    run_trial: RunTrial, settings: _Settings, config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None
) -> None:
    """Run a trial in this process, from its first line to its exit code."""
    os.setsid()
    rest_while_importing()  # the fork server did; looking for garbage there would copy all its memory
    _detach_from_fork_server()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(settings.environment)
    os.chdir(settings.folder)
    sys.orig_argv[:] = settings.command
    print_into(log_file(Path(run_dir)))
    if settings.threads is not None:
        import torch  # the fork server has it, and read the environment before this trial had one of its own

        torch.set_num_threads(settings.threads)
    sys.exit(run_trial(config, run_dir, link))


def _detach_from_fork_server() -> None:
    """Close what would keep the fork server alive when its sweep has died: this trial has to notice that."""
    server: Any = forkserver._forkserver
    if (kept := server._forkserver_alive_fd) is not None:
        os.close(kept)
        server._forkserver_alive_fd = None


def note(file: Path, text: str) -> None:
    """Add a line to what a trial printed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def print_into(file: Path) -> None:
    """Append all that this process prints to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    into = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(into, number)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(into)
