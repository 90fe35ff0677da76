"""conf/tracking: where a run is tracked besides its folder; exporters are registered in src.tracking.exporters."""

from dataclasses import dataclass, fields

from omegaconf import MISSING

from src.config.schema.checks import Check, RegisteredCheck
from src.config.schema.fields import Impact, key, later_default, type_key
from src.registry import Registry

TRACKERS = Registry[type]("tracker")
"""`tracking.type` -> its subclass of TrackingConfig."""
FURTHER = RegisteredCheck("a list of trackers", lambda v: all(one in TRACKERS for one in v), TRACKERS)
WANDB_MODE = Check("online, offline or null", lambda v: v in (None, "online", "offline"))


@dataclass
class TrackingConfig:
    """A tracker; a subclass adds its keys."""

    type: str = type_key("tracking", TRACKERS, resume=Impact.harmless)
    also: list[str] = key(
        FURTHER,
        default=[],
        text="further trackers; keys that they share with this one are those of this one",
        resume=Impact.harmless,
    )

    def trackers(self) -> list["TrackingConfig"]:
        """Return the settings of this tracker and of those in `also`, each once."""
        return [self, *(self._of(name) for name in dict.fromkeys(self.also) if name != self.type)]

    def lacking(self, name: str) -> list[str]:
        """Return the keys that another tracker needs and this one does not have."""
        return [
            one.name for one in fields(TRACKERS[name]) if later_default(one) == MISSING and not hasattr(self, one.name)
        ]

    def _of(self, name: str) -> "TrackingConfig":
        shared = {one.name: getattr(self, one.name) for one in fields(TRACKERS[name]) if hasattr(self, one.name)}
        return TRACKERS[name](**shared | {"type": name, "also": []})


@TRACKERS.register("mlflow")
@dataclass
class MlflowConfig(TrackingConfig):
    """conf/tracking/mlflow.yaml: an MLflow server or store that mirrors the run's folder."""

    uri: str = key(resume=Impact.harmless)
    experiment_name: str = key(resume=Impact.harmless)
    run_name: str = key(resume=Impact.harmless)
    tags: dict[str, str] = key(resume=Impact.harmless)
    log_model: bool = key(resume=Impact.harmless)
    log_system_metrics: bool = key(default=False, resume=Impact.harmless)


@TRACKERS.register("tensorboard")
@dataclass
class TensorBoardConfig(TrackingConfig):
    """conf/tracking/tensorboard.yaml: event files in `tensorboard/` of the run's folder."""


@TRACKERS.register("wandb")
@dataclass
class WandbConfig(TrackingConfig):
    """conf/tracking/wandb.yaml: Weights & Biases, with an account or offline in `wandb/` of the run's folder."""

    experiment_name: str = key(resume=Impact.harmless)
    run_name: str = key(resume=Impact.harmless)
    tags: dict[str, str] = key(resume=Impact.harmless)
    mode: str | None = key(WANDB_MODE, default=None, resume=Impact.harmless)


@TRACKERS.register("none")
@dataclass
class NoTrackingConfig(TrackingConfig):
    """conf/tracking/none.yaml: the run's folder only."""
