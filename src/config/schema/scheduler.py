"""conf/scheduler: a registered class a schedule, with its keys and the learning rate of each step."""

import math
from dataclasses import dataclass

from src.config.schema.checks import BELOW_ONE, COUNT, FRACTION
from src.config.schema.fields import key, type_key
from src.registry import Registry

SCHEDULES = Registry[type]("schedule")
"""`scheduler.type` -> its subclass of SchedulerConfig."""
OTHER_RATES = "other learning rates"


@dataclass
class SchedulerConfig:
    """A schedule; a subclass adds keys of its own, and says what share of its peak the learning rate has."""

    type: str = type_key("scheduler", SCHEDULES, why=OTHER_RATES)

    depends_on_length = True  # whether a longer run has other learning rates from its first step on; warm-ups apart

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return over how many steps of a run the learning rate rises from 0."""
        return 0

    def factor(self, step: int, num_steps: int) -> float:
        """Compute the learning rate as a share of its peak.

        Args:
            step: updates done before, from 0.
            num_steps: updates of the whole run.
        """
        raise NotImplementedError


@SCHEDULES.register("constant")
@dataclass
class ConstantScheduleConfig(SchedulerConfig):
    """conf/scheduler/constant.yaml: the learning rate never changes."""

    depends_on_length = False

    def factor(self, step: int, num_steps: int) -> float:
        return 1.0


@SCHEDULES.register("constant_with_warmup")
@dataclass
class WarmupScheduleConfig(SchedulerConfig):
    """conf/scheduler/constant_with_warmup.yaml: linear warm-up, then constant; the formulas are transformers'."""

    warmup_ratio: float = key(
        BELOW_ONE, why=OTHER_RATES, counts_where=lambda config: config.get("scheduler.warmup_steps") is None
    )
    warmup_steps: int | None = key(COUNT, why=OTHER_RATES)

    depends_on_length = False

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return warmup_steps, or the share of all steps, rounded up."""
        return math.ceil(self.warmup_ratio * num_steps) if self.warmup_steps is None else self.warmup_steps

    def factor(self, step: int, num_steps: int) -> float:
        warmup = self.num_warmup_steps(num_steps)
        if step < warmup:
            return step / max(1, warmup)  # the first update of a warm-up has rate 0
        return self.factor_after_warmup(min(1.0, (step - warmup) / max(1, num_steps - warmup)))

    def factor_after_warmup(self, progress: float) -> float:
        """Compute the share of the peak where `progress` of the steps after the warm-up are done."""
        return 1.0


@dataclass
class DecayScheduleConfig(WarmupScheduleConfig):
    """A warm-up, then a decay to min_lr_ratio of the peak at the end of the run."""

    min_lr_ratio: float = key(FRACTION, why=OTHER_RATES)

    depends_on_length = True

    def factor_after_warmup(self, progress: float) -> float:
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """Compute what remains of the way from the peak to the minimum: 1 at first, 0 at the end."""
        raise NotImplementedError


@SCHEDULES.register("linear")
@dataclass
class LinearScheduleConfig(DecayScheduleConfig):
    """conf/scheduler/linear.yaml."""

    def decay(self, progress: float) -> float:
        return 1.0 - progress


@SCHEDULES.register("cosine")
@dataclass
class CosineScheduleConfig(DecayScheduleConfig):
    """conf/scheduler/cosine.yaml."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
