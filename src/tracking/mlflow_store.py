"""A folder as one run in MLflow, whatever the folder is of. The door to mlflow.

`tracking.json` in the folder remembers what was delivered, so that the rest can be delivered later, by another process,
from the same files. It may be wrong: damaged, or older or newer than the store, which somebody may have restored,
emptied or lost. So each delivery begins by looking at what the store has of the run.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import urlsplit

from src import secrets
from src.config.schema import MlflowConfig
from src.errors import DamagedFileError
from src.records import NUMBER, OPTIONAL_TEXT, Line, Types, check_keys, check_plain, damaged, read_json
from src.tracking import mlflow_calls
from src.tracking.artifacts import Artifacts
from src.tracking.console import Console
from src.tracking.mlflow_calls import CALLS_AGAIN, RUN_ID, Watch, Watched
from src.tracking.mlflow_errors import StoreError, explained, is_gone, is_missing, status_of
from src.tracking.sqlite_store import OPENING_SECONDS, SqliteStore
from src.util import write_json

TRACKING = "tracking.json"
TRACKING_KEYS: Mapping[str, Types] = {
    "uri": str,
    "run_id": OPTIONAL_TEXT,
    "lines": int,
    "samples": int,
    "history": int,
    "points": dict,
    "trials": dict,
    "files": dict,
    "replaced": list,
    "elsewhere": list,
    "counts": (dict, NoneType),
    "judged": list,
}
REQUEST_SECONDS = 60
"""How long a server may take for an answer; slow ones are waited for, by a thread that nobody waits for."""
MAX_PARAM_CHARACTERS = 500  # older stores refuse more; the file that they come from is an artifact and holds everything
MAX_NAME_CHARACTERS = 250
METRICS_AT_ONCE = 1000  # MLflow's limit for one call
STATES = {"FINISHED": "FINISHED", "FAILED": "FAILED", "PREEMPTED": "KILLED", "PRUNED": "KILLED"}
"""How a run or a sweep ended, in MLflow's words."""
Former = tuple[str, str]
"""A run that a folder had before: its store's address as files have it, and its id there."""
KILLED = "KILLED"
"""How one ended that nobody is at, and that says it runs."""


