"""conf/adapter: LoRA by PEFT's own keys, the rows of new tokens alone, or none."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from src.config.schema.checks import BELOW_ONE, COUNT, STRINGS, WEIGHT, Check, is_int, up_to
from src.config.schema.fields import AT_START, DottedConfig, Impact, Verdict, key, type_key

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
    "a text, or a list of texts", lambda v: (isinstance(v, str) and bool(v)) or (STRINGS.holds(v) and bool(v))
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


LoraBias = StrEnum("LoraBias", "none all lora_only")


OTHER_TRAINED = "other weights are trained"
OTHER_SIZE = "matrices of another size"
OTHER_FUNCTION = "another function of the same matrices"
_type = partial(type_key, "adapter", resume=Impact.impossible, why=OTHER_TRAINED)


def _impact_of_choice(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of another choice of modules or layers: order does not count, nor a list of one layer."""
    chosen = [
        frozenset(value) if isinstance(value, list) else frozenset([value]) if isinstance(value, int) else value
        for value in (before[key], now[key])
    ]
    return (Impact.harmless, "") if chosen[0] == chosen[1] else (Impact.impossible, "different matrices are trained")


def _impact_of_init(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of another initialisation: some methods move a part of the base into the adapter."""
    if {"pissa", "olora"} & {before[key], now[key]}:
        return Impact.impossible, "these matrices belong to a different base"
    return Impact.harmless, AT_START


@dataclass
class NoAdapterConfig:
    """conf/adapter/none.yaml: every weight is trained."""

    type: str = _type(["none"])

    is_on = False


@dataclass
class LoraConfig:
    """conf/adapter/lora.yaml and those built on it: the keys of PEFT's LoraConfig."""

    type: str = _type(["lora"])
    r: int = key(RANK, resume=Impact.impossible, why=OTHER_SIZE)
    lora_alpha: float = key(WEIGHT, why=OTHER_FUNCTION)
    lora_dropout: float = key(BELOW_ONE, why=OTHER_FUNCTION)
    bias: LoraBias = key(resume=Impact.impossible, why=OTHER_TRAINED)
    target_modules: Any = key(TEXT_OR_TEXTS, resume=_impact_of_choice)
    exclude_modules: Any = key(TEXT_OR_TEXTS_OR_NULL, resume=_impact_of_choice)
    use_dora: bool = key(resume=Impact.impossible, why=OTHER_TRAINED)
    use_rslora: bool = key(why=OTHER_FUNCTION)
    init_lora_weights: Any = key(LORA_INIT, resume=_impact_of_init)
    layers_to_transform: Any = key(LAYERS, resume=_impact_of_choice)
    rank_pattern: dict[str, int] = key(RANKS, resume=Impact.impossible, why=OTHER_SIZE)
    alpha_pattern: dict[str, float] = key(ALPHAS, why=OTHER_FUNCTION)

    is_on = True


@dataclass
class TokensOnlyConfig:
    """conf/adapter/tokens_only.yaml: the rows of new tokens are all that is trained."""

    type: str = _type(["tokens_only"])

    is_on = True


AdapterConfig = NoAdapterConfig | LoraConfig | TokensOnlyConfig
