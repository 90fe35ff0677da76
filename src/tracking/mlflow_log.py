"""A run in MLflow that is open to be logged to, the place of its files, and what of it has not been seen there yet."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src import secrets
from src.records import file_digest
from src.tracking.exporters import Activity, DeliveryError
from src.tracking.mlflow_client import WatchedClient
from src.tracking.mlflow_names import distinct_names, milliseconds, plain_name

SLOWEST_UPLOAD = 500_000  # bytes per second; a slower upload is not waited for
READ_BACK_BYTES = 1 << 24  # a larger file's content is not compared with that of a stored one of its name and size
THROUGH_A_SERVER = ("mlflow-artifacts:", "http:", "https:")
MAX_PARAM_CHARACTERS = 500  # older stores refuse more; the file that they come from is an artifact and holds everything
METRICS_AT_ONCE = 1000  # MLflow's limit for one call
PARAMS_AT_ONCE = 100


class Artifacts:
    """The place for the files of a run.

    Args:
        uri: its address, which the store, at its own address, has assigned to the run.
        folder: the folder that is delivered.
        is_new: whether this process has begun the run, so that no file of an earlier one can be there.
    """

    def __init__(
        self, uri: str, store: str, activity: Activity, folder: Path, *, is_new: bool = False, calls_again: int = 0
    ) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

        place = get_artifact_repository(add_databricks_profile_info_to_artifact_uri(uri, store), tracking_uri=store)
        self._is_checked = uri.startswith(THROUGH_A_SERVER)
        self._place: Any = WatchedClient(place, activity, folder, calls_again, self._is_checked)
        self._activity = activity
        self._folder = folder
        self._is_new = is_new
        self._delivered: set[str] = set()

    def upload(self, file: Path, parent: str | None = None) -> None:
        """Log a file below the run's folder `parent`; DeliveryError where it was accepted and is not there."""
        name = f"{parent}/{file.name}" if parent else file.name
        size = file.stat().st_size
        self._activity.extra_seconds = size / SLOWEST_UPLOAD
        try:
            self._place.log_artifact(str(file), parent)
            if self._is_checked and not self._is_there(name, parent, file, size):
                why = "what answers for artifacts may be no MLflow, but a page or a proxy"
                raise DeliveryError(f"{name} was accepted and is not there: {why}", is_lasting=False)
        finally:
            self._activity.extra_seconds = 0.0
        self._delivered.add(name)
        self._activity.note_delivered(str(self._folder), name, file_digest(file))

    def _is_there(self, name: str, parent: str | None, file: Path, size: int) -> bool:
        """Return whether a file is there with its size; and its content, where another one might have that size."""
        sizes = {one.path: one.file_size for one in self._place.list_artifacts(parent) if not one.is_dir}
        if name not in sizes or sizes[name] not in (None, size):
            return False
        if (self._is_new and name not in self._delivered) or size > READ_BACK_BYTES:
            return True
        with tempfile.TemporaryDirectory() as folder:
            return file_digest(Path(self._place.download_artifacts(name, folder))) == file_digest(file)


@dataclass
class Sent:
    """What was sent to a run and not seen there yet, by name."""

    params: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    status: str | None = None

    def is_in(self, run: Any) -> bool:
        """Return whether a run has all of it."""
        inputs = {one.dataset.name for one in run.inputs.dataset_inputs} if run.inputs else set()
        data = run.data
        has = (
            self.params <= data.params.keys() and self.tags <= data.tags.keys() and self.metrics <= data.metrics.keys()
        )
        return has and self.inputs <= inputs and self.status in (None, run.info.status)


class OpenRun:
    """Logs to a run; each call may be repeated. May raise whatever MLflow raises."""

    def __init__(self, client: Any, run: Any, artifacts: Artifacts) -> None:
        self.client = client
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.artifacts = artifacts
        self.sent = Sent()

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log what is short enough; what is longer is in the file that it comes from."""
        from mlflow.entities import Param

        short = {key: secrets.clean(value) for key, value in values.items() if len(value) <= MAX_PARAM_CHARACTERS}
        names = distinct_names(short)
        params = [Param(names[key], value) for key, value in short.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.id, params=params[first : first + PARAMS_AT_ONCE])
        self.sent.params |= {param.key for param in params}

    def log_tags(self, tags: Mapping[str, Any], run_id: str | None = None) -> None:
        """Set the tags that have a value, of this run or of another, in one call."""
        from mlflow.entities import RunTag

        run_tags = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
        self.client.log_batch(run_id or self.id, tags=run_tags)
        if run_id is None:
            self.sent.tags |= {tag.key for tag in run_tags}

    def log_points(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Log metrics: name, value, time in milliseconds, step. The same point again is no second one."""
        from mlflow.entities import Metric

        metrics = [Metric(plain_name(name), float(value), at, step) for name, value, at, step in points]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(self.id, metrics=metrics[first : first + METRICS_AT_ONCE])
        self.sent.metrics |= {metric.key for metric in metrics}

    def log_inputs(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Log each set with a digest of its encoded rows (MLflow's own digests ignore columns that hold lists)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs, source = [], json.dumps({"config": "data"})
        for name, report in reports.items():
            profile = json.dumps({key: report[key] for key in ("rows_kept", "tokens", "supervised_tokens")})
            rows = Dataset(name=name, digest=report["digest"], source_type="local", source=source, profile=profile)
            inputs.append(DatasetInput(rows, [InputTag("mlflow.data.context", name)]))
        self.client.log_inputs(self.id, inputs)
        self.sent.inputs |= {one.dataset.name for one in inputs}

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table for MLflow's page, in the form of its own log_table, which would append."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            file.write_text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, indent=2))
            self.artifacts.upload(file)
        shown = json.dumps([{"path": name, "type": "table"}])
        self.client.set_tag(self.id, "mlflow.loggedArtifacts", shown)
        self.sent.tags.add("mlflow.loggedArtifacts")

    def set_running(self) -> None:
        self.client.update_run(self.id, status="RUNNING")
        self.sent.status = "RUNNING"

    def set_ended(self, state: str, at: str | None) -> None:
        """End the run; `at`, where known, is when, as ISO 8601."""
        self.client.set_terminated(self.id, state, None if at is None else milliseconds(at))
        self.sent.status = state
