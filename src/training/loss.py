"""The loss, as pure functions of tensors and numbers.

Per optimizer step: the sum of weighted token losses over all micro-batches and processes, divided once by the sum of
weights of that whole step (mean), or not divided (sum). So how a batch is cut changes nothing. A token of an answer
weighs 1, one of a thought `loss.thought_weight`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from src.config.schema import LossConfig, Reduction
from src.data.encoding import IGNORE_INDEX

MAX_LOGITS = 2**26
"""Logits held at once, in elements: 256 MiB in fp32."""


class TokenLosses(NamedTuple):
    """The losses of a micro-batch's supervised tokens, in reading order; only the objective has a gradient."""

    objective: Tensor  # scalar sum of the weighted, smoothed token losses, float32
    nll: Tensor  # negative log-likelihoods in nats, [supervised]
    targets: Tensor  # ids, [supervised]
    is_thought: Tensor | None  # mask of thought tokens, [supervised]; None where no row has any

    def sums(self) -> Tensor:
        """Return the objective, the summed nll, and that of thoughts, [3], detached."""
        thoughts = self.nll.new_zeros(()) if self.is_thought is None else (self.nll * self.is_thought).sum()
        return torch.stack([self.objective.detach(), self.nll.sum(), thoughts])


def supervised_positions(
    hidden: Tensor, labels: Tensor, is_thought: Tensor | None = None, *, is_causal: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Select the states that predict a supervised token, these tokens, and which of them are thought tokens.

    Args:
        hidden: states, [batch, seq, width].
        labels: ids, not shifted, [batch, seq]; IGNORE_INDEX is not supervised.
        is_thought: mask of labels that are thought tokens, [batch, seq].
        is_causal: whether the state at position i predicts the label at i + 1, as in a causal model, or the one at i,
            as in a decoder whose input was shifted.
    Returns:
        States [supervised, width], targets [supervised] and the mask of thought tokens [supervised].
    """
    if is_causal:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        is_thought = None if is_thought is None else is_thought[:, 1:]
    chosen = labels != IGNORE_INDEX
    return hidden[chosen], labels[chosen], None if is_thought is None else is_thought[chosen]


def token_losses(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], num_vocabulary: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the objective and the negative log-likelihood of each target, with at most MAX_LOGITS logits at once.

    Args:
        states: [supervised, width].
        targets: [supervised].
        head: computes logits [n, vocabulary] of states [n, width]; called as a module, so that its hooks run.
        num_vocabulary: columns of the logits, to size the chunks; more than one chunk is computed again in backward.
        label_smoothing: share of each target that is spread evenly over all columns, as in functional.cross_entropy.
    Returns:
        Two tensors [supervised] in nats, float32; without smoothing they are equal. Attached to the graph, also where
        nothing is supervised.
    """
    chunk = max(1, MAX_LOGITS // num_vocabulary)

    def of_chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        nll = functional.cross_entropy(logits, targets, reduction="none")
        if not label_smoothing:
            return nll, nll
        smoothed = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return smoothed, nll.detach()

    if len(targets) <= chunk:
        return of_chunk(states, targets)
    chunks = zip(states.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(of_chunk, *part, use_reentrant=False) for part in chunks]
    objectives, nlls = zip(*losses, strict=True)
    return torch.cat(objectives), torch.cat(nlls)


def compute_losses(
    states: Tensor,
    targets: Tensor,
    is_thought: Tensor | None,
    head: Callable[[Tensor], Tensor],
    num_vocabulary: int,
    config: LossConfig,
) -> TokenLosses:
    """Compute the losses of a micro-batch's supervised tokens; for the arguments see token_losses."""
    objectives, nll = token_losses(states, targets, head, num_vocabulary, config.label_smoothing)
    if is_thought is not None and config.thought_weight != 1:
        objectives = torch.where(is_thought, config.thought_weight * objectives, objectives)
    return TokenLosses(objectives.sum(), nll.detach(), targets, is_thought)


def sum_of_weights(num_supervised: float, num_thought: float, config: LossConfig) -> float:
    """Return the sum of the tokens' weights, which a mean divides by."""
    return num_supervised + (config.thought_weight - 1) * num_thought


def step_objective(objective: Tensor, weights_in_step: float, reduction: Reduction) -> Tensor:
    """Return what a micro-batch's summed objective, in nats, adds to that of its step.

    `weights_in_step` is the sum over all micro-batches and processes; where that is 0, so is the result.
    """
    return objective if reduction is Reduction.sum else objective / (weights_in_step or 1)


def span_losses(nll: float, num_supervised: float, thought_nll: float, num_thought: float) -> dict[str, float]:
    """Return the mean nats per token of thoughts and of answers by name; empty where there are no thoughts."""
    if not num_thought:
        return {}
    answers = num_supervised - num_thought
    means = {"thought_loss": thought_nll / num_thought}
    return means | ({"answer_loss": (nll - thought_nll) / answers} if answers else {})
