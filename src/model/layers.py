"""Linear layers, also GPT-2's, whose matrix is transposed."""

from typing import Any

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer (Conv1D), whose matrix is [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def num_inputs(layer: Any) -> int:
    """Return the width of a linear layer's input."""
    return int(layer.weight.shape[0 if is_transposed(layer) else 1])
