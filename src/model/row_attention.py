"""Attention within rows that lie one after another in one sequence, as transformers' registry takes it: by name.

FlashAttention does so on GPUs. This does it for torch's attention on a CPU, where a kernel for each row costs little:
all else of a model then computes no padding, and attention needs no mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, BY_ROWS = "sdpa", "sdpa_by_rows"


def attend_by_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as sdpa does; where lengths of rows are given, within each row of the only sequence.

    Args:
        query, key, value: [batch, heads, seq, head width]; 1 sequence, where there are `row_lengths`, which add up to
            its length.
        attention_mask: as sdpa's; with `row_lengths` it is not looked at.
        options: as sdpa's; `sliding_window` is how many tokens one sees, itself included.
    Returns:
        [batch, seq, heads, head width], and no weights. TypeError where a model has not handed on `row_lengths`.
    """
    if row_lengths is None:
        if attention_mask is not None and not attention_mask.numel():
            raise TypeError(f"{type(module).__name__} does not hand on row_lengths")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = zip(*(one.split(list(row_lengths), dim=2) for one in (query, key, value)), strict=True)
    window = options.get("sliding_window")
    masks = [_window_mask(length, window, query.device) for length in row_lengths]
    attended = [sdpa_attention_forward(module, *row, mask, **options)[0] for row, mask in zip(rows, masks, strict=True)]
    return torch.cat(attended, dim=1), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which tokens each token of a row sees, [1, 1, length, length]; None where it is all before it."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def no_mask() -> Tensor:
    """Return what a model that builds a mask takes for one that is built already: rows need none."""
    return torch.empty(1, 1, 0, 0)


def can_attend_by_rows(model: Any) -> bool:
    """Return whether a model computes its attention by a name that can be replaced, and masks no more than windows."""
    return model.config._attn_implementation in (SDPA, BY_ROWS) and not getattr(
        model.config, "attention_chunk_size", None
    )


AttentionInterface.register(BY_ROWS, attend_by_rows)
AttentionMaskInterface.register(BY_ROWS, sdpa_mask)
