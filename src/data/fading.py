"""How much of each thought is gone in an epoch: data.thought_dropout and data.thought_schedule. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from src.config.schema import RunConfig, Side, ThoughtSchedule


@dataclass(frozen=True)
class Fading:
    """Which thoughts are left out, and how many tokens each of the others lacks, by seed, epoch and row.

    Source: Deng, Choi, Shieber 2024, "From Explicit CoT to Implicit CoT" (arXiv 2405.14838), where thoughts shrink from
    the left, and by o further tokens with P(o) ∝ exp(-λo); `schedule.smoothing` is exp(-λ), so 0 is exact.
    """

    dropout: float
    schedule: ThoughtSchedule | None
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """Return the fading of a run; None where all thoughts stay as they are, or none is written."""
        data = config.data
        if config.thought_tags is None or not (data.thought_dropout or data.thought_schedule):
            return None
        return cls(data.thought_dropout, data.thought_schedule, config.seed)

    @property
    def side(self) -> Side:
        """Where thoughts shrink."""
        return Side.left if self.schedule is None else self.schedule.side

    def gone(self, lengths: Sequence[int], epoch: int, row: Sequence[int]) -> list[int | None]:
        """Return how many of the tokens between the tags of each thought are gone; None: all, and the tags with them.

        Args:
            lengths: tokens between the tags of each thought of a row.
            epoch: counted from 0.
            row: whole numbers that identify the row wherever it is.
        """
        count, planned = len(lengths), 0 if self.schedule is None else epoch * self.schedule.tokens_per_epoch
        smoothing = 0.0 if self.schedule is None else self.schedule.smoothing
        is_left_out, further = [False] * count, [0] * count
        if self.dropout or smoothing:
            rng = np.random.default_rng([self.seed, epoch, *row])
            is_left_out = (rng.random(count) < self.dropout).tolist()
            further = (rng.geometric(1 - smoothing, count) - 1).tolist()
        return [
            None if is_out or 0 < planned + more >= length else planned + more
            for length, more, is_out in zip(lengths, further, is_left_out, strict=True)
        ]
