"""Evaluation of one set: the loss over every supervised token, and scores of generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from src.config.schema import Metric, RunConfig
from src.data.batching import collate
from src.data.dataset import EncodedSet
from src.data.encoding import Encoder
from src.evaluation.generate import Generator
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

    @classmethod
    def of(cls, config: RunConfig, scored: nn.Module, generator: Generator, encoder: Encoder) -> Evaluator:
        """Take the settings from a run's configuration."""
        return cls(
            scored=scored,
            generator=generator,
            encoder=encoder,
            runtime=generator.runtime,
            metrics=config.metrics,
            tags=config.thought_tags,
            answer_pattern=config.data.answer_pattern,
            max_samples=config.evaluation.max_samples,
            batch_size=config.training.per_device_eval_batch_size,
        )

    def evaluate(self, rows: EncodedSet, seed: int) -> dict[str, float]:
        """Give the set's metrics by their names in metrics.jsonl, `eval/<set>/…`.

        Raises:
            Interrupted: between batches, where a signal asked for it.
        """
        count = min(len(rows), self.max_samples or len(rows))
        loss = self._loss(rows, count)
        values = {"loss": loss, "perplexity": perplexity(loss)}
        if Metric.exact_match in self.metrics:
            completions = self.generator.generate([rows.prompt_ids(i) for i in range(count)], seed)
            texts = [strip_thoughts(self.encoder.decode(completion.ids), self.tags) for completion in completions]
            references = [example.reference for example in rows.examples[:count]]
            values["exact_match"] = exact_match(texts, references, self.answer_pattern)
        return {f"eval/{rows.name}/{name}": value for name, value in values.items()}

    @torch.no_grad()
    def _loss(self, rows: EncodedSet, count: int) -> float:
        """Mean nats per supervised token over the first `count` rows; batches of similar length are padded little."""
        order = sorted(range(count), key=lambda i: len(rows[i][0]))
        total = torch.zeros((), dtype=torch.float64)
        num_supervised = 0
        self.scored.eval()
        for start in range(0, count, self.batch_size):
            self.runtime.check_stop()
            batch = collate(rows, order[start : start + self.batch_size], self.generator.settings["pad_token_id"])
            num_supervised += batch.num_supervised
            batch = batch.to(self.runtime.device)
            total += self.scored(batch.input_ids, batch.labels).double().cpu()
        return total.item() / num_supervised
