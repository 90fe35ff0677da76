"""Trials handed to one of Hydra's launchers (submitit: this machine or SLURM), in batches. No torch here.

The launcher composes each job by itself, where it runs; it is given the sweep's own copy of conf/, and the trial takes
its frozen configuration from the sweep's folder. A file asks trials to stop, wherever they run.
"""

import json
import os
import queue
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.frozen import read_status
from src.config.quoting import override
from src.errors import DamagedFileError, Interrupted, one_line
from src.sweep.folder import SweepFolder
from src.sweep.plan import Plan
from src.sweep.workers import RunTrial, TrialJob, Workers, log_file, note, print_into
from src.util import load_json

STOP_FILE = "stop"
LAUNCH = "launch"
POLL_SECONDS = 1.0
CODES = {"FINISHED": 0, "PRUNED": 0, "PREEMPTED": Interrupted.exit_code}  # of a trial whose launcher has no code


def _state(run_dir: Path) -> str | None:
    """Return a run's state by its status.json; None where there is none, or none that can be read."""
    try:
        return read_status(run_dir).get("state")
    except DamagedFileError:  # the sweep reports it when it reads the trial
        return None


def is_own_launcher(config: DictConfig) -> bool:
    """Return whether trials are this machine's processes: Hydra's basic launcher, which is the default, means that."""
    return str(config.hydra.launcher._target_).endswith(".BasicLauncher")


class Launched:
    """Runs trials by a launcher, a batch after the other: all there are, or `n_jobs` where a sampler proposes them."""

    def __init__(self, config: DictConfig, context: HydraContext, plan: Plan, run_trial: RunTrial) -> None:
        self._config, self._context, self._plan = config, context, plan
        self._task = _Task(run_trial)
        self._batch: list[TrialJob] = []
        self._is_launched = False
        self._ended: queue.SimpleQueue[list[int]] = queue.SimpleQueue()  # exit codes of a batch, in its order

    @property
    def room(self) -> int:
        if self._is_launched:
            return 0
        return (len(self._plan.trials) if self._plan.is_listed else self._plan.config.n_jobs) - len(self._batch)

    @property
    def running(self) -> list[int]:
        return [job.number for job in self._batch]

    def get_ready(self) -> None:
        """Withdraw what an earlier start asked, and its jobs that are still queued."""
        shutil.rmtree(self._plan.folder / LAUNCH, ignore_errors=True)
        (self._plan.folder / STOP_FILE).unlink(missing_ok=True)

    def is_ready(self, seconds: float) -> bool:
        """A launcher is asked at any time."""
        return True

    def start(self, job: TrialJob) -> None:
        """Take a trial into the next batch."""
        file = self._plan.folder / LAUNCH / f"{job.number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"config": job.config, "link": job.link, "batch": self._task.batch}
        file.write_text(json.dumps(content), encoding="utf-8")
        self._batch.append(job)

    def go(self) -> None:
        """Hand the batch to the launcher."""
        if self._batch and not self._is_launched:
            self._is_launched = True
            threading.Thread(target=self._launch, args=(list(self._batch),), name="launcher", daemon=True).start()

    def _launch(self, batch: Sequence[TrialJob]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of its processes too: the sweep passes Ctrl-C on
        folder, codes = self._plan.folder.resolve(), [1] * len(batch)
        of_folder = override("hydra.sweep.dir", str(folder))
        try:
            overrides = [[of_folder, override("hydra.sweep.subdir", str(job.number))] for job in batch]
            returns = self._launcher(folder).launch(overrides, initial_job_idx=batch[0].number)
            codes = [one.return_value if isinstance(one._return_value, int) else 1 for one in returns]
        except Exception as error:  # the launcher's own, a job that the scheduler killed
            numbers = [job.number for job in batch]
            while any(SweepFolder(folder).held(numbers)):  # it reports the first, the others continue
                time.sleep(POLL_SECONDS)
            states = [_state(job.run_dir) for job in batch]
            for job, state in zip(batch, states, strict=True):
                if state not in CODES:
                    note(log_file(job.run_dir), f"the launcher says: {one_line(error)}")
            codes = [CODES.get(str(state), 1) for state in states]
        finally:
            self._ended.put(codes)

    def _launcher(self, folder: Path) -> Any:
        search_path = create_config_search_path(str(folder / "conf" / "0"))
        context = HydraContext(config_loader=ConfigLoaderImpl(search_path), callbacks=self._context.callbacks)
        config = OmegaConf.masked_copy(self._config, list(self._config))
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra = []
            config.hydra.job.config_name = "config"
        return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=self._task, config=config)

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        """Wait until the batch has ended, or so long; return its trials with their exit codes."""
        try:
            codes = self._ended.get(timeout=seconds)
        except queue.Empty:
            return []
        self._is_launched, batch, self._batch = False, self._batch, []
        self._task = _Task(self._task.run_trial)
        return list(zip(batch, codes, strict=True))

    def ask_to_stop(self) -> None:
        (self._plan.folder / STOP_FILE).touch()

    def stop_at_once(self) -> None:
        """Ask once more: what runs elsewhere can't be ended from here."""
        self.ask_to_stop()


TrialRunner = Workers | Launched


class _Task:
    """Hydra's task function of a launched trial. It is pickled; what Hydra composed is not used."""

    def __init__(self, run_trial: RunTrial) -> None:
        self.run_trial, self.batch = run_trial, uuid.uuid4().hex

    def __call__(self, _: DictConfig) -> int:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        file = run_dir.parent / LAUNCH / f"{run_dir.name}.json"
        given: Mapping[str, Any] = load_json(file) if file.exists() else {}
        if given.get("batch") != self.batch:  # the sweep gave this job up while it waited
            return Interrupted.exit_code
        print_into(log_file(run_dir))
        threading.Thread(target=_stop_when_asked, args=(run_dir.parent / STOP_FILE,), daemon=True).start()
        return self.run_trial(given["config"], str(run_dir), given["link"])


def _stop_when_asked(file: Path) -> None:
    """Ask this process to stop until it does: a signal that comes before its handler is lost."""
    while True:
        if file.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(POLL_SECONDS)
