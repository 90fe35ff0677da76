"""conf/quantization: weights in 8 or 4 bits."""

from dataclasses import dataclass
from enum import StrEnum

from src.config.schema.fields import DottedConfig, key
from src.config.schema.model import Dtype

OTHER_WEIGHTS = "other frozen weights, or another precision"


QuantType = StrEnum("QuantType", "nf4 fp4")


def _is_in_4bit(config: DottedConfig) -> bool:
    return bool(config.get("quantization.load_in_4bit"))


@dataclass
class QuantizationConfig:
    """conf/quantization: bitsandbytes' own keys; both `load_in_…` false means none."""

    load_in_8bit: bool = key(why=OTHER_WEIGHTS)
    load_in_4bit: bool = key(why=OTHER_WEIGHTS)
    bnb_4bit_quant_type: QuantType = key(why=OTHER_WEIGHTS, counts_where=_is_in_4bit)
    bnb_4bit_compute_dtype: Dtype = key(why=OTHER_WEIGHTS, counts_where=_is_in_4bit)
    bnb_4bit_use_double_quant: bool = key(why=OTHER_WEIGHTS, counts_where=_is_in_4bit)

    @property
    def is_on(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit
