"""Generation in batches: prompts padded on the left, completions cut at EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from src.runtime.session import Runtime


@dataclass(frozen=True)
class Completion:
    """Generated ids, without EOS, and why they end: `eos` or `length`."""

    ids: list[int]
    stop_reason: str


@dataclass(frozen=True)
class Generator:
    """A model with the settings it generates by; `settings` are transformers' own, see model.build."""

    model: Any
    settings: dict[str, Any]
    runtime: Runtime
    batch_size: int

    def generate(self, prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        """Generate a completion for each prompt (ids), in the order given.

        Prompts of similar length go together, so that little is padded. Sampling draws from a stream of its own, by
        `seed`. The model is in eval mode meanwhile.

        Raises:
            Interrupted: between batches, where a signal asked for it.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: list[Completion | None] = [None] * len(prompts)
        training = self.model.training
        self.model.eval()
        with self.runtime.isolated_rng(seed), torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                self.runtime.check_stop()
                some = order[start : start + self.batch_size]
                for i, completion in zip(some, self._batch([prompts[i] for i in some]), strict=True):
                    completions[i] = completion
        self.model.train(training)
        return [completion for completion in completions if completion is not None]

    def _batch(self, prompts: Sequence[list[int]]) -> list[Completion]:
        longest = max(map(len, prompts))
        pad = self.settings["pad_token_id"]
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self.runtime.autocast():
            generated = self.model.generate(
                input_ids=ids.to(self.runtime.device),
                attention_mask=real.to(self.runtime.device),
                generation_config=self._configuration(),
            )
        return [cut_at(row, self.settings["eos_token_id"]) for row in generated[:, longest:].tolist()]

    def _configuration(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(**self.settings)


def cut_at(ids: list[int], eos_token_id: int) -> Completion:
    """Cut generated ids before the first EOS; what stands behind it is padding."""
    if eos_token_id in ids:
        return Completion(ids[: ids.index(eos_token_id)], "eos")
    return Completion(ids, "length")
