"""Generation in batches: prompts padded on the left, completions cut at EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from src.data.dataset import EncodedSet
from src.errors import DataError, ModelError
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest


class _WhenAsked(StoppingCriteria):
    """Ends generation between two tokens when a signal asks the run to stop."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), bool(self._stop.name), device=input_ids.device)


@dataclass(frozen=True)
class Completion:
    """Generated ids, without EOS, and why they end: `eos` or `length`."""

    ids: list[int]
    stop_reason: str


@dataclass(frozen=True)
class Generator:
    """A model that generates by its own `generation_config`, see model.build."""

    model: Any
    runtime: Runtime
    batch_size: int

    @property
    def pad_token_id(self) -> int:
        return int(self.model.generation_config.pad_token_id)

    def check_room(self, rows: EncodedSet) -> None:
        """See that every prompt can be generated from: not empty, and with room behind it.

        Raises:
            DataError, ModelError: naming the row, or the lengths that do not fit.
        """
        lengths = [len(rows.prompt_ids(i)) for i in range(len(rows))]
        if 0 in lengths:
            raise DataError(f"{rows.places[lengths.index(0)]}  nothing to generate from: an empty prompt, and no BOS")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.model.generation_config.max_new_tokens
        if positions is not None and max(lengths) + new > positions:
            raise ModelError(
                f"{rows.name}: the longest prompt has {max(lengths)} tokens, generation.max_new_tokens = {new} more do "
                f"not fit into the model's {positions} positions; lower one of data.max_seq_length and max_new_tokens"
            )

    def generate(self, prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        """Generate a completion for each prompt (ids), in the order given.

        Prompts of similar length go together, so that little is padded. Sampling draws from a stream of its own, by
        `seed`. The model is in eval mode meanwhile.

        Raises:
            Interrupted: between two tokens, where a signal asked for it.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: list[Completion | None] = [None] * len(prompts)
        training = self.model.training
        self.model.eval()
        with self.runtime.isolated_rng(seed), torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                self.runtime.stop.check()
                some = order[start : start + self.batch_size]
                for i, completion in zip(some, self._batch([prompts[i] for i in some]), strict=True):
                    completions[i] = completion
        self.model.train(training)
        return [completion for completion in completions if completion is not None]

    def _batch(self, prompts: Sequence[list[int]]) -> list[Completion]:
        longest = max(map(len, prompts))
        pad = self.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self.runtime.autocast():
            generated = self.model.generate(
                input_ids=ids.to(self.runtime.device),
                attention_mask=real.to(self.runtime.device),
                stopping_criteria=StoppingCriteriaList([_WhenAsked(self.runtime.stop)]),
            )
        self.runtime.stop.check()
        return [cut_at(row, self.model.generation_config.eos_token_id) for row in generated[:, longest:].tolist()]


def cut_at(ids: list[int], eos_token_id: int) -> Completion:
    """Cut generated ids before the first EOS; what stands behind it is padding."""
    if eos_token_id in ids:
        return Completion(ids[: ids.index(eos_token_id)], "eos")
    return Completion(ids, "length")
