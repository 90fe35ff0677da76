"""Which tensors are alive while a computation runs, and its floating-point operations, also on fake tensors."""

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""FLOP formulas by operator: torch's own, also for two operators of attention on a CPU that it does not list."""


def _grouped_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Multiply experts' matrices; torch's rule for shapes takes bfloat16 only, though a CPU multiplies float32 too."""

    def with_dtype(value: Any, dtype: torch.dtype) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device) if is_float else value

    halves = [with_dtype(value, torch.bfloat16) for value in args]
    return with_dtype(func(*halves, **{k: value for k, value in kwargs.items() if k != "out_dtype"}), args[0].dtype)


class LiveTensors(TorchDispatchMode):
    """Follows which storages are alive, how many bytes at most at once, and counts floating-point operations."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """Start with nothing counted; the storages of `existing` tensors never are."""
        super().__init__()
        self._not_counted = {tensor.untyped_storage()._cdata for tensor in existing}
        self._new_number = itertools.count()
        self._numbers: dict[int, int] = {}  # of storages that are alive, by address, which another one may get later
        self._alive: dict[int, int] = {}  # bytes, by number
        self._at_peak: dict[int, int] | None = None
        self._total = self.peak = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls; FakeTensorMode would take long to say the same
            return args[0].device
        kwargs = kwargs or {}
        result = _grouped_product(func, args, kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._not_counted or address in self._numbers:
            return
        self._numbers[address] = number = next(self._new_number)
        self._alive[number] = storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak, self._at_peak = self._total, None
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._note_peak()
        self._total -= self._alive.pop(self._numbers.pop(address))

    def _note_peak(self) -> None:
        if self._at_peak is None and self._total == self.peak:
            self._at_peak = dict(self._alive)

    def restart_peak(self) -> None:
        """Look for the most from here on."""
        self.peak, self._at_peak = self._total, None

    def at_peak(self) -> dict[int, int]:
        """Return number and bytes of each storage that was alive at the worst moment."""
        self._note_peak()
        return self._at_peak or {}

    def alive(self) -> dict[int, int]:
        """Return number and bytes of each storage that is alive."""
        return dict(self._alive)

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage; None where it is not counted."""
        return self._numbers.get(tensor.untyped_storage()._cdata)
