"""conf/optimizer: one dataclass for options with the same keys."""

from __future__ import annotations

from dataclasses import dataclass

from src.config.schema.checks import BELOW_ONE, BETAS, WEIGHT, WEIGHT_OR_ZERO, in_float32
from src.config.schema.fields import key, type_key

EPS = in_float32(1.2e-38, "of at least 1.2e-38")
"""What a sum is divided by: below, it is 0 in 32 bits."""


@dataclass
class AdamWConfig:
    """conf/optimizer/adamw.yaml: torch.optim.AdamW; adamw_8bit and paged_adamw_32bit: bitsandbytes'."""

    type: str = type_key("optimizer", "adamw", "adamw_8bit", "paged_adamw_32bit")
    lr: float = key(WEIGHT)
    embedding_lr: float | None = key(WEIGHT)
    weight_decay: float = key(WEIGHT_OR_ZERO)
    betas: list[float] = key(BETAS)
    eps: float = key(EPS)


@dataclass
class AdafactorConfig:
    """conf/optimizer/adafactor.yaml: torch.optim.Adafactor."""

    type: str = type_key("optimizer", "adafactor")
    lr: float = key(WEIGHT)
    embedding_lr: float | None = key(WEIGHT)
    weight_decay: float = key(WEIGHT_OR_ZERO)


@dataclass
class SGDConfig:
    """conf/optimizer/sgd.yaml: torch.optim.SGD."""

    type: str = type_key("optimizer", "sgd")
    lr: float = key(WEIGHT)
    embedding_lr: float | None = key(WEIGHT)
    weight_decay: float = key(WEIGHT_OR_ZERO)
    momentum: float = key(BELOW_ONE)


OptimizerConfig = AdamWConfig | AdafactorConfig | SGDConfig
