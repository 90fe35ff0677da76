"""One measurement: what a way to train takes for one epoch of a workload's rows, in this process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.speed.measurement import Measurement
from benchmarks.speed.preparing import Facts
from benchmarks.speed.workloads import Settings, Way, Workload
from src.runtime.products import matmul_flops_per_second

CALIBRATIONS, CALIBRATION_SECONDS = 10, 0.1
"""What products of matrices reach is measured so often: their median, as clocks and other machines change it."""


class StepSize(NamedTuple):
    """Tokens of a step, those of them that are supervised, and positions that are computed, padding included."""

    num_tokens: int
    num_supervised: int
    num_positions: int


@dataclass
class Stopwatch:
    """Takes the time from the end of the last warm-up step to the end of the last step."""

    device: torch.device
    warm_up: int
    losses: list[Any] = field(default_factory=list)  # of each step: mean nats per supervised token
    _started: float = 0.0
    seconds: float = 0.0

    def start(self) -> None:
        """Be called before the first step."""
        self._started = self._now()

    def step(self, loss: Any, *, is_last: bool) -> None:
        """Be called when a step is done; its loss may still be on the device."""
        self.losses.append(loss)
        if len(self.losses) == self.warm_up:
            self._started = self._now()
        elif is_last:
            self.seconds = self._now() - self._started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(workload: Workload, way: Way, settings: Settings, folder: Path) -> Measurement:
    """Train one epoch of prepared rows in one way."""
    device = torch.device(settings.device)
    watch, facts = Stopwatch(device, settings.warm_up), Facts.read(folder)
    batch_size = facts.packs_per_step if way.batching == "packed" else workload.batch_size
    if way.trainer == "towline":
        from benchmarks.speed.own import towline as train
    elif way.trainer == "bare":
        from benchmarks.speed.own import bare as train
    else:
        from benchmarks.speed.peers import train
    sizes = train(workload, way, settings, folder, batch_size, watch)
    if not watch.seconds:
        raise SystemExit(f"the {len(watch.losses)} steps of these rows are all warm-up: more --steps")
    memory = peak_memory_bytes(device)
    measured = StepSize(*map(sum, zip(*sizes[settings.warm_up : len(watch.losses)], strict=True)))
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" or workload.dtype == "bfloat16" else torch.float32
    return Measurement(
        way.name,
        watch.seconds,
        *measured,
        losses=[float(loss) for loss in watch.losses],
        peak_memory_bytes=memory,
        peak_flops=median(matmul_flops_per_second(device, dtype, CALIBRATION_SECONDS) for _ in range(CALIBRATIONS)),
        flops=facts.flops_per_token * measured.num_tokens,
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: on a GPU what was allocated there, else what the process held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> None:
    """Draw the matrices of LoRA that do not begin at 0 as every other way draws them."""
    drawn: Sequence[torch.Tensor] = [p for name, p in model.named_parameters() if "lora_A" in name]
    generator = torch.Generator().manual_seed(seed)
    for parameter in drawn:
        bound = parameter.shape[1] ** -0.5
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
