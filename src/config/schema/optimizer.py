"""conf/optimizer: a registered class an optimizer, with its keys and how it is built.

torch is imported by `build` alone, which is called after the gate.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from src.config.schema.checks import BELOW_ONE, BETAS, WEIGHT, WEIGHT_OR_ZERO, in_float32
from src.config.schema.fields import Impact, key, type_key
from src.registry import Registry

if TYPE_CHECKING:
    from torch.optim import Optimizer

EPS = in_float32(1.2e-38, "of at least 1.2e-38")
"""What a sum is divided by: below, it is 0 in 32 bits."""

STATE_BLOCK = 256
"""Values of an 8-bit optimizer's state that share a scale."""
MIN_8BIT_SIZE = 4096
"""Values below which a tensor's state keeps 32 bits."""


class StateTensor(NamedTuple):
    """What an optimizer keeps for one trained tensor."""

    name: str
    num: int
    bytes_per_value: int


class TrainableTensor(NamedTuple):
    """A tensor that is trained, by its size."""

    shape: tuple[int, ...]
    bytes_per_value: int

    @property
    def num(self) -> int:
        return math.prod(self.shape)


OPTIMIZERS = Registry[type]("optimizer")
"""`optimizer.type` -> its subclass of OptimizerConfig."""


_key = partial(key, why="other updates")


@dataclass
class OptimizerConfig:
    """The keys of every optimizer; a subclass adds those of its own, and builds it."""

    type: str = type_key("optimizer", OPTIMIZERS, resume=Impact.impossible, why="an optimizer's state fits no other")
    lr: float = _key(WEIGHT)
    embedding_lr: float | None = _key(WEIGHT)
    weight_decay: float = _key(WEIGHT_OR_ZERO)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer over groups of parameters, each with its `params`, `weight_decay` and perhaps `lr`."""
        raise NotImplementedError

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor] | None:
        """Return what is kept for a trained tensor, for forecasts of memory and disk; None: not known.

        Counters, and tables that all tensors share, are left out.
        """
        return None


def _like_it(tensor: TrainableTensor, bytes_per_value: int, *names: str) -> list[StateTensor]:
    return [StateTensor(name, tensor.num, bytes_per_value) for name in names]


@OPTIMIZERS.register("adamw")
@dataclass
class AdamWConfig(OptimizerConfig):
    """conf/optimizer/adamw.yaml: torch.optim.AdamW."""

    betas: list[float] = _key(BETAS)
    eps: float = _key(EPS)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from torch.optim import AdamW

        return AdamW(groups, **self._options(), fused=True)

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor]:
        return _like_it(tensor, tensor.bytes_per_value, "exp_avg", "exp_avg_sq")

    def _options(self) -> dict[str, Any]:
        first, second = self.betas
        return {"lr": self.lr, "betas": (first, second), "eps": self.eps}


@OPTIMIZERS.register("adamw_8bit")
@dataclass
class AdamW8bitConfig(AdamWConfig):
    """conf/optimizer/adamw_8bit.yaml: bitsandbytes' AdamW with its state in 8 bits."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return _bitsandbytes_optimizers().AdamW8bit(groups, **self._options())

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor]:
        if tensor.num < MIN_8BIT_SIZE:
            return _like_it(tensor, 4, "state1", "state2")
        scales = [StateTensor(name, math.ceil(tensor.num / STATE_BLOCK), 4) for name in ("absmax1", "absmax2")]
        return _like_it(tensor, 1, "state1", "state2") + scales


@OPTIMIZERS.register("paged_adamw_32bit")
@dataclass
class PagedAdamWConfig(AdamWConfig):
    """conf/optimizer/paged_adamw_32bit.yaml: bitsandbytes' AdamW whose state leaves a full GPU."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizers = _bitsandbytes_optimizers()
        is_on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        # without a GPU there is no memory to page from, and bitsandbytes would warn of it in the first step
        chosen = optimizers.PagedAdamW32bit if is_on_gpu else optimizers.AdamW32bit
        return chosen(groups, **self._options())

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor]:
        return _like_it(tensor, 4, "state1", "state2")


@OPTIMIZERS.register("adafactor")
@dataclass
class AdafactorConfig(OptimizerConfig):
    """conf/optimizer/adafactor.yaml: torch.optim.Adafactor."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from torch import finfo, float32
        from torch.optim import Adafactor

        # torch's own eps for float32 weights, and here for all. Its default follows the weights' type, and bfloat16's,
        # 0.008, is far above usual gradients: such weights stand still (measured: 100 steps with gradients of 3e-5
        # moved them by 0.1 %)
        return Adafactor(groups, lr=self.lr, eps=(finfo(float32).eps, 1e-3))

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor]:
        size = tensor.bytes_per_value
        if len(tensor.shape) < 2:
            return [StateTensor("variance", tensor.num, size)]
        names = {"row_var": tensor.shape[-1], "col_var": tensor.shape[-2]}
        return [StateTensor(name, tensor.num // gone, size) for name, gone in names.items()]


@OPTIMIZERS.register("sgd")
@dataclass
class SGDConfig(OptimizerConfig):
    """conf/optimizer/sgd.yaml: torch.optim.SGD."""

    momentum: float = _key(BELOW_ONE)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from torch.optim import SGD

        return SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)

    def state_of(self, tensor: TrainableTensor) -> list[StateTensor]:
        return _like_it(tensor, tensor.bytes_per_value, "momentum_buffer") if self.momentum else []


def _bitsandbytes_optimizers() -> Any:
    """Import bitsandbytes, which takes seconds, without its word about a CPU kernel that it could fetch from a hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import optim

    return optim
