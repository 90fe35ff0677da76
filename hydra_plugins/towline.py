"""Hands src/sweep to Hydra, which loads sweepers from this package only. Imported at every start: nothing heavy here.

There is no `__init__.py` in this folder: it would hide the launchers that other packages put here.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TowlineSweeper(Sweeper):
    """Hydra's face of `src.sweep.sweeper.sweep`."""

    def __init__(self, params: DictConfig | None = None) -> None:
        """Take what Hydra passes; `params` is read when the sweep is planned."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        task: Any = task_function  # src.cli.hydra_main.Task, which carries the sweep
        self._context, self._request, self._config = hydra_context, task.sweep, config

    def sweep(self, arguments: list[str]) -> Any:
        from src.sweep.sweeper import sweep

        return sweep(self._request, self._config, self._context)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="towline",
    node={"_target_": "hydra_plugins.towline.TowlineSweeper", "params": None},
    provider="towline",
)
