"""A run in MLflow that is open to be logged to, and what of it has not been seen there yet."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src import secrets
from src.tracking.artifacts import Artifacts
from src.tracking.mlflow_names import distinct_names, milliseconds, plain_name

MAX_PARAM_CHARACTERS = 500  # older stores refuse more; the file that they come from is an artifact and holds everything
METRICS_AT_ONCE = 1000  # MLflow's limit for one call
PARAMS_AT_ONCE = 100


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
        has = self.params <= run.data.params.keys() and self.tags <= run.data.tags.keys()
        has = has and self.metrics <= run.data.metrics.keys() and self.inputs <= inputs
        return has and self.status in (None, run.info.status)


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

        inputs = [
            DatasetInput(
                Dataset(
                    name=name,
                    digest=report["digest"],
                    source_type="local",
                    source=json.dumps({"config": "data"}),
                    profile=json.dumps({key: report[key] for key in ("rows_kept", "tokens", "supervised_tokens")}),
                ),
                [InputTag("mlflow.data.context", name)],
            )
            for name, report in reports.items()
        ]
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
