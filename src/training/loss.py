"""The loss, as pure functions of tensors and numbers.

Per optimizer step: the sum of token losses over all micro-batches and processes, divided once by the number of
supervised tokens of that whole step (mean), or not divided (sum). So how a batch is cut changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from src.config.schema import Reduction
from src.data.encoding import IGNORE_INDEX

MAX_LOGITS = 2**26
"""Logits held at once, in elements: 256 MiB in fp32."""


def supervised_positions(hidden: Tensor, labels: Tensor, *, ahead: bool = True) -> tuple[Tensor, Tensor]:
    """Pick the states that predict a supervised token, and these tokens.

    Args:
        hidden: states, [batch, seq, width].
        labels: ids, not shifted, [batch, seq]; IGNORE_INDEX is not scored.
        ahead: whether the state at position i predicts the label at i + 1, as in a causal model, or the one at i, as
            in a decoder whose input was shifted.
    Returns:
        States [supervised, width] and targets [supervised].
    """
    if ahead:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    chosen = labels != IGNORE_INDEX
    return hidden[chosen], labels[chosen]


def token_nll(states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], num_vocabulary: int) -> Tensor:
    """Sum the negative log-likelihood of the targets, never holding more than MAX_LOGITS logits.

    Args:
        states: [supervised, width].
        targets: [supervised].
        head: gives logits [n, vocabulary] for states [n, width]; called as a module, so that its hooks run.
        num_vocabulary: columns of the logits, to size the chunks; more than one chunk is computed again in backward.
    Returns:
        Scalar sum in nats, float32; 0, still attached to the graph, where nothing is supervised.
    """
    chunk = max(1, MAX_LOGITS // num_vocabulary)

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(head(states).float(), targets, reduction="sum")

    if len(targets) <= chunk:
        return of_chunk(states, targets)
    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        part = (states[start : start + chunk], targets[start : start + chunk])
        total = total + checkpoint(of_chunk, *part, use_reentrant=False)
    return total


def step_objective(nll: Tensor, num_supervised_in_step: float, reduction: Reduction) -> Tensor:
    """Give the part that a micro-batch's summed nll has in its step's objective.

    Args:
        nll: scalar sum over the micro-batch, in nats.
        num_supervised_in_step: supervised tokens of the whole step, over all micro-batches and processes.
    """
    return nll if reduction is Reduction.sum else nll / max(num_supervised_in_step, 1)
