"""Rules of `tracking`."""

from collections.abc import Iterator

from src.config.problems import Problem
from src.config.rules.rule import applies_to
from src.config.schema import MlflowConfig, TrackingConfig


@applies_to("run")
def tracker_can_be_reached_by_some_scheme(tracking: TrackingConfig) -> Iterator[Problem]:
    schemes = ("sqlite:", "postgresql", "mysql", "mssql", "http:", "https:", "databricks")
    if isinstance(tracking, MlflowConfig) and not tracking.uri.startswith(schemes):
        reason = f"not an address that MLflow knows; it begins with one of {' '.join(schemes)}"
        if tracking.uri.startswith(("file:", "/", "./", "../")):
            reason += "; runs in a folder are kept in a file there: sqlite:///FOLDER/mlflow.db"
        yield Problem("tracking.uri", reason, tracking.uri)
