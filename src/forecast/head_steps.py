"""What a model does to its last hidden states and to its head's result, by the operations that it calls."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.training.head_form import HeadForm

aten = torch.ops.aten
SCALES = {aten.mul, aten.div}
MOVES = {aten.slice, aten.alias, aten.detach, aten.view, aten._to_copy, aten.clone, aten.expand, torch.ops.prim.device}
"""Operations that change no value."""
ANY_SCALE = 0.5


class HeadSteps(TorchDispatchMode):
    """Notes the operations before and after the head; `begin` says that the last hidden states are there."""

    def __init__(self) -> None:
        super().__init__()
        self._before, self._after = set[Any](), set[Any]()
        self._noted: set[Any] = set()

    def begin(self) -> None:
        self._before.clear()
        self._noted = self._before

    def pause(self) -> None:
        self._noted = set()

    def resume(self) -> None:
        self._noted = self._after

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._noted.add(func._overloadpacket)
        return func(*args, **(kwargs or {}))

    def form(self, num_columns: int, device: torch.device) -> HeadForm | None:
        """Return the form that the head has, its numbers made up; None where it has none."""
        before, after = self._before - MOVES, self._after - MOVES
        if before - SCALES or after - SCALES - {aten.tanh, aten.add}:
            return None
        is_capped, has_bias = aten.tanh in after, aten.add in after
        return HeadForm(
            before=ANY_SCALE if before else 1.0,
            after=ANY_SCALE if after & SCALES and not is_capped else 1.0,
            bias=torch.empty(num_columns, device=device) if has_bias else None,
            cap=1.0 if is_capped else None,
        )
