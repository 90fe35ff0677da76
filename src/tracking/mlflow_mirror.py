"""MLflow as the mirror of a run's folder.

A thread of its own brings MLflow up to date with the folder's files. So training never waits for a tracker, one that is
gone costs a warning, and what is missing can be delivered later from the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config.frozen import read_status
from src.config.schema import MlflowConfig
from src.tracking.mirror import Mirror
from src.tracking.mlflow_store import STATES, FolderDelivery, flat, milliseconds

ARTIFACTS = ("config.yaml", "provenance.json", "data_report.json", "samples.jsonl", "summary.json")
LINES_AT_ONCE = 100


class Delivery(FolderDelivery):
    """What of a run's folder MLflow has."""

    @property
    def _run_name(self) -> str:
        return self._config.run_name

    @property
    def _own_tags(self) -> Mapping[str, str]:
        return {}

    def rewind(self, num_kept: int, taken: Sequence[Mapping[str, Any]]) -> None:
        """Take note that a run goes on behind its first lines of metrics: the others will come again.

        Args:
            taken: the lines behind those that stay, as they were. What of them MLflow has is not brought again where
                it comes out the same.
        """
        delivered = taken[: max(0, self._num_delivered - num_kept)]
        ahead = self._done.get("ahead", {})
        for line in delivered:
            ahead.setdefault(str(line["step"]), {}).update(line)
        lines = min(self._num_delivered, num_kept)
        self._remember(lines=lines, samples=0, ahead=ahead, artifacts=False, ended=False, running=False)

    @property
    def num_pending(self) -> int:
        """How many lines of metrics MLflow does not have yet."""
        return len(self._lines("metrics.jsonl")) - self._num_delivered

    @property
    def pending(self) -> str:
        return f"{self.num_pending} lines of metrics"

    @property
    def _num_delivered(self) -> int:
        return int(self._done.get("lines", 0))

    def _bring(self) -> None:
        self._deliver_once("params", self._log_config)
        if (self._folder / "provenance.json").exists():
            self._deliver_once("tags", self._log_provenance)
        if (self._folder / "data_report.json").exists():
            self._deliver_once("inputs", self._log_inputs)
        if self._done.get("running") is False:  # it had ended before
            self._deliver_once("running", self._set_running)
        self._log_metrics()
        self._log_samples()
        state = str(read_status(self._folder).get("state"))
        if state in STATES:
            self._deliver_once("artifacts", self._log_artifacts)
            self._deliver_once("ended", lambda: self._set_ended(state))

    def _log_config(self) -> None:
        import yaml

        self._log_params(dict(flat(yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8")))))

    def _log_provenance(self) -> None:
        made = self._read("provenance.json")
        git = made.get("git", {})
        self._log_tags(
            {
                "mlflow.source.git.commit": git.get("commit"),
                "git_commit": git.get("commit"),
                "git_dirty": git.get("dirty"),
                "config_hash": made.get("config_hash"),
                "device": made.get("hardware", {}).get("device"),
            }
        )

    def _log_inputs(self) -> None:
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
            for name, report in self._read("data_report.json").items()
        ]
        self._client.log_inputs(self.run_id, inputs)

    def _log_metrics(self) -> None:
        """Log the lines that are new, many at once; each is dated by itself, so that a repeat is no second point."""
        started = read_status(self._folder)["started"]
        lines, ahead = self._lines("metrics.jsonl")[self._num_delivered :], self._done.get("ahead", {})
        for first in range(0, len(lines), LINES_AT_ONCE):
            points = []
            some = lines[first : first + LINES_AT_ONCE]
            for line in some:
                record = json.loads(line)
                step, at = record.pop("step"), milliseconds(started, record.get("perf/elapsed_seconds", 0.0))
                has = ahead.get(str(step), {})
                points += [
                    (name, value, at, step)
                    for name, value in record.items()
                    if value is not None and not (name in has and (name.startswith("perf/") or has[name] == value))
                ]
            self._log_points(points)
            self._remember(lines=self._num_delivered + len(some))

    def _log_artifacts(self) -> None:
        self._log_files(ARTIFACTS)
        if self._config.log_model and (self._folder / "model").is_dir():
            self._client.log_artifacts(self.run_id, str(self._folder / "model"), artifact_path="model")

    def _log_samples(self) -> None:
        """Log the samples as a table, anew when there are more."""
        rows = [json.loads(line) for line in self._lines("samples.jsonl")]
        if len(rows) > self._done.get("samples", 0):
            self._log_table("samples.json", list(rows[-1]), [list(row.values()) for row in rows])
            self._remember(samples=len(rows))


class MlflowMirror(Mirror):
    """The mirror of a run's folder.

    Args:
        waits: whether it is not known yet which lines of the folder stay.
    """

    def __init__(self, config: MlflowConfig, folder: Path, *, waits: bool = False) -> None:
        self._run = Delivery(config, folder)
        super().__init__(self._run, waits=waits)

    def rewind(self, num_kept: int, taken: Sequence[Mapping[str, Any]]) -> None:
        """See Delivery.rewind; before anything was delivered by this start."""
        if self._waits:
            self._run.rewind(num_kept, taken)
            self.release()
