"""Optimizers and schedules, as pure functions of parameters and numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import (
    AdafactorConfig,
    AdamWConfig,
    DecayScheduleConfig,
    OptimizerConfig,
    SchedulerConfig,
    ScheduleType,
    WarmupScheduleConfig,
)
from src.errors import ModelError
from src.runtime.sharding import full_shape

ADAFACTOR_EPS = (torch.finfo(torch.float32).eps, 1e-3)
"""torch's own for float32 weights, and here for all. Its default follows the weights' type, and bfloat16's, 0.008, is
far above usual gradients: such weights stand still (measured: 100 steps with gradients of 3e-5 moved them by 0.1 %)."""


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    embeddings: Iterable[nn.Parameter] = (),
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split what is trained into matrices, which decay, and norms and biases (one dimension or none), which do not.

    With `embedding_lr` the embeddings form groups of their own, behind the others, that have it as their peak. A
    parameter that comes twice, such as a tied matrix, is taken once.

    Raises:
        ModelError: where `embedding_lr` is given and no embedding is trained.
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
    """Build the optimizer over all parameters that are trained.

    Args:
        parameters: where they will be trained: build it when the model is on its device.
        embeddings: those of them that are embedding rows, which `embedding_lr` is for.
    Raises:
        ModelError: see parameter_groups.
    """
    groups = parameter_groups(parameters, config.weight_decay, embeddings, config.embedding_lr)
    if isinstance(config, AdamWConfig):
        first, second = config.betas
        options: dict[str, Any] = {"lr": config.lr, "betas": (first, second), "eps": config.eps}
        if config.type == "adamw":
            return torch.optim.AdamW(groups, **options, fused=True)
        optimizers = _bitsandbytes_optimizers()
        if config.type == "adamw_8bit":
            return optimizers.AdamW8bit(groups, **options)
        is_on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        # without a GPU there is no memory to page from, and bitsandbytes would warn of it in the first step
        return (optimizers.PagedAdamW32bit if is_on_gpu else optimizers.AdamW32bit)(groups, **options)
    if isinstance(config, AdafactorConfig):
        return torch.optim.Adafactor(groups, lr=config.lr, eps=ADAFACTOR_EPS)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _bitsandbytes_optimizers() -> Any:
    """Import bitsandbytes, which takes seconds, without its word about a CPU kernel that it could fetch from a hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import optim

    return optim


def num_warmup_steps(config: SchedulerConfig, num_steps: int) -> int:
    """Give the length of the warm-up in steps: warmup_steps, or the share of all steps, rounded up."""
    if not isinstance(config, WarmupScheduleConfig):
        return 0
    return math.ceil(config.warmup_ratio * num_steps) if config.warmup_steps is None else config.warmup_steps


def lr_factor(kind: ScheduleType, step: int, num_steps: int, warmup: int, min_ratio: float) -> float:
    """Give the learning rate as a share of its peak, by transformers' formulas.

    Args:
        step: updates done before, from 0: the first update of a warm-up has rate 0.
        num_steps: updates of the whole run.
        warmup: updates over which the rate rises linearly.
        min_ratio: where a decay ends, at `step == num_steps`.
    """
    if kind is ScheduleType.constant:
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if kind is ScheduleType.constant_with_warmup:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    remaining = 1.0 - progress if kind is ScheduleType.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_ratio + (1.0 - min_ratio) * remaining


def cannot_learn(config: SchedulerConfig, num_steps: int) -> list[str]:
    """Say how a warm-up keeps a run of so many updates from learning; nothing where it does not."""
    warmup = num_warmup_steps(config, num_steps)
    if not warmup or warmup < num_steps:
        return []
    key = "scheduler.warmup_ratio" if _has_ratio(config) else "scheduler.warmup_steps"
    if num_steps == 1:
        return [f"the run has one step, and a warm-up begins at a learning rate of 0: nothing is learned ({key}=0)"]
    return [
        f"the warm-up takes {warmup:,} steps and the run has {num_steps:,}: the learning rate never reaches "
        f"optimizer.lr; give it more steps, or a smaller {key}"
    ]


def _has_ratio(config: SchedulerConfig) -> bool:
    return isinstance(config, WarmupScheduleConfig) and config.warmup_steps is None


def build_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """Build the schedule over `num_steps` updates."""
    warmup = num_warmup_steps(config, num_steps)
    min_ratio = config.min_lr_ratio if isinstance(config, DecayScheduleConfig) else 0.0
    return LambdaLR(optimizer, lambda step: lr_factor(config.type, step, num_steps, warmup, min_ratio))


def restore_schedule(schedule: LambdaLR, num_updates: int) -> None:
    """Put a schedule where it is after so many updates; it depends on nothing else."""
    schedule.last_epoch, schedule._step_count = num_updates, num_updates + 1
    rates = [base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
