"""conf/sweep: what `-m` makes of several values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from src.config.schema.checks import AT_LEAST_ONE, AT_LEAST_TWO, COUNT, NAME, PATH, POSITIVE, PROCESSES, SEED, Check
from src.config.schema.fields import key
from src.util import as_tuple

EngineName = StrEnum("EngineName", "local ray slurm")
Sampler = StrEnum("Sampler", "grid random tpe gp cmaes qmc")
Pruner = StrEnum("Pruner", "none median asha hyperband")
Replicate = StrEnum("Replicate", "none seeds folds")


class Direction(StrEnum):  # a class, so that its values have a literal type
    minimize = "minimize"
    maximize = "maximize"


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def is_metric(value: Any) -> bool:
    """Return whether a value is a text that is not empty, or a list of such."""
    return bool(value) and all(isinstance(one, str) and one for one in (value if isinstance(value, list) else [value]))


def is_direction(value: Any) -> bool:
    return is_metric(value) and all(one in Direction.__members__ for one in as_tuple(value))


@dataclass
class SweepConfig:
    """conf/sweep: what `-m` makes of several values. A sweep has it; none of its runs does."""

    name: str = key(NAME)
    params: Any = key(Check("a mapping from a key to its values: a list, or a text as in KEY=TEXT", is_mapping))
    when: Any = key(Check("a mapping from a varied key to {OTHER_KEY: VALUE or [VALUES]}", is_mapping), None)
    metric: Any = key(Check("a name of summary.json, or a list of them", is_metric))
    direction: Any = key(Check("minimize or maximize, or a list of them, one for each metric", is_direction))
    sampler: Sampler = MISSING
    pruner: Pruner = MISSING
    replicate: Replicate = MISSING
    num_seeds: int = key(AT_LEAST_ONE)
    n_trials: int | None = key(AT_LEAST_ONE)
    max_points: int = key(AT_LEAST_ONE)
    n_jobs: int = key(PROCESSES)
    engine: EngineName = MISSING
    ray_address: str | None = MISSING
    slurm: Any = key(Check("a mapping from an option of sbatch to its value", is_mapping))
    seed: int = key(SEED)
    min_resource: int = key(AT_LEAST_ONE)
    reduction_factor: int = key(AT_LEAST_TWO)
    max_seconds: float | None = key(POSITIVE)
    dry_run: bool = MISSING
    fail_fast: bool = MISSING
    max_retries: int = key(COUNT)
    storage: str | None = MISSING
    warm_start: str | None = key(PATH, None)

    def __post_init__(self) -> None:
        for name in ("metric", "direction"):
            if isinstance(given := getattr(self, name), list) and len(given) == 1:
                setattr(self, name, given[0])  # a list of one means what the text does

    @property
    def metrics(self) -> tuple[str, ...]:
        return as_tuple(self.metric)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return tuple(map(Direction, as_tuple(self.direction)))
