"""Keys outside any section."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from src.config.schema.checks import PATH, SEED, STRINGS, PathCheck
from src.config.schema.fields import key

NAME = PathCheck(
    "a name without '/' that does not start with '.'",
    lambda v: bool(v) and "/" not in v and not v.startswith("."),
)


@dataclass
class TopLevelConfig:
    """The keys that stand outside any section."""

    name: str = key(NAME)
    seed: int = key(SEED)
    force: bool = MISSING
    rerun: str | None = key(PATH)
    init_from: str | None = key(PATH)
    plugins: list[str] = key(STRINGS)
