"""Quantised layers without weights: what bitsandbytes' layers hold and compute on fake tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from src.forecast.parameters import NESTED_BLOCK, SCALE_BLOCK


def is_quantised(module: nn.Module) -> bool:
    """Return whether a layer is one of bitsandbytes' for 8 or 4 bits."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(module, "in_features")


def put_fake_weight(layer: Any, device: torch.device) -> None:
    """Put an empty weight into a quantised layer, as it is when the layer is on its device; under a FakeTensorMode."""
    rows, columns = layer.out_features, layer.in_features
    if type(layer).__name__ == "Linear4bit":
        num = rows * columns
        weight: Any = _frozen(torch.empty(math.ceil(num / 2), 1, dtype=torch.uint8, device=device))
        weight.quant_state = _state_of_4_bits(layer, torch.Size([rows, columns]), device)
        layer.compute_type_is_set = True
    else:
        weight = _frozen(torch.empty(rows, columns, dtype=torch.int8, device=device))
        weight.CB = weight.SCB = None
        layer.state.CB, layer.state.SCB = weight.data, torch.empty(rows, device=device)
        layer.state.has_fp16_weights = False
        layer.state.threshold = 0.0  # which columns are outliers is a matter of values
    layer._parameters["weight"] = weight


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _state_of_4_bits(layer: Any, shape: torch.Size, device: torch.device) -> Any:
    from bitsandbytes.functional import QuantState

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    is_nested = layer.weight.compress_statistics
    blocks = math.ceil(shape.numel() / SCALE_BLOCK)
    nested = QuantState(
        absmax=empty(math.ceil(blocks / NESTED_BLOCK)), code=empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    return QuantState(
        absmax=empty(blocks, dtype=torch.uint8 if is_nested else torch.float32),
        shape=shape,
        code=empty(16),
        blocksize=SCALE_BLOCK,
        quant_type=layer.weight.quant_type,
        dtype=torch.float32,
        offset=empty() if is_nested else None,
        state2=nested if is_nested else None,
    )
