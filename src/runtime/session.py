"""The runtime of a run: device, precision, seeds and processes. With runtime/sharding the door to Accelerate.

No other file depends on how many processes there are, or on this one's rank.
"""

import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, utils
from accelerate.state import AcceleratorState
from torch import nn

from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.errors import Interrupted, TowlineError
from src.runtime.allocation import keep_freed_memory, resident_bytes
from src.runtime.launch import place_of
from src.runtime.precision import choose_precision
from src.runtime.sharding import Replicated, Sharded, forget_groups, zero_environment
from src.runtime.signals import StopRequest

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=6)
"""How long a process may wait for the others, as while one of them reads a large checkpoint. One that has died is
noticed by who started it."""
FINISHED_GROUPS: list[Any] = []
"""Groups of processes that have finished, never destroyed: torch 2.13 waits there for a thread of gloo's while it
holds Python's lock, which that thread waits for if the last exchange was just now (docs/decisions/0021)."""


@dataclass
class Runtime:
    """The device, precision and processes of a run. Built by `start_runtime`."""

    _accelerator: Accelerator
    seed: int
    stop: StopRequest
    zero_stage: int = 0  # what is sharded over the processes, see ZeroConfig.stage; 0: nothing
    strategy: Replicated = field(init=False, repr=False)  # how the processes share what is trained; from `prepare` on

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def num_processes(self) -> int:
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        """The number of this process among all, from 0."""
        return self._accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self._accelerator.is_main_process

    @property
    def description(self) -> str:
        """Device and precision, as text."""
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        else:
            place = f"{self.device.type}, {torch.get_num_threads()} threads"
        precision = self._accelerator.mixed_precision
        many = f"{self.num_processes} processes, each on " if self.num_processes > 1 else ""
        return f"{many}{place}, {'no mixed precision' if precision == 'no' else f'{precision} mixed precision'}"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Place the model on the device and wrap both for precision and processes.

        Steps whose fp16 overflowed are skipped.
        """
        wrapped, wrapped_optimizer = self._accelerator.prepare(model, optimizer)
        self.strategy = (Sharded if self.zero_stage else Replicated)(self._accelerator, wrapped, optimizer)
        return wrapped, wrapped_optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that computes in the precision of `training.mixed_precision`."""
        return self._accelerator.autocast()

    @property
    def scales_gradients(self) -> bool:
        """Whether fp16 gradients are scaled, so that one that overflows skips a step instead of ending the run."""
        return self._accelerator.scaler is not None

    def step_was_skipped(self) -> bool:
        """Return whether the last optimizer step did nothing because fp16 gradients overflowed."""
        return bool(self._accelerator.optimizer_step_was_skipped)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of values over all processes."""
        if self.num_processes == 1:
            return [float(value) for value in values]
        summed = self._accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return [float(value) for value in summed.tolist()]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; any that can be pickled."""
        if self.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Return the main process's value, in all processes."""
        if self.num_processes == 1:
            return value
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        self._accelerator.wait_for_everyone()

    def rounds(self, items: Sequence[T]) -> list[Sequence[T]]:
        """Return what all processes together take of each item that `split` gives this one."""
        return [items[start : start + self.num_processes] for start in range(0, len(items), self.num_processes)]

    def split(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield the items of this process, and whether each is a real one or a filler.

        All processes get the same number, because they compute together: where the items don't divide evenly, some
        get a filler, whose results are dropped.
        """
        for together in self.rounds(items):
            is_real = self.rank < len(together)
            yield together[self.rank if is_real else 0], is_real

    def check_stop(self, asked: float | None = None) -> None:
        """Stop all processes here, with an Interrupted that names what asked, if any was asked to stop.

        `asked` is how many were asked, where that was summed already.
        """
        if self.num_processes == 1:
            self.stop.check()
            return
        (asked,) = self.sum([float(bool(self.stop.asked()))]) if asked is None else (asked,)
        if asked:
            raise Interrupted(next(name for name in self.gather(self.stop.name) if name))

    @contextmanager
    def shared_folder(self) -> Iterator[Path]:
        """Yield one temporary folder for all processes, which the block may use."""
        with tempfile.TemporaryDirectory(prefix="towline-") if self.is_main else nullcontext("") as folder:
            yield Path(self.from_main(folder))

    @contextmanager
    def isolated_rng(self, seed: int) -> Iterator[None]:
        """Draw from separate generators in the block, so that how often a run evaluates changes nothing in training."""
        cuda_devices = [self.device] if self.device.type == "cuda" else []
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=cuda_devices):
                utils.set_seed(seed % 2**32)
                yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def rng_state(self) -> dict[str, Any]:
        """Return the state of every global generator of this process."""
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore_rng(self, state: Mapping[str, Any]) -> None:
        """Restore every generator of which `rng_state` has a state."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def seed_apart(self, step: int = 0) -> None:
        """Seed every process but the first differently; before, all draw the same numbers, to build the same model."""
        if self.rank:
            utils.set_seed((self.seed + 1000 * self.rank + step) % 2**32)

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the state of the scaler of fp16 gradients; None where they are not scaled."""
        scaler = self._accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def restore_scaler(self, state: Mapping[str, Any] | None) -> None:
        """Restore the scaler of fp16 gradients."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(dict(state))

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a clock measures it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> dict[str, int]:
        """Return the memory that this process holds now, and its peak so far, both of what `peak_memory_bytes` is."""
        is_cuda = self.device.type == "cuda"
        held = int(torch.cuda.memory_allocated(self.device)) if is_cuda else resident_bytes()
        peak = max(held, self.peak_memory_bytes())  # Linux notes a peak now and then only, some pages late
        return {"memory_bytes": held, "peak_memory_bytes": peak}

    def peak_memory_bytes(self) -> int:
        """Return the peak of memory so far: of the device on CUDA, else of the process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def rng_as_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return generators' states as plain JSON values, exactly."""
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    texts = {name: bytes(state[name].tolist()).hex() for name in ("torch", "cuda") if name in state}
    return {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest], **texts}


