"""What a run still has to do after a step, and how long that takes by the pace of what it has done so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from src.config.schema import RunConfig
from src.data.dataset import Data
from src.progress import TimeLeft
from src.training.state import TrainState

FORWARD_SHARE = 1 / 3
"""The share of a step that its forward takes: a row's loss takes as much of it, until an evaluation was timed."""


@dataclass(frozen=True)
class Occasion:
    """What happens every so many steps: how often, and how many batches of each kind of work it has."""

    every: int | str | None
    work: Mapping[str, int]
    at_end: bool = True  # whether it happens after the last step in any case


@dataclass(frozen=True)
class WorkAhead:
    """What a run does besides its steps."""

    num_steps: int
    steps_per_epoch: int | None
    rows_per_step: float
    occasions: tuple[Occasion, ...]

    def time_left(self, step: int, seconds_per_step: float, pace: Mapping[str, float]) -> TimeLeft:
        """Return how long it takes from now, when a step has been computed and what follows it is not done yet.

        `pace` is the seconds a batch of each kind of work; one of an evaluation's losses is a row.
        """
        batches: dict[str, int] = {}
        for one in self.occasions:
            times = self._times_from(step, one)
            for kind, count in one.work.items():
                batches[kind] = batches.get(kind, 0) + times * count
        known = {"saving": 0.0, "evaluating": seconds_per_step / self.rows_per_step * FORWARD_SHARE} | dict(pace)
        seconds = (self.num_steps - step) * seconds_per_step
        seconds += sum(count * known[kind] for kind, count in batches.items() if kind in known)
        is_uncounted = any(one.every == "epoch" and self.steps_per_epoch is None for one in self.occasions)
        return TimeLeft(seconds, is_uncounted or any(count and kind not in known for kind, count in batches.items()))

    def _times_from(self, step: int, occasion: Occasion) -> int:
        """Count how often something happens after a step or a later one."""
        every = self.steps_per_epoch if occasion.every == "epoch" else occasion.every
        if every is None:
            return int(occasion.at_end)
        steps = int(every)
        count = num_times(steps, self.num_steps) if occasion.at_end else self.num_steps // steps
        return count - (step - 1) // steps


def work_ahead(config: RunConfig, data: Data, state: TrainState) -> WorkAhead:
    """Return what a run does besides its steps."""
    settings, most = config.evaluation, config.evaluation.max_samples
    sampler, in_all = state.batch_sampler, data.num_train_rows
    rows_per_step = float(sampler.size * sampler.micro_batches_per_step)
    if sampler.counts_tokens:
        rows_per_step = sampler.step_size / max(1.0, data.train.first.lengths.mean())
    elif state.steps_per_epoch is not None and in_all is not None:  # rows that are packed are more than sequences
        rows_per_step = max(rows_per_step, in_all / state.steps_per_epoch)

    def batches(num_texts: int) -> int:
        return math.ceil(num_texts / (config.training.per_device_eval_batch_size * config.runtime.world_size))

    def evaluated(counts: list[int]) -> dict[str, int]:
        rows = [min(count, most or count) for count in counts]
        texts = [count * config.num_scored_samples for count in rows] if config.metrics else []
        return {"evaluating": sum(rows), "generating": sum(map(batches, texts))}

    occasions = (
        Occasion(settings.eval_steps, evaluated([len(rows) for rows in data.validation.values()])),
        Occasion(None, evaluated([len(rows) for rows in data.test.values()])),
        Occasion(settings.sample_steps, {"generating": batches(settings.sample_prompts)}),
        Occasion(config.checkpoint.checkpointing_steps, {"saving": 1}, at_end=config.checkpoint.saves_at_end),
    )
    return WorkAhead(state.num_steps, state.steps_per_epoch, rows_per_step, occasions)


def num_times(every: int | str | None, num_steps: int, steps_per_epoch: int | None = None) -> int:
    """Count what happens every N steps, every epoch or never (None), and after the last step in any case; epochs of a
    streamed train set, whose steps_per_epoch is None, are not counted.
    """
    step = steps_per_epoch if every == "epoch" else every
    return 1 if step is None else math.ceil(num_steps / int(step))
