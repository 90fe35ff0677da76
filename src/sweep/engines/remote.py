"""Trials that share only the sweep's folder with it: each takes its job from a file there, and a file asks all to stop.

A job is good for one start: where the sweep has died, or given the job up, whatever still waits in a queue somewhere
finds another ticket in its file, or none, and ends. No torch here.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.config.frozen import read_status
from src.errors import DamagedFileError, Interrupted, SweepError, one_line
from src.sweep.engines.engine import RunTrial, TrialJob, note, print_into
from src.tracking.lock import holder_of
from src.trials.folder import log_file
from src.util import load_json

STOP_FILE, LAUNCH = "stop", "launch"  # in the sweep's folder
AT_ONCE = "at once"  # what STOP_FILE says where trials are not to save first
POLL_SECONDS = 1.0
CODES = {"FINISHED": 0, "PRUNED": 0, "PREEMPTED": Interrupted.exit_code}  # of a trial that was lost, by its state
NOT_SHARED = (
    "a sweep needs one folder that all machines see: trials leave their metrics, checkpoints and results there, and "
    "without them none can be resumed, paused or ranked"
)


@dataclass(frozen=True)
class Order:
    """A trial's job as it is handed to another process, on this machine or another one; the file there holds the rest.

    Its own process runs where the sweep's does (`directory`), and names the sweep's command as its own.
    """

    folder: Path
    number: int
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    directory: str = field(default_factory=os.getcwd)
    command: tuple[str, ...] = field(default_factory=lambda: tuple(sys.orig_argv))

    @property
    def file(self) -> Path:
        return self.folder / LAUNCH / f"{self.number}.json"

    def write(self, job: TrialJob) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"ticket": self.ticket, "config": job.config, "link": job.link}
        self.file.write_text(json.dumps(content), encoding="utf-8")

    def take(self) -> TrialJob | int | str:
        """Return the job, in a process that is where it is to run; or the exit code, or why it can't run here."""
        if not self.file.parent.is_dir():
            return f"{os.uname().nodename} does not see {self.folder}; {NOT_SHARED}"
        given: Mapping[str, Any] = load_json(self.file) if self.file.exists() else {}
        if given.get("ticket") != self.ticket or (self.folder / STOP_FILE).exists():
            return Interrupted.exit_code
        os.chdir(self.directory)
        sys.orig_argv[:] = self.command
        return TrialJob(self.number, given["config"], self.folder / str(self.number), given["link"])


def run_here(run_trial: RunTrial, order: Order) -> int | str:
    """Run a trial in this process, which ends with it; return its exit code, or why it can't run here."""
    job = order.take()
    if not isinstance(job, TrialJob):
        return job
    print_into(log_file(job.run_dir))
    threading.Thread(target=_stop_when_asked, args=(order.folder / STOP_FILE,), daemon=True).start()
    return run_trial(job.config, str(job.run_dir), job.link)


def _stop_when_asked(file: Path) -> None:
    """Ask this process to stop until it does: a signal that comes before its handler is lost."""
    while True:
        if file.exists():
            os.kill(os.getpid(), signal.SIGINT if file.read_text() == AT_ONCE else signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def withdraw(folder: Path) -> None:
    """Withdraw what an earlier start of a sweep asked, and its jobs that are still queued."""
    shutil.rmtree(folder / LAUNCH, ignore_errors=True)
    (folder / STOP_FILE).unlink(missing_ok=True)


class Remote:
    """The base of engines whose trials run elsewhere."""

    def __init__(self, folder: Path, n_jobs: int, run_trial: RunTrial) -> None:
        self._folder, self._n_jobs, self._run_trial = folder.resolve(), n_jobs, run_trial
        self._working: dict[int, tuple[TrialJob, Any]] = {}  # a trial and the handle of its job, by its number

    @property
    def room(self) -> int:
        return self._n_jobs - len(self._working)

    @property
    def running(self) -> list[int]:
        return list(self._working)

    def open(self) -> None:
        """Nothing is started: the engine is there."""

    def is_ready(self, _: float) -> bool:
        return True

    def start(self, job: TrialJob) -> None:
        order = Order(self._folder, job.number)
        order.write(job)
        self._working[job.number] = job, self._submit(order)

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        self._rest([handle for _, handle in self._working.values()], seconds)
        codes = {number: self._code(job, handle) for number, (job, handle) in self._working.items()}
        ended = [(self._working.pop(number)[0], code) for number, code in codes.items() if code is not None]
        for job, _ in ended:
            Order(self._folder, job.number).file.unlink(missing_ok=True)
        return ended

    def _code(self, job: TrialJob, handle: Any) -> int | None:
        """Return a trial's exit code, None while it runs; by its folder where its process, or machine, was lost."""
        try:
            outcome = self._outcome(handle)
        except Exception as error:  # the engine's own, of whatever kind
            return None if holder_of(job.run_dir) else code_of_lost(job, error)
        if not isinstance(outcome, str):
            return outcome
        note(log_file(job.run_dir), outcome)
        return SweepError.exit_code

    def _submit(self, order: Order) -> Any:
        """Have a trial run; return a handle of its job."""
        raise NotImplementedError

    def _rest(self, handles: Sequence[Any], seconds: float) -> None:
        """Wait until one of the jobs ends, or so long."""
        time.sleep(seconds)

    def _outcome(self, handle: Any) -> int | str | None:
        """Return what a job has returned, None while it runs; raises where it returned nothing."""
        raise NotImplementedError

    def ask_to_stop(self) -> None:
        (self._folder / STOP_FILE).touch()

    def stop_at_once(self) -> None:
        (self._folder / STOP_FILE).write_text(AT_ONCE)

    def close(self) -> None:
        """Nothing was started."""


def code_of_lost(job: TrialJob, error: Exception) -> int:
    """Return the exit code of a trial whose process returned none, by what its folder says; noted in its log."""
    try:
        state = str(read_status(job.run_dir).get("state"))
    except DamagedFileError:  # the sweep reports it when it reads the trial
        state = ""
    if state not in CODES:
        note(log_file(job.run_dir), f"the process of this trial was lost: {one_line(error)}")
    return CODES.get(state, 1)
