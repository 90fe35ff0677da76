"""A folder as one run in MLflow, whatever the folder is of.

`tracking.json` in the folder remembers what was delivered (`tracking.mlflow_state`). As it may be wrong, each delivery
begins by checking what the store has of the run.
"""

import os
import socket
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from src import secrets
from src.config.schema import MlflowConfig
from src.errors import DamagedFileError
from src.records import check_plain
from src.tracking import mlflow_client
from src.tracking.exporters import DeliveryError, FolderExporter, Warn
from src.tracking.mlflow_experiment import experiment_of
from src.tracking.mlflow_log import Artifacts, OpenRun, Sent
from src.tracking.mlflow_names import milliseconds, plain_name, user_name
from src.tracking.mlflow_state import TRACKING, read_tracking, runs_left
from src.tracking.previous_runs import PreviousRuns
from src.tracking.sqlite_store import SqliteStore
from src.tracking.step_logs import is_timing


class MlflowExporter(FolderExporter):
    """Delivers a folder to its run in MLflow, see FolderExporter. May raise whatever MLflow raises.

    What succeeds in an exporter that is a part of another one, its `parent`, succeeds there.
    """

    name = "MLflow"
    can_be_synced = True
    main_file: str  # the file that is there if there may be something to deliver
    may_show_older = False  # whether an older value may be dated later than the last one

    def __init__(
        self,
        config: MlflowConfig,
        folder: Path,
        *,
        parent: "MlflowExporter | None" = None,
        is_over: bool = False,
        warn: Warn,
    ) -> None:
        self._config = replace(
            config,  # a store needs no secrets
            experiment_name=secrets.clean(config.experiment_name),
            run_name=secrets.clean(config.run_name),
            tags=secrets.cleaned(config.tags),
        )
        self.is_local = config.uri.startswith("sqlite")
        self.previous: PreviousRuns | None = parent.previous if parent else None  # ends runs in other stores
        self._parent = parent
        self._open: OpenRun | None = None
        self._address = config.uri
        self._has_failed = False
        self._damage: list[DamagedFileError] = []
        self._sqlite: SqliteStore | None = parent._sqlite if parent else None
        super().__init__(folder, TRACKING, is_over=is_over, warn=warn, activity=parent.activity if parent else None)

    @abstractmethod
    def _deliver_folder(self) -> Iterator[None]:
        """Deliver the folder as it is now to the run."""

    @property
    @abstractmethod
    def _run_name(self) -> str: ...

    @property
    @abstractmethod
    def _recorded_start(self) -> str:
        """When the run or sweep was begun, as its folder says; '' where it does not."""

    @property
    def _start_time(self) -> str:
        """When the run or sweep was begun, by whatever says so; '' where nothing does."""
        return self._recorded_start

    @property
    def _own_tags(self) -> Mapping[str, str]:
        """Tags that only this kind of folder has."""
        return {}

    @property
    @abstractmethod
    def _exceeds_folder(self) -> bool:
        """Whether tracking.json says that more was delivered than the folder holds."""

    @abstractmethod
    def _last_values(self) -> Mapping[str, set[float]]:
        """Return for each metric which values MLflow may show as its last, by what was delivered."""

    @abstractmethod
    def _query_store(self, client: Any, run: Any) -> dict[str, Any]:
        """Return what is delivered by what the store has of the run, in the form of tracking.json."""

    @property
    def where(self) -> str:
        return secrets.without_credentials(self._config.uri)

    @property
    def stored_uri(self) -> str:
        """The store's address as files have it: what the environment set of it is the name of the variable."""
        return secrets.as_stored(self._config.uri)

    def is_its_store(self, uri: str) -> bool:
        """Return whether an address in a tracking.json is that of this store."""
        return secrets.as_stored(uri) == self.stored_uri

    @property
    def run_id(self) -> str | None:
        return self._state["run_id"]

    @property
    def is_connected(self) -> bool:
        return self._open is not None

    @property
    def _run(self) -> OpenRun:
        """The folder's run; once `_connect` has found or begun it."""
        assert self._open is not None
        return self._open

    def is_being_made(self) -> bool:
        return self._sqlite is not None and self._sqlite.is_being_made()

    def explain(self, error: Exception) -> DeliveryError:
        return mlflow_client.explained(error)

    def supersede(self, state: Mapping[str, Any]) -> None:
        """Replace a run that the folder had before, by what its tracking.json said."""
        self._state |= self._runs_before(state)
        if state["run_id"] is not None and self.is_its_store(state["uri"]):
            self._state["replaced"] += [state["run_id"]]

    def _runs_before(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the runs that this one replaces, by what a tracking.json says: here, and in other stores."""
        here = list(state.get("replaced", [])) if self.is_its_store(state["uri"]) else []
        elsewhere = []
        for uri, run_id in runs_left(state):
            if not self.is_its_store(uri):
                elsewhere.append({"uri": uri, "run_id": run_id})
            elif run_id != state["run_id"]:
                here.append(run_id)
        return {"replaced": here, "elsewhere": elsewhere}

    def _end_in_other_stores(self) -> None:
        """Ask for the end of runs there; a part of another exporter does not record it: its folder is not held then."""

        def forget(ended: Mapping[str, str]) -> None:
            self._save_state(elsewhere=[one for one in self._state.get("elsewhere", []) if one != ended])

        if self.previous is not None:
            for one in self._state.get("elsewhere", []):
                run = (one["uri"], one["run_id"])
                self.previous.end(run, self.folder, None if self._parent else partial(forget, one))

    def deliver(self) -> Iterator[None]:
        """Deliver the folder as it is now, connecting first where that was not done.

        DamagedFileError names a file that can't be read; what others say was delivered nevertheless.
        """
        self._damage = []
        mlflow_client.quiet_client()  # with the first delivery, and before anything else of MLflow's, which would print
        self._end_in_other_stores()
        try:
            self._open_store()
            if not self.is_connected:
                self._connect()
            yield from self._deliver_folder()
            self._check_arrived()
        except Exception as error:
            self._has_failed = True
            if mlflow_client.is_gone(error):
                self._open = None  # how the run is there is checked again
            raise
        self._has_failed = False
        if self._damage:
            raise self._damage[0]

    def _part(self, do: Callable[[], None]) -> None:
        """Do a part of a delivery; a file that it can't read holds up no other part, and is reported in the end."""
        try:
            do()
        except DamagedFileError as error:
            self._damage.append(error)

    def _part_in_turns(self, turns: Iterator[None]) -> Iterator[None]:
        """Do a part that takes long, as `_part`."""
        try:
            yield from turns
        except DamagedFileError as error:
            self._damage.append(error)

    def _open_store(self) -> None:
        """Check in a few seconds that the store can be used; a SQLite file is made where there is none."""
        self.activity.check()
        self.activity.since = time.monotonic()
        if self.is_local:
            self._sqlite = self._sqlite or SqliteStore(self._config.uri, self.warn_once, self.activity.check)
            if self._sqlite.open():
                self._open = None  # what another file has of the run must be checked
        elif self._is_server and (self._has_failed or not self.is_connected):
            mlflow_client.reach(self._address)

    @property
    def _is_server(self) -> bool:
        return self._address.startswith("http")

    def _connect(self) -> None:
        """Find the folder's run, or begin one, and see what the store has of it."""
        try:
            self._open = self._open_run()
        except Exception as error:
            address = mlflow_client.redirected(error, self._address)
            if address is None:
                raise
            self._address = address
            self._open = self._open_run()

    def _open_run(self) -> OpenRun:
        calls_again = mlflow_client.CALLS_AGAIN if self._is_server else 0
        made = mlflow_client.quiet_client()(tracking_uri=self._address)
        client = mlflow_client.WatchedClient(made, self.activity, self.folder, calls_again, self._is_server)
        run = found = self._find_run(client)
        if found is None:
            run = self._begin_run(client)
        elif (
            found.info.run_id != self.run_id
            or self._state.get("doubtful")
            or self._exceeds_folder
            or not self._shows_last_values(found)
        ):
            self._save_state(doubtful=True)
            has = self._query_store(client, found)
            kept = {name: self._state[name] for name in ("uri", "replaced", "elsewhere") if name in self._state}
            retried = bool(self._state.get("retried") or self._state.get("creating"))
            self._state = kept | {"run_id": found.info.run_id, "retried": retried} | has
            self._save_state()
        elif found.info.status == "RUNNING" and self._state.get("ended"):
            self._save_state(ended=None)
        place = (run.info.artifact_uri, self._address)
        artifacts = Artifacts(*place, self.activity, self.folder, is_new=found is None, calls_again=calls_again)
        return OpenRun(client, run, artifacts)

    def _find_run(self, client: Any) -> Any:
        """Return the folder's run; None where there is none that can be logged to."""
        if self.run_id is not None:
            run = mlflow_client.run_of(client, self.run_id)
            if run is not None and self._is_own(run):
                return run
        elif not self._state.get("doubtful") and not self._state.get("creating"):
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
        """Tags that identify the folder's run."""
        return {"towline.folder": str(self.folder.resolve()), "towline.started": self._recorded_start}

    @staticmethod
    def _filter(tags: Mapping[str, str]) -> str:
        """Return a filter for runs with such tags; a value with both kinds of quotes can't be asked for."""
        quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in tags.items() if value}
        return " and ".join(f"tags.`{name}` = {value}" for name, value in quoted.items() if value[0] not in value[1:-1])

    def _begin_run(self, client: Any) -> Any:
        file = self._sqlite.file if self._sqlite is not None and self._sqlite.is_file else None
        experiment_id = experiment_of(client, self._config.experiment_name, file)
        retried = bool(self._state.get("creating"))
        self._save_state(creating=True)  # if the answer is lost, the run is searched for before another is begun
        began = milliseconds(self._start_time) if self._start_time else None
        tags = {
            **self._identity,
            "towline.host": socket.gethostname(),
            "mlflow.source.name": "src.run",
            "mlflow.user": user_name(),
            **self._own_tags,
            **self._config.tags,
        }
        create = partial(client.create_run, experiment_id, start_time=began, run_name=self._run_name, tags=tags)
        try:
            run = create()
        except Exception as error:
            if mlflow_client.explained(error).is_lasting or not self._is_server:
                raise
            time.sleep(mlflow_client.AGAIN_SECONDS)
            retried = True  # if the first was begun nevertheless, it goes when this one ends
            run = create()
        replaced = [one for one in self._state.get("replaced", []) if one != run.info.run_id]
        kept = {"elsewhere": self._state["elsewhere"]} if self._state.get("elsewhere") else {}
        begun = {"uri": self.stored_uri, "run_id": run.info.run_id, "replaced": replaced, "retried": retried}
        self._state = begun | kept
        self._save_state()
        return run

    def _shows_last_values(self, run: Any) -> bool:
        """Return whether a run shows as last values what was delivered; of speeds and times any value will do."""
        has, values = run.data.metrics, {plain_name(name): some for name, some in self._last_values().items()}
        return all(name in has and (is_timing(name) or has[name] in some) for name, some in values.items())

    def _check_arrived(self) -> None:
        """Raise DeliveryError where a server lacks what it accepted: it, or a proxy before it, may answer anything."""
        if not self._is_server or self._run.sent == Sent():
            return
        run = self._run.client.get_run(self.run_id)
        if self._run.sent.is_in(run) and (self.may_show_older or self._shows_last_values(run)):
            self._run.sent = Sent()
            return
        self._save_state(doubtful=True)
        self._open = None
        raise DeliveryError("the server accepted what was delivered, and does not have it", is_lasting=False)

    def _end_replaced(self) -> None:
        """End runs that no process is training and that this one replaces, where they say RUNNING.

        One that was begun when an answer was lost, and that nothing was ever logged to, is deleted.
        """
        client, others, twins = self._run.client, list(self._state.get("replaced") or []), []
        if self._state.get("retried"):
            same = f"{self._filter(self._identity)} and attributes.status = 'RUNNING'"
            found = client.search_runs([self._run.experiment_id], same)
            twins = [one.info.run_id for one in found if one.info.run_id != self.run_id]
        for run_id in (*others, *twins):
            # one with the run's own id is the folder's again
            run = None if run_id == self.run_id else mlflow_client.run_of(client, run_id)
            if run is None or run.info.status != "RUNNING":
                continue
            if run_id in twins and not run.data.metrics and not run.data.params:
                client.delete_run(run_id)
            else:
                client.set_terminated(run_id, mlflow_client.KILLED)
        if others or self._state.get("retried"):
            self._save_state(replaced=[], retried=False)

    def _log_files(self, names: Iterable[str]) -> Iterator[None]:
        """Log those of the files that are there, each once as it is, so that a repeat resumes where it was."""
        for name in names:
            self._part(partial(self._log_file, name))
            yield

    def _files_in(self, name: str) -> list[str]:
        """Return the names of the files in a folder of the run or sweep; none where there is no such folder."""
        files = sorted(file for file in (self.folder / name).rglob("*") if not file.is_dir())
        return [str(file.relative_to(self.folder)) for file in files]

    def _log_file(self, name: str) -> None:
        file = self.folder / name
        check_plain(file, "Move it away, or restore it from a copy.")
        if not file.exists():
            return
        status = file.stat()
        version, known = [status.st_size, status.st_mtime_ns], self._state.get("files", {})
        if known.get(name) != version:
            self._run.artifacts.upload(file, None if "/" not in name else name.rpartition("/")[0])
            self._save_state(files=known | {name: version})

    def _load_state(self) -> dict[str, Any]:
        """Return what tracking.json says; where it says nothing that can be used, what is to be looked up."""
        try:
            state = read_tracking(self.folder)
        except FileNotFoundError:
            state = {}
        except DamagedFileError as error:
            self._set_aside(error, "What MLflow has of the run is looked up there.")
            return {"uri": self.stored_uri, "run_id": self._id_elsewhere(), "doubtful": True}
        if state and self.is_its_store(state["uri"]):
            return state | {"uri": self.stored_uri}
        run_id = None if state else self._id_elsewhere()
        may_be_known = bool(state) or run_id is not None or os.path.lexists(self.folder / self.main_file)
        before = self._runs_before(state) if state else {}
        return {"uri": self.stored_uri, "run_id": run_id} | before | ({"doubtful": True} if may_be_known else {})

    def _id_elsewhere(self) -> str | None:
        """Return the run's id by another file than tracking.json; None where no other has it."""
        return None
