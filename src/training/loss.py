"""The loss, as pure functions of tensors and numbers.

Per optimizer step: the sum of weighted token losses over all micro-batches and processes, divided once by the sum of
weights of that whole step (mean), or not divided (sum). So how a batch is cut changes nothing. A token weighs what its
part does (`loss.thought_weight` …; one of an answer 1), times its row's weight (`data.weight_column`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from src.config.schema import LossConfig, Reduction
from src.data.batching import positions_of_labels
from src.data.encoding import AFTER_THOUGHT, ANSWER, PARTS, THOUGHT, THOUGHT_CLOSE, THOUGHT_OPEN
from src.metrics import PART_LOSSES
from src.training.fused_loss import LinearHead, fused_losses

MAX_LOGITS = 2**26
"""Logits held at once, in elements: 256 MiB in fp32."""


class TokenLosses(NamedTuple):
    """The losses of a micro-batch's supervised tokens, in reading order; only the objective has a gradient."""

    objective: Tensor  # scalar sum of the weighted, smoothed token losses, float32
    nll: Tensor  # negative log-likelihoods in nats, [supervised]
    targets: Tensor  # ids, [supervised]
    parts: Tensor | None  # numbers of PARTS, uint8, [supervised]; None where no row has a thought

    @property
    def is_thought(self) -> Tensor | None:
        """Mask of thought tokens, tags included, [supervised]; None where no row has any."""
        return None if self.parts is None else (self.parts != ANSWER) & (self.parts != AFTER_THOUGHT)

    def part_nll(self) -> Tensor:
        """Return the summed nll of each part, [parts]."""
        if self.parts is None:
            return functional.pad(self.nll.sum()[None], (0, len(PARTS) - 1))
        return torch.stack([(self.nll * (self.parts == part)).sum() for part in range(len(PARTS))])

    def sums(self) -> Tensor:
        """Return the objective, the summed nll, and that of each part, [2 + parts], detached."""
        return torch.cat([torch.stack([self.objective.detach(), self.nll.sum()]), self.part_nll()])


class Supervised(NamedTuple):
    """The supervised tokens of a micro-batch, in reading order."""

    states: Tensor  # which predict them, [supervised, width]
    targets: Tensor  # ids, [supervised]
    parts: Tensor | None = None  # numbers of PARTS, uint8, [supervised]; None: all are of answers
    row_weights: Tensor | None = None  # the weight of each one's row, [supervised]; None: 1


def supervised_positions(
    hidden: Tensor,
    labels: Tensor,
    parts: Tensor | None = None,
    row_weights: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    is_causal: bool = True,
) -> Supervised:
    """Select the states that predict a supervised token, these tokens, and what is known of them.

    Args:
        hidden: states, [batch, seq, width].
        labels: ids, not shifted, [batch, seq]; IGNORE_INDEX is not supervised.
        parts, row_weights: of each label, [batch, seq].
        positions: where the supervised labels are, see positions_of_labels; counting them here would wait for a GPU.
        is_causal: whether the state at position i predicts the label at i + 1, as in a causal model, or the one at i,
            as in a decoder whose input was shifted.
    """
    if positions is None:
        counted = positions_of_labels(labels.numpy(force=True), is_causal=is_causal)
        positions = torch.from_numpy(counted).to(labels.device)
    states = hidden.flatten(0, 1).index_select(0, positions - int(is_causal))
    each = (None if one is None else one.flatten().index_select(0, positions) for one in (parts, row_weights))
    return Supervised(states, labels.flatten().index_select(0, positions), *each)


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
    chosen: Supervised, head: Callable[[Tensor], Tensor] | LinearHead, num_vocabulary: int, config: LossConfig
) -> TokenLosses:
    """Compute the losses of a micro-batch's supervised tokens.

    `head` computes logits of states, see token_losses, or is the matrix that makes them: then they are fused.
    """
    weights = _weights(chosen, config)
    if isinstance(head, LinearHead):
        objective, nll = fused_losses(chosen.states, head, chosen.targets, weights, config.label_smoothing)
        return TokenLosses(objective, nll, chosen.targets, chosen.parts)
    objectives, nll = token_losses(chosen.states, chosen.targets, head, num_vocabulary, config.label_smoothing)
    objective = (objectives if weights is None else objectives * weights).sum()
    return TokenLosses(objective, nll.detach(), chosen.targets, chosen.parts)


def _weights(chosen: Supervised, config: LossConfig) -> Tensor | None:
    """Return the weight of each supervised token, [supervised]; None where all weigh 1."""
    of_parts, of_rows = part_weights(config), chosen.row_weights
    if chosen.parts is None or set(of_parts) == {1.0}:
        return of_rows
    weights = torch.tensor(of_parts, device=chosen.parts.device)[chosen.parts.long()]
    return weights if of_rows is None else weights * of_rows


def part_weights(config: LossConfig) -> list[float]:
    """Return the weight of a token of each part, [parts]."""
    weights = {f"{part}_weight": 1.0 for part in PARTS} | config.thought_weights()
    return [float(weight) for weight in weights.values()]


def sum_of_weights(weights_of_rows: Sequence[float], config: LossConfig) -> float:
    """Return the sum of the tokens' weights, which a mean divides by.

    `weights_of_rows` [parts] sums the weights of the tokens' rows, of each part: the tokens' number where all weigh 1.
    """
    return sum(weight * of_rows for weight, of_rows in zip(part_weights(config), weights_of_rows, strict=True))


def objective_differs(config: LossConfig) -> bool:
    """Return whether what is minimised is not the mean loss itself, where all rows weigh 1."""
    return config.reduction is Reduction.sum or config.label_smoothing > 0 or set(part_weights(config)) != {1.0}


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


def part_losses(nll: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """Return the mean nats per token of thoughts and of answers, and of each part of them; empty without thoughts.

    Args:
        nll, counts: the summed nll and the number of tokens of each part, [parts].
    """
    inner = (THOUGHT, THOUGHT_OPEN, THOUGHT_CLOSE)
    means = span_losses(sum(nll), sum(counts), sum(nll[part] for part in inner), sum(counts[part] for part in inner))
    names = dict(zip((*inner, AFTER_THOUGHT), PART_LOSSES, strict=True))
    return means | {name: nll[part] / counts[part] for part, name in names.items() if counts[part]}
