"""Linear layers, and their weights in 8 or 4 bits by bitsandbytes: its settings, and what it can't do."""

import logging
from typing import Any

import torch
from torch import nn

from src.config.schema import Dtype, MixedPrecision, ModelConfig, QuantizationConfig
from src.errors import ModelError
from src.util import listed

PACKS = "support_avx512bf16_for_cpu"
CPU_BLOCK = 64
"""On a CPU bitsandbytes 0.50 takes 4-bit layers whose input is a multiple of this only: else it fails in evaluation."""


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer (Conv1D), whose matrix is [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def quiet_bitsandbytes() -> None:
    """Show errors of bitsandbytes only: when it is imported on a CPU, it recommends a package that is not needed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quantization_settings(config: QuantizationConfig, model: ModelConfig, precision: MixedPrecision) -> Any:
    """Return transformers' settings, or None where nothing is quantised."""
    if not config.is_on:
        return None
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_8bit=config.load_in_8bit,
        load_in_4bit=config.load_in_4bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type.value,
        bnb_4bit_compute_dtype=compute_dtype(config, model, precision),
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
    )


def compute_dtype(config: QuantizationConfig, model: ModelConfig, precision: MixedPrecision) -> torch.dtype:
    """Return the type that products with 4-bit weights compute in; `auto` is mixed precision's, else the model's."""
    if config.bnb_4bit_compute_dtype is not Dtype.auto:
        return getattr(torch, config.bnb_4bit_compute_dtype.value)
    mixed = {MixedPrecision.bf16: torch.bfloat16, MixedPrecision.fp16: torch.float16}
    if precision in mixed:
        return mixed[precision]
    return torch.float32 if model.dtype is Dtype.auto else getattr(torch, model.dtype.value)


def quantised_layers(empty: Any) -> dict[str, Any]:
    """Return an empty model's linear layers that are quantised, by name: as in transformers all but the head."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(empty)
    return {
        name: module
        for name, module in empty.named_modules()
        if is_linear(module) and not any(name == key or name.startswith(f"{key}.") for key in kept)
    }


def put_quantised_layers(empty: Any, settings: Any) -> None:
    """Replace linear layers by bitsandbytes' own, in place, as transformers does on loading.

    The model is on the meta device, without adapter; the settings are those of quantization_settings.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(empty, get_keys_to_not_convert(empty), settings)


def check_quantisable(empty: Any, config: QuantizationConfig, device: torch.device) -> None:
    """Check, before weights are loaded, that they can be quantised on the device; ModelError names those that can't."""
    layers = quantised_layers(empty)
    if not layers:
        raise ModelError(f"{type(empty).__name__} has no linear layers that could be quantised")
    if config.load_in_4bit and device.type == "cpu":
        widths = {name: layer.weight.shape[0 if is_transposed(layer) else 1] for name, layer in layers.items()}
        odd = [f"{name}: {width}" for name, width in widths.items() if width % CPU_BLOCK]
        if odd:
            raise ModelError(
                f"on a CPU 4-bit layers need inputs of a multiple of {CPU_BLOCK}, these have others (a GPU takes them, "
                f"and so does quantization=int8):\n{listed(odd)}"
            )


def disable_cpu_packing(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights for CPUs with AVX512-BF16 when the model is first evaluated.

    Packed weights stay packed when training resumes (0.50), and their product has no gradient: all layers below would
    silently stop learning, and a layer with a bias fails.
    """
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