def rng_from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states that `rng_as_json` wrote."""
    version, numbers, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    tensors = {
        name: torch.tensor(list(bytes.fromhex(state[name])), dtype=torch.uint8)
        for name in ("torch", "cuda")
        if name in state
    }
    numpy_state = (kind, np.array(keys, dtype=np.uint32), *rest)
    return {"python": (version, tuple(numbers), gauss), "numpy": numpy_state, **tensors}


@contextmanager
def start_runtime(
    config: RuntimeConfig,
    mixed_precision: MixedPrecision,
    seed: int,
    stop: StopRequest,
    deepspeed: Mapping[str, Any] | None = None,
) -> Iterator[Runtime]:
    """Choose the device, join the other processes and seed every generator, for the length of a block.

    `deepspeed` are DeepSpeed's settings (see deepspeed_settings), None where it is not used. TowlineError says that the
    device or the precision is not available.
    """
    use_cpu = config.device is Device.cpu or not torch.cuda.is_available()
    if mixed_precision is MixedPrecision.auto:  # of a run whose own choice is not known
        mixed_precision = choose_precision(torch.device("cpu" if use_cpu else "cuda"))
    if config.device is Device.cuda and use_cpu:
        raise TowlineError("runtime.device = cuda, but torch finds no CUDA device here; use auto or cpu")
    if mixed_precision is MixedPrecision.fp16 and use_cpu:
        raise TowlineError("training.mixed_precision = fp16 needs a GPU, and there is none; use no or bf16")
    if config.compile and shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        raise TowlineError(f"runtime.compile needs a C++ compiler, and there is no {compiler} (CXX names another)")
    if use_cpu:
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic)  # imports torch's compiler, which takes a second
    with ExitStack() as resources:
        if deepspeed:
            resources.enter_context(zero_environment(on_cpu=use_cpu, alone=place_of() is None))
        accelerator = _start_accelerator(mixed_precision, deepspeed, use_cpu=use_cpu)
        utils.set_seed(seed)
        try:
            yield Runtime(accelerator, seed, stop, deepspeed["zero_optimization"]["stage"] if deepspeed else 0)
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                FINISHED_GROUPS.append(torch.distributed.group.WORLD)
                forget_groups() if deepspeed else torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)  # a sweep's next run chooses afresh


def _start_accelerator(
    mixed_precision: MixedPrecision, deepspeed: Mapping[str, Any] | None, *, use_cpu: bool
) -> Accelerator:
    handlers: list[Any] = []
    if place_of() or deepspeed:
        handlers.append(utils.InitProcessGroupKwargs(backend="gloo" if use_cpu else "nccl", timeout=LONGEST_WAIT))
    if place_of() and not deepspeed:
        handlers.append(utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    # without a plugin the environment could have Accelerate divide our losses
    num_steps = deepspeed["gradient_accumulation_steps"] if deepspeed else 1
    return Accelerator(
        mixed_precision=mixed_precision.value,
        cpu=use_cpu and not deepspeed,  # else Accelerate would not use it
        deepspeed_plugin=utils.DeepSpeedPlugin(hf_ds_config=dict(deepspeed)) if deepspeed else None,
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=num_steps),
        kwargs_handlers=handlers,
    )
