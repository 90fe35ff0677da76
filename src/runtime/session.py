"""One session of computing: device, precision, seeds, processes. The door to Accelerate.

Everything that depends on how many processes there are is asked here, so that no other file knows of ranks.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import Tensor, nn

from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.errors import TowlineError
from src.runtime.signals import StopRequest


class Runtime:
    """What a run computes on. Built by `start_runtime`."""

    def __init__(self, accelerator: Accelerator, seed: int, stop: StopRequest) -> None:
        self._accelerator = accelerator
        self.seed = seed
        self.stop = stop

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def num_processes(self) -> int:
        return self._accelerator.num_processes

    @property
    def description(self) -> str:
        """Device and precision in a few words."""
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        else:
            place = f"{self.device.type}, {torch.get_num_threads()} threads"
        precision = self._accelerator.mixed_precision
        return f"{place}, {'no mixed precision' if precision == 'no' else f'{precision} mixed precision'}"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Place the model on the device and wrap both for precision; steps whose fp16 overflowed are skipped."""
        return self._accelerator.prepare(model, optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients. Accelerate is not told of accumulation, so it divides nothing."""
        self._accelerator.backward(loss)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Hold back the exchange of gradients for all but the last micro-batch of a step."""
        return nullcontext() if last else self._accelerator.no_sync(model)

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clip the gradients to a total norm (None: don't clip) and give the norm before, unscaled."""
        return self._accelerator.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    @property
    def scales_gradients(self) -> bool:
        """Whether fp16 gradients are scaled, so that one that overflows skips a step instead of ending the run."""
        return self._accelerator.scaler is not None

    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step did nothing because fp16 gradients overflowed."""
        return bool(self._accelerator.optimizer_step_was_skipped)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add each value over all processes."""
        if self.num_processes == 1:
            return [float(value) for value in values]
        summed = self._accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return [float(value) for value in summed.tolist()]

    @contextmanager
    def isolated_rng(self, seed: int) -> Iterator[None]:
        """Draw from a stream of one's own, so that how often one evaluates changes nothing in training."""
        cuda_devices = [self.device] if self.device.type == "cuda" else []
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=cuda_devices):
                set_seed(seed % 2**32)
                yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def rng_state(self) -> dict[str, Any]:
        """Take down where every global generator of this process is."""
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore_rng(self, state: Mapping[str, Any]) -> None:
        """Put every generator where `rng_state` found it; one that there was no device for goes its own way."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def scaler_state(self) -> dict[str, Any] | None:
        """Give how fp16 gradients are scaled; None where they are not."""
        scaler = self._accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def restore_scaler(self, state: Mapping[str, Any] | None) -> None:
        """Go on scaling fp16 gradients as `scaler_state` found it."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(dict(state))

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """The most memory held so far: of the device on CUDA, else the process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def rng_as_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Give generators' states as plain JSON values, exactly."""
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    texts = {name: bytes(state[name].tolist()).hex() for name in ("torch", "cuda") if name in state}
    return {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest], **texts}


def rng_from_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """Give back what `rng_as_json` was given."""
    version, numbers, gauss = given["python"]
    kind, keys, *rest = given["numpy"]
    tensors = {
        name: torch.tensor(list(bytes.fromhex(given[name])), dtype=torch.uint8)
        for name in ("torch", "cuda")
        if name in given
    }
    numpy_state = (kind, np.array(keys, dtype=np.uint32), *rest)
    return {"python": (version, tuple(numbers), gauss), "numpy": numpy_state, **tensors}


@contextmanager
def start_runtime(
    config: RuntimeConfig, mixed_precision: MixedPrecision, seed: int, stop: StopRequest
) -> Iterator[Runtime]:
    """Start computing: choose the device and seed every generator.

    Raises:
        TowlineError: where the device or the precision can't be had.
    """
    use_cpu = config.device is Device.cpu or not torch.cuda.is_available()
    if config.device is Device.cuda and use_cpu:
        raise TowlineError("runtime.device = cuda, but torch finds no CUDA device here; use auto or cpu")
    if mixed_precision is MixedPrecision.fp16 and use_cpu:
        raise TowlineError("training.mixed_precision = fp16 needs a GPU, and there is none; use no or bf16")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TowlineError("started as one of several processes: this version trains with one process only")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    once = GradientAccumulationPlugin(num_steps=1)  # else the environment could have Accelerate divide our losses
    accelerator = Accelerator(mixed_precision=mixed_precision.value, cpu=use_cpu, gradient_accumulation_plugin=once)
    set_seed(seed)
    try:
        yield Runtime(accelerator, seed, stop)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # a sweep's next run chooses afresh