def quiet_client() -> Any:
    """Import MLflow with its retries cut short (by default an unreachable server blocks a call for minutes)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")  # a POST would come back as a GET
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # it would print tracebacks of what is told in words
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    return MlflowClient


@dataclass
class Arrived:
    """What was brought to a run and not seen there yet, by name."""

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


class FolderDelivery(ABC):
    """What of a folder MLflow has, and the means to bring it the rest. May raise whatever MLflow raises.

    Args:
        within: the delivery that this one is a part of; what succeeds here succeeds there.
        is_over: whether nobody is at the folder's run or sweep, so that one that says it runs was killed.
        tell: is told, once each, what is not as it should be and costs nothing.
    """

    def __init__(
        self,
        config: MlflowConfig,
        folder: Path,
        *,
        within: FolderDelivery | None = None,
        is_over: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._config = replace(
            config,  # a store needs no secrets
            experiment_name=secrets.clean(config.experiment_name),
            run_name=secrets.clean(config.run_name),
            tags=secrets.cleaned(config.tags),
        )
        self._folder = folder
        self._is_over = is_over
        self._tell = tell or Console().warn
        self._told: set[str] = set()
        self._client_class = quiet_client()
        self._client: Any = None
        self._artifacts: Any = None
        self._arrived = Arrived()
        self._damage: list[DamagedFileError] = []
        self._address = config.uri
        self._has_failed = False
        self._sqlite: SqliteStore | None = within._sqlite if within else None
        self._growing: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = {}
        self.watch: Watch = within.watch if within else Watch()
        self.end_elsewhere: Callable[[Former, Path], None] | None = within.end_elsewhere if within else None
        """Has a run ended that the folder had in another store; returns at once."""
        self._done: dict[str, Any] = self._recall()

    @property
    @abstractmethod
    def pending(self) -> str:
        """What MLflow does not have yet, as words in the plural."""

    @property
    @abstractmethod
    def progress(self) -> str:
        """How much of the folder MLflow has."""

    @abstractmethod
    def _bring(self) -> None:
        """Bring MLflow up to date with the folder as it is now."""

    @property
    @abstractmethod
    def _run_name(self) -> str: ...

    @property
    @abstractmethod
    def _began(self) -> str:
        """When the run or sweep was begun, as its folder says; '' where it does not."""

    @property
    def _dated_from(self) -> str:
        """When the run or sweep was begun, by whatever says so; '' where nothing does."""
        return self._began

    @property
    @abstractmethod
    def _own_tags(self) -> Mapping[str, str]:
        """Tags that only this kind of folder has."""

    @property
    @abstractmethod
    def _journal(self) -> str:
        """The file that is there if there may be something to deliver."""

    @property
    @abstractmethod
    def _says_too_much(self) -> bool:
        """Whether tracking.json says that more was delivered than the folder holds."""

    @abstractmethod
    def _last_values(self) -> Mapping[str, set[float]]:
        """Return for each metric which values MLflow may show as its last, by what was delivered."""

    @abstractmethod
    def _look_up(self, run: Any) -> dict[str, Any]:
        """Return what is delivered by what the store has of the run, in the form of tracking.json."""

    @property
    def uri(self) -> str:
        """The store's address, without credentials."""
        return secrets.without_credentials(self._config.uri)

    @property
    def stored_uri(self) -> str:
        """The store's address as files have it: what the environment gave of it is the name of the variable."""
        return secrets.as_stored(self._config.uri)

    def is_its_store(self, uri: str) -> bool:
        """Return whether an address that a tracking.json has is that of this store."""
        return secrets.as_stored(uri) == self.stored_uri

    @property
    def run_id(self) -> str | None:
        return self._done["run_id"]

    @property
    def is_connected(self) -> bool:
        """Whether the store was found, and has a run for the folder."""
        return self._client is not None

    def is_being_made(self) -> bool:
        """Return whether the store is a file that is being made."""
        return self._sqlite is not None and self._sqlite.is_being_made()

    def replace(self, former: Mapping[str, Any]) -> None:
        """Take the place of a run that the folder had before, by what its tracking.json said."""
        self._done |= self._former_runs(former)
        if former["run_id"] is not None and self.is_its_store(former["uri"]):
            self._done["replaced"] = [*self._done["replaced"], former["run_id"]]

    def _former_runs(self, done: Mapping[str, Any]) -> dict[str, Any]:
        """Return the runs that this one takes the place of, by what a tracking.json says: here, and in other stores."""
        here = list(done.get("replaced", [])) if self.is_its_store(done["uri"]) else []
        elsewhere = []
        for one in former_runs(done):
            if self.is_its_store(one[0]):
                here += [one[1]] if one[1] != done["run_id"] else []
            else:
                elsewhere.append({"uri": one[0], "run_id": one[1]})
        return {"replaced": here, "elsewhere": elsewhere}

    @property
    def elsewhere(self) -> list[Former]:
        """The runs that the folder had in other stores, which nobody has ended yet."""
        return [(one["uri"], one["run_id"]) for one in self._done.get("elsewhere", [])]

    def forget_elsewhere(self, ended: Collection[Former]) -> None:
        """Take note of runs in other stores that don't run any more."""
        left = [{"uri": uri, "run_id": run_id} for uri, run_id in self.elsewhere if (uri, run_id) not in ended]
        if len(left) < len(self.elsewhere):
            self._remember(elsewhere=left)

    def begin(self) -> None:
        """Leave word in the folder that MLflow is to have it, even if it is never reached."""
        self._remember()

    def deliver(self) -> None:
        """Bring MLflow up to date with the folder as it is now, connecting first where that was not done.

        Raises:
            DamagedFileError: naming a file that can't be read; what others say was brought nevertheless.
        """
        self._damage = []
        if self.end_elsewhere is not None:
            for one in self.elsewhere:
                self.end_elsewhere(one, self._folder)
        try:
            self._open_store()
            if not self.is_connected:
                self._connect()
            self._bring()
            self._look_at_what_arrived()
        except Exception as error:
            self._has_failed = True
            if is_gone(error):
                self._client = None  # what became of the run is looked at again
            raise
        self._has_failed = False
        if self._damage:
            raise self._damage[0]

    def _part(self, do: Callable[[], None]) -> None:
        """Do a part of a delivery; a file that it can't read holds up no other part, and is told in the end."""
        try:
            do()
        except DamagedFileError as error:
            self._damage.append(error)

    def tell_once(self, text: str) -> None:
        """Tell something, unless it was told."""
        text = secrets.clean(text)
        if text not in self._told:
            self._told.add(text)
            self._tell(text)

    def _open_store(self) -> None:
        """Have the store be there and answer, in a few seconds.

        Raises:
            StoreError: where it is not, or does not.
        """
        self.watch.check()
        self.watch.since = time.monotonic()
        if self._config.uri.startswith("sqlite"):
            self._sqlite = self._sqlite or SqliteStore(self._config.uri, self.tell_once, self.watch.check)
            if self._sqlite.open():
                self._client = None  # what another file has of the run must be looked at
        elif self._address.startswith("http") and (self._has_failed or not self.is_connected):
            reach(self._address)

    def _connect(self) -> None:
        """Find the folder's run, or begin one, and see what the store has of it."""
        try:
            self._client = self._open_run()
        except Exception as error:
            if not self._follow(error):
                raise
            self._client = self._open_run()

    def _open_run(self) -> Any:
        is_server = self._address.startswith("http")
        calls_again = CALLS_AGAIN if is_server else 0
        made = self._client_class(tracking_uri=self._address)
        client = Watched(made, self.watch, self._folder, calls_again=calls_again, is_server=is_server)
        self._arrived = Arrived()
        run = found = self._find_run(client)
        if found is None:
            run = self._begin_run(client)
        elif found.info.run_id != self.run_id or self._done.get("doubtful") or not self._is_believable(found):
            self._remember(doubtful=True)
            self._client = client
            try:
                has = self._look_up(run)
            finally:
                self._client = None
            kept = {name: self._done[name] for name in ("uri", "replaced", "elsewhere") if name in self._done}
            retried = bool(self._done.get("retried") or self._done.get("creating"))
            self._done = kept | {"run_id": run.info.run_id, "retried": retried} | has
            self._remember()
        elif run.info.status == "RUNNING" and self._done.get("ended"):
            self._remember(ended=None)
        place = run.info.artifact_uri
        self._artifacts = Artifacts(
            place, self._address, self.watch, self._folder, is_new=found is None, calls_again=calls_again
        )
        return client

    def _find_run(self, client: Any) -> Any:
        """Return the folder's run; None where there is none that can be logged to."""
        if self.run_id is not None:
            run = run_of(client, self.run_id)
            if run is not None and self._is_own(run):
                return run
        elif not self._done.get("doubtful") and not self._done.get("creating"):
            return None
        experiment = client.get_experiment_by_name(self._config.experiment_name)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            return None
        filters = self._filter(self._identity)
        found = client.search_runs([experiment.experiment_id], filters, max_results=1, order_by=["start_time DESC"])
        return found[0] if found else None

    def _is_own(self, run: Any) -> bool:
        """Return whether a run is the folder's, which may have been moved, or its status lost."""
        tags, own = run.data.tags, self._identity
        return "towline.started" not in tags or any(tags.get(name) == value for name, value in own.items())

    @property
    def _identity(self) -> dict[str, str]:
        """Tags that tell the folder's run from every other."""
        return {"towline.folder": str(self._folder.resolve()), "towline.started": self._began}

    @staticmethod
    def _filter(tags: Mapping[str, str]) -> str:
        """Return a filter for runs with such tags; a value with both kinds of quotes can't be asked for."""
        quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in tags.items() if value}
        return " and ".join(f"tags.`{name}` = {value}" for name, value in quoted.items() if value[0] not in value[1:-1])

    def _begin_run(self, client: Any) -> Any:
        experiment_id = self._experiment(client)
        retried = bool(self._done.get("creating"))
        self._remember(creating=True)  # if the answer is lost, the run is looked for before another is begun
        began = milliseconds(self._dated_from) if self._dated_from else None
        tags = {
            **self._identity,
            "towline.host": socket.gethostname(),
            "mlflow.source.name": "src.run",
            "mlflow.user": user_name(),
            **self._own_tags,
            **self._config.tags,
        }
        try:
            run = client.create_run(experiment_id, start_time=began, run_name=self._run_name, tags=tags)
        except Exception as error:
            if explained(error).is_lasting or not self._address.startswith("http"):
                raise
            time.sleep(mlflow_calls.AGAIN_SECONDS)
            retried = True  # if the first was begun nevertheless, it goes when this one ends
            run = client.create_run(experiment_id, start_time=began, run_name=self._run_name, tags=tags)
        replaced = [one for one in self._done.get("replaced", []) if one != run.info.run_id]
        kept = {"elsewhere": self._done["elsewhere"]} if self._done.get("elsewhere") else {}
        begun = {"uri": self.stored_uri, "run_id": run.info.run_id, "replaced": replaced, "retried": retried}
        self._done = begun | kept
        self._remember()
        return run

    def _experiment(self, client: Any) -> str:
        """Return the id of the experiment, which is made where there is none."""
        name = self._config.experiment_name
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._create_experiment(client)
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)  # another process was faster
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise StoreError(
                f"the experiment {name} is deleted there. Restore it (mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}), or choose another with tracking.experiment_name=…"
            )
        return experiment.experiment_id

    def _create_experiment(self, client: Any) -> str:
        location = None
        if self._sqlite is not None and self._sqlite.is_file:
            location = (self._sqlite.file.resolve().parent / "mlartifacts").as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page then shows training runs first
        return client.create_experiment(self._config.experiment_name, artifact_location=location, tags=kind)

    def _is_believable(self, run: Any) -> bool:
        """Return whether tracking.json says no more than the folder holds, and a run's last values are as it says."""
        if self._says_too_much:
            return False
        return self._shows_last_values(run)

    def _shows_last_values(self, run: Any) -> bool:
        """Return whether a run shows as last values what was delivered; of speeds and times any value will do."""
        has, values = run.data.metrics, {plain_name(name): some for name, some in self._last_values().items()}
        return all(name in has and (name.startswith("perf/") or has[name] in some) for name, some in values.items())

    def _look_at_what_arrived(self) -> None:
        """See that a server has what it took: one that answers anything, or what stands in front of it, may not.

        Raises:
            StoreError: where it has not.
        """
        if not self._address.startswith("http") or self._arrived == Arrived():
            return
        run = self._client.get_run(self.run_id)
        if self._arrived.is_in(run) and self._shows_last_values(run):
            self._arrived = Arrived()
            return
        self._remember(doubtful=True)
        self._client = None
        raise StoreError("the server took what it was brought, and does not have it", is_lasting=False)

    def _follow(self, error: Exception) -> bool:
        """Go to where a server redirects: the same host only, as the credentials would go with it.

        Raises:
            StoreError: naming where else it redirects.
        """
        status = status_of(error)
        if status is None or not 300 <= status < 400:
            return False
        target = redirected(self._address)
        if target is None or (urlsplit(target).scheme, "https") == ("http", urlsplit(self._address).scheme):
            raise StoreError(f"the server redirects ({status}): is tracking.uri right?") from error
        here, there = urlsplit(self._address), urlsplit(target)
        if there.hostname != here.hostname:
            raise StoreError(f"the server redirects ({status}) to {target}: if that is right, give it as tracking.uri")
        login, at, _ = here.netloc.rpartition("@")
        self._address = there._replace(netloc=f"{login}{at}{there.netloc}").geturl()
        return True

    def _end_others(self) -> None:
        """End runs that nobody is at and that this one takes the place of, where they say that they run.

        One that was begun when an answer was lost, and that nothing was ever brought to, is deleted.
        """
        others, twins = list(self._done.get("replaced") or []), []
        if self._done.get("retried"):
            run = self._client.get_run(self.run_id)
            same = f"{self._filter(self._identity)} and attributes.status = 'RUNNING'"
            found = self._client.search_runs([run.info.experiment_id], same)
            twins = [one.info.run_id for one in found if one.info.run_id != self.run_id]
        for run_id in (*others, *twins):
            if run_id == self.run_id:  # it is the folder's again
                continue
            run = run_of(self._client, run_id)
            if run is None or run.info.status != "RUNNING":
                continue
            if run_id in twins and not run.data.metrics and not run.data.params:
                self._client.delete_run(run_id)
            else:
                self._client.set_terminated(run_id, KILLED)
        if others or self._done.get("retried"):
            self._remember(replaced=[], retried=False)

    def _log_params(self, values: Mapping[str, str]) -> None:
        """Log what is short enough; what is longer is in the file that it comes from."""
        from mlflow.entities import Param

        params = {key: secrets.clean(value) for key, value in values.items() if len(value) <= MAX_PARAM_CHARACTERS}
        names = distinct_names(params)
        given = [Param(names[key], value) for key, value in params.items()]
        for first in range(0, len(given), 100):  # MLflow's limit for one call
            self._client.log_batch(self.run_id, params=given[first : first + 100])
        self._arrived.params |= {param.key for param in given}

    def _log_tags(self, tags: Mapping[str, Any], run_id: str | None = None) -> None:
        """Set tags, those that have a value, of this run or of another, in one call."""
        from mlflow.entities import RunTag

        given = [RunTag(key, str(value)) for key, value in tags.items() if value is not None]
        self._client.log_batch(run_id or self.run_id, tags=given)
        if run_id is None:
            self._arrived.tags |= {tag.key for tag in given}

    def _log_points(self, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Log metrics: name, value, time in milliseconds, step. The same point again is no second one."""
        from mlflow.entities import Metric

        metrics = [Metric(plain_name(name), float(value), at, step) for name, value, at, step in points]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + METRICS_AT_ONCE])
        self._arrived.metrics |= {metric.key for metric in metrics}

    def _log_files(self, names: Iterable[str], *, artifact_path: str | None = None) -> None:
        """Log those of the files that are there, each once as it is."""
        for name in names:
            self._part(partial(self._log_file, name, artifact_path))

    def _log_file(self, name: str, artifact_path: str | None) -> None:
        file = self._folder / name
        check_plain(file, "Move it away, or restore it from a copy.")
        if not file.exists():
            return
        status = file.stat()
        version, known = [status.st_size, status.st_mtime_ns], self._done.get("files", {})
        if known.get(name) != version:
            self._artifacts.bring(file, artifact_path)
            self._remember(files=known | {name: version})

    def _log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table for MLflow's page, in the form of log_table, which would append."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            file.write_text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, indent=2))
            self._artifacts.bring(file)
        shown = json.dumps([{"path": name, "type": "table"}])
        self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", shown)
        self._arrived.tags.add("mlflow.loggedArtifacts")

    def _set_running(self) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        self._arrived.status = "RUNNING"

    def _set_ended(self, state: str, at: str | None) -> None:
        """End the run; `at`, where known, is when, as ISO 8601."""
        self._client.set_terminated(self.run_id, state, None if at is None else milliseconds(at))
        self._arrived.status = state

    def _deliver_once(self, what: str, do: Callable[[], None], version: Any = True) -> None:
        """Do what was not done yet for this version of what the folder holds."""
        if self._done.get(what) != version:
            do()
            self._remember(**{what: version})

    def _recall(self) -> dict[str, Any]:
        """Return what tracking.json says; where it says nothing that can be used, what is to be looked up."""
        file = self._folder / TRACKING
        try:
            done = read_tracking(self._folder)
        except FileNotFoundError:
            done = {}
        except DamagedFileError as error:
            kept = file.with_name(f"{TRACKING}.damaged")
            number = 2
            while os.path.lexists(kept):
                kept, number = file.with_name(f"{TRACKING}.damaged-{number}"), number + 1
            try:
                os.replace(file, kept)
                where = f" It is kept as {kept.name}."
            except OSError:
                where = ""
            self.tell_once(f"{error} What MLflow has of the run is looked up there.{where}")
            return {"uri": self.stored_uri, "run_id": self._id_elsewhere(), "doubtful": True}
        if done and self.is_its_store(done["uri"]):
            return done | {"uri": self.stored_uri}
        run_id = None if done else self._id_elsewhere()
        may_be_known = bool(done) or run_id is not None or os.path.lexists(self._folder / self._journal)
        former = self._former_runs(done) if done else {}
        return {"uri": self.stored_uri, "run_id": run_id} | former | ({"doubtful": True} if may_be_known else {})

    def _id_elsewhere(self) -> str | None:
        """Return the run's id by another file than tracking.json; None where no other has it."""
        return None

    def _remember(self, **done: Any) -> None:
        self.watch.check()
        self._done |= done
        try:
            write_json(self._folder / TRACKING, self._done)
        except OSError as error:
            lost = "how far MLflow has got is not remembered, and is looked up there the next time"
            self.tell_once(f"{self._folder / TRACKING} can't be written ({error.strerror}): {lost}")

    def _lines(self, name: str, read: Callable[[Path, str], list[Line]]) -> list[dict[str, Any]]:
        """Return what the whole lines of a file that grows say."""
        file = self._folder / name
        try:
            status = os.stat(file)
            version = (status.st_ino, status.st_size)
        except OSError:  # that it is not there, or can't be read, is for its reader to say
            version = (-1, -1)
        known, lines = self._growing.get(name, ((0, 0), []))
        if known != version or version == (-1, -1):
            lines = [line.content for line in read(self._folder, name)]
            self._growing[name] = (version, lines)
        return lines

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self._folder / name)
        except FileNotFoundError:
            return {}


