"""The module that is trained: a model whose forward gives the summed loss, with logits for supervised positions only.

It stands inside what Accelerate wraps, so that their hooks see one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.training.loss import supervised_positions, token_nll

TOLERANCE = 1e-4
"""Largest relative difference from the model's own logits at which the shortcut over hidden states is trusted."""


class ScoredModel(nn.Module):
    """A causal model that scores itself: input_ids and labels [batch, seq] become the summed nll of the labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.uses_full_logits = False
        """Whether the model's own forward computes the logits, because head(hidden) would be something else."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        if self.uses_full_logits or head is None:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            picked, targets = supervised_positions(logits, labels)
            return token_nll(picked, targets, lambda chosen: chosen, logits.shape[-1])
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        states, targets = supervised_positions(hidden, labels)
        return token_nll(states, targets, head, head.weight.shape[0])

    @torch.no_grad()
    def choose_head(self, input_ids: Tensor, labels: Tensor) -> float:
        """Compare the loss of a short row with the model's own full-logits forward; where they differ, use that one.

        Many models put something between head and logits (a scale, a cap, a bias), so this is measured, not assumed.

        Args:
            input_ids, labels: one short row, [1, seq].
        Returns:
            The relative difference that was found.
        """
        training = self.training
        self.eval()
        self.uses_full_logits = True
        reference = self(input_ids, labels)
        self.uses_full_logits = False
        try:
            shortcut = self(input_ids, labels)
        except (AttributeError, TypeError):  # no base model of the usual form
            shortcut = torch.full_like(reference, float("nan"))
        difference = ((shortcut - reference).abs() / reference.abs().clamp_min(1e-6)).item()
        self.uses_full_logits = not difference <= TOLERANCE
        self.train(training)
        return difference
