"""Runs that a folder had in stores that nothing is brought to any more: they are ended, so that nobody waits for them.

A run that goes on, or is begun anew, with another tracker or none leaves its former run in MLflow as one that runs. A
thread of its own ends it, where its store can be reached; the work never waits for that.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src import secrets
from src.tracking.mlflow_calls import Watch, Watched
from src.tracking.mlflow_errors import StoreError, explained
from src.tracking.mlflow_store import KILLED, TRACKING, Former, former_runs, quiet_client, reach, run_of
from src.tracking.sqlite_store import SqliteStore
from src.util import write_json

WAIT_SECONDS = 20.0
"""How long the end of a run or a command waits for it."""


class FormerRuns:
    """Ends runs, in a thread of its own.

    Args:
        tell: is told, once for each store, what could not be ended and why.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._asked: queue.SimpleQueue[tuple[Former, Path]] = queue.SimpleQueue()
        self._known: set[Former] = set()
        self._out_of_reach: set[str] = set()
        self._watch = Watch()
        self._thread: threading.Thread | None = None
        self._left = 0
        self._changed = threading.Condition()
        self.ended: set[Former] = set()
        """Those that don't run any more."""

    def end(self, former: Former, folder: Path) -> None:
        """Have a run ended that a folder had; returns at once."""
        if former in self._known:
            return
        self._known.add(former)
        with self._changed:
            self._left += 1
        self._asked.put((former, folder))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow-former", daemon=True)
            self._thread.start()

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until all was tried."""
        with self._changed:
            self._changed.wait_for(lambda: self._left == 0, seconds)

    def _work(self) -> None:
        while True:
            former, folder = self._asked.get()
            try:
                if former[0] not in self._out_of_reach:
                    self._end(former, folder)
                    self.ended.add(former)
            except Exception as error:  # whatever MLflow raises: it is not what the work waits for
                self._out_of_reach.add(former[0])
                where = secrets.without_credentials(former[0])
                self._tell(
                    f"MLflow at {where}: the run {former[1]}, which {folder} had there before, can't be ended, and may "
                    f"say that it runs: {explained(error)}"
                )
            finally:
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()

    def _end(self, former: Former, folder: Path) -> None:
        stored, run_id = former
        missing: list[tuple[str, str]] = []
        uri = str(secrets.reveal({"tracking": {"uri": stored}}, missing)["tracking"]["uri"])
        if missing:
            raise StoreError(missing[0][1])
        if uri.startswith("sqlite"):
            store = SqliteStore(uri, self._tell)
            if store.is_file and not store.file.exists():
                return  # it went with its runs
            store.open()
        elif uri.startswith("http"):
            reach(uri)
        made = quiet_client()(tracking_uri=uri)
        client = Watched(made, self._watch, folder, is_server=uri.startswith("http"))
        run = run_of(client, run_id)
        if run is not None and run.info.status == "RUNNING" and _was_of(run, folder):
            client.set_terminated(run_id, KILLED)


def _was_of(run: Any, folder: Path) -> bool:
    """Return whether a run was a folder's: a copy of a folder has no say in the run of the original."""
    tags, here = run.data.tags, str(folder.resolve())
    known = tags.get("towline.folder", here)
    is_moved = tags.get("towline.host") == socket.gethostname() and not Path(known).exists()
    return bool(known == here or is_moved)


def end_all_of(done: Mapping[str, Any] | None, folder: Path, tell: Callable[[str], None]) -> Callable[[float], None]:
    """Have the runs ended that a folder has in MLflow, and that its run or sweep goes on without.

    Args:
        done: what its tracking.json says, or said before it was removed.
    Returns: waits so many seconds for it, and has tracking.json say so.
    """
    former = FormerRuns(tell)
    runs = former_runs(done) if done else []
    for one in runs:
        former.end(one, folder)

    def wait(seconds: float) -> None:
        former.wait(seconds)
        if done and runs and former.ended >= set(runs) and (folder / TRACKING).is_file():
            write_json(folder / TRACKING, {**done, "ended": KILLED, "elsewhere": []})

    return wait
