"""The sections `training` and `loss` of conf/config.yaml."""

import math
from dataclasses import dataclass
from enum import StrEnum

from src.config.schema.checks import AT_LEAST_ONE, BELOW_ONE, POSITIVE, WEIGHT, WEIGHT_OR_ZERO
from src.config.schema.data import is_grouped_by_length
from src.config.schema.fields import DottedConfig, Impact, Verdict, key
from src.config.schema.scheduler import SCHEDULES

MixedPrecision = StrEnum("MixedPrecision", "no bf16 fp16")
Reduction = StrEnum("Reduction", "mean sum")


OTHER_LOSS = "something else is minimised"
MAX_STEPS = "training.max_train_steps"
ROWS_OF_A_STEP = (
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "runtime.num_processes",
    "runtime.num_machines",
)
"""Keys whose product is how many rows make a step."""


def _impact_of_length(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of another length: a run may get longer.

    From epochs to steps or back, Fingerprint.num_steps decides.
    """
    if key != MAX_STEPS and (before.get(MAX_STEPS), now.get(MAX_STEPS)) != (None, None):
        return Impact.harmless, ""
    if None not in (before[key], now[key]) and now[key] < before[key]:
        return Impact.trajectory, "a shorter run"
    return Impact.harmless, "the learning rate's schedule moves to the new end" if _has_end(now) else ""


def _has_end(config: DottedConfig) -> bool:
    """Return whether learning rates depend on how many steps there will be."""
    schedule = SCHEDULES.get(str(config.get("scheduler.type")))
    return getattr(schedule, "depends_on_length", False) or (
        config.get("scheduler.warmup_steps") is None and bool(config.get("scheduler.warmup_ratio"))
    )


def _impact_of_batch(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of another division of a step's rows: the same rows in other micro-batches are the same step.

    Grouping by length and the ends of streamed blocks go by micro-batches, so they change the rows of a step.
    """
    first, second = (math.prod(one.get(size, 1) for size in ROWS_OF_A_STEP) for one in (before, now))
    is_cut_freely = not any(is_grouped_by_length(one) or one.get("data.streaming") for one in (before, now))
    if is_cut_freely and first == second:
        return Impact.rounding, "the same rows a step, in other micro-batches"
    return Impact.trajectory, "a step takes different rows"


@dataclass
class TrainingConfig:
    """How long, in which batches and in which precision. One step is one optimizer update."""

    num_train_epochs: float = key(POSITIVE, resume=_impact_of_length)
    max_train_steps: int | None = key(AT_LEAST_ONE, resume=_impact_of_length)
    max_seconds: float | None = key(POSITIVE, resume=Impact.harmless)
    per_device_train_batch_size: int = key(AT_LEAST_ONE, resume=_impact_of_batch, reorders=is_grouped_by_length)
    per_device_eval_batch_size: int = key(AT_LEAST_ONE, resume=Impact.harmless, read_by_predict=True)
    gradient_accumulation_steps: int = key(AT_LEAST_ONE, resume=_impact_of_batch)
    max_grad_norm: float | None = key(WEIGHT, why="other updates")
    mixed_precision: MixedPrecision = key(why="computes in another precision", read_by_predict=True)
    logging_steps: int = key(AT_LEAST_ONE, resume=Impact.harmless)


@dataclass
class LossConfig:
    """What is minimised: see src.training.loss."""

    reduction: Reduction = key(why=OTHER_LOSS)
    thought_weight: float = key(WEIGHT_OR_ZERO, why=OTHER_LOSS)
    label_smoothing: float = key(BELOW_ONE, why=OTHER_LOSS)
