"""Evaluation of sets: mean loss over all supervised tokens, and metrics of generated text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from src.config.schema import RunConfig
from src.data.batching import collate
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.errors import DataError, NonFiniteLossError
from src.evaluation.answers import AnswerReader
from src.evaluation.generate import EndText, Generator, check_prompts
from src.metrics import compute_metrics, perplexity
from src.runtime.session import Runtime
from src.training.loss import span_losses

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
    batch_size: int

    @property
    def pad_token_id(self) -> int:
        return self.generator.pad_token_id

    def evaluate(self, sets: Iterable[EncodedSet], watched: Mapping[str, int] = NO_TOKENS) -> dict[str, float]:
        """Return the metrics of sets by their names in metrics.jsonl, `eval/<set>/…`.

        Args:
            watched: tokens and their ids, for which `tokens/<token>/log_probability` (mean where it is the target, over
                all the sets) and `…/share_of_targets` are computed too.
        Raises:
            Interrupted: between batches, where a signal asked for it.
        """
        metrics: dict[str, float] = {}
        targets = TargetStats(watched)
        for rows in sets:
            count = min(len(rows), self.max_samples or len(rows))
            values = self._losses(rows, count, targets)
            if self.metrics:
                completions = self.generator.generate([rows.prompt_ids(i) for i in range(count)], self.runtime.seed)
                texts = [self.reader.encoder.decode(completion.ids) for completion in completions]
                answers = [self.reader.answer(rows, i, text) for i, text in enumerate(texts)]
                references = [self.reader.reference(rows, i) for i in range(count)]
                values |= compute_metrics(self.metrics, answers, references, self.answer_pattern, rows.place)
            metrics |= {f"eval/{rows.name}/{name}": value for name, value in values.items()}
        return metrics | targets.metrics(self.runtime)

    @torch.no_grad()
    def _losses(self, rows: EncodedSet, count: int, targets: "TargetStats") -> dict[str, float]:
        """Compute the mean nats per supervised token of the first `count` rows: of all, of thoughts and of answers."""
        order = sorted(range(count), key=lambda i: rows.lengths[i])  # little padding
        total, thought_sum = torch.zeros(2, dtype=torch.float64)
        num_supervised = num_thought = 0
        self.loss_model.eval()
        for start, is_real in self.runtime.split(range(0, count, self.batch_size)):
            self.runtime.check_stop()
            batch = collate(rows, [[i] for i in order[start : start + self.batch_size]], self.generator.pad_token_id)
            batch_losses = self.loss_model(**batch.to(self.runtime.device).inputs())
            if not is_real:
                continue
            num_supervised += batch.num_supervised
            num_thought += batch.num_thought
            nll = batch_losses.nll.double().cpu()
            total += nll.sum()
            if batch_losses.is_thought is not None:
                thought_sum += nll[batch_losses.is_thought.cpu()].sum()
            targets.update(batch_losses.targets.cpu(), nll)
        sums = [total.item(), float(num_supervised), thought_sum.item(), float(num_thought)]
        nll, all_supervised, thought_nll, all_thought = self.runtime.sum(sums)
        loss = nll / all_supervised
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss on {rows.name} became {loss}: the weights are broken")
        losses = {"loss": loss, "perplexity": perplexity(loss)}
        return losses | span_losses(nll, all_supervised, thought_nll, all_thought)


def check_spans(config: RunConfig, data: Data) -> None:
    """Raise DataError where a key depends on thoughts and the rows have none."""
    if config.loss.thought_weight != 1 and not data.reports["train"].thought_tokens:
        raise DataError(f"loss.thought_weight = {config.loss.thought_weight:g}, but no row of train has a thought")
    metric = config.checkpoint.metric_for_best_model
    if not config.checkpoint.load_best_model_at_end or not metric.endswith(("thought_loss", "answer_loss")):
        return
    report = data.reports[metric.split("/")[1]]
    answers = report.supervised_tokens - report.thought_tokens
    if not report.thought_tokens or not answers:
        raise DataError(f"checkpoint.metric_for_best_model = {metric}, but its rows have no thoughts, or nothing else")


class TargetStats:
    """Sums over the positions where watched tokens are the target."""

    def __init__(self, watched: Mapping[str, int]) -> None:
        self._watched = watched
        self._counts = dict.fromkeys(watched, 0)
        self._nlls = dict.fromkeys(watched, 0.0)
        self._total = 0

    def update(self, targets: Tensor, nll: Tensor) -> None:
        """Add targets [supervised] and their losses, in nats."""
        self._total += len(targets)
        for token, token_id in self._watched.items():
            is_token = targets == token_id
            self._counts[token] += int(is_token.sum())
            self._nlls[token] += float(nll[is_token].sum())

    def metrics(self, runtime: Runtime) -> dict[str, float]:
        """Return share_of_targets of every token, and log_probability of those that were one, over all processes."""
        metrics = {}
        total, *sums = runtime.sum([float(self._total), *self._counts.values(), *self._nlls.values()])
        counts, nlls = sums[: len(self._counts)], sums[len(self._counts) :]
        for token, count, nll in zip(self._watched, counts, nlls, strict=True):
            if count:
                metrics[f"tokens/{token}/log_probability"] = -nll / count
            if total:
                metrics[f"tokens/{token}/share_of_targets"] = count / total
        return metrics


def open_evaluation(config: RunConfig, loss_model: nn.Module, model: Any, data: Data, runtime: Runtime) -> Evaluator:
    """Build the evaluator of a run, and check that its prompts can be generated from.

    Raises:
        DataError, ModelError: where a prompt is empty, or leaves no room for what is generated.
    """
    generator = Generator(
        model,
        runtime,
        config.training.per_device_eval_batch_size,
        data.encoder.target_prefix,
        EndText.from_frame(data.frame, data.encoder),
    )
    check_prompts(config, model, data)
    check_spans(config, data)
    return Evaluator(
        loss_model=loss_model,
        generator=generator,
        reader=AnswerReader(data.encoder, config.thought_tags, data.frame),
        runtime=runtime,
        metrics=config.metrics,
        answer_pattern=config.data.answer_pattern,
        max_samples=config.evaluation.max_samples,
        batch_size=config.training.per_device_eval_batch_size,
    )
