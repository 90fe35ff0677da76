"""conf/tracking: where a run is tracked besides its folder."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from src.config.schema.fields import type_key


@dataclass
class MlflowConfig:
    """conf/tracking/mlflow.yaml: an MLflow server or store that mirrors the run's folder."""

    type: str = type_key("tracking", "mlflow")
    uri: str = MISSING
    experiment_name: str = MISSING
    run_name: str = MISSING
    tags: dict[str, str] = MISSING
    log_model: bool = MISSING


@dataclass
class NoTrackingConfig:
    """conf/tracking/none.yaml: the run's folder only."""

    type: str = type_key("tracking", "none")


TrackingConfig = MlflowConfig | NoTrackingConfig
