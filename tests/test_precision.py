"""bf16 that is slower than float32 is told, with what to choose; measuring it leaves no trace."""

from __future__ import annotations

import pytest
import torch

from src.runtime.products import SLOWER, bf16_slowdown, bf16_warnings, matmul_flops_per_second
from tests.conftest import admitted

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        (["training.mixed_precision=bf16"], "training.mixed_precision=no"),
        (["model.dtype=bfloat16"], "model.dtype=float32 (twice the memory)"),
        (
            ["training.mixed_precision=bf16", "model.dtype=bfloat16"],
            "training.mixed_precision=no model.dtype=float32 (twice the memory)",
        ),
    ],
)
def test_slow_bf16_is_told_with_what_to_choose(overrides: list[str], advised: str) -> None:
    config = admitted(*overrides).config
    [warning] = bf16_warnings(config, CPU, lambda _: 27.4)
    assert warning == f"this processor takes 27.4 times as long for products in bf16 as in float32: {advised}"
    assert bf16_warnings(config, CPU, lambda _: SLOWER - 0.01) == []


def test_nothing_is_measured_where_a_run_computes_in_float32() -> None:
    def measured(_device: torch.device) -> float:
        raise AssertionError("measured")

    assert bf16_warnings(admitted().config, CPU, measured) == []


def test_measuring_changes_neither_generators_nor_threads() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bf16_slowdown(CPU) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert matmul_flops_per_second(CPU, torch.float32, budget_seconds=0.01) > 0
