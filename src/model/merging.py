"""Merging an adapter into its base, and checking that the merged weights compute what was trained.

The sum is made in float32 and rounded once, to the type that the base has (docs/decisions/0016).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import ModelError
from src.model.adapters import Adapter
from src.model.embeddings import true_tie_flag

TOLERANCE = 1e-4
"""How far logits may move by another order of sums in float32; relative to the largest one where that is above 1."""
ROUNDED = 2.0
"""How far they may be from float32's in the type that is written, as a multiple of the distance that this type, or
quantised weights, had in training."""
PROBE = (
    "The bridge was closed on Monday, so we took the long way round: 12 miles more, and 30 minutes. Was it worth it?"
)
REBUILT = 0.1
"""How far the logits of the float32 model that is merged may be from those in training, as a share of their spread.

Rounding to 8 or 16 bits stays well below; weights wrongly converted, or a lost adapter, do not."""


@torch.no_grad()
def merge(adapter: Adapter, folder: Path, ids: Sequence[int]) -> Any:
    """Return a plain model with the adapter in its weights.

    The model with the adapter can't be used any more. Quantised and 16-bit weights are made float32 on the CPU first:
    quantised again, or rounded twice, the adapter would be rounded away.

    Args:
        folder: where the adapter was saved.
        ids: the row on which the models are compared.
    Raises:
        ModelError: where merging would change the model. PEFT and bitsandbytes raise many other kinds.
    """
    model = adapter.peft_model.get_base_model()
    model.eval()
    if "flash" in model.config._attn_implementation:  # which computes in 16 bits only, on GPUs
        model.set_attn_implementation("sdpa")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    probe = torch.tensor([ids[:positions]])
    as_trained = logits(model, probe)
    float32_parameters = [p for p in model.parameters() if p.dtype == torch.float32]
    float32_model, dtype = adapter.on_float32(folder)
    buffers = _make_float32(float32_model.get_base_model())
    expected = logits(float32_model.get_base_model(), probe)
    if not (moved := _rms_difference(as_trained, expected)) <= REBUILT * expected.std().item():
        raise ModelError(
            f"the weights can't be made float32 as they were trained: logits of {probe.numel()} tokens move by "
            f"{moved:.2g}, and their spread is {expected.std().item():.2g}"
        )
    with true_tie_flag(float32_model.get_base_model()):
        merged = float32_model.merge_and_unload()
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    if not (moved := (logits(merged, probe) - expected).abs().max().item()) <= limit:
        raise ModelError(
            f"merging changes the model: logits of {probe.numel()} tokens move by {moved:.2g}, and rounding moves "
            f"them by {limit:.2g} at most"
        )
    was_float32 = set(map(id, float32_parameters))
    for parameter in merged.parameters():
        if id(parameter) not in was_float32:
            parameter.data = parameter.data.to(dtype)
    for module, name, old_dtype in buffers:
        setattr(module, name, getattr(module, name).to(old_dtype))
    limit = max(limit, ROUNDED * _rms_difference(as_trained, expected))
    if not (moved := _rms_difference(logits(merged, probe), expected)) <= limit:
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"the merged weights lose too much in {kind} (model.dtype): logits of {probe.numel()} tokens move by "
            f"{moved:.2g}, and training itself rounded by {limit / ROUNDED:.2g}"
        )
    return merged


def _rms_difference(first: Tensor, second: Tensor) -> float:
    """Return the root mean square of the differences: the largest, by rounding, is a matter of chance."""
    return (first - second).square().mean().sqrt().item()


def probe_ids(tokenizer: Any, named: Sequence[str]) -> list[int]:
    """Return a short row of ordinary text, with the tokens that a configuration names in the middle of it.

    Ordinary, because rounding errors are far larger on tokens that make no sense together.
    """
    half, vocabulary = len(PROBE) // 2, tokenizer.get_vocab()
    parts = [
        tokenizer(PROBE[:half])["input_ids"],
        [vocabulary[token] for token in named if token in vocabulary],
        tokenizer(PROBE[half:], add_special_tokens=False)["input_ids"],
    ]
    return [token_id for part in parts for token_id in part]


def logits(model: Any, probe: Tensor) -> Tensor:
    """Compute a model's logits on a row, float32 on the CPU, [1, length, rows]."""
    ids = probe.to(model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs).logits.detach().float().cpu()


def _make_float32(model: nn.Module) -> list[tuple[nn.Module, str, torch.dtype]]:
    """Make all weights of 16 bits float32 in place; return the buffers that were others, and their types."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    buffers = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                buffers.append((module, name, buffer.dtype))
                setattr(module, name, buffer.float())
    return buffers
