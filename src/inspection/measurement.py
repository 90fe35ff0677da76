"""What preflight.measure=true measures: micro-batches, a batch of an evaluation, the first tokens of texts."""

import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.config.schema import RunConfig
from src.data.batching import collate
from src.data.dataset import Data
from src.data.micro_batches import Sequences
from src.evaluation.evaluate import Evaluator, open_evaluator
from src.forecast.counting import MicroBatchShape, measure_saved_bytes
from src.forecast.time import TimeItem, measured_time
from src.inspection.workload import Evaluation, Generation, Workload
from src.model.adapters import add_adapter
from src.model.build import build_model, set_generation
from src.model.embeddings import resize_embeddings
from src.progress import Progress
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import stop_on_signals
from src.tokens import num_token_ids
from src.training.loss import TokenLosses
from src.training.state import TrainState, build_train_state

NUM_TOKENS = 16
"""Tokens that are generated after the first one, to time a token."""


@dataclass(frozen=True)
class Measured:
    """What was measured, on batches of the median size unless a field says otherwise."""

    widest_tokens: int
    activation_bytes: int  # what autograd keeps of the widest micro-batch of the first epoch
    peak_memory_bytes: int
    seconds: float  # time of a micro-batch, forward and backward
    evaluation_seconds: float | None  # time of the losses of a batch; None where nothing is evaluated
    evaluation_tokens: int  # positions of that batch
    generation_seconds: float | None  # time of a batch of texts of the maximum length; None where nothing is generated


def measure_work(
    config: RunConfig, tokenizer: Any, new_ids: Sequence[int], data: Data, work: Workload, progress: Progress
) -> Measured:
    """Measure the widest micro-batch, and a batch of the median size of training, evaluation and generation."""
    with (
        stop_on_signals() as stop,
        start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime,
    ):
        with progress.work("loading", "the model"):
            model = build_model(config, runtime.device)
            set_generation(model, config.generation, tokenizer, data.stop_ids, data.encoder.target_prefix)
            resize_embeddings(model, num_token_ids(tokenizer), config.tokens.pad_to_multiple_of)
            add_adapter(model, config, new_ids)
            state = build_train_state(model, work.train, config, runtime)
        with progress.work("measuring", "micro-batches"):
            widest_tokens, activation_bytes, seconds = _measure_training(state, work, runtime)
        evaluator = open_evaluator(config, state.loss_model, state.model, data, runtime)
        with progress.work("measuring", "an evaluation"):
            evaluation_seconds, evaluation_tokens = _measure_evaluation(evaluator, work.evaluations, runtime)
        generation_seconds = None
        if work.generation is not None:
            with progress.work("measuring", "generation"):
                generation_seconds = _measure_generation(evaluator, work.generation, runtime)
        return Measured(
            widest_tokens,
            activation_bytes,
            runtime.peak_memory_bytes(),
            seconds,
            evaluation_seconds,
            evaluation_tokens,
            generation_seconds,
        )


def _measure_training(state: TrainState, work: Workload, runtime: Runtime) -> tuple[int, int, float]:
    """Return positions and kept bytes of the widest micro-batch, and the seconds of one of the median size."""
    pad = state.model.generation_config.pad_token_id
    state.loss_model.train()

    def inputs(sequences: Sequences) -> dict[str, Any]:
        return collate(work.train, sequences, pad, state.row_bounds).to(runtime.device).inputs()

    widest = inputs(work.micro_batches[work.shapes.index(work.widest)])
    losses: list[TokenLosses] = []
    saved = measure_saved_bytes(lambda: losses.append(state.loss_model(**widest)), state.model.parameters())
    runtime.strategy.backward(losses[0].objective)
    usual = inputs(_median_batch(work.micro_batches, work.shapes))
    seconds = _seconds_of(lambda: runtime.strategy.backward(state.loss_model(**usual).objective), runtime)
    return widest["input_ids"].numel(), saved, seconds


def _measure_evaluation(
    evaluator: Evaluator, evaluations: Sequence[Evaluation], runtime: Runtime
) -> tuple[float | None, int]:
    """Return the seconds and positions of a batch of the set that takes longest."""
    if not evaluations:
        return None, 0
    rows, batches, shapes, _ = max(evaluations, key=_num_tokens)
    batch = _median_batch(batches, shapes)
    batch_rows = rows.select([row for (row,) in batch])
    losses_only = replace(evaluator, metrics=[], max_samples=None)
    seconds = _seconds_of(lambda: losses_only.evaluate([batch_rows]), runtime)
    return seconds, shapes[batches.index(batch)].num_tokens


def _measure_generation(evaluator: Evaluator, texts: Generation, runtime: Runtime) -> float:
    """Return the seconds of a batch of texts of the maximum length, extrapolated from their first tokens."""
    generator = replace(evaluator.generator, reader=None)
    settings, rows = generator.model.generation_config, texts.rows
    longest, lengths = settings.max_new_tokens, rows.prompt_lengths().tolist()
    usual = sorted(range(len(rows)), key=lambda i: abs(lengths[i] - texts.mean_prompt))[: texts.batch]
    prompts = [rows.first_ids(i) for i in usual]
    num_more = min(NUM_TOKENS, longest - 1)

    def seconds_of_new(num: int) -> float:
        settings.min_new_tokens = settings.max_new_tokens = num
        return _seconds_of(lambda: generator.generate(prompts, runtime.seed), runtime)

    first = seconds_of_new(1)
    each = max(0.0, seconds_of_new(1 + num_more) - first) / num_more if num_more else 0.0
    return (first + (longest - 1) * each) * texts.batch / len(prompts)


def measured_times(measured: Measured, work: Workload, config: RunConfig) -> tuple[TimeItem, ...]:
    """Return the time of a run by what was measured of its parts."""
    processes = config.runtime.world_size
    num_micro_batches = math.ceil(work.num_micro_batches / processes)
    parts = [measured_time("training", measured.seconds, num_micro_batches, "micro-batches")]
    if measured.evaluation_seconds is not None:
        num = sum(map(_num_tokens, work.evaluations)) / measured.evaluation_tokens / processes
        parts.append(measured_time("evaluation", measured.evaluation_seconds, math.ceil(num), "batches"))
    if measured.generation_seconds is not None and work.generation is not None:
        num = math.ceil(work.generation.num_texts / work.generation.batch / processes)
        what = "batches of texts of the maximum length"
        parts.append(measured_time("generation", measured.generation_seconds, num, what))
    return tuple(parts)


def _num_tokens(evaluation: Evaluation) -> int:
    """Return the positions that all evaluations of a set compute."""
    return evaluation.times * sum(shape.num_tokens for shape in evaluation.shapes)


def _median_batch(batches: Sequence[Sequences], shapes: Sequence[MicroBatchShape]) -> Sequences:
    """Return the batch of the median size."""
    by_size = sorted(range(len(batches)), key=lambda i: shapes[i].num_tokens)
    return batches[by_size[len(by_size) // 2]]


def _seconds_of(compute: Callable[[], object], runtime: Runtime) -> float:
    """Return the shortest time of a computation, after a first one that chooses kernels."""

    def compute_all() -> None:
        compute()
        runtime.synchronize()

    compute_all()
    return min(timeit.repeat(compute_all, number=1, repeat=2))
