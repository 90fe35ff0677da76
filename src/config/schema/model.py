"""conf/model: which network, from where, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from src.config.schema.checks import PathCheck
from src.config.schema.fields import TYPE_TEXT, key

CHECKPOINT = PathCheck("a folder with a checkpoint, or the name of one on a hub", bool)


class ModelType(Enum):
    causal_lm = "causal_lm"
    encoder_decoder = "encoder_decoder"


class Weights(Enum):
    pretrained = "pretrained"
    random = "random"


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


@dataclass
class ModelConfig:
    """conf/model: which network, from where, in which precision."""

    type: ModelType = key(text=TYPE_TEXT.format(group="model"))
    checkpoint: str = key(CHECKPOINT)
    revision: str | None = MISSING
    weights: Weights = MISSING
    dtype: Dtype = MISSING
    attn_implementation: Attention | None = MISSING
    gradient_checkpointing: bool = MISSING
    use_safetensors: bool = MISSING
    trust_remote_code: bool = MISSING
