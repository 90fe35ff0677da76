"""How long a run will take at least, from its operations and the speed of this device's matrix products."""

import time
import timeit
from typing import NamedTuple

import torch
from torch import Tensor


class TimeItem(NamedTuple):
    """Seconds of a part of a run (None: unknown), without loading and export, and how they were computed."""

    name: str
    seconds: float | None
    is_lower_bound: bool
    how: str


def counted_time(name: str, flops: float | None, flops_per_second: float, unknown: str = "") -> TimeItem:
    """Forecast from below: counted operations at the full speed of this device's matrix products, see
    matmul_flops_per_second, and nothing else; `unknown` says why they can't be counted where `flops` is None.
    """
    if flops is None:
        return TimeItem(name, None, True, f"unknown: {unknown}")
    how = f"{flops:.3g} FLOP counted, at the {flops_per_second:.3g} FLOP/s of this device's matrix products"
    return TimeItem(name, flops / flops_per_second, True, how)


def measured_time(name: str, seconds_each: float, count: int, what: str) -> TimeItem:
    """Forecast from one that was really computed, of the mean size."""
    return TimeItem(name, seconds_each * count, False, f"{count:,} {what} x {seconds_each:.3g} s, as measured")


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, budget_seconds: float = 0.3) -> float:
    """Measure how fast this device multiplies square matrices: the best of as many products as the budget has room for.

    Sizes double from 512 to 1024 on a CPU and to 4096 on a GPU, which 1024 would not fill.
    """
    largest = 1024 if device.type == "cpu" else 4096
    size, best, ends = 512, 0.0, time.perf_counter() + budget_seconds
    while True:
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        _seconds_of_product(a, b)  # the first one of a size chooses its kernel
        best = max(best, 2 * size**3 / _seconds_of_product(a, b))
        left = ends - time.perf_counter()
        fitting = [n for n in (size, min(2 * size, largest)) if 2 * (2 * n**3) / best < left]
        if not fitting:
            return best
        size = fitting[-1]


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    def multiply() -> None:
        torch.matmul(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    return timeit.timeit(multiply, number=1)
