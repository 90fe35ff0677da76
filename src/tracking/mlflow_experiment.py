"""The experiment that a run is a run of: found by its name, or made."""

from pathlib import Path
from typing import Any

from src.tracking.exporters import DeliveryError
from src.tracking.mlflow_view import VIEW_TAG, view_tag


def experiment_of(client: Any, name: str, file: Path | None) -> str:
    """Return the id of an experiment, which is made where there is none; DeliveryError where it was deleted.

    `file` is the store, where that is a file: artifacts are then kept beside it.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return _create(client, name, file)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise DeliveryError(
            f"the experiment {name} is deleted there. Restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or choose another with tracking.experiment_name=…"
        )
    return str(experiment.experiment_id)


def _create(client: Any, name: str, file: Path | None) -> str:
    location = None if file is None else (file.resolve().parent / "mlartifacts").as_uri()
    tags = {VIEW_TAG: view_tag(), "mlflow.experimentKind": "custom_model_development"}  # the latter for older servers
    return str(client.create_experiment(name, artifact_location=location, tags=tags))
