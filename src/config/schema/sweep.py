"""conf/sweep: what `-m` makes of several values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from src.config.schema.checks import AT_LEAST_ONE, AT_LEAST_TWO, COUNT, NAME, PATH, POSITIVE, PROCESSES, SEED, Check
from src.config.schema.fields import key

EngineName = StrEnum("EngineName", "local ray slurm")
Sampler = StrEnum("Sampler", "grid random tpe gp cmaes qmc")
Pruner = StrEnum("Pruner", "none median asha hyperband")
Replicate = StrEnum("Replicate", "none seeds folds")


class Direction(StrEnum):  # a class, so that its values have a literal type
    minimize = "minimize"
    maximize = "maximize"


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


@dataclass
class SweepConfig:
    """conf/sweep: what `-m` makes of several values. A sweep has it; none of its runs does."""

    name: str = key(NAME)
    params: Any = key(Check("a mapping from a key to its values: a list, or a text as in KEY=TEXT", is_mapping))
    when: Any = key(Check("a mapping from a varied key to {OTHER_KEY: VALUE or [VALUES]}", is_mapping), None)
    metric: str = MISSING
    direction: Direction = MISSING
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
