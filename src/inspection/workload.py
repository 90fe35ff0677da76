"""What a run computes: the shapes of its micro-batches, evaluations and generated texts, and how many of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from src.config.schema import Batching, RunConfig
from src.data.batching import Sequences
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.forecast.counting import MicroBatchShape


class Generation(NamedTuple):
    """Texts that a run generates over all its evaluations and samples."""

    num_texts: int
    batch: int
    """Rows that are generated at once, times beams."""
    longest_prompt: int
    mean_prompt: int


@dataclass(frozen=True)
class Workload:
    """What a run computes."""

    micro_batches: list[MicroBatchShape]
    """Of the first epoch."""
    evaluations: list[tuple[list[MicroBatchShape], int]]
    """Of each set that is evaluated its batches, and how often."""
    generation: Generation | None

    @property
    def widest_index(self) -> int:
        """The micro-batch that holds most."""
        shapes = self.micro_batches
        return max(range(len(shapes)), key=lambda i: (shapes[i].num_tokens, shapes[i].num_supervised))

    @property
    def widest(self) -> MicroBatchShape:
        return self.micro_batches[self.widest_index]


def shape_of(rows: EncodedSet, sequences: Sequences, config: RunConfig) -> MicroBatchShape:
    """Return the shape of a micro-batch of these sequences of rows."""
    lengths = [int(rows.lengths[sequence].sum()) for sequence in sequences]
    targets = [int(rows.target_lengths[sequence].sum()) for sequence in sequences]
    supervised = rows.supervised_lengths()
    return MicroBatchShape(
        batch=len(sequences),
        seq=max(lengths),
        num_supervised=sum(int(supervised[row]) for sequence in sequences for row in sequence),
        target_seq=max(targets) or None,
        is_packed=config.data.batching is Batching.packed,
        has_padding=max(targets) > 0 and len(set(lengths)) > 1,
    )


def mean_shape(shapes: Sequence[MicroBatchShape]) -> MicroBatchShape:
    """Return a shape of which as many as these compute as much, but for what grows with the square of a length."""
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


def evaluation_shapes(rows: EncodedSet, config: RunConfig) -> list[MicroBatchShape]:
    """Return the batches of a set's evaluation, rows of similar length together."""
    count, size = _num_evaluated(rows, config), config.training.per_device_eval_batch_size
    order = sorted(range(count), key=lambda i: int(rows.lengths[i]))
    batches = [[[row] for row in order[start : start + size]] for start in range(0, count, size)]
    return [shape_of(rows, batch, config)._replace(is_packed=False) for batch in batches]


def num_evaluations(every: int | str | None, num_steps: int, steps_per_epoch: int | None) -> int:
    """Count what happens every N steps, every epoch or never (None), and after the last step in any case.

    Args:
        steps_per_epoch: None where the train set is streamed; its epochs are not counted then.
    """
    step = steps_per_epoch if every == "epoch" else every
    return 1 if step is None else math.ceil(num_steps / int(step))


def generation(data: Data, config: RunConfig, num_steps: int, steps_per_epoch: int | None) -> Generation | None:
    """Return what is generated; None where nothing is."""
    settings = config.evaluation
    prompts: list[int] = []
    if config.metrics:
        times = num_evaluations(settings.eval_steps, num_steps, steps_per_epoch)
        for rows in data.validation.values():
            prompts += times * _prompts(rows, _num_evaluated(rows, config))
        for rows in data.test.values():
            prompts += _prompts(rows, _num_evaluated(rows, config))
    times = 1 + num_evaluations(settings.sample_steps, num_steps, steps_per_epoch)
    prompts += times * _prompts(data.for_samples(), settings.sample_prompts)
    if not prompts:
        return None
    batch = min(config.training.per_device_eval_batch_size, len(prompts)) * (config.generation.num_beams or 1)
    return Generation(len(prompts), batch, max(prompts), max(1, round(sum(prompts) / len(prompts))))


def _prompts(rows: EncodedSet, count: int) -> list[int]:
    return [max(1, int(length)) for length in rows.prompt_lengths()[:count]]


def _num_evaluated(rows: EncodedSet, config: RunConfig) -> int:
    return min(len(rows), config.evaluation.max_samples or len(rows))


def plan_work(
    config: RunConfig,
    data: Data,
    train: EncodedSet,
    micro_batches: Sequence[Sequences],
    num_steps: int,
    steps_per_epoch: int | None,
) -> Workload:
    """Return what a run computes.

    Args:
        train: the train set, or the first block of one that is streamed.
        micro_batches: of its first epoch.
    """
    times = num_evaluations(config.evaluation.eval_steps, num_steps, steps_per_epoch)
    return Workload(
        [shape_of(train, sequences, config) for sequences in micro_batches],
        [
            *((evaluation_shapes(rows, config), times) for rows in data.validation.values()),
            *((evaluation_shapes(rows, config), 1) for rows in data.test.values()),
        ],
        generation(data, config, num_steps, steps_per_epoch),
    )
