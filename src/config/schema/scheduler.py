"""conf/scheduler: how the learning rate changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from src.config.schema.checks import BELOW_ONE, COUNT, FRACTION
from src.config.schema.fields import key, type_key

OTHER_RATES = "other learning rates"


class ScheduleType(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"


@dataclass
class ConstantScheduleConfig:
    """conf/scheduler/constant.yaml: the learning rate never changes."""

    type: ScheduleType = type_key("scheduler", why=OTHER_RATES)


@dataclass
class WarmupScheduleConfig:
    """conf/scheduler/constant_with_warmup.yaml: linear warm-up, then constant."""

    type: ScheduleType = type_key("scheduler", why=OTHER_RATES)
    warmup_ratio: float = key(
        BELOW_ONE, why=OTHER_RATES, counts_where=lambda config: config.get("scheduler.warmup_steps") is None
    )
    warmup_steps: int | None = key(COUNT, why=OTHER_RATES)


@dataclass
class DecayScheduleConfig(WarmupScheduleConfig):
    """conf/scheduler/linear.yaml and cosine.yaml: linear warm-up, then decay to min_lr_ratio of the peak."""

    min_lr_ratio: float = key(FRACTION, why=OTHER_RATES)


SchedulerConfig = ConstantScheduleConfig | WarmupScheduleConfig | DecayScheduleConfig
