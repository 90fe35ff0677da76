"""Several models that generate one text: each token by the mean of their probabilities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from src.errors import ModelError

OWN = ("past_key_values", "encoder_outputs")
"""Inputs that transformers prepared for the first model, and that each other one has of its own."""


@dataclass
class _Follower:
    """A model that computes, step by step, what follows the ids that were chosen so far."""

    model: Any
    inputs: dict[str, Any]  # as transformers' loop keeps them from one step to the next
    num_beams: int
    ids: Tensor | None = field(default=None, init=False)  # of the step before, [rows * beams, tokens]

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Compute the logarithms of the next id's probabilities, [rows * beams, vocabulary], after one more id."""
        if self.ids is not None and self.num_beams > 1:
            self._reorder(ids)
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if self.ids is None else 1,
            is_first_iteration=self.ids is None,
            **self.inputs,
        )
        outputs = self.model(**inputs, return_dict=True)
        is_pair = self.model.config.is_encoder_decoder
        self.inputs = self.model._update_model_kwargs_for_generation(outputs, self.inputs, is_encoder_decoder=is_pair)
        self.ids = ids
        return outputs.logits[:, -1].float().log_softmax(1)

    def _reorder(self, ids: Tensor) -> None:
        """Put the states of each beam where the beam is now that continues it."""
        assert self.ids is not None
        cache = self.inputs.get("past_key_values")
        if cache is None:
            raise ModelError(f"beams of a {type(self.model).__name__} can't be followed; generation=greedy")
        now, before = (one.unflatten(0, (-1, self.num_beams)) for one in (ids[:, :-1], self.ids))
        parents = (now[:, :, None] == before[:, None]).all(3).int().argmax(2)
        cache.reorder_cache((parents + self.num_beams * torch.arange(len(now), device=ids.device)[:, None]).flatten())


@dataclass
class MeanProbabilities(LogitsProcessor):
    """Puts the logarithm of the models' mean probabilities in the place of the first one's scores."""

    followers: Sequence[_Follower]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        total = scores.log_softmax(1)
        for follower in self.followers:
            own = follower.log_probabilities(input_ids)
            if missing := total.shape[1] - own.shape[1]:  # rows of padding, which some matrices have more of
                own = torch.nn.functional.pad(own, (0, missing), value=-math.inf)
            total = torch.logaddexp(total, own)
        return total - math.log(1 + len(self.followers))


def mean_probabilities(
    models: Sequence[Any], prompts: Sequence[list[int]], inputs: Mapping[str, Any], num_beams: int
) -> MeanProbabilities:
    """Return the processor that has other models follow one that generates.

    Args:
        prompts: ids of each row, without padding.
        inputs: what transformers prepared for the model that generates.
    """
    shared = {name: value for name, value in inputs.items() if name not in OWN}
    followers = []
    for model in models:
        own = dict(shared)
        if model.config.is_encoder_decoder:
            mask = inputs["attention_mask"]
            ids = torch.zeros_like(mask)
            for row, prompt in enumerate(prompts):
                beams = slice(row * num_beams, (row + 1) * num_beams)
                ids[beams, : len(prompt)] = torch.tensor(prompt, device=mask.device)
            own["encoder_outputs"] = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        followers.append(_Follower(model, own, num_beams))
    return MeanProbabilities(followers)
