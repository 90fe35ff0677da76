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
from collections.abc import Collection, Sequence
from contextlib import suppress
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
from src.sweep.engines.engine import RunTrial, TrialJob, print_into
from src.trials.folder import log_file

PRELOAD_MODULE = "src.sweep.engines.preload"  # what the fork server imports before the first trial
OPTIONAL_MODULES = {
    "adapter": ("peft",),
    "mlflow": (
        *("mlflow", "mlflow.store.tracking.sqlalchemy_workspace_store", "mlflow.store.tracking.rest_store"),
        *("alembic.command", "sqlalchemy.dialects.sqlite"),
    ),
    "hub": ("datasets",),
}
"""Modules that only some trials need, imported after PRELOAD_MODULE."""
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
GRACE_SECONDS = 5.0  # how long trials may take to end at once, when asked twice


def modules_of_run(config: RunConfig, varied: Collection[str] = ()) -> list[str]:
    """Return the modules that a run, or one of a sweep that varies these sections, imports after PRELOAD_MODULE."""
    wanted = {
        "adapter": config.adapter.is_on or "adapter" in varied,
        "mlflow": any(isinstance(one, MlflowConfig) for one in config.tracking.trackers()),
        "hub": any(source.data.dataset_name for source in config.data.train_sources().values()) or "data" in varied,
    }
    modules = [module for need, is_wanted in wanted.items() if is_wanted for module in OPTIONAL_MODULES[need]]
    with suppress(OSError, DamagedFileError):  # no file here, or none that can be used: the run reports it
        kind = read_json(Path(config.model.checkpoint, "config.json"), {"model_type": str})["model_type"]
        modules.append(f"transformers.models.{kind}.modeling_{kind}")
    return modules


def start_fork_server(needs: Sequence[str]) -> None:
    """Start the fork server, which imports what all trials need and these modules, in silence; return at once."""
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
    """Runs up to `n_jobs` trials at the same time, each with its share of threads, and `gpus_each` GPUs if any."""

    def __init__(self, run_trial: RunTrial, n_jobs: int, gpus_each: int, *, uses_gpus: bool) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
        self._run_trial, self._n_jobs = run_trial, n_jobs
        self._threads = threads_each(n_jobs, gpus_each)
        self._gpus = shares(visible_gpus() if uses_gpus else [], n_jobs, gpus_each)
        self._working: dict[int, tuple[TrialJob, BaseProcess]] = {}  # by the slot that a trial takes
        self._first: threading.Thread

    @property
    def room(self) -> int:
        return self._n_jobs - len(self._working)

    @property
    def running(self) -> list[int]:
        return [job.number for job, _ in self._working.values()]

    def open(self) -> None:
        """Have the fork server, which imports what trials need since the command was checked, fork a first process."""
        self._first = threading.Thread(target=self._start_nothing, name="fork-server", daemon=True)
        self._first.start()

    def is_ready(self, seconds: float) -> bool:
        self._first.join(seconds)
        return not self._first.is_alive()

    def _start_nothing(self) -> None:
        with suppress(EOFError, OSError):  # it has died: the first trial reports it
            process = self._context.Process(target=_detach_from_fork_server)
            process.start()
            process.join()

    def start(self, job: TrialJob) -> None:
        slot = next(i for i in range(self._n_jobs) if i not in self._working)
        variables = dict(os.environ)
        if self._threads is not None:
            variables["OMP_NUM_THREADS"] = str(self._threads)
        if self._gpus[slot]:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot])
        given = (self._run_trial, job, self._threads, variables, str(Path.cwd()), list(sys.orig_argv))
        process = self._context.Process(target=_work, args=given, name=f"trial-{job.number}")
        try:
            process.start()
        except (EOFError, OSError) as error:
            raise SweepError(f"the process that trials are forked from has died ({one_line(error)})") from error
        self._working[slot] = job, process

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        multiprocessing.connection.wait([process.sentinel for _, process in self._working.values()], seconds)
        ended = {slot: one for slot, one in self._working.items() if one[1].exitcode is not None}
        for slot, (_, process) in ended.items():
            process.join()
            del self._working[slot]
        return [(job, process.exitcode or 0) for job, process in ended.values()]

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        for _, process in self._working.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def stop_at_once(self) -> None:
        processes = []
        for _, trial in self._working.values():
            with suppress(psutil.NoSuchProcess):
                leader = psutil.Process(trial.pid)
                processes += [leader, *leader.children(recursive=True)]
        self.ask_to_stop(signal.SIGINT)
        _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)

    def close(self) -> None:
        end_fork_server()


def _work(
    run_trial: RunTrial, job: TrialJob, threads: int | None, variables: dict[str, str], folder: str, command: list[str]
) -> None:
    """Run a trial in this process, from its first line to its exit code."""
    os.setsid()
    rest_while_importing()  # the fork server did; looking for garbage there would copy all its memory
    _detach_from_fork_server()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.orig_argv[:] = command
    print_into(log_file(job.run_dir))
    if threads is not None:
        import torch  # the fork server has it, and read the environment before this trial had one of its own

        torch.set_num_threads(threads)
    sys.exit(run_trial(job.config, str(job.run_dir), job.link))


def _detach_from_fork_server() -> None:
    """Close what would keep the fork server alive when its sweep has died: this trial has to notice that."""
    server: Any = forkserver._forkserver
    if (kept := server._forkserver_alive_fd) is not None:
        os.close(kept)
        server._forkserver_alive_fd = None
