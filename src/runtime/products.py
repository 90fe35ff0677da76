"""How fast a device multiplies matrices, and whether bf16 is slower on it than float32."""

import time
import timeit
from collections.abc import Callable

import torch
from torch import Tensor

from src.config.schema import MixedPrecision, RunConfig

BUDGET_SECONDS = 0.04  # of a type
SLOWER = 1.25
"""From which ratio on bf16 counts as slower; below, it may be noise, and bf16 still moves less memory."""


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, budget_seconds: float = 0.3, smallest: int = 512
) -> float:
    """Measure how fast this device multiplies square matrices: the best of as many products as the budget has room for.

    Sizes double from `smallest` to 1024 on a CPU and to 4096 on a GPU, which 1024 would not fill.
    """
    largest = 1024 if device.type == "cpu" else 4096
    size, best, ends = smallest, 0.0, time.perf_counter() + budget_seconds
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


def bf16_slowdown(device: torch.device) -> float:
    """Measure how many times longer products of matrices take in bf16 than in float32; a tenth of a second.

    One thread computes them: several wait for the slowest, which other work on the machine may hold up.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        float32, bf16 = (
            matmul_flops_per_second(device, dtype, BUDGET_SECONDS, smallest=128)
            for dtype in (torch.float32, torch.bfloat16)
        )
    finally:
        torch.set_num_threads(num_threads)
    return float32 / bf16


def bf16_warnings(
    config: RunConfig,
    weights: torch.dtype,
    device: torch.device,
    slowdown: Callable[[torch.device], float] = bf16_slowdown,
) -> list[str]:
    """Return a warning where a run computes in bf16, and the device takes longer for it than for float32.

    Args:
        weights: the type of the model's weights as they are loaded.
        slowdown: measures it, where it matters: many processors compute bf16 by converting each number.
    """
    instead = []
    if config.training.mixed_precision is MixedPrecision.bf16:
        instead.append("training.mixed_precision=no")
    if weights is torch.bfloat16:
        instead.append("model.dtype=float32 (twice the memory)")
    if not instead or (times := slowdown(device)) < SLOWER:
        return []
    what = "processor" if device.type == "cpu" else "GPU"
    return [f"this {what} takes {times:.1f} times as long for products in bf16 as in float32: {' '.join(instead)}"]
