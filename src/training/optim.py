"""Optimizers and schedules, as pure functions of parameters and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import (
    AdamWConfig,
    DecayScheduleConfig,
    OptimizerConfig,
    SchedulerConfig,
    ScheduleType,
    WarmupScheduleConfig,
)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split what is trained into matrices, which decay, and norms and biases (one dimension or none), which do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters that are trained."""
    groups = parameter_groups(parameters, config.weight_decay)
    if isinstance(config, AdamWConfig):
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


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


def build_schedule(config: SchedulerConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """Build the schedule over `num_steps` updates."""
    warmup = num_warmup_steps(config, num_steps)
    min_ratio = config.min_lr_ratio if isinstance(config, DecayScheduleConfig) else 0.0
    return LambdaLR(optimizer, lambda step: lr_factor(config.type, step, num_steps, warmup, min_ratio))
