"""What a run holds at most on its device, in each process: what stays by arithmetic, the rest counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from src.config.schema import OptimizerConfig
from src.forecast.counting import ForwardCount, MicroBatchShape, TrainingCount
from src.forecast.parameters import FP32, MemoryItem, ModelParameters, optimizer_part, total
from src.runtime.allocation import KEPT_IN_ALL
from src.util import human_bytes


@dataclass(frozen=True)
class MemoryForecast:
    """What a run holds at its worst moment, and at others."""

    parts: tuple[MemoryItem, ...]  # what is held when a training step holds most
    instead: tuple[MemoryItem, ...] = ()  # what evaluation and generation hold in place of activations and backward
    on_cpu: tuple[MemoryItem, ...] = ()  # what is offloaded: held by the CPU instead, by each process

    @property
    def total(self) -> MemoryItem:
        """The most at any moment."""
        always = [part for part in self.parts if part.name not in STEP_PARTS]
        moments = [total(self.parts, "at the worst moment of a training step")]
        moments += [total([*always, one], f"at the worst moment of {one.name}") for one in self.instead]
        return max(moments, key=lambda item: item.bytes or 0)


STEP_PARTS = ("activations", "backward")
"""Parts that only a training step has."""


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed's ZeRO shards what one process would hold; sizes in elements."""

    stage: int
    num_processes: int
    is_bf16: bool = (
        False  # whether the weights themselves are cast to bfloat16, and float32 ones are kept to be updated
    )
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False
    bucket: int = 500_000_000  # gradients that are exchanged together
    num_buckets: int = 1
    max_live: int = 1_000_000_000  # the maximum of weights that are gathered at the same time, with stage 3


def memory_forecast(
    parameters: ModelParameters,
    optimizer: OptimizerConfig,
    shape: MicroBatchShape,
    step: TrainingCount | None,
    instead: Sequence[tuple[str, ForwardCount]] = (),
    *,
    uncounted: str = "",
    device_type: str = "cpu",
    sharding: Sharding | None = None,
    libraries_bytes: int | None = None,
) -> MemoryForecast:
    """Forecast what a run holds on its device, in each process.

    Args:
        shape: of the micro-batch that was counted.
        step: its count; None where the model can't be counted. Where processes share gradients, of two micro-batches.
        instead: names and counts of moments that are not training.
        uncounted: why step is None.
        device_type: cpu or cuda.
        sharding: None where each process holds everything.
        libraries_bytes: what the process holds before there is a model, as measured; None: not of this device.
    """
    if sharding is not None and sharding.is_bf16:
        parameters = parameters.in_bf16()
    parts, on_cpu = [MemoryItem("parameters", parameters.bytes, parameters.how)], list[MemoryItem]()
    if sharding is None:
        parts.append(optimizer_part(parameters, optimizer, device_type))
    else:
        parts, on_cpu = _sharded(parameters, parts[0], optimizer, sharding)
    if step is None:
        parts += [MemoryItem(name, None, f"unknown: {uncounted}") for name in STEP_PARTS]
    else:
        parts += _of_step(parameters, shape, step, are_gradients_sharded=sharding is not None)
    if libraries_bytes is not None:
        kept = KEPT_IN_ALL if step is None else min(KEPT_IN_ALL, step.peak_bytes)
        parts[:0] = [
            MemoryItem("libraries and data", libraries_bytes, "measured: what such a run imports, and its rows"),
            MemoryItem("free blocks", kept, "at most, that malloc keeps for the next step"),
        ]
    others = [
        MemoryItem(name, count.peak_bytes, "counted; instead of activations and backward") for name, count in instead
    ]
    return MemoryForecast(tuple(parts), tuple(others), tuple(on_cpu))


def _of_step(
    parameters: ModelParameters, shape: MicroBatchShape, step: TrainingCount, *, are_gradients_sharded: bool
) -> list[MemoryItem]:
    """Forecast what a step holds on top; sharded gradients, all there when most is held, are among the items of
    _sharded.
    """
    activations, backward = STEP_PARTS
    length = f"{shape.seq:,}" if shape.target_seq is None else f"({shape.seq:,} + {shape.target_seq:,})"
    kept = f"kept for backward, counted by a forward of {shape.batch:,} x {length} tokens, "
    kept += f"{shape.num_supervised:,} of them scored"
    peak, on_top = step.peak_bytes, "on top when most is held: single operations (logits)"
    if are_gradients_sharded:
        peak -= step.peak_gradient_bytes
    else:
        on_top += f" and {human_bytes(step.peak_gradient_bytes)} of gradients; when it is over they are "
        on_top += human_bytes(parameters.trained_bytes)
    return [MemoryItem(activations, step.saved_bytes, kept), MemoryItem(backward, peak - step.saved_bytes, on_top)]


def _sharded(
    parameters: ModelParameters, weights: MemoryItem, optimizer: OptimizerConfig, sharding: Sharding
) -> tuple[list[MemoryItem], list[MemoryItem]]:
    """Forecast weights, gradients and optimizer state of one process, on its device and on the CPU.

    Source: deepspeed 0.19.8, stage_1_and_2.py and stage3.py; counted in tests/test_processes.py. It keeps a second copy
    of what it updates, in float32, also of weights that are float32 themselves.
    """
    n, num, size = sharding.num_processes, parameters.num_trained, parameters.bytes_per_parameter

    def share(item: MemoryItem) -> MemoryItem:
        share_bytes = None if item.bytes is None else math.ceil(item.bytes / n)
        return item._replace(bytes=share_bytes, how=item.how if n == 1 else f"({item.how}) / {n}")

    in_32_bits = replace(parameters, trained=tuple(one._replace(bytes_per_value=FP32) for one in parameters.trained))
    gradients = MemoryItem("gradients", parameters.trained_bytes, parameters.how_trained)
    updated = share(MemoryItem("updated weights", num * FP32, f"{num:,} trained parameters x {FP32} B"))
    state = share(optimizer_part(in_32_bits, optimizer))
    buckets = sharding.num_buckets * sharding.bucket * size
    how = f"{sharding.num_buckets} x {sharding.bucket:,} gradients x {size} B"
    on_device, on_cpu = [MemoryItem("gradient buckets", buckets, how)], list[MemoryItem]()
    if sharding.stage == 3:
        num_live = min(parameters.num, sharding.max_live)
        on_device.append(MemoryItem("gathered weights", num_live * size, f"up to {num_live:,} at once x {size} B"))
    weights = share(weights) if sharding.stage == 3 else weights
    (on_cpu if sharding.weights_on_cpu else on_device).insert(0, weights)
    if sharding.optimizer_on_cpu:
        return on_device, [*on_cpu, share(MemoryItem("gradients", num * FP32, in_32_bits.how_trained)), updated, state]
    # stage 1 keeps them whole from one micro-batch to the next
    return [*on_device, gradients if sharding.stage == 1 else share(gradients), updated, state], on_cpu
