"""conf/quantization: weights in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from src.config.schema.model import Dtype


class QuantType(Enum):
    nf4 = "nf4"
    fp4 = "fp4"


@dataclass
class QuantizationConfig:
    """conf/quantization: bitsandbytes' own keys; both `load_in_…` false means none."""

    load_in_8bit: bool = MISSING
    load_in_4bit: bool = MISSING
    bnb_4bit_quant_type: QuantType = MISSING
    bnb_4bit_compute_dtype: Dtype = MISSING
    bnb_4bit_use_double_quant: bool = MISSING

    @property
    def is_on(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit
