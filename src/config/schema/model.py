"""conf/model: which network, from where, in which precision."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from src.config.schema.checks import PathCheck
from src.config.schema.fields import AT_START, BY_OUTCOME, GENERATING, Impact, key, type_key

CHECKPOINT = PathCheck("a folder with a checkpoint, or the name of one on a hub", bool)


ModelType = StrEnum("ModelType", "causal_lm encoder_decoder")
Weights = StrEnum("Weights", "pretrained random")
Dtype = StrEnum("Dtype", "auto float32 bfloat16 float16")
Attention = StrEnum("Attention", "sdpa eager flash_attention_2")


@dataclass
class ModelConfig:
    """conf/model: which network, from where, in which precision."""

    type: ModelType = type_key("model", resume=Impact.impossible, why="another network")
    checkpoint: str = key(CHECKPOINT, resume=BY_OUTCOME)
    revision: str | None = key(resume=BY_OUTCOME)
    weights: Weights = key(resume=BY_OUTCOME, why=AT_START)
    dtype: Dtype = key(why="weights of another precision", read_by=GENERATING)
    attn_implementation: Attention | None = key(resume=Impact.rounding, read_by=GENERATING)
    gradient_checkpointing: bool = key(resume=Impact.rounding)
    use_safetensors: bool = key(resume=BY_OUTCOME)
    trust_remote_code: bool = key(resume=Impact.rounding, why="other code may compute", read_by=(*GENERATING, "export"))

    kernels: bool = key(default=False, resume=Impact.rounding)

    def pretrained_at(self, folder: Path) -> Self:
        """Return the settings that load the model in a folder, in the same precision."""
        return replace(self, checkpoint=str(folder), revision=None, weights=Weights.pretrained)
