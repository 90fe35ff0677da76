"""The sections `checkpoint` and `export` of conf/config.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.schema.checks import AT_LEAST_ONE, COUNT, STEPS_OR_EPOCH, PathCheck
from src.config.schema.fields import Impact, key
from src.metrics import greater_is_better


@dataclass
class CheckpointConfig:
    """When the run is saved, which saves are kept, and how a run that was stopped resumes."""

    checkpointing_steps: Any = key(STEPS_OR_EPOCH, resume=Impact.harmless)
    keep_last: int = key(AT_LEAST_ONE, resume=Impact.harmless)
    keep_best: int = key(COUNT, resume=Impact.harmless)
    newest_optimizer_only: bool = key(resume=Impact.harmless)
    metric_for_best_model: str = key(resume=Impact.harmless)
    greater_is_better: bool | None = key(resume=Impact.harmless)
    load_best_model_at_end: bool = key(resume=Impact.harmless)
    resume: str = key(PathCheck("auto, never, or a folder: a run's or a checkpoint", bool), resume=Impact.harmless)
    allow_changed: bool = key(resume=Impact.harmless)

    @property
    def saves_at_end(self) -> bool:
        """Whether the run is saved at its end: where it is saved at all, or the best weights are loaded there."""
        return self.checkpointing_steps is not None or self.load_best_model_at_end

    @property
    def is_greater_better(self) -> bool:
        """Whether a higher value of metric_for_best_model is the better one."""
        known = greater_is_better(self.metric_for_best_model)
        return known if self.greater_is_better is None else self.greater_is_better

    @property
    def resume_from(self) -> Path | None:
        """The folder that resume names; None for auto and never."""
        return None if self.resume in ("auto", "never") else Path(self.resume)


@dataclass
class ExportConfig:
    """What the exported model/ holds."""

    merge: bool = key(resume=Impact.harmless)