def read_tracking(folder: Path) -> dict[str, Any]:
    """Return what tracking.json of a folder says.

    Raises:
        FileNotFoundError: where there is none.
        DamagedFileError: where it can't be read.
    """
    done = read_json(folder / TRACKING, TRACKING_KEYS, may_lack=[key for key in TRACKING_KEYS if key != "uri"])
    try:
        for step, points in done.get("points", {}).items():
            int(step)
            check_keys(done["points"], {step: dict})
            check_keys(points, dict.fromkeys(points, list))
            for values in points.values():
                check_keys(
                    {str(place): value for place, value in enumerate(values)},
                    dict.fromkeys(map(str, range(len(values))), NUMBER),
                )
        if any(done.get(name, 0) < 0 for name in ("lines", "samples", "history")):
            raise ValueError("a number of lines is negative")
        for one in done.get("elsewhere", []):
            check_keys({"elsewhere": one}, {"elsewhere": dict})
            check_keys(one, {"uri": str, "run_id": str})
        others = [*done.get("replaced", []), *(one["run_id"] for one in done.get("elsewhere", []))]
        for run_id in (done.get("run_id"), *others):
            if run_id is not None and not (isinstance(run_id, str) and RUN_ID.fullmatch(run_id)):
                raise ValueError(f"{json.dumps(run_id)} is no id of a run")
        check_keys(done.get("counts") or {}, dict.fromkeys(done.get("counts") or {}, NUMBER))
    except ValueError as error:
        raise damaged(folder / TRACKING, str(error), "") from error
    return {"run_id": None} | done


