"""Runs that a folder had in stores that it is not delivered to any more: they are ended, so that none says RUNNING.

A run that is resumed or begun anew with another tracker, or none, leaves its previous run in MLflow as one that runs.
"""

import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from src import secrets
from src.tracking.exporters import Activity, DeliveryError, Exporter, Warn
from src.tracking.mlflow_client import KILLED, WatchedClient, explained, quiet_client, reach, run_of
from src.tracking.mlflow_state import TRACKING, PreviousRun, runs_left
from src.tracking.sqlite_store import SqliteStore
from src.util import write_json


class PreviousRuns(Exporter):
    """Ends runs, where their store can be reached, in turns of a folder's export thread; warns once for each store."""

    name = "MLflow"
    is_connected = True
    where = pending = ""
    progress = "ended what the folder had there before"

    def __init__(self, warn: Warn) -> None:
        self.activity = Activity()
        self._warn = warn
        self._waiting: deque[tuple[PreviousRun, Path, Callable[[], None] | None]] = deque()
        self._known: set[PreviousRun] = set()
        self._out_of_reach: set[str] = set()

    def end(self, run: PreviousRun, folder: Path, ended: Callable[[], None] | None = None) -> None:
        """End a run that a folder had, in the next turn; `ended` is called once it does not run any more."""
        if run not in self._known:
            self._known.add(run)
            self._waiting.append((run, folder, ended))

    def end_all(self, state: Mapping[str, Any], folder: Path) -> None:
        """End all runs that a folder has in MLflow by its tracking.json, which may be removed and else records it."""
        left = set(runs_left(state))

        def note_ended(run: PreviousRun) -> None:
            left.discard(run)
            if not left and (folder / TRACKING).is_file():
                write_json(folder / TRACKING, {**state, "ended": KILLED, "elsewhere": []})

        for run in runs_left(state):
            self.end(run, folder, partial(note_ended, run))

    def deliver(self) -> Iterator[None]:
        while self._waiting:
            (stored, run_id), folder, ended = self._waiting.popleft()
            try:
                if stored not in self._out_of_reach:
                    self._end(stored, run_id, folder)
                    self.activity.check()
                    if ended is not None:
                        ended()
            except Exception as error:  # whatever MLflow raises: nothing depends on it
                self.activity.check()
                self._out_of_reach.add(stored)
                where = secrets.without_credentials(stored)
                self._warn(
                    f"MLflow at {where}: the run {run_id}, which {folder} had there before, can't be ended, and may "
                    f"say RUNNING: {explained(error)}"
                )
            yield

    def explain(self, error: Exception) -> DeliveryError:
        return explained(error)

    def _end(self, stored: str, run_id: str, folder: Path) -> None:
        missing: list[tuple[str, str]] = []
        uri = str(secrets.reveal({"tracking": {"uri": stored}}, missing)["tracking"]["uri"])
        if missing:
            raise DeliveryError(missing[0][1])
        if uri.startswith("sqlite"):
            store = SqliteStore(uri, self._warn, self.activity.check)
            if store.is_file and not store.file.exists():
                return  # it was removed with its runs
            store.open()
        elif uri.startswith("http"):
            reach(uri)
        made = quiet_client()(tracking_uri=uri)
        client = WatchedClient(made, self.activity, folder, is_server=uri.startswith("http"))
        run = run_of(client, run_id)
        if run is not None and run.info.status == "RUNNING" and _was_of(run, folder):
            client.set_terminated(run_id, KILLED)


def _was_of(run: Any, folder: Path) -> bool:
    """Return whether a run was a folder's: a copy of a folder must not end the run of the original."""
    tags, here = run.data.tags, str(folder.resolve())
    known = tags.get("towline.folder", here)
    is_moved = tags.get("towline.host") == socket.gethostname() and not Path(known).exists()
    return bool(known == here or is_moved)
