"""What a run's process holds before there is any data or model: measured by importing and computing the same here."""

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from src.model.quantization import quiet_bitsandbytes
from src.runtime.allocation import resident_bytes


def import_as_run(modules: Sequence[str]) -> int:
    """Import the modules that a run imports, and return the bytes that this process holds then.

    A process of its own would hold as much, and cost its imports on top: most modules are needed here too.
    """
    quiet_bitsandbytes()  # PEFT imports it
    for name in modules:
        with suppress(ImportError):  # code of a checkpoint's own, or a library that only the run itself would miss
            import_module(name)
    _compute_once()
    return resident_bytes()


def _compute_once() -> None:
    """Train a matrix for a step: threads, their buffers and kernels are there from the first computation on."""
    import torch

    weight = torch.ones(1024, 1024, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    (torch.ones(512, 1024) @ weight).sum().backward()
    optimizer.step()
