"""The best weights so far, kept in the run's folder until the end. Safetensors, nothing pickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from src.config.schema import CheckpointConfig, greater_is_better


class BestWeights:
    """Keeps the weights of the evaluation with the best `metric_for_best_model`, where they are wanted at the end."""

    def __init__(self, config: CheckpointConfig, run_dir: Path) -> None:
        self._metric = config.metric_for_best_model
        self._wanted = config.load_best_model_at_end
        given = config.greater_is_better
        self._greater = greater_is_better(self._metric) if given is None else given
        self._file = run_dir / "checkpoints" / "best.safetensors"
        self._value: float | None = None
        self.step: int | None = None
        """The step whose weights are kept."""

    def consider(self, step: int, metrics: Mapping[str, float], model: Any) -> None:
        """Keep the model's weights if this evaluation is better than all before; the first of equals stays."""
        if not self._wanted:
            return
        value = metrics[self._metric]
        if self._value is None or (value > self._value if self._greater else value < self._value):
            self._file.parent.mkdir(exist_ok=True)
            beside = self._file.with_suffix(".part")
            save_file(_trained(model), beside)
            os.replace(beside, self._file)
            self._value, self.step = value, step

    def restore(self, model: Any) -> None:
        """Put the best weights back into the model, if they are wanted, and let go of the file."""
        if self.step is not None:
            kept = load_file(self._file)
            with torch.no_grad():
                for name, parameter in _trained(model).items():
                    parameter.copy_(kept[name])
            self._file.unlink()
            self._file.parent.rmdir()


def _trained(model: Any) -> dict[str, nn.Parameter]:
    """Give what is trained of a model by name, each parameter once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
