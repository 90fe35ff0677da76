"""conf/adapter: LoRA by PEFT's own keys, or none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from src.config.schema.checks import BELOW_ONE, COUNT, STRINGS, WEIGHT, Check, is_int, up_to
from src.config.schema.fields import key, type_key

RANK = up_to(65_536, "wider than any layer")
RANKS = Check(
    "a mapping from a module's name or pattern to its r, from 1 to 65,536",
    lambda v: isinstance(v, dict) and all(one is not None and RANK.holds(one) for one in v.values()),
)
ALPHAS = Check(
    "a mapping from a module's name or pattern to its lora_alpha, above 0 and at most 3.4e38",
    lambda v: isinstance(v, dict) and all(one is not None and WEIGHT.holds(one) for one in v.values()),
)
TEXT_OR_TEXTS = Check(
    "a text, or a list of texts",
    lambda v: (isinstance(v, str) and bool(v)) or (STRINGS.holds(v) and bool(v)),
)
TEXT_OR_TEXTS_OR_NULL = Check("a text, a list of texts, or null", lambda v: v is None or TEXT_OR_TEXTS.holds(v))
LORA_INITS = ("gaussian", "olora", "orthogonal", "pissa")
LORA_INIT = Check(
    f"true, false, {', '.join(LORA_INITS)}",  # pissa_niter_N draws its start anew when the adapter is loaded
    lambda v: isinstance(v, bool) or v in LORA_INITS,
)
LAYERS = Check(
    "a layer's number, a list of them, or null",
    lambda v: v is None or COUNT.holds(v) or (isinstance(v, list) and bool(v) and all(map(is_int, v))),
)


class LoraBias(Enum):
    none = "none"
    all = "all"
    lora_only = "lora_only"


@dataclass
class NoAdapterConfig:
    """conf/adapter/none.yaml: every weight is trained."""

    type: str = type_key("adapter", "none")


@dataclass
class LoraConfig:
    """conf/adapter/lora.yaml and those built on it: the keys of PEFT's LoraConfig."""

    type: str = type_key("adapter", "lora")
    r: int = key(RANK)
    lora_alpha: float = key(WEIGHT)
    lora_dropout: float = key(BELOW_ONE)
    bias: LoraBias = MISSING
    target_modules: Any = key(TEXT_OR_TEXTS)
    exclude_modules: Any = key(TEXT_OR_TEXTS_OR_NULL)
    use_dora: bool = MISSING
    use_rslora: bool = MISSING
    init_lora_weights: Any = key(LORA_INIT)
    layers_to_transform: Any = key(LAYERS)
    rank_pattern: dict[str, int] = key(RANKS)
    alpha_pattern: dict[str, float] = key(ALPHAS)


AdapterConfig = NoAdapterConfig | LoraConfig
