"""Trials handed to one of Hydra's launchers (joblib, submitit, …), in batches. No torch here.

The launcher composes each job by itself, where it runs; it is given the sweep's own copy of conf/, and the trial takes
its frozen configuration from the sweep's folder.
"""

import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.quoting import override
from src.sweep.engines.engine import RunTrial
from src.sweep.engines.remote import POLL_SECONDS, Order, Remote, code_of_lost, run_here
from src.sweep.plan import Plan
from src.tracking.lock import holder_of


def is_own_launcher(config: DictConfig) -> bool:
    """Return whether trials are `sweep.engine`'s: Hydra's basic launcher, which is the default, means that."""
    return str(config.hydra.launcher._target_).endswith(".BasicLauncher")


class Launched(Remote):
    """Runs trials by a launcher, a batch after the other: all there are, or `n_jobs` where a sampler proposes them."""

    def __init__(self, config: DictConfig, context: HydraContext, plan: Plan, run_trial: RunTrial) -> None:
        super().__init__(plan.folder, len(plan.trials) if plan.is_listed else plan.config.n_jobs, run_trial)
        self._config, self._context = config, context
        self._is_launched = False
        self._ended: queue.SimpleQueue[dict[int, int | str]] = queue.SimpleQueue()  # what trials of a batch returned
        self._outcomes: dict[int, int | str] = {}

    @property
    def room(self) -> int:
        return 0 if self._is_launched else super().room

    def _submit(self, order: Order) -> Order:
        """Take a trial into the next batch."""
        return order

    def _rest(self, handles: Sequence[Order], seconds: float) -> None:
        """Hand the batch to the launcher; wait until it has ended, or so long."""
        if not self._is_launched:
            self._is_launched = True
            threading.Thread(target=self._launch, args=(handles,), name="launcher", daemon=True).start()
        try:
            self._outcomes, self._is_launched = self._ended.get(timeout=seconds), False
        except queue.Empty:
            return

    def _outcome(self, handle: Order) -> int | str | None:
        return self._outcomes.pop(handle.number, None)

    def _launch(self, batch: Sequence[Order]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of its processes too: the sweep passes Ctrl-C on
        numbers = [order.number for order in batch]
        outcomes: list[int | str] = [1] * len(batch)
        of_folder = override("hydra.sweep.dir", str(self._folder))
        try:
            overrides = [[of_folder, override("hydra.sweep.subdir", str(number))] for number in numbers]
            task = _Task(self._run_trial, {order.number: order for order in batch})
            returns = self._launcher(task).launch(overrides, initial_job_idx=numbers[0])
            outcomes = [one.return_value if isinstance(one._return_value, int | str) else 1 for one in returns]
        except Exception as error:  # the launcher's own, a job that the scheduler killed
            jobs = [self._working[number][0] for number in numbers]
            while any(holder_of(job.run_dir) for job in jobs):  # it reports the first, the others continue
                time.sleep(POLL_SECONDS)
            outcomes = [code_of_lost(job, error) for job in jobs]
        finally:
            self._ended.put(dict(zip(numbers, outcomes, strict=True)))

    def _launcher(self, task: "_Task") -> Any:
        search_path = create_config_search_path(str(self._folder / "conf" / "0"))
        context = HydraContext(config_loader=ConfigLoaderImpl(search_path), callbacks=self._context.callbacks)
        config = OmegaConf.masked_copy(self._config, list(self._config))
        with open_dict(config):
            config.hydra.sweep.dir = str(self._folder)
            config.hydra.overrides.hydra = []
            config.hydra.job.config_name = "config"
        return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


class _Task:
    """Hydra's task function of a launched trial. It is pickled; what Hydra composed is not used."""

    def __init__(self, run_trial: RunTrial, orders: Mapping[int, Order]) -> None:
        self._run_trial, self._orders = run_trial, orders

    def __call__(self, _: DictConfig) -> int | str:
        return run_here(self._run_trial, self._orders[int(Path(HydraConfig.get().runtime.output_dir).name)])
