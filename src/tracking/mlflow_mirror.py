"""MLflow as the mirror of a run's folder. The door to mlflow.

A thread of its own brings MLflow up to date with the folder's files; `tracking.json` remembers what was delivered. So
training never waits for a tracker, one that is gone costs a warning, and what is missing can be delivered later from
the same files.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from src.config.schema import MlflowConfig
from src.tracking.journal import read_status, write_atomically

MAX_PARAM_CHARACTERS = 500  # older stores refuse more; config.yaml is an artifact and holds everything
ARTIFACTS = ("config.yaml", "provenance.json", "data_report.json", "samples.jsonl", "summary.json")
PATIENCE_SECONDS = 1.0
"""How long the end of a run waits for a tracker that delivers nothing."""
RETRY_SECONDS = 2.0
METRICS_AT_ONCE = 1000  # MLflow's limit for one call
LINES_AT_ONCE = 100
STATES = {"FINISHED": "FINISHED", "FAILED": "FAILED", "PREEMPTED": "KILLED"}


def quiet_client() -> Any:
    """Import MLflow with its retries cut short (by default an unreachable server blocks a call for minutes)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)

    return MlflowClient


class Delivery:
    """What of a run's folder MLflow has, and the means to bring it the rest. May raise whatever MLflow raises."""

    def __init__(self, config: MlflowConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._client_class = quiet_client()
        self._client: Any = None
        fresh = {"uri": config.uri, "run_id": None, "lines": 0}
        done = self._read("tracking.json")
        self._done: dict[str, Any] = done if done and done.get("uri") == config.uri else fresh
        self.last_success = time.monotonic()
        """When something was last delivered, by the monotonic clock."""

    @property
    def run_id(self) -> str | None:
        return self._done["run_id"]

    def begin(self) -> None:
        """Leave word in the folder that MLflow is to have it, even if it is never reached."""
        self._remember()

    def rewind(self, num_kept: int, taken: Sequence[Mapping[str, Any]]) -> None:
        """Take note that a run goes on behind its first lines of metrics: the others will come again.

        Args:
            taken: the lines behind those that stay, as they were. What of them MLflow has is not brought again where
                it comes out the same.
        """
        delivered = taken[: max(0, int(self._done["lines"]) - num_kept)]
        ahead = self._done.get("ahead", {})
        for line in delivered:
            ahead.setdefault(str(line["step"]), {}).update(line)
        lines = min(int(self._done["lines"]), num_kept)
        self._remember(lines=lines, samples=0, ahead=ahead, artifacts=False, ended=False, running=False)

    @property
    def num_pending(self) -> int:
        """How many lines of metrics MLflow does not have yet."""
        return len(self._lines()) - int(self._done["lines"])

    def deliver(self) -> None:
        """Bring MLflow up to date with the folder as it is now."""
        if self._client is None:
            self._connect()
        self._deliver_once("params", self._log_params)
        if (self._folder / "provenance.json").exists():
            self._deliver_once("tags", self._log_tags)
        if (self._folder / "data_report.json").exists():
            self._deliver_once("inputs", self._log_inputs)
        if self._done.get("running") is False:  # it had ended before
            self._deliver_once("running", lambda: self._client.update_run(self.run_id, status="RUNNING"))
        self._log_metrics()
        self._log_samples()
        state = read_status(self._folder).get("state")
        if state in STATES:
            self._deliver_once("artifacts", self._log_artifacts)
            self._deliver_once("ended", lambda: self._client.set_terminated(self.run_id, STATES[str(state)]))

    def _connect(self) -> None:
        with self._store_lock():
            client = self._client_class(tracking_uri=self._config.uri)
            if self.run_id is None:
                experiment = client.get_experiment_by_name(self._config.experiment_name)
                experiment_id = experiment.experiment_id if experiment else self._create_experiment(client)
                run = client.create_run(
                    experiment_id,
                    run_name=self._config.run_name,
                    tags={
                        "towline.folder": str(self._folder.resolve()),
                        "mlflow.source.name": "src.run",
                        "mlflow.user": user_name(),
                        **self._config.tags,
                    },
                )
                self._remember(run_id=run.info.run_id)
        self._client = client

    def _store_lock(self) -> AbstractContextManager[Any]:
        """Let one process at a time open a SQLite store: several on a fresh one die in its migration."""
        database = self._database()
        if database is None:
            return nullcontext()
        database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{database}.lock")

    def _database(self) -> Path | None:
        prefix = "sqlite:///"
        return Path(self._config.uri.removeprefix(prefix)) if self._config.uri.startswith(prefix) else None

    def _create_experiment(self, client: Any) -> str:
        database = self._database()
        location = (database.resolve().parent / "mlartifacts").as_uri() if database else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page then shows training runs first
        return client.create_experiment(self._config.experiment_name, artifact_location=location, tags=kind)

    def _log_params(self) -> None:
        import yaml
        from mlflow.entities import Param

        frozen = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
        params = {key: value for key, value in flat(frozen) if len(value) <= MAX_PARAM_CHARACTERS}
        names = distinct_names(params)
        self._client.log_batch(self.run_id, params=[Param(names[key], value) for key, value in params.items()])

    def _log_tags(self) -> None:
        from mlflow.entities import RunTag

        made = self._read("provenance.json") or {}
        git = made.get("git", {})
        tags = {
            "mlflow.source.git.commit": git.get("commit"),
            "git_commit": git.get("commit"),
            "git_dirty": git.get("dirty"),
            "config_hash": made.get("config_hash"),
            "device": made.get("hardware", {}).get("device"),
        }
        self._client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items() if v is not None])

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
            for name, report in (self._read("data_report.json") or {}).items()
        ]
        self._client.log_inputs(self.run_id, inputs)

    def _log_metrics(self) -> None:
        """Log the lines that are new, many at once; each is dated by itself, so that a repeat is no second point."""
        from mlflow.entities import Metric

        started = datetime.fromisoformat(read_status(self._folder)["started"]).timestamp()
        lines, ahead = self._lines()[int(self._done["lines"]) :], self._done.get("ahead", {})
        for first in range(0, len(lines), LINES_AT_ONCE):
            metrics = []
            for line in lines[first : first + LINES_AT_ONCE]:
                record = json.loads(line)
                step, at = record.pop("step"), int(1000 * (started + record.get("perf/elapsed_seconds", 0.0)))
                has = ahead.get(str(step), {})
                metrics += [
                    Metric(plain_name(k), float(v), at, step)
                    for k, v in record.items()
                    if v is not None and not (k in has and (k.startswith("perf/") or has[k] == v))
                ]
            for start in range(0, len(metrics), METRICS_AT_ONCE):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_AT_ONCE])
            self._remember(lines=int(self._done["lines"]) + len(lines[first : first + LINES_AT_ONCE]))

    def _log_artifacts(self) -> None:
        for name in ARTIFACTS:
            if (self._folder / name).exists():
                self._client.log_artifact(self.run_id, str(self._folder / name))
                self.last_success = time.monotonic()
        if self._config.log_model and (self._folder / "model").is_dir():
            self._client.log_artifacts(self.run_id, str(self._folder / "model"), artifact_path="model")

    def _log_samples(self) -> None:
        """Log the samples as a table, anew when there are more, in the form of log_table, which would append."""
        file = self._folder / "samples.jsonl"
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        if len(rows) > self._done.get("samples", 0):
            table = {"columns": list(rows[-1]), "data": [list(row.values()) for row in rows]}
            self._client.log_dict(self.run_id, table, "samples.json")
            shown = [{"path": "samples.json", "type": "table"}]
            self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(shown))
            self._remember(samples=len(rows))

    def _deliver_once(self, what: str, do: Callable[[], None]) -> None:
        if not self._done.get(what):
            do()
            self._remember(**{what: True})

    def _remember(self, **done: Any) -> None:
        self.last_success = time.monotonic()
        self._done |= done
        write_atomically(self._folder / "tracking.json", json.dumps(self._done, indent=2) + "\n")

    def _lines(self) -> list[str]:
        file = self._folder / "metrics.jsonl"
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return text.split("\n")[:-1]

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self._folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class MlflowMirror:
    """A delivery that runs beside the training, in a thread of its own."""

    def __init__(self, config: MlflowConfig, folder: Path, *, waits: bool = False) -> None:
        self._delivery = Delivery(config, folder)
        self._delivery.begin()
        self._waits = waits
        """Whether it is not known yet which lines of the folder stay."""
        self.uri = config.uri
        self._is_local = config.uri.startswith("sqlite:")
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._done = threading.Event()
        self.trouble = ""
        """Why the last attempt failed, or ''."""
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id

    def poke(self) -> None:
        """Say that the folder changed; returns at once."""
        if not self._waits:
            self._changed.set()

    def rewind(self, num_kept: int, taken: Sequence[Mapping[str, Any]]) -> None:
        """See Delivery.rewind; before anything was delivered by this start."""
        if self._waits:
            self._delivery.rewind(num_kept, taken)
            self._waits = False
            self.poke()

    def close(self) -> str:
        """Deliver the rest, as long as something is being delivered, and give what is left undone in words, or ''."""
        self.trouble = ""
        self._delivery.last_success = time.monotonic()
        self._closing.set()
        self._changed.set()
        patience = 60.0 if self._is_local else PATIENCE_SECONDS
        while not self._done.wait(0.05):
            if self.trouble or time.monotonic() - self._delivery.last_success > patience:
                break
        if self._done.is_set():
            return ""
        return f"{self._delivery.num_pending} lines of metrics are not delivered ({self.trouble or 'no answer'})"

    def _work(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closing.is_set()
            try:
                self._delivery.deliver()
            except Exception as error:  # whatever MLflow raises: the folder is the truth, so training goes on
                self.trouble = " ".join(str(error).split())[:200] or type(error).__name__
                self._closing.wait(RETRY_SECONDS)
                self._changed.set()
                if closing:
                    return
            else:
                self.trouble = ""
                if closing:
                    self._done.set()
                    return


def plain_name(name: str) -> str:
    """Give a name that MLflow takes: '<' and '>' of a token, say, become '_'."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def distinct_names(names: Iterable[str]) -> dict[str, str]:
    """Give each param a name of its own that MLflow takes: other characters become '_', repeats get a number."""
    given: dict[str, str] = {}
    for name in names:
        plain = candidate = re.sub(r"[^\w\-. ]", "_", name)
        number = 2
        while candidate in given.values():
            candidate, number = f"{plain}_{number}", number + 1
        given[name] = candidate
    return given


def user_name() -> str:
    """Give the user's name, or '' in a container that has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give a nested configuration as dotted keys and texts."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
