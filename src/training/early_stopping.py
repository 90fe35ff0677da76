"""Early stopping: a run ends once its evaluations have not improved for a while. No torch here.

What counts is what metrics.jsonl has, so a run that resumes stops where it would have without the stop.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from src.config.schema import RunConfig
from src.util import plural


class EarlyStopping:
    """Counts the evaluations since `checkpoint.metric_for_best_model` has improved.

    It has improved where it is better, by more than `training.early_stopping_threshold`, than at the improvement
    before. A value that is not finite is no improvement.
    """

    def __init__(self, config: RunConfig, lines: Iterable[Mapping[str, Any]]) -> None:
        self._training = config.training
        self._metric = config.checkpoint.metric_for_best_model
        self._sign = 1 if config.checkpoint.is_greater_better else -1
        self._best: float | None = None
        self._best_step: int | None = None
        self._num_stale = 0
        for line in lines:
            self.add(int(line["step"]), line)

    def add(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Count what was measured after a step; return whether the run is to end there."""
        if self._metric not in metrics:
            return False
        value = metrics[self._metric]
        value = math.nan if value is None else float(value)
        gain = math.inf if self._best is None else self._sign * (value - self._best)
        if math.isfinite(value) and gain > self._training.early_stopping_threshold:
            self._best, self._best_step, self._num_stale = value, step, 0
        else:
            self._num_stale += 1
        return self.is_reached

    @property
    def is_reached(self) -> bool:
        """Whether the last evaluation was the last that the run waits for an improvement."""
        patience = self._training.early_stopping_patience
        return patience is not None and self._num_stale >= patience

    @property
    def cause(self) -> str:
        """Why the run ends, for people."""
        threshold = self._training.early_stopping_threshold
        more = f" by more than {threshold:g}" if threshold else ""
        best = "" if self._best is None else f"; {self._best:.4f} at step {self._best_step:,} was the last improvement"
        return f"stopped early: {self._metric} did not improve{more} in {plural(self._num_stale, 'evaluation')}{best}"
