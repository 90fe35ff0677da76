"""conf/tracking: where a run is tracked besides its folder."""

from __future__ import annotations

from dataclasses import dataclass

from src.config.schema.fields import Impact, key, type_key


@dataclass
class MlflowConfig:
    """conf/tracking/mlflow.yaml: an MLflow server or store that mirrors the run's folder."""

    type: str = type_key("tracking", "mlflow", resume=Impact.harmless)
    uri: str = key(resume=Impact.harmless)
    experiment_name: str = key(resume=Impact.harmless)
    run_name: str = key(resume=Impact.harmless)
    tags: dict[str, str] = key(resume=Impact.harmless)
    log_model: bool = key(resume=Impact.harmless)


@dataclass
class NoTrackingConfig:
    """conf/tracking/none.yaml: the run's folder only."""

    type: str = type_key("tracking", "none", resume=Impact.harmless)


TrackingConfig = MlflowConfig | NoTrackingConfig
