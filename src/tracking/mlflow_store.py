"""A folder as one run in MLflow, whatever the folder is of. The door to mlflow.

`tracking.json` in the folder remembers what was delivered, so that the rest can be delivered later, by another process,
from the same files.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from src.config.schema import MlflowConfig
from src.records import write_atomically

MAX_PARAM_CHARACTERS = 500  # older stores refuse more; the file that they come from is an artifact and holds everything
METRICS_AT_ONCE = 1000  # MLflow's limit for one call
STATES = {"FINISHED": "FINISHED", "FAILED": "FAILED", "PREEMPTED": "KILLED", "PRUNED": "KILLED"}
"""How a run or a sweep ended, in MLflow's words."""


def quiet_client() -> Any:
    """Import MLflow with its retries cut short (by default an unreachable server blocks a call for minutes)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)

    return MlflowClient


class FolderDelivery(ABC):
    """What of a folder MLflow has, and the means to bring it the rest. May raise whatever MLflow raises.

    Args:
        within: the delivery that this one is a part of; what succeeds here succeeds there.
    """

    def __init__(self, config: MlflowConfig, folder: Path, within: FolderDelivery | None = None) -> None:
        self._config = config
        self._folder = folder
        self._within = within
        self._client_class = quiet_client()
        self._client: Any = None
        done = self._read("tracking.json")
        self._done: dict[str, Any] = done if done.get("uri") == config.uri else {"uri": config.uri, "run_id": None}
        self.last_success = time.monotonic()
        """When something was last delivered, by the monotonic clock."""

    @property
    @abstractmethod
    def pending(self) -> str:
        """What MLflow does not have yet, as words in the plural."""

    @abstractmethod
    def _bring(self) -> None:
        """Bring MLflow up to date with the folder as it is now."""

    @property
    @abstractmethod
    def _run_name(self) -> str: ...

    @property
    @abstractmethod
    def _own_tags(self) -> Mapping[str, str]:
        """Tags that only this kind of folder has."""

    @property
    def uri(self) -> str:
        return self._config.uri

    @property
    def run_id(self) -> str | None:
        return self._done["run_id"]

    @property
    def is_local(self) -> bool:
        """Whether the store is a file, which takes what it is given, unlike a server that may be gone."""
        return self._database() is not None

    @property
    def is_connected(self) -> bool:
        """Whether the store was found, and has a run for the folder."""
        return self._client is not None

    def begin(self) -> None:
        """Leave word in the folder that MLflow is to have it, even if it is never reached."""
        self._remember()

    def deliver(self) -> None:
        """Bring MLflow up to date with the folder as it is now, connecting first where that was not done."""
        if not self.is_connected:
            self._connect()
        self._bring()

    def _connect(self) -> None:
        with self._store_lock():
            client = self._client_class(tracking_uri=self._config.uri)
            if self.run_id is None:
                experiment = client.get_experiment_by_name(self._config.experiment_name)
                experiment_id = experiment.experiment_id if experiment else self._create_experiment(client)
                run = client.create_run(
                    experiment_id,
                    run_name=self._run_name,
                    tags={
                        "towline.folder": str(self._folder.resolve()),
                        "mlflow.source.name": "src.run",
                        "mlflow.user": user_name(),
                        **self._own_tags,
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

    def _log_params(self, values: Mapping[str, str]) -> None:
        """Log what is short enough; what is longer is in the file that it comes from."""
        from mlflow.entities import Param

        params = {key: value for key, value in values.items() if len(value) <= MAX_PARAM_CHARACTERS}
        names = distinct_names(params)
        self._client.log_batch(self.run_id, params=[Param(names[key], value) for key, value in params.items()])

    def _log_tags(self, tags: Mapping[str, Any], run_id: str | None = None) -> None:
        """Set tags, those that have a value, of this run or of another, in one call."""
        from mlflow.entities import RunTag

        given = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
        self._client.log_batch(run_id or self.run_id, tags=given)

    def _log_points(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Log metrics: name, value, time in milliseconds, step. The same point again is no second one."""
        from mlflow.entities import Metric

        metrics = [Metric(plain_name(name), float(value), at, step) for name, value, at, step in points]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + METRICS_AT_ONCE])

    def _log_files(self, names: Iterable[str], *, artifact_path: str | None = None) -> None:
        """Log those of the files that are there."""
        for name in names:
            if (self._folder / name).exists():
                self._client.log_artifact(self.run_id, str(self._folder / name), artifact_path)
                self._succeed()

    def _log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table for MLflow's page, in the form of log_table, which would append."""
        self._client.log_dict(self.run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, name)
        shown = json.dumps([{"path": name, "type": "table"}])
        self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", shown)

    def _set_running(self) -> None:
        self._client.update_run(self.run_id, status="RUNNING")

    def _set_ended(self, state: str) -> None:
        self._client.set_terminated(self.run_id, STATES[state])

    def _deliver_once(self, what: str, do: Callable[[], None], version: Any = True) -> None:
        """Do what was not done yet for this version of what the folder holds."""
        if self._done.get(what) != version:
            do()
            self._remember(**{what: version})

    def _remember(self, **done: Any) -> None:
        self._succeed()
        self._done |= done
        write_atomically(self._folder / "tracking.json", json.dumps(self._done, indent=2) + "\n")

    def _succeed(self) -> None:
        self.last_success = time.monotonic()
        if self._within:
            self._within._succeed()

    def _lines(self, name: str) -> list[str]:
        """Give the whole lines of a file that grows."""
        file = self._folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        return text.split("\n")[:-1]

    def _read(self, name: str) -> dict[str, Any]:
        file = self._folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def milliseconds(time_of: str, later_seconds: float = 0.0) -> int:
    """Give a time of ISO 8601, or one so much later, as MLflow counts it."""
    return int(1000 * (datetime.fromisoformat(time_of).timestamp() + later_seconds))


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
