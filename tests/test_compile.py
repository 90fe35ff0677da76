"""What torch compiles, and what kernels of the hub compute, is the same; what can't be had is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli.start import run_job
from src.errors import ConfigError, ModelError, TowlineError
from src.runtime.signals import StopRequest
from tests.conftest import admitted, read_lines
from tests.kinds import thin_llama

SHORT = (
    f"model.checkpoint={thin_llama()}",
    *("runtime.device=cpu", "data.limit=32", "training.max_train_steps=4", "training.per_device_train_batch_size=4"),
    *("training.logging_steps=1", "evaluation.max_samples=4", "evaluation.sample_prompts=1"),
    *("generation.max_new_tokens=4", "checkpoint.checkpointing_steps=null"),
)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in torch's own compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_have_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The code that torch makes takes a minute; what it is made from is followed without."""
    compiled: list[object] = []
    compile_it = torch.compile

    def note(function: Callable[..., Any], **how: Any) -> Any:
        compiled.append(how)
        return compile_it(function, **how, backend=backend)

    monkeypatch.setattr(torch, "compile", note)
    found = []
    for is_compiled in (False, True):
        place = tmp_path / str(is_compiled)
        how = f"runtime.compile={str(is_compiled).lower()}"
        run_job(admitted(*SHORT, how, f"hydra.run.dir={place}"), StopRequest())
        found.append(read_lines(place / "metrics.jsonl"))
    assert compiled == [{"dynamic": True}]
    for plain, fast in zip(*found, strict=True):
        assert fast["train/loss"] == pytest.approx(plain["train/loss"], abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found[1][-1]["eval/test/loss"] == pytest.approx(found[0][-1]["eval/test/loss"], abs=1e-5)


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(TowlineError, match=r"runtime\.compile needs a C\+\+ compiler.*none"):
        run_job(admitted(*SHORT, "runtime.compile=true", f"hydra.run.dir={tmp_path / 'run'}"), StopRequest())


def test_what_zero3_shares_out_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.compile[^\n]*ZeRO-3"):
        admitted("runtime.compile=true", "deepspeed=zero3")


def test_kernels_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.kernels needs a GPU"):
        run_job(admitted(*SHORT, "model.kernels=true", f"hydra.run.dir={tmp_path / 'run'}"), StopRequest())
