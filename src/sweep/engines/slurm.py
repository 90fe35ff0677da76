"""Trials as jobs of SLURM, by submitit: one job a trial. No torch here.

A job that comes near its time limit, or is preempted, saves and ends as a run that was asked to stop; the sweep submits
the trial again, which resumes.
"""

import os
import shutil
import signal
import time
from typing import Any

from src.errors import SweepError, one_line
from src.sweep.engines.engine import RunTrial, TrialJob
from src.sweep.engines.remote import POLL_SECONDS, Order, Remote, run_here
from src.sweep.plan import Plan

FOLDER = ".submitit"  # in the sweep's folder: scripts and output of the jobs
HINT = "e.g. sweep.slurm={partition: gpu, time: 240, gpus_per_node: 1}"


class Slurm(Remote):
    """Keeps up to `n_jobs` trials in SLURM's queue, or running."""

    def __init__(self, plan: Plan, run_trial: RunTrial) -> None:
        super().__init__(plan.folder, plan.config.n_jobs, run_trial)
        self._name, self._options = plan.name, dict(plan.config.slurm)
        self._library = _library()
        self._looked = 0.0
        if "time" not in self._options:
            raise SweepError(f"sweep.slurm has no time, the minutes that a job may take: {HINT}")

    def open(self) -> None:
        options = dict(self._options)
        cluster, minutes = options.pop("cluster", "slurm"), options.pop("time")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise SweepError("sweep.engine = slurm needs SLURM: there is no sbatch here")
        try:
            self._executor = self._library.AutoExecutor(self._folder / FOLDER, cluster=cluster)
            self._executor.update_parameters(
                name=self._name, timeout_min=minutes, **{f"slurm_{key}": value for key, value in options.items()}
            )
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise SweepError(f"sweep.slurm = {self._options}: {one_line(error)}") from error

    def _submit(self, order: Order) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of its processes too: the sweep passes Ctrl-C on
        try:
            return self._executor.submit(_run, self._run_trial, order)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        """Do as others do, but look at the jobs' files, which are on a disk that many share, not all the time."""
        if is_due := time.monotonic() - self._looked > POLL_SECONDS:
            self._looked = time.monotonic()
        else:
            time.sleep(seconds)
        return super().wait(0) if is_due else []

    def _outcome(self, handle: Any) -> int | str | None:
        return handle.result() if handle.done() else None

    def ask_to_stop(self) -> None:
        """Ask what runs, and take out of the queue what waits there."""
        super().ask_to_stop()
        for _, handle in self._working.values():
            if handle.state == "PENDING":
                handle.cancel(check=False)


def _library() -> Any:
    try:
        import submitit
    except ImportError as error:
        hint = "pip install -c constraints.txt -e '.[cluster]'"
        raise SweepError(f"sweep.engine = slurm needs submitit, which is not installed: {hint}") from error
    return submitit


def _run(run_trial: RunTrial, order: Order) -> int | str:
    """Run a trial in a job's process; what SLURM sends before the time limit asks it to stop as SIGTERM does."""
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return run_here(run_trial, order)
