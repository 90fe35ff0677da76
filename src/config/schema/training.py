"""The sections `training` and `loss` of conf/config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from src.config.schema.checks import AT_LEAST_ONE, BELOW_ONE, POSITIVE, WEIGHT, WEIGHT_OR_ZERO
from src.config.schema.every import Every
from src.config.schema.fields import key


class MixedPrecision(Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Reduction(Enum):
    mean = "mean"
    sum = "sum"


@dataclass
class TrainingConfig:
    """How long, in which batches and in which precision. One step is one optimizer update."""

    num_train_epochs: float = key(POSITIVE)
    max_train_steps: int | None = key(AT_LEAST_ONE)
    max_seconds: float | None = key(POSITIVE)
    per_device_train_batch_size: int = key(AT_LEAST_ONE)
    per_device_eval_batch_size: int = key(AT_LEAST_ONE)
    gradient_accumulation_steps: int = key(AT_LEAST_ONE)
    max_grad_norm: float | None = key(WEIGHT)
    mixed_precision: MixedPrecision = MISSING
    logging_steps: int = key(AT_LEAST_ONE)

    @property
    def log_every(self) -> Every:
        """When metrics.jsonl gets a line, even where nothing was evaluated."""
        return Every(self.logging_steps)


@dataclass
class LossConfig:
    """What is minimised: see src.training.loss."""

    reduction: Reduction = MISSING
    thought_weight: float = key(WEIGHT_OR_ZERO)
    label_smoothing: float = key(BELOW_ONE)
