"""What a model does before and after its output matrix: a scale, a soft cap, a bias. Measured, not assumed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.training.fused_loss import LinearHead, compute_type

SMALL, LARGE = 2.0**-20, 1e6
"""Logits that no cap bends, and that every cap does."""
MOST_OFF = 1e-5
"""How far, relatively, logits may be from those of the form: rounding in float32."""


class HeadForm(NamedTuple):
    """The logits of hidden states: x = after * head(before * hidden) + bias, or cap * tanh(x / cap)."""

    before: float = 1.0
    after: float = 1.0
    bias: Tensor | None = None  # a constant, [vocabulary]
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Return whether the logits are what the head computes of the hidden states."""
        return self == HeadForm()

    def linear(self, head: nn.Linear) -> LinearHead:
        """Return how the logits follow from hidden states that are multiplied by `before` and `after`."""
        bias = None if head.bias is None else head.bias * self.after
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        return LinearHead(head.weight, bias, self.cap)


def is_linear(head: Any) -> bool:
    """Return whether a head is a plain matrix with all its rows in this process, and nothing hooks into it: no adapter,
    no rows of its own, not quantised, not sharded."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not any(getattr(head, name) for name in hooks)
        and head.weight.is_floating_point()
        and not hasattr(head.weight, "ds_id")
    )


def is_fused(head: Any) -> bool:
    """Return whether the loss is computed from a head's matrix, rather than from what the head returns.

    In float16 it is not: gradients would be computed before they are scaled, and be 0 too often.
    """
    return is_linear(head) and compute_type(head.weight) is not torch.float16


def last_hidden_states(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return what a model without its head computes, [batch, seq, width]; None where it has no such part."""
    if model.base_model is not model:
        return getattr(model.base_model(**inputs), "last_hidden_state", None)
    if not model.config.is_encoder_decoder:
        return None
    mask, given = inputs.get("attention_mask"), dict(inputs)  # T5, whose encoder and decoder lie in the model itself
    encoded = model.get_encoder()(input_ids=given.pop("input_ids"), attention_mask=mask)
    given |= {"attention_mask": None, "input_ids": given.pop("decoder_input_ids")}
    decoded = model.get_decoder()(**given, encoder_hidden_states=encoded[0], encoder_attention_mask=mask)
    return decoded.last_hidden_state


def measure_form(model: Any, inputs: Mapping[str, Any]) -> tuple[HeadForm | None, int | None]:
    """Return the form of a model's head, and how many columns its logits have; None where that is not known.

    Hidden states and what the head gets of them are compared; of what follows the head, its output is replaced by
    numbers of all sizes. A cap bends large logits only, and small random weights have none.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None, None
    with _watched(head) as seen, torch.no_grad():
        num_columns = model(**inputs).logits.shape[-1]
    with torch.no_grad():
        hidden = last_hidden_states(model, inputs)
    if len(seen) != 1 or hidden is None:
        return None, num_columns
    fed, given = seen[0]
    before = _factor(hidden, fed)
    numbers = _numbers(given.shape, given.device)
    # where anything is trained behind the head, the result of constants has a gradient
    with torch.set_grad_enabled(is_linear(head)), _watched(head, numbers):
        logits = model(**inputs).logits
    after = None if logits.requires_grad or logits.shape != numbers.shape else _after(numbers, logits.float())
    return None if before is None or after is None else after._replace(before=before), num_columns


@contextmanager
def _watched(head: nn.Module, replacement: Tensor | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note what a head gets and returns in this block; have it return a replacement, where there is one."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor | None:
        seen.append((given[0], result))
        return replacement

    hook = head.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def _factor(values: Tensor, scaled: Tensor) -> float | None:
    """Return the number that values were multiplied by; None where that is not what was done to them."""
    if values.shape != scaled.shape:
        return None
    if torch.equal(values, scaled):
        return 1.0
    exact, result = values.double(), scaled.double()
    factor = float((exact * result).sum() / exact.square().sum())
    least = torch.finfo(scaled.dtype).eps * result.abs()
    return factor if ((exact * factor - result).abs() <= least).all() else None


def _numbers(shape: torch.Size, device: torch.device) -> Tensor:
    """Return what takes the place of a head's output [1, positions, columns]: zeros, SMALL, LARGE, then 1e-3 to 1e3."""
    _, positions, columns = shape
    rest = torch.linspace(-3, 3, (positions - 3) * columns, device=device).view(positions - 3, columns)
    signs = torch.arange(columns, device=device) % 2 * 2.0 - 1
    fixed = torch.tensor([0.0, SMALL, LARGE], device=device)[:, None].expand(3, columns)
    return torch.cat([fixed, 10**rest * signs])[None]


def _after(numbers: Tensor, logits: Tensor) -> HeadForm | None:
    """Return what made logits of `_numbers`; None where it is more than a factor, a bias and a cap."""
    zero, small, large = logits[0, :3]
    if zero.any():
        form = HeadForm(bias=zero.clone())
    else:
        after = float(small[0]) / SMALL
        is_capped = abs(float(large[0]) - after * LARGE) > MOST_OFF * abs(after) * LARGE
        form = HeadForm(after=after, cap=float(large[0]) if is_capped else None)
    expected = numbers * form.after
    if form.bias is not None:
        expected = expected + form.bias
    if form.cap:
        expected = form.cap * torch.tanh(expected / form.cap)
    return form if torch.allclose(logits, expected, rtol=MOST_OFF, atol=MOST_OFF * SMALL) else None
