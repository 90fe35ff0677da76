"""What a run computes: the shapes of its micro-batches, evaluations and generated texts, and how many of each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from src.config.schema import Batching, RunConfig, TrainingConfig
from src.data.batching import BatchSampler, similar_batches
from src.data.dataset import Data
from src.data.micro_batches import MicroBatches, Sequences
from src.data.sets import EncodedSet
from src.forecast.counting import MicroBatchShape
from src.training.state import build_batch_sampler, plan_steps
from src.training.work_ahead import num_times


class Evaluation(NamedTuple):
    """A set that is evaluated, and in which batches."""

    rows: EncodedSet
    batches: list[Sequences]
    shapes: list[MicroBatchShape]  # the shape of each batch
    times: int  # how often the run evaluates it


class Generation(NamedTuple):
    """Texts that a run generates over all its evaluations and samples."""

    num_texts: int
    batch: int  # rows that are generated at once
    longest_prompt: int
    mean_prompt: int
    rows: EncodedSet  # a set that texts are generated for


@dataclass(frozen=True)
class Workload:
    """What a run computes."""

    batch_sampler: BatchSampler
    num_steps: int
    num_steps_per_epoch: int | None  # none where the train set is streamed, or its epochs differ
    train: EncodedSet  # the train set, or the first block of one that is streamed
    micro_batches: MicroBatches  # the micro-batches of the first epoch
    shapes: list[MicroBatchShape]  # the shapes of these micro-batches
    evaluations: list[Evaluation]
    generation: Generation | None

    @cached_property
    def widest(self) -> MicroBatchShape:
        """The shape of the micro-batch that holds most."""
        return widest_of(self.shapes)

    def num_epochs(self, config: TrainingConfig) -> int:
        """Return how many epochs the run begins; from a number of steps, as if all were as long as the first one, or in
        a stream as its first block.
        """
        if config.max_train_steps is None:
            return math.ceil(config.num_train_epochs)
        return math.ceil(
            self.num_steps / math.ceil(len(self.micro_batches) / self.batch_sampler.micro_batches_per_step)
        )

    @property
    def num_micro_batches(self) -> int:
        """Their number in the run, over all processes."""
        if self.num_steps_per_epoch is None:
            return self.num_steps * self.batch_sampler.micro_batches_per_step
        return round(self.num_steps / self.num_steps_per_epoch * len(self.micro_batches))

    @property
    def tokens_fed(self) -> int:
        return round(self.num_micro_batches / len(self.shapes) * self.train.num_tokens)

    @property
    def tokens_computed(self) -> int:
        """Positions that are computed: tokens_fed and padding."""
        return round(self.num_micro_batches / len(self.shapes) * sum(shape.num_tokens for shape in self.shapes))


def plan_work(config: RunConfig, data: Data) -> Workload:
    """Return what a run computes, from its first epoch's micro-batches and from the sets that are evaluated."""
    train, settings = data.train.first, config.evaluation
    batch_sampler = build_batch_sampler(config, data.train, config.runtime.world_size)
    num_steps, per_epoch = plan_steps(config, data.train, batch_sampler)
    micro_batches = batch_sampler.micro_batches_of(train, [config.seed, 0])
    fed = [[list(chain(*one))] for one in micro_batches] if batch_sampler.is_padding_free else micro_batches
    is_packed = batch_sampler.batching is Batching.packed and not batch_sampler.is_padding_free
    shapes = shapes_of(train, fed, is_packed=is_packed)
    times = num_times(settings.eval_steps, num_steps, per_epoch)
    evaluations = [_evaluation(rows, config, times) for rows in data.validation.values()]
    evaluations += [_evaluation(rows, config, 1) for rows in data.test.values()]
    times = 1 + num_times(settings.sample_steps, num_steps, per_epoch)
    generation = _generation(config, evaluations, data.for_samples(), times)
    return Workload(batch_sampler, num_steps, per_epoch, train, micro_batches, shapes, evaluations, generation)


def shapes_of(rows: EncodedSet, batches: Iterable[Sequences], *, is_packed: bool) -> list[MicroBatchShape]:
    """Return the shapes of batches of sequences of rows."""
    counts = [lengths.tolist() for lengths in (rows.lengths, rows.target_lengths, rows.supervised_lengths())]
    shapes = []
    for sequences in batches:
        lengths, targets, scored = (
            [sum(of_row[row] for row in sequence) for sequence in sequences] for of_row in counts
        )
        has_padding = max(targets) > 0 and len(set(lengths)) > 1
        shapes.append(
            MicroBatchShape(len(sequences), max(lengths), sum(scored), max(targets) or None, is_packed, has_padding)
        )
    return shapes


def widest_of(shapes: Iterable[MicroBatchShape]) -> MicroBatchShape:
    """Return the shape that holds most."""
    return max(shapes, key=lambda shape: (shape.num_tokens, shape.num_supervised))


def mean_shape(shapes: Sequence[MicroBatchShape]) -> MicroBatchShape:
    """Return a shape that costs the mean of these, but for what grows with the square of a length."""
    count = len(shapes)
    batch = max(1, round(sum(shape.batch for shape in shapes) / count))
    rows = count * batch
    targets = sum(shape.batch * (shape.target_seq or 0) for shape in shapes)
    return shapes[0]._replace(
        batch=batch,
        seq=max(2, round(sum(shape.batch * shape.seq for shape in shapes) / rows)),
        num_supervised=max(1, round(sum(shape.num_supervised for shape in shapes) / count)),
        target_seq=max(1, round(targets / rows)) if targets else None,
        has_padding=any(shape.has_padding for shape in shapes),
    )


def _evaluation(rows: EncodedSet, config: RunConfig, times: int) -> Evaluation:
    """Return what is evaluated of a set, rows of similar length together."""
    count, size = min(len(rows), config.evaluation.max_samples or len(rows)), config.training.per_device_eval_batch_size
    lengths = np.stack([rows.lengths[:count], rows.target_lengths[:count]])
    batches = [[[row] for row in batch] for batch in similar_batches(lengths, size)]
    return Evaluation(rows, batches, shapes_of(rows, batches, is_packed=False), times)


def _generation(
    config: RunConfig, evaluations: Iterable[Evaluation], samples: EncodedSet, times: int
) -> Generation | None:
    """Return what is generated, `times` times for the samples; None where nothing is."""
    num_draws = config.num_scored_samples if config.generation.num_beams == 1 else 1  # beams are one search
    lengths = times * samples.prompt_lengths()[: config.evaluation.sample_prompts].tolist()
    for one in evaluations if config.metrics else ():
        lengths += (
            num_draws * one.times * one.rows.prompt_lengths()[: sum(shape.batch for shape in one.shapes)].tolist()
        )
    if not lengths:
        return None
    prompts = [max(1, length) for length in lengths]
    batch = min(config.training.per_device_eval_batch_size, len(prompts))
    return Generation(len(prompts), batch, max(prompts), max(1, round(sum(prompts) / len(prompts))), samples)
