"""What one process measured. No torch here: the process that collects it stays small."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """What one process found."""

    way: str
    seconds: float
    num_tokens: int  # of the measured steps, as are the next two
    num_supervised: int
    num_positions: int
    losses: list[float]  # of all steps
    peak_memory_bytes: int
    peak_flops: float  # of matrix products here, right after the training
    flops: float  # that the measured tokens need

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def supervised_per_second(self) -> float:
        return self.num_supervised / self.seconds

    @property
    def needed_flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return 1 - self.num_tokens / self.num_positions
