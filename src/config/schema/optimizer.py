"""conf/optimizer: a registered class an optimizer, with its keys and how it is built.

torch is imported by `build` alone, which is called after the gate.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.config.schema.checks import BELOW_ONE, BETAS, WEIGHT, WEIGHT_OR_ZERO, in_float32
from src.config.schema.fields import key, registered_type_key
from src.registry import Registry

if TYPE_CHECKING:
    from torch.optim import Optimizer

EPS = in_float32(1.2e-38, "of at least 1.2e-38")
"""What a sum is divided by: below, it is 0 in 32 bits."""

OPTIMIZERS = Registry[type]("optimizer")
"""`optimizer.type` -> its subclass of OptimizerConfig."""


@dataclass
class OptimizerConfig:
    """The keys of every optimizer; a subclass adds those of its own, and builds it."""

    type: str = registered_type_key("optimizer", OPTIMIZERS)
    lr: float = key(WEIGHT)
    embedding_lr: float | None = key(WEIGHT)
    weight_decay: float = key(WEIGHT_OR_ZERO)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer over groups of parameters, each with its `params`, `weight_decay` and perhaps `lr`."""
        raise NotImplementedError


@OPTIMIZERS.register("adamw")
@dataclass
class AdamWConfig(OptimizerConfig):
    """conf/optimizer/adamw.yaml: torch.optim.AdamW."""

    betas: list[float] = key(BETAS)
    eps: float = key(EPS)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from torch.optim import AdamW

        return AdamW(groups, **self._options(), fused=True)

    def _options(self) -> dict[str, Any]:
        first, second = self.betas
        return {"lr": self.lr, "betas": (first, second), "eps": self.eps}


@OPTIMIZERS.register("adamw_8bit")
@dataclass
class AdamW8bitConfig(AdamWConfig):
    """conf/optimizer/adamw_8bit.yaml: bitsandbytes' AdamW with its state in 8 bits."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer: Optimizer = _bitsandbytes_optimizers().AdamW8bit(groups, **self._options())
        return optimizer


@OPTIMIZERS.register("paged_adamw_32bit")
@dataclass
class PagedAdamWConfig(AdamWConfig):
    """conf/optimizer/paged_adamw_32bit.yaml: bitsandbytes' AdamW whose state leaves a full GPU."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizers = _bitsandbytes_optimizers()
        is_on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        # without a GPU there is no memory to page from, and bitsandbytes would warn of it in the first step
        chosen = optimizers.PagedAdamW32bit if is_on_gpu else optimizers.AdamW32bit
        optimizer: Optimizer = chosen(groups, **self._options())
        return optimizer


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


@OPTIMIZERS.register("sgd")
@dataclass
class SGDConfig(OptimizerConfig):
    """conf/optimizer/sgd.yaml: torch.optim.SGD."""

    momentum: float = key(BELOW_ONE)

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        from torch.optim import SGD

        return SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)


def _bitsandbytes_optimizers() -> Any:
    """Import bitsandbytes, which takes seconds, without its word about a CPU kernel that it could fetch from a hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import optim

    return optim
