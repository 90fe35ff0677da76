"""What stands in conf/config.yaml itself: the keys outside any section, and the sections that have no options."""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from src.config.schema import checks
from src.config.schema.checks import AT_LEAST_ONE, BELOW_ONE, COUNT, PATH, POSITIVE, WEIGHT_OR_ZERO, PathCheck
from src.config.schema.data import is_grouped_by_length
from src.config.schema.fields import AT_START, BY_OUTCOME, GENERATING, READING_ROWS, DottedConfig, Impact, Verdict, key
from src.config.schema.scheduler import SCHEDULES
from src.metrics import greater_is_better

MixedPrecision = StrEnum("MixedPrecision", "no bf16 fp16 auto")
Reduction = StrEnum("Reduction", "mean sum")
Device = StrEnum("Device", "auto cpu cuda")

OTHER_LOSS = "something else is minimised"
MAX_STEPS = "training.max_train_steps"
BATCH_SIZE = "training.per_device_train_batch_size"
ROWS_OF_A_STEP = (
    *(BATCH_SIZE, "training.gradient_accumulation_steps"),
    *("runtime.num_processes", "runtime.num_machines"),
)
"""Keys whose product is how many rows make a step."""
PORT = checks.Check("a port's number, from 1 to 65535", lambda v: v is None or (checks.is_int(v) and 1 <= v <= 65535))
TRACED = checks.up_to(100, "summing up a traced step takes seconds")
MACHINES = checks.up_to(65_536, "more machines than any cluster has")
_runtime_key = partial(key, resume=BY_OUTCOME, read_by=(*GENERATING, "export"))


