"""Optimizers and schedules of a run, built of their configuration; each is defined in src/config/schema."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import OptimizerConfig, SchedulerConfig, WarmupScheduleConfig
from src.errors import ModelError
from src.runtime.sharding import full_shape


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    embeddings: Iterable[nn.Parameter] = (),
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split what is trained into matrices, which decay, and norms and biases (one dimension or none), which do not.

    With `embedding_lr` the embeddings form groups of their own, after the others, with it as their peak; where none is
    trained, that is a ModelError. A parameter that comes twice, such as a tied matrix, is taken once.
    """
    trained = list({id(p): p for p in parameters if p.requires_grad}.values())
    rows = set() if embedding_lr is None else {id(p) for p in embeddings}
    others, apart = ([p for p in trained if (id(p) in rows) == is_row] for is_row in (False, True))
    if embedding_lr is not None and not apart:
        raise ModelError(
            f"optimizer.embedding_lr = {embedding_lr}, but no embedding is trained here: optimizer.embedding_lr=null"
        )
    groups: list[dict[str, Any]] = []
    for chosen, rate in ((others, {}), (apart, {"lr": embedding_lr})):
        groups += [
            {"params": [p for p in chosen if len(full_shape(p)) >= 2], "weight_decay": weight_decay, **rate},
            {"params": [p for p in chosen if len(full_shape(p)) < 2], "weight_decay": 0.0, **rate},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], embeddings: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters that are trained, see parameter_groups, once they are on their device."""
    return config.build(parameter_groups(parameters, config.weight_decay, embeddings, config.embedding_lr))


def warmup_warnings(config: SchedulerConfig, num_steps: int) -> list[str]:
    """Return why a warm-up keeps a run of `num_steps` updates from learning; nothing where it does not."""
    warmup = config.num_warmup_steps(num_steps)
    if not warmup or warmup < num_steps:
        return []
    has_ratio = isinstance(config, WarmupScheduleConfig) and config.warmup_steps is None
    key = "scheduler.warmup_ratio" if has_ratio else "scheduler.warmup_steps"
    if num_steps == 1:
        return [f"the run has one step, and a warm-up begins at a learning rate of 0: nothing is learned ({key}=0)"]
    return [
        f"the warm-up takes {warmup:,} steps and the run has {num_steps:,}: the learning rate never reaches "
        f"optimizer.lr; give it more steps, or a smaller {key}"
    ]


def build_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """Build the schedule over `num_steps` updates."""
    return LambdaLR(optimizer, lambda step: config.factor(step, num_steps))


def restore_schedule(schedule: LambdaLR, num_updates: int) -> None:
    """Set a schedule to where it is after `num_updates`; it depends on nothing else."""
    schedule.last_epoch, schedule._step_count = num_updates, num_updates + 1
    rates = [base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
