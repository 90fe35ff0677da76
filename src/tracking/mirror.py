"""A delivery that runs beside the work, in a thread of its own: nothing waits for a tracker that is slow or gone."""

from __future__ import annotations

import threading
import time

from src.errors import one_line
from src.tracking.mlflow_store import FolderDelivery

PATIENCE_SECONDS = 1.0
"""How long the work waits for a server that delivers nothing."""
LOCAL_PATIENCE_SECONDS = 60.0
"""The same for a store that is a file, where several processes may stand in line."""
RETRY_SECONDS = 2.0


class Mirror:
    """Keeps MLflow up to date with a folder.

    Args:
        waits: hold everything back until `release`.
    """

    def __init__(self, delivery: FolderDelivery, *, waits: bool = False) -> None:
        self._delivery = delivery
        self._delivery.begin()
        self._waits = waits
        self._patience = LOCAL_PATIENCE_SECONDS if delivery.is_local else PATIENCE_SECONDS
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._done = threading.Event()
        self.trouble = ""
        """Why the last attempt failed, or ''."""
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return self._delivery.uri

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id

    def poke(self) -> None:
        """Say that the folder changed; returns at once."""
        if not self._waits:
            self._changed.set()

    def release(self) -> None:
        """Deliver from now on."""
        self._waits = False
        self.poke()

    def connect(self) -> None:
        """Wait until the store is there and has a run for the folder, but not for a server that is slow or gone."""
        self.poke()
        end = time.monotonic() + self._patience
        while not self._delivery.is_connected and not self.trouble and time.monotonic() < end:
            time.sleep(0.02)

    def close(self) -> str:
        """Deliver the rest, as long as something is being delivered, and give what is left undone in words, or ''."""
        self.trouble = ""
        self._delivery.last_success = time.monotonic()
        self._closing.set()
        self._changed.set()
        while not self._done.wait(0.05):
            if self.trouble or time.monotonic() - self._delivery.last_success > self._patience:
                break
        if self._done.is_set():
            return ""
        return f"{self._delivery.pending} are not delivered ({self.trouble or 'no answer'})"

    def _work(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closing.is_set()
            try:
                self._delivery.deliver()
            except Exception as error:  # whatever MLflow raises: the folder is the truth, so the work goes on
                self.trouble = one_line(error, 200)
                self._closing.wait(RETRY_SECONDS)
                self._changed.set()
                if closing:
                    return
            else:
                self.trouble = ""
                if closing:
                    self._done.set()
                    return