def _impact_of_start(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    return Impact.harmless, "" if now[key] is None else AT_START


@dataclass
class TopLevelConfig:
    """The keys that stand outside any section."""

    name: str = key(checks.NAME, resume=Impact.harmless)
    seed: int = key(checks.SEED, why="the rows come in another order", reorders=True, read_by=GENERATING)
    force: bool = key(resume=Impact.harmless, read_by=(*GENERATING, "export"))
    rerun: str | None = key(PATH, resume=Impact.harmless)
    init_from: str | None = key(PATH, resume=_impact_of_start)
    plugins: list[str] = key(checks.STRINGS, resume=BY_OUTCOME, read_by=(*GENERATING, "export"))


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


def _has_token_budget(config: DottedConfig) -> bool:
    return config.get("training.per_device_train_tokens") is not None


def _impact_of_batch(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of another division of a step's rows: the same rows in other micro-batches are the same step.

    Budgets of tokens and the ends of streamed blocks go by micro-batches, so they change the rows of a step.
    """
    first, second = (math.prod(one.get(size, 1) for size in ROWS_OF_A_STEP) for one in (before, now))
    if key == BATCH_SIZE and _has_token_budget(before) and _has_token_budget(now):
        return Impact.harmless, ""
    is_cut_freely = not any(_has_token_budget(one) or one.get("data.streaming") for one in (before, now))
    if is_cut_freely and first == second:
        return Impact.rounding, "the same rows a step, in other micro-batches"
    return Impact.trajectory, "a step takes different rows"


@dataclass
class TrainingConfig:
    """How long, in which batches and in which precision. One step is one optimizer update."""

    num_train_epochs: float = key(POSITIVE, resume=_impact_of_length)
    max_train_steps: int | None = key(AT_LEAST_ONE, resume=_impact_of_length)
    max_seconds: float | None = key(POSITIVE, resume=Impact.harmless)
    per_device_train_batch_size: int = key(AT_LEAST_ONE, resume=_impact_of_batch)
    per_device_eval_batch_size: int = key(AT_LEAST_ONE, resume=Impact.harmless, read_by=GENERATING)
    gradient_accumulation_steps: int = key(AT_LEAST_ONE, resume=_impact_of_batch)
    per_device_train_tokens: int | None = key(
        AT_LEAST_ONE, None, resume=_impact_of_batch, reorders=is_grouped_by_length
    )
    max_grad_norm: float | None = key(checks.WEIGHT, why="other updates")
    mixed_precision: MixedPrecision = key(why="computes in another precision", read_by=GENERATING)
    logging_steps: int = key(AT_LEAST_ONE, resume=Impact.harmless)
    early_stopping_patience: int | None = key(AT_LEAST_ONE, None, resume=Impact.harmless)
    early_stopping_threshold: float = key(WEIGHT_OR_ZERO, 0.0, resume=Impact.harmless)


@dataclass
class LossConfig:
    """What is minimised: see src.training.loss."""

    reduction: Reduction = key(why=OTHER_LOSS)
    thought_weight: float = key(WEIGHT_OR_ZERO, why=OTHER_LOSS)
    label_smoothing: float = key(BELOW_ONE, why=OTHER_LOSS)
    thought_open_weight: float | None = key(WEIGHT_OR_ZERO, None, why=OTHER_LOSS)
    thought_close_weight: float | None = key(WEIGHT_OR_ZERO, None, why=OTHER_LOSS)
    after_thought_weight: float = key(WEIGHT_OR_ZERO, 1.0, why=OTHER_LOSS)

    def thought_weights(self) -> dict[str, float]:
        """Return the weight of each part of a thought, and of what comes after it, by its key."""
        inner = self.thought_weight
        opening, closing = (inner if w is None else w for w in (self.thought_open_weight, self.thought_close_weight))
        names = ("thought_weight", "thought_open_weight", "thought_close_weight", "after_thought_weight")
        return dict(zip(names, (inner, opening, closing, self.after_thought_weight), strict=True))


@dataclass
class EvaluationConfig:
    """When and on how much the run is evaluated and samples are written."""

    eval_steps: Any = key(checks.STEPS_OR_EPOCH, resume=Impact.harmless)
    metrics: list[str] | None = key(checks.METRIC_NAMES, resume=Impact.harmless, read_by=READING_ROWS)
    max_samples: int | None = key(AT_LEAST_ONE, resume=Impact.harmless, read_by=("evaluate",))
    sample_steps: Any = key(checks.STEPS_OR_EPOCH, resume=Impact.harmless)
    sample_prompts: int = key(COUNT, resume=Impact.harmless)


@dataclass
class CheckpointConfig:
    """When the run is saved, which saves are kept, and how a run that was stopped resumes."""

    checkpointing_steps: Any = key(checks.STEPS_OR_EPOCH, resume=Impact.harmless)
    keep_last: int = key(AT_LEAST_ONE, resume=Impact.harmless)
    keep_best: int = key(COUNT, resume=Impact.harmless)
    newest_optimizer_only: bool = key(resume=Impact.harmless)
    metric_for_best_model: str = key(resume=Impact.harmless)
    greater_is_better: bool | None = key(resume=Impact.harmless)
    load_best_model_at_end: bool = key(resume=Impact.harmless)
    resume: str = key(PathCheck("auto, never, or a folder: a run's or a checkpoint", bool), resume=Impact.harmless)
    allow_changed: bool = key(resume=Impact.harmless)

    @property
    def saves_at_end(self) -> bool:
        """Whether the run is saved at its end: where it is saved at all, or the best weights are loaded there."""
        return self.checkpointing_steps is not None or self.load_best_model_at_end

    @property
    def is_greater_better(self) -> bool:
        """Whether a higher value of metric_for_best_model is the better one."""
        known = greater_is_better(self.metric_for_best_model)
        return known if self.greater_is_better is None else self.greater_is_better

    @property
    def resume_from(self) -> Path | None:
        """The folder that resume names; None for auto and never."""
        return None if self.resume in ("auto", "never") else Path(self.resume)


@dataclass
class ExportConfig:
    """What the exported model/ holds."""

    merge: bool = key(resume=Impact.harmless)


@dataclass
class RuntimeConfig:
    """On what the run computes."""

    device: Device = _runtime_key()
    num_processes: int = _runtime_key(checks.PROCESSES)
    num_machines: int = _runtime_key(MACHINES)
    machine_rank: int = _runtime_key(COUNT)
    main_process_ip: str | None = _runtime_key()
    main_process_port: int | None = _runtime_key(PORT)
    deterministic: bool = _runtime_key(resume=Impact.rounding)
    profile_steps: int | None = key(TRACED, None, resume=Impact.harmless)
    compile: bool = key(default=False, resume=Impact.rounding)

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines
