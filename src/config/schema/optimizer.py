"""conf/optimizer: one dataclass for options with the same keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from src.config.schema.checks import BELOW_ONE, BETAS, WEIGHT, WEIGHT_OR_ZERO, in_float32
from src.config.schema.fields import Impact, key, type_key

EPS = in_float32(1.2e-38, "of at least 1.2e-38")
"""What a sum is divided by: below, it is 0 in 32 bits."""


_type = partial(type_key, "optimizer", resume=Impact.impossible, why="an optimizer's state fits no other")
_key = partial(key, why="other updates")


@dataclass
class _AnyOptimizer:
    """What every optimizer has."""

    type: str = _type()
    lr: float = _key(WEIGHT)
    embedding_lr: float | None = _key(WEIGHT)
    weight_decay: float = _key(WEIGHT_OR_ZERO)


@dataclass
class AdamWConfig(_AnyOptimizer):
    """conf/optimizer/adamw.yaml: torch.optim.AdamW; adamw_8bit and paged_adamw_32bit: bitsandbytes'."""

    type: str = _type("adamw", "adamw_8bit", "paged_adamw_32bit")
    betas: list[float] = _key(BETAS)
    eps: float = _key(EPS)


@dataclass
class AdafactorConfig(_AnyOptimizer):
    """conf/optimizer/adafactor.yaml: torch.optim.Adafactor."""

    type: str = _type("adafactor")


@dataclass
class SGDConfig(_AnyOptimizer):
    """conf/optimizer/sgd.yaml: torch.optim.SGD."""

    type: str = _type("sgd")
    momentum: float = _key(BELOW_ONE)


OptimizerConfig = AdamWConfig | AdafactorConfig | SGDConfig
