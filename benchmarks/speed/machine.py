"""What computes, and how many operations in matrix products a workload needs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class RowLength(NamedTuple):
    """Tokens of a row: `targets` are a decoder's, 0 for a causal model."""

    inputs: int
    targets: int
    supervised: int


def describe(device: str) -> str:
    """Return what computes, and the versions of what is measured."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl") if find_spec(name)]
    place = f"{processor()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        place = torch.cuda.get_device_name()
    return ", ".join([place, *versions])


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def training_flops(model: Any, rows: Sequence[RowLength]) -> float:
    """Count the floating-point operations of the matrix products that training on rows needs, once each.

    Needed are those of tokens, not of padding; logits of supervised tokens; of attention what is not masked; in
    backward the gradient of each input, and of each weight that is trained. Nothing is computed twice. A multiplication
    and an addition are two operations.
    """
    head = model.get_output_embeddings()
    flops = _linear_flops(head, sum(row.supervised for row in rows))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            flops += _linear_flops(module, sum(_tokens_of(name, row) for row in rows))
    return flops + sum(attention_flops(model.config, row) for row in rows)


def _linear_flops(module: nn.Linear, num_tokens: int) -> float:
    return 2.0 * module.weight.numel() * num_tokens * (3 if module.weight.requires_grad else 2)


def _tokens_of(name: str, row: RowLength) -> int:
    """Return how many tokens of a row a module of transformers is computed for."""
    if not row.targets:
        return row.inputs
    is_of_encoder = ".encoder." in name or ".encoder_attn.k_proj" in name or ".encoder_attn.v_proj" in name
    return row.inputs if is_of_encoder else row.targets


def attention_flops(config: Any, row: RowLength) -> float:
    """Count the operations of attention's two products, forward and backward, over all layers."""

    def causal(length: int) -> float:
        return 2.0 * length * (length + 1)

    if not row.targets:
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 3 * config.num_hidden_layers * width * causal(row.inputs)
    decoder = causal(row.targets) + 4.0 * row.inputs * row.targets
    encoder = 4.0 * row.inputs**2
    return 3 * config.d_model * (config.encoder_layers * encoder + config.decoder_layers * decoder)
