"""conf/tracking: where a run is tracked besides its folder; exporters are registered in src.tracking.exporters."""

from dataclasses import dataclass

from src.config.schema.fields import Impact, key, type_key
from src.registry import Registry

TRACKERS = Registry[type]("tracker")
"""`tracking.type` -> its subclass of TrackingConfig."""


@dataclass
class TrackingConfig:
    """A tracker; a subclass adds its keys."""

    type: str = type_key("tracking", TRACKERS, resume=Impact.harmless)


@TRACKERS.register("mlflow")
@dataclass
class MlflowConfig(TrackingConfig):
    """conf/tracking/mlflow.yaml: an MLflow server or store that mirrors the run's folder."""

    uri: str = key(resume=Impact.harmless)
    experiment_name: str = key(resume=Impact.harmless)
    run_name: str = key(resume=Impact.harmless)
    tags: dict[str, str] = key(resume=Impact.harmless)
    log_model: bool = key(resume=Impact.harmless)


@TRACKERS.register("none")
@dataclass
class NoTrackingConfig(TrackingConfig):
    """conf/tracking/none.yaml: the run's folder only."""
