"""Optimizers and schedules, as pure functions of parameters and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import OptimizerConfig, SchedulerConfig, WarmupScheduleConfig
from src.errors import CheckpointError, ModelError
from src.runtime.sharding import whole_shape

CODE_BOOKS = ("qmap1", "qmap2")
"""State of bitsandbytes' 8-bit optimizers that is the same for all parameters, and never changes."""


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
            {"params": [p for p in chosen if len(whole_shape(p)) >= 2], "weight_decay": weight_decay, **rate},
            {"params": [p for p in chosen if len(whole_shape(p)) < 2], "weight_decay": 0.0, **rate},
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
    return config.build(parameter_groups(parameters, config.weight_decay, embeddings, config.embedding_lr))


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Give what an optimizer has gathered: its tensors as `<parameter>/<key>`, and the other values by parameter.

    Args:
        names: id(parameter) -> name.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        values[name] = {}
        for key, value in state.items():
            if key in CODE_BOOKS:
                continue
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                values[name][key] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave.

    Raises:
        CheckpointError: where a tensor is not of the parameter's form.
    """
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            if name not in values:
                continue
            kept = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
            if hasattr(optimizer, "init_state"):  # bitsandbytes: its tensors may be paged, or share their code book
                optimizer.init_state(group, parameter, group_number, number)
                state = optimizer.state[parameter]
                for key, value in kept.items():
                    if key not in state or state[key].shape != value.shape:
                        raise CheckpointError(f"the optimizer's {key} of {name} is of another form")
                    state[key].copy_(value)
                state.update(values[name])
                continue
            follows = group.get("fused") or group.get("capturable")
            state = {
                key: value.to("cpu" if key == "step" and not follows else parameter.device, copy=True)
                for key, value in kept.items()
            }
            optimizer.state[parameter] = state | dict(values[name])


def cannot_learn(config: SchedulerConfig, num_steps: int) -> list[str]:
    """Say how a warm-up keeps a run of so many updates from learning; nothing where it does not."""
    warmup = config.num_warmup_steps(num_steps)
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
    return LambdaLR(optimizer, lambda step: config.factor(step, num_steps))


def restore_schedule(schedule: LambdaLR, num_updates: int) -> None:
    """Put a schedule where it is after so many updates; it depends on nothing else."""
    schedule.last_epoch, schedule._step_count = num_updates, num_updates + 1
    rates = [base * factor(num_updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
