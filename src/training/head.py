"""The module that is trained: a model whose forward gives the summed loss, with logits for supervised positions only.

It stands inside what Accelerate wraps, so that their hooks see one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.training.loss import supervised_positions, token_nll


class ScoredModel(nn.Module):
    """A causal model that scores itself: input_ids and labels [batch, seq] become the summed nll of the labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.uses_full_logits = False
        """Whether the model's own forward computes the logits, because head(hidden) would be something else."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        if self.uses_full_logits:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            picked, targets = supervised_positions(logits, labels)
            return token_nll(picked, targets, lambda chosen: chosen, logits.shape[-1])
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        states, targets = supervised_positions(hidden, labels)
        return token_nll(states, targets, head, head.weight.shape[0])

    @torch.no_grad()
    def choose_head(self, input_ids: Tensor) -> None:
        """Watch the model's own forward on a short row, [1, seq]: is the head fed the last hidden states, and are the
        logits what it gives back, bit for bit?

        Many models put something between head and logits (a scale, a cap, a bias), so this is seen, not assumed. Where
        it is not so, the model's own forward computes the logits from then on.
        """
        self.uses_full_logits = True
        head = self.model.get_output_embeddings()
        if head is None:
            return
        seen: list[tuple[Tensor, Tensor]] = []
        watch = head.register_forward_hook(lambda _module, given, result: seen.append((given[0], result)))
        training = self.training
        self.eval()
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            base = self.model.base_model(input_ids=input_ids, use_cache=False)
            hidden = getattr(base, "last_hidden_state", None)
        finally:
            watch.remove()
            self.train(training)
        if len(seen) == 1 and hidden is not None:
            fed, given = seen[0]
            self.uses_full_logits = not (torch.equal(fed, hidden) and torch.equal(given.float(), logits.float()))
