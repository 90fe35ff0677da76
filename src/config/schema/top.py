"""Keys outside any section."""

from dataclasses import dataclass

from src.config.schema.checks import PATH, SEED, STRINGS, PathCheck
from src.config.schema.fields import AT_START, BY_OUTCOME, DottedConfig, Impact, Verdict, key

NAME = PathCheck(
    "a name without '/' that does not start with '.'", lambda v: bool(v) and "/" not in v and not v.startswith(".")
)


def _impact_of_start(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    return Impact.harmless, "" if now[key] is None else AT_START


@dataclass
class TopLevelConfig:
    """The keys that stand outside any section."""

    name: str = key(NAME, resume=Impact.harmless)
    seed: int = key(SEED, why="the rows come in another order", reorders=True, read_by_predict=True)
    force: bool = key(resume=Impact.harmless, read_by_predict=True)
    rerun: str | None = key(PATH, resume=Impact.harmless)
    init_from: str | None = key(PATH, resume=_impact_of_start)
    plugins: list[str] = key(STRINGS, resume=BY_OUTCOME)
