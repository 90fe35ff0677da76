"""What each optimizer keeps for what it trains, in memory and in a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from src.config.schema import OptimizerConfig
from src.forecast.items import MemoryItem
from src.forecast.parameters import FP32, ModelParameters, TrainableTensor

STATE_BLOCK = 256  # values of an 8-bit optimizer's state that share a scale
MIN_8BIT_SIZE = 4096  # values below which a tensor's state keeps 32 bits


class StateTensor(NamedTuple):
    """What an optimizer keeps for one trained tensor."""

    name: str
    num: int
    bytes_per_value: int


def _as_the_weights(*names: str) -> Callable[[TrainableTensor], list[StateTensor]]:
    return lambda tensor: [StateTensor(name, tensor.num, tensor.bytes_per_value) for name in names]


def _in_32_bits(tensor: TrainableTensor) -> list[StateTensor]:
    return [StateTensor(name, tensor.num, FP32) for name in ("state1", "state2")]


def _in_8_bits(tensor: TrainableTensor) -> list[StateTensor]:
    if tensor.num < MIN_8BIT_SIZE:
        return _in_32_bits(tensor)
    scales = math.ceil(tensor.num / STATE_BLOCK)
    states = [StateTensor(name, tensor.num, 1) for name in ("state1", "state2")]
    return states + [StateTensor(name, scales, FP32) for name in ("absmax1", "absmax2")]


def _rows_and_columns(tensor: TrainableTensor) -> list[StateTensor]:
    size = tensor.bytes_per_value
    if len(tensor.shape) < 2:
        return [StateTensor("variance", tensor.num, size)]
    names = {"row_var": tensor.shape[-1], "col_var": tensor.shape[-2]}
    return [StateTensor(name, tensor.num // gone, size) for name, gone in names.items()]


OPTIMIZER_STATE: dict[str, Callable[[Any], Callable[[TrainableTensor], list[StateTensor]]]] = {
    "adamw": lambda config: _as_the_weights("exp_avg", "exp_avg_sq"),
    "adamw_8bit": lambda config: _in_8_bits,
    "paged_adamw_32bit": lambda config: _in_32_bits,
    "adafactor": lambda config: _rows_and_columns,
    "sgd": lambda config: _as_the_weights("momentum_buffer") if config.momentum else _as_the_weights(),
}
"""The optimizer's type -> what it keeps for a tensor that is trained, but for counters and tables of a few values."""


def optimizer_part(parameters: ModelParameters, optimizer: OptimizerConfig, device_type: str = "cpu") -> MemoryItem:
    """Forecast the optimizer's state, tensor by tensor."""
    if optimizer.type not in OPTIMIZER_STATE:
        return MemoryItem("optimizer state", None, f"unknown: nothing is known of what {optimizer.type} keeps")
    counts = _state_counts(parameters.trained, optimizer)
    if not counts:
        return MemoryItem("optimizer state", 0, f"{optimizer.type} keeps nothing with these settings")
    alike: dict[tuple[int, int], list[str]] = {}
    for (name, size), num in counts.items():
        alike.setdefault((num, size), []).append(name)
    how = " + ".join(
        f"{len(names)} x {num:,} {'trained parameters' if num == parameters.num_trained else 'values'} x {size} B: "
        + ", ".join(names)
        for (num, size), names in alike.items()
    )
    if optimizer.type.startswith("paged") and device_type == "cuda":
        how += "; moved to the CPU's memory where the GPU's is full"
    return MemoryItem("optimizer state", sum(num * size for (_, size), num in counts.items()), how)


def _state_counts(trained: Iterable[TrainableTensor], optimizer: OptimizerConfig) -> Counter[tuple[str, int]]:
    """Return name and bytes of a value -> number of values, of an optimizer that is in OPTIMIZER_STATE."""
    keeps = OPTIMIZER_STATE[optimizer.type](optimizer)
    counts: Counter[tuple[str, int]] = Counter()
    for tensor in trained:
        for name, num, size in keeps(tensor):
            counts[name, size] += num
    return counts


def checkpoint_bytes(trained: Iterable[TrainableTensor], optimizer: OptimizerConfig) -> tuple[int, int]:
    """Count what a resumable checkpoint holds: bytes of the weights, and of the optimizer's state.

    Left out, as in memory: the state's counters and the tables that all tensors share.

    Args:
        optimizer: of a type that is in OPTIMIZER_STATE.
    """
    trained = tuple(trained)
    weights = sum(tensor.num * tensor.bytes_per_value for tensor in trained)
    return weights, sum(num * size for (_, size), num in _state_counts(trained, optimizer).items())
