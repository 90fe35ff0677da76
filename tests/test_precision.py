"""bf16 that is slower than float32 is told, with what to choose; measuring it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.checkpoint.manifest import read_state
from src.cli.start import run_job
from src.config.command_line import read_command_line
from src.config.frozen import read_finished
from src.runtime.precision import about_frozen_weights, choose_precision, with_precision
from src.runtime.products import SLOWER, bf16_slowdown, bf16_warnings, matmul_flops_per_second
from src.runtime.signals import StopRequest
from tests.conftest import admitted, read_lines
from tests.kinds import thin_llama

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
    weights = torch.bfloat16 if "model.dtype=bfloat16" in overrides else torch.float32
    [warning] = bf16_warnings(config, weights, CPU, lambda _: 27.4)
    assert warning == f"this processor takes 27.4 times as long for products in bf16 as in float32: {advised}"
    assert bf16_warnings(config, weights, CPU, lambda _: SLOWER - 0.01) == []


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (["adapter=lora", "training.mixed_precision=bf16"], True),
        (["adapter=lora"], False),
        (["training.mixed_precision=bf16"], False),
        (["adapter=lora", "training.mixed_precision=bf16", "model.dtype=bfloat16"], False),
    ],
)
def test_frozen_weights_that_are_cast_in_every_forward_are_told(overrides: list[str], is_told: bool) -> None:
    weights = torch.bfloat16 if "model.dtype=bfloat16" in overrides else torch.float32
    assert (
        bool(about_frozen_weights(admitted("model=causal_lm", "model.checkpoint=x", *overrides).config, weights))
        == is_told
    )


def test_nothing_is_measured_where_a_run_computes_in_float32() -> None:
    def measured(_device: torch.device) -> float:
        raise AssertionError("measured")

    assert bf16_warnings(admitted().config, torch.float32, CPU, measured) == []


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


@pytest.mark.parametrize(
    ("units", "expected"),
    [({}, "no"), ({"avx512_bf16": True}, "no"), ({"amx_bf16": 1}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_auto_is_what_the_processor_has_units_for(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units})
    config = admitted("training.mixed_precision=auto", "runtime.device=cpu").config
    assert with_precision(config).training.mixed_precision.value == expected
    assert with_precision(config, "bf16").training.mixed_precision.value == "bf16"  # as it was before
    explicit = admitted("training.mixed_precision=bf16").config
    assert with_precision(explicit, "no") is explicit


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_what_the_gpu_has_units_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert choose_precision(torch.device("cuda")).value == expected


SHORT = (
    f"model.checkpoint={thin_llama()}",
    *("data.limit=24", "training.max_train_steps=6", "training.per_device_train_batch_size=4"),
    *("training.logging_steps=1", "evaluation.max_samples=2", "evaluation.sample_prompts=0"),
    *("generation.max_new_tokens=2", "checkpoint.checkpointing_steps=2", "runtime.device=cpu", "scheduler=constant"),
)


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in read_lines(run_dir / "metrics.jsonl")]


def test_a_run_stays_in_the_precision_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = (*SHORT, "training.mixed_precision=auto", f"hydra.run.dir={tmp_path / 'auto'}")
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
        run_job(admitted(*auto, "training.max_train_steps=3"), StopRequest())
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    run_job(admitted(*auto), StopRequest())  # goes on, on another processor
    found = {}
    for precision in ("bf16", "no"):
        place = (f"training.mixed_precision={precision}", f"hydra.run.dir={tmp_path / precision}")
        run_job(admitted(*SHORT, *place), StopRequest())
        found[precision] = losses(tmp_path / precision)
    assert losses(tmp_path / "auto") == found["bf16"] != found["no"]
    state = read_state(tmp_path / "auto" / "checkpoints" / "step-00000006")
    assert state["chosen"]["training.mixed_precision"] == "bf16"
    line = read_command_line([f"run={tmp_path / 'auto'}"])
    assert read_finished(tmp_path / "auto", line, "predict").sections["training"]["mixed_precision"] == "bf16"
