"""Evaluation of sets: mean loss over all supervised tokens, and metrics of generated text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.config.schema import RunConfig
from src.data.batching import collate, similar_batches
from src.data.dataset import Data
from src.data.encoding import IGNORE_INDEX, PARTS
from src.data.sets import EncodedSet
from src.errors import DataError, NonFiniteLossError
from src.evaluation.answers import AnswerReader
from src.evaluation.generate import Generator, check_prompts
from src.evaluation.thought_counts import thought_metrics
from src.evaluation.thoughts import thought_rule
from src.metrics import THOUGHT_LOSSES, compute_metrics, perplexity
from src.progress import NO_PROGRESS, Progress
from src.runtime.profiling import region
from src.runtime.session import Runtime
from src.training.loss import part_losses

NO_TOKENS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Evaluator:
    """Evaluates sets, the first `max_samples` rows of each (None: all)."""

    loss_model: nn.Module
    generator: Generator
    reader: AnswerReader
    runtime: Runtime
    metrics: Sequence[str]
    answer_pattern: str | None
    max_samples: int | None
    num_samples: int = 1  # texts that are generated for each row
    progress: Progress = NO_PROGRESS

    @region("evaluation")
    def evaluate(self, sets: Iterable[EncodedSet], watched: Mapping[str, int] = NO_TOKENS) -> dict[str, float]:
        """Return the metrics of sets by their names in metrics.jsonl, `eval/<set>/…`.

        For `watched` tokens, by their ids, `tokens/<token>/log_probability` (mean where it is the target, over all the
        sets) and `…/share_of_targets` are computed too. Interrupted between batches, where a signal asked for it.
        """
        metrics, targets = dict[str, float](), TargetStats(watched)
        for rows in sets:
            count = min(len(rows), self.max_samples or len(rows))
            values = self._losses(rows, count, targets)
            if self.metrics:
                values |= self._scores(rows, count)
            metrics |= {f"eval/{rows.name}/{name}": value for name, value in values.items()}
        return metrics | targets.metrics(self.runtime)

    def _scores(self, rows: EncodedSet, count: int) -> dict[str, float]:
        """Generate for the first `count` rows, compare the answers with their references, and count the thoughts."""
        prompts, decode = [rows.prompt_ids(i) for i in range(count)], self.reader.encoder.decode
        seed, what = self.runtime.seed, f"for {rows.name}"
        samples = self.generator.generate_samples(prompts, seed, count=self.num_samples, what=what)
        answers = [
            [self.reader.answer(rows, i, decode(completion.ids)) for completion in completions]
            for i, completions in enumerate(samples)
        ]
        first = [one for one, *_ in answers]
        references = [self.reader.reference(rows, i) for i in range(count)]
        values = compute_metrics(self.metrics, first, references, self.answer_pattern, rows.place, answers)
        if (rule := self.generator.thoughts) is not None:
            pairs = zip(prompts, samples, strict=True)
            values |= thought_metrics([rule.found(prompt, one.ids) for prompt, texts in pairs for one in texts])
        return values

    @torch.no_grad()
    def _losses(self, rows: EncodedSet, count: int, targets: "TargetStats") -> dict[str, float]:
        """Compute the mean nats per supervised token of the first `count` rows: of all, and of each part."""
        sums = torch.zeros(2 * len(PARTS), dtype=torch.float64)  # nats and tokens of each part
        self.loss_model.eval()
        lengths = np.stack([rows.lengths[:count], rows.target_lengths[:count]])
        batches = similar_batches(lengths, self.generator.batch_size)
        with self.progress.work("evaluating", rows.name, count) as advance:
            rounds = self.runtime.rounds(batches)
            for together, (chosen, is_real) in zip(rounds, self.runtime.split(batches), strict=True):
                self.runtime.check_stop()
                batch = collate(rows, [[i] for i in chosen], self.generator.pad_token_id)
                losses = self.loss_model(**batch.to(self.runtime.device).inputs())
                advance(sum(map(len, together)))
                if not is_real:
                    continue
                nll = losses.nll.double().cpu()
                part_nll = losses._replace(nll=losses.nll.double()).part_nll()
                sums += torch.cat([part_nll.cpu(), torch.from_numpy(batch.part_counts)])
                targets.update(losses.targets.cpu(), nll)
        summed = self.runtime.sum(sums.tolist())
        part_nll, counts = summed[: len(PARTS)], summed[len(PARTS) :]
        loss = sum(part_nll) / sum(counts)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss on {rows.name} became {loss}: the weights are broken")
        return {"loss": loss, "perplexity": perplexity(loss)} | part_losses(part_nll, counts)


def check_spans(config: RunConfig, data: Data) -> None:
    """Raise DataError where a key depends on thoughts and the rows have none."""
    for key, weight in config.loss.thought_weights().items():
        if weight != 1 and not data.reports["train"].thought_tokens:
            raise DataError(f"loss.{key} = {weight:g}, but no row of train has a thought")
    metric, is_early = config.checkpoint.metric_for_best_model, config.training.early_stopping_patience is not None
    name, _, score = metric.removeprefix("eval/").rpartition("/")
    if score in THOUGHT_LOSSES and (is_early or config.checkpoint.load_best_model_at_end):
        rows = data.validation[name]
        each = (rows[i] for i in range(min(len(rows), config.evaluation.max_samples or len(rows))))
        parts = np.concatenate([row.parts[row.labels != IGNORE_INDEX] for row in each])
        if score not in part_losses([0.0] * len(PARTS), np.bincount(parts, minlength=len(PARTS)).tolist()):
            raise DataError(f"checkpoint.metric_for_best_model = {metric}, but no evaluated row has such a token")


class TargetStats:
    """Sums over the positions where watched tokens are the target."""

    def __init__(self, watched: Mapping[str, int]) -> None:
        self._watched = watched  # the sums are the number of all, then of each token the number and nats
        self._sums = torch.zeros(1 + 2 * len(watched), dtype=torch.float64)

    def update(self, targets: Tensor, nll: Tensor) -> None:
        """Add targets [supervised] and their losses, in nats."""
        masks = [targets == token_id for token_id in self._watched.values()]
        sums = [len(targets), *(value for mask in masks for value in (mask.sum(), nll[mask].sum()))]
        self._sums += torch.tensor(sums, dtype=torch.float64)

    def metrics(self, runtime: Runtime) -> dict[str, float]:
        """Return share_of_targets of every token, and log_probability of those that were one, over all processes."""
        metrics = {}
        total, *sums = runtime.sum(self._sums.tolist())
        for token, count, nats in zip(self._watched, sums[::2], sums[1::2], strict=True):
            if count:
                metrics[f"tokens/{token}/log_probability"] = -nats / count
            if total:
                metrics[f"tokens/{token}/share_of_targets"] = count / total
        return metrics


def open_evaluator(
    config: RunConfig, loss_model: nn.Module, model: Any, data: Data, runtime: Runtime, progress: Progress = NO_PROGRESS
) -> Evaluator:
    """Build the evaluator of a run; DataError or ModelError where a prompt is empty, or leaves no room for what is
    generated.
    """
    check_prompts(config, model, data)
    check_spans(config, data)
    reader = AnswerReader(data.encoder, config.thought_tags, data.frame)
    size, pattern = config.training.per_device_eval_batch_size, config.data.answer_pattern
    rule = thought_rule(data.encoder, config.generation)
    generator = Generator(model, runtime, size, data.encoder.target_prefix, reader, rule, progress=progress)
    scored, most = (config.metrics, pattern), config.evaluation.max_samples
    return Evaluator(loss_model, generator, reader, runtime, *scored, most, config.num_scored_samples, progress)
