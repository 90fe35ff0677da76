"""Evaluation of one set: the loss over every supervised token, and scores of generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from src.config.schema import Metric, RunConfig
from src.data.batching import collate
from src.data.dataset import Data
from src.data.encoding import Encoder
from src.data.sets import EncodedSet
from src.errors import NonFiniteLossError
from src.evaluation.generate import Generator, check_prompts
from src.evaluation.metrics import exact_match, perplexity, strip_thoughts
from src.runtime.session import Runtime


@dataclass(frozen=True)
class Evaluator:
    """What every set's evaluation needs alike.

    `tags` open and close thoughts in generated text; `max_samples` is how many rows of a set, the first ones, count.
    """

    scored: nn.Module
    generator: Generator
    encoder: Encoder
    runtime: Runtime
    metrics: Sequence[Metric]
    tags: tuple[str, str] | None
    answer_pattern: str | None
    max_samples: int | None
    batch_size: int

    @property
    def pad_token_id(self) -> int:
        return self.generator.pad_token_id

    def evaluate(self, rows: EncodedSet) -> dict[str, float]:
        """Give the set's metrics by their names in metrics.jsonl, `eval/<set>/…`.

        Raises:
            Interrupted: between batches, where a signal asked for it.
        """
        count = min(len(rows), self.max_samples or len(rows))
        loss = self._loss(rows, count)
        values = {"loss": loss, "perplexity": perplexity(loss)}
        if Metric.exact_match in self.metrics:
            completions = self.generator.generate([rows.prompt_ids(i) for i in range(count)], self.runtime.seed)
            answers = [strip_thoughts(self.encoder.decode(completion.ids), self.tags) for completion in completions]
            references = [self.reference(rows, i) for i in range(count)]
            values["exact_match"] = exact_match(answers, references, self.answer_pattern)
        return {f"eval/{rows.name}/{name}": value for name, value in values.items()}

    def reference(self, rows: EncodedSet, index: int) -> str:
        """Give what a row's answer should be, without thoughts, also without those that stand in the data as tags."""
        return strip_thoughts(rows.reference(index), self.tags)

    @torch.no_grad()
    def _loss(self, rows: EncodedSet, count: int) -> float:
        """Mean nats per supervised token over the first `count` rows; batches of similar length are padded little."""
        order = sorted(range(count), key=lambda i: rows.lengths[i])
        total = torch.zeros((), dtype=torch.float64)
        num_supervised = 0
        self.scored.eval()
        for start in range(0, count, self.batch_size):
            self.runtime.stop.check()
            batch = collate(rows, [[i] for i in order[start : start + self.batch_size]], self.generator.pad_token_id)
            num_supervised += batch.num_supervised
            batch = batch.to(self.runtime.device)
            total += self.scored(**batch.inputs()).double().cpu()
        loss = total.item() / num_supervised
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss on {rows.name} became {loss}: training has spoilt the weights")
        return loss


def open_evaluation(config: RunConfig, scored: nn.Module, model: Any, data: Data, runtime: Runtime) -> Evaluator:
    """Take the settings from a run's configuration, and see that what will be generated from can be.

    Raises:
        DataError, ModelError: where a prompt is empty, or leaves no room for what is generated.
    """
    generator = Generator(model, runtime, config.training.per_device_eval_batch_size, data.encoder.target_prefix)
    check_prompts(config, model, data)
    return Evaluator(
        scored=scored,
        generator=generator,
        encoder=data.encoder,
        runtime=runtime,
        metrics=config.metrics,
        tags=config.thought_tags,
        answer_pattern=config.data.answer_pattern,
        max_samples=config.evaluation.max_samples,
        batch_size=config.training.per_device_eval_batch_size,
    )
