"""Output matrix and cross-entropy in one: losses and their gradients, a chunk of the supervised positions at a time.

The gradient of a position needs only its own logits, so it replaces them as soon as they are known. Only one chunk of
logits ever exists, and none is computed again for backward. (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, do the
same in Triton.)
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_ON_CPU = 2**23
"""Logits of a chunk, in elements: 32 MiB in float32, about what caches hold."""
LOGITS_ELSEWHERE = 2**27
"""The same on a GPU (not measured), where short chunks would wait for memory."""
LEAST_ROWS = 256
"""Positions of a chunk, where there are so many: each chunk reads and writes the whole gradient of the matrix."""


class LinearHead(NamedTuple):
    """How logits follow from states: x = states @ weight.T + bias, or cap * tanh(x / cap) where there is a cap."""

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]
    cap: float | None = None


class _Gradients(NamedTuple):
    """Gradients of the weighted sum of losses; None where they are not needed. The weight's and the bias's are sums
    over chunks, in float32 at least."""

    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def compute_type(weight: Tensor) -> torch.dtype:
    """Return the type that a product with a weight is computed in, here."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def chunk_size(num_positions: int, num_vocabulary: int, device: torch.device) -> int:
    """Return how many positions a chunk has, so that all are of about the same size."""
    logits = LOGITS_ON_CPU if device.type == "cpu" else LOGITS_ELSEWHERE
    num_chunks = round(num_positions / max(LEAST_ROWS, logits // num_vocabulary))
    return max(1, math.ceil(num_positions / max(1, num_chunks)))


def fused_losses(
    states: Tensor, head: LinearHead, targets: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of the smoothed losses, and the negative log-likelihood of each target, in nats.

    Only the sum has a gradient, for states, weight and bias. It can't be differentiated twice, and backward is called
    once, because it scales gradients in place.

    Args:
        states: [positions, width].
        targets: ids, [positions].
        weights: of the losses, constants, [positions]; None: all are 1.
        label_smoothing: share of each target that is spread evenly over all columns, as in functional.cross_entropy.
    Returns:
        A scalar and a tensor [positions], in float32; in float64 where that is computed in.
    """
    return _FusedLosses.apply(states, *head, targets, weights, label_smoothing, torch.is_grad_enabled())


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        targets: Tensor,
        weights: Tensor | None,
        label_smoothing: float,
        has_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (states, weight, bias)
        needed = [has_gradients and needs for needs in ctx.needs_input_grad[: len(inputs)]]
        dtype = compute_type(weight)
        with torch.autocast(weight.device.type, enabled=False):
            gradients = _empty_gradients(inputs, needed, torch.promote_types(dtype, torch.float32))
            head = LinearHead(weight.to(dtype), None if bias is None else bias.to(dtype), cap)
            losses, nll = _compute(states.to(dtype), head, targets, weights, label_smoothing, gradients)
        ctx.dtypes = [None if one is None else one.dtype for one in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return (losses if weights is None else losses * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, _of_nll: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the gradients would count as constants
            raise RuntimeError("the fused loss can't be differentiated twice")
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)  # in place: no second one of the matrix
        scaled = [None if one is None else one.mul_(of_sum).to(dtype) for one, dtype in gradients]
        return (*scaled, None, None, None, None, None)


def _empty_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None], needed: list[bool], dtype: torch.dtype
) -> _Gradients:
    """Return gradients to be written; of the weight and the bias zeros, where no chunk will be."""
    make = torch.empty_like if len(inputs[0]) else torch.zeros_like
    return _Gradients(
        *(
            make(one, dtype=dtype) if needs and one is not None else None
            for one, needs in zip(inputs, needed, strict=True)
        )
    )


def _compute(
    states: Tensor,
    head: LinearHead,
    targets: Tensor,
    weights: Tensor | None,
    label_smoothing: float,
    gradients: _Gradients,
) -> tuple[Tensor, Tensor]:
    """Compute the losses and nll of all positions, and write the gradients of the losses' weighted sum."""
    num_vocabulary, device = len(head.weight), states.device
    dtype, exact = states.dtype, torch.promote_types(states.dtype, torch.float32)
    losses, nll = (torch.empty(len(states), dtype=exact, device=device) for _ in range(2))
    size = chunk_size(len(states), num_vocabulary, device)
    logits = torch.empty(min(size, len(states)), num_vocabulary, dtype=exact, device=device)
    products = logits if dtype == exact else torch.empty_like(logits, dtype=dtype)
    for start in range(0, len(states), size):
        chunk = slice(start, start + size)
        fed = states[chunk]
        given, product = logits[: len(fed)], products[: len(fed)]
        if head.bias is None:
            torch.mm(fed, head.weight.t(), out=product)
        else:
            torch.addmm(head.bias, fed, head.weight.t(), out=product)
        if product is not given:
            given.copy_(product)
        losses[chunk], nll[chunk] = _to_gradients(given, targets[chunk], head.cap, label_smoothing)
        if weights is not None:
            given.mul_(weights[chunk, None])
        if product is not given:
            product.copy_(given)
        _add_products(gradients, chunk, product, fed, head.weight)
    return losses, nll


def _to_gradients(logits: Tensor, targets: Tensor, cap: float | None, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Replace logits [positions, vocabulary], before their cap, by the gradients of their losses; return losses and
    nll, [positions]."""
    squashed = None
    if cap is not None:
        squashed = logits.div_(cap).tanh_().clone()
        logits.mul_(cap)
    at = targets[:, None]
    of_target, most = logits.gather(1, at), logits.amax(1, keepdim=True)
    mean = logits.mean(1, keepdim=True) if label_smoothing else most
    torch.softmax(logits, 1, out=logits)
    of_most = logits.amax(1, keepdim=True).log()  # a target's own would be -inf where its probability rounds to 0
    nll = (most - of_target) - of_most
    losses = torch.lerp(nll, (most - mean) - of_most, label_smoothing) if label_smoothing else nll
    logits.scatter_add_(1, at, torch.full_like(nll, label_smoothing - 1))
    if label_smoothing:
        logits.sub_(label_smoothing / logits.shape[1])
    if squashed is not None:
        logits.addcmul_(logits, squashed.square_(), value=-1)  # tanh' = 1 - tanh^2
    return losses[:, 0], nll[:, 0]


def _add_products(gradients: _Gradients, chunk: slice, of_logits: Tensor, states: Tensor, weight: Tensor) -> None:
    """Add what the gradients of a chunk's logits [positions, vocabulary] give to the others; the first chunk writes."""
    if gradients.states is not None:
        gradients.states[chunk] = torch.mm(of_logits, weight)
    is_first = chunk.start == 0
    if (total := gradients.weight) is not None and total.dtype == of_logits.dtype:
        torch.addmm(total, of_logits.t(), states, beta=0 if is_first else 1, out=total)
    elif total is not None:
        product = torch.mm(of_logits.t(), states)
        total.copy_(product) if is_first else total.add_(product)
    if (total := gradients.bias) is not None:
        product = of_logits.sum(0, dtype=total.dtype)
        total.copy_(product) if is_first else total.add_(product)