def former_runs(done: Mapping[str, Any]) -> list[Former]:
    """Return the runs that may say that they run, by what a tracking.json says, and that nothing is brought to now."""
    own = [(done["uri"], done["run_id"])] if done["run_id"] is not None and not done.get("ended") else []
    return [*((one["uri"], one["run_id"]) for one in done.get("elsewhere", [])), *own]


def reach(uri: str) -> None:
    """Raise a StoreError where a server can't be connected to in a few seconds; one behind a proxy is not tried."""
    from requests.utils import get_environ_proxies, select_proxy

    address = urlsplit(uri)
    if address.hostname is None or select_proxy(uri, get_environ_proxies(uri, None)):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=OPENING_SECONDS).close()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"can't be reached: {said}", is_lasting=False) from error


def redirected(uri: str) -> str | None:
    """Return the address that a server's API is redirected to; None where that can't be told."""
    import requests

    path = "/api/2.0/mlflow/experiments/get-by-name"
    try:
        answer = requests.get(f"{uri.rstrip('/')}{path}", allow_redirects=False, timeout=REQUEST_SECONDS)
    except requests.RequestException:
        return None
    target = answer.headers.get("Location", "").partition("?")[0]
    if not target.startswith(("http://", "https://")) or not target.endswith(path):
        return None
    return target.removesuffix(path)


def run_of(client: Any, run_id: str) -> Any:
    """Return a run; None where there is none, or it was deleted."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if is_missing(error):
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def milliseconds(time_of: str, later_seconds: float = 0.0) -> int:
    """Return a time of ISO 8601, or one so much later, as MLflow counts it."""
    return int(1000 * (datetime.fromisoformat(time_of).timestamp() + later_seconds))


def plain_name(name: str) -> str:
    """Return a name that MLflow takes: '<' and '>' of a token, say, become '_', and a very long one is cut."""
    plain = re.sub(r"[^\w\-. :/]", "_", name)
    if len(plain) <= MAX_NAME_CHARACTERS:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: MAX_NAME_CHARACTERS - 9]}_{digest}"


def distinct_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each param a name of its own that MLflow takes: other characters become '_', repeats get a number."""
    given: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = candidate = re.sub(r"[^\w\-. ]", "_", name)[: MAX_NAME_CHARACTERS - 9]
        number = 2
        while candidate in taken:
            candidate, number = f"{plain}_{number}", number + 1
        given[name] = candidate
        taken.add(candidate)
    return given


def user_name() -> str:
    """Return the user's name, or '' in a container that has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested configuration as dotted keys and texts."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False, default=str)
