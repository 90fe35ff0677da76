"""A delivery that runs beside the work, in a thread of its own: the work never waits for a tracker.

What waits is the end of a run, for as long as calls bring something new and within bounds, and the command that
delivers what is left, for as long as calls bring something new.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from src.tracking.former import WAIT_SECONDS, FormerRuns
from src.tracking.mlflow_errors import explained
from src.tracking.mlflow_store import FolderDelivery
from src.tracking.sqlite_store import OPENING_SECONDS

RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60.0
LOOKING_SECONDS = 0.5
COMPUTING_SHARE = 0.05
"""Of a processor, by which a process is seen to do more than wait."""
SHARE = 0.1
"""How much of a processor the delivery may take from the work."""
LONGEST_REST_SECONDS = 10.0
SERVER_SECONDS = 1.0
"""How long a sweep waits for a server before its trials start."""


@dataclass(frozen=True)
class Patience:
    """How long the end of a run, or a command, waits for a delivery.

    Args:
        call_seconds: for one call.
        total_seconds: in all; while calls succeed.
        attempts: how often what fails is tried, with nothing brought in between that was not brought before.
        signals: what ends the waiting.
    """

    call_seconds: float
    total_seconds: float = math.inf
    attempts: int = 2
    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


AT_THE_END = Patience(call_seconds=30.0, total_seconds=120.0)
WHEN_STOPPED = Patience(call_seconds=10.0, total_seconds=10.0, signals=(signal.SIGINT,))
"""Of a run that was asked to stop: schedulers kill after half a minute, and repeat their signals."""
TO_THE_END = Patience(call_seconds=90.0, attempts=4)
"""Of a command that does nothing else."""


class Mirror:
    """Keeps MLflow up to date with a folder.

    Args:
        waits: hold everything back until `release`.
        tell: is told what needs somebody's hand, once.
    """

    def __init__(
        self, delivery: FolderDelivery, *, waits: bool = False, tell: Callable[[str], None] | None = None
    ) -> None:
        self._delivery = delivery
        self._former = FormerRuns(delivery.tell_once)
        self._delivery.end_elsewhere = self._former.end
        self._delivery.begin()
        self._waits = waits
        self._tell = tell
        self._is_file = delivery.uri.startswith("sqlite")
        self._patience = AT_THE_END
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._over = threading.Event()
        self._is_delivered = False
        self.ended_by = ""
        """The signal that ended the waiting, or ''."""
        self.trouble = ""
        """Why the last attempt failed, or ''."""
        self.needs_mending = False
        """Whether trying again is of no use before somebody has mended what `trouble` says."""
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return self._delivery.uri

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id

    def notify(self) -> None:
        """Say that the folder changed; returns at once."""
        if not self._waits:
            self._changed.set()

    def release(self) -> None:
        """Deliver from now on."""
        self._waits = False
        self.notify()

    def connect(self) -> None:
        """Wait until the store is there and has a run for the folder, but not for a server that is slow or gone."""
        self.notify()
        started, signs = time.monotonic(), _SignsOfLife(self._delivery)
        while not self._delivery.is_connected and not self.trouble:
            since, seconds = (signs.last(), OPENING_SECONDS) if self._is_file else (started, SERVER_SECONDS)
            if time.monotonic() - since > seconds:
                break
            time.sleep(0.02)

    def close(self, patience: Patience = AT_THE_END, show: Callable[[str], None] | None = None) -> str:
        """Deliver the rest and return what is left undone in words, or ''.

        Args:
            patience: how long to wait for it.
            show: is told how far it is, again and again.
        """
        self._patience = patience
        self.trouble, self.needs_mending = "", False
        started, signs = time.monotonic(), _SignsOfLife(self._delivery)
        self._closing.set()
        self._changed.set()
        reason = ""
        with _noted(patience.signals) as asked:
            while not reason and not self._over.wait(0.05):
                reason = f"ended by {asked[0]}" if asked else self._impatience(started, signs)
                if show is not None and time.monotonic() - started > 1.0:
                    show(f"MLflow has {self._delivery.progress}{f'; {self.trouble}' if self.trouble else ''}")
        self.ended_by = asked[0] if asked else ""
        if self._over.is_set() and not asked and self._delivery.elsewhere:
            self._former.wait(min(WAIT_SECONDS, patience.total_seconds))
            self._delivery.forget_elsewhere(self._former.ended)
        if self._is_delivered:
            return ""
        self._delivery.watch.is_cancelled = True
        return f"{self._delivery.pending} are not delivered ({self.trouble or reason})"

    def _impatience(self, started: float, signs: _SignsOfLife) -> str:
        """Return why nothing is waited for any more, or ''."""
        now, watch, patience = time.monotonic(), self._delivery.watch, self._patience
        last = max(watch.since, started)
        if watch.is_calling or not self._is_file:
            seconds = patience.call_seconds + watch.extra_seconds
        else:
            seconds, last = OPENING_SECONDS, max(last, signs.last())
        if now - last > seconds:
            return "no answer"
        if now - started > patience.total_seconds:
            return f"not all of it in {patience.total_seconds:g} seconds"
        return ""

    def _work(self) -> None:
        failures, was_closing = 0, False
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closing.is_set()
            if closing and not was_closing:
                failures, was_closing = 0, True
            before, is_first, used = (
                self._delivery.watch.num_brought,
                not self._delivery.is_connected,
                time.thread_time(),
            )
            try:
                self._delivery.deliver()
            except Exception as error:  # whatever MLflow raises: the folder is the truth, so the work goes on
                brought = self._delivery.watch.num_brought > before
                failures = 1 if brought else failures + 1
                if not self._go_on(error, failures, closing=closing):
                    break
            else:
                self.trouble, self.needs_mending, failures = "", False, 0
                if closing:
                    self._is_delivered = True
                    break
                if not is_first:
                    used = time.thread_time() - used
                    self._closing.wait(min(used / SHARE, LONGEST_REST_SECONDS))
        self._over.set()

    def _go_on(self, error: Exception, failures: int, *, closing: bool) -> bool:
        """Tell what an error says, and wait; return whether to try again."""
        told = explained(error)
        self.trouble, self.needs_mending = str(told), told.is_lasting
        if closing:
            if told.is_lasting or failures >= self._patience.attempts:
                return False
            time.sleep(min(RETRY_SECONDS * 2 ** (failures - 2), 8.0))
        else:
            if told.is_lasting and self._tell is not None:
                self._delivery.tell_once(f"MLflow: {told}")
            self._closing.wait(min(RETRY_SECONDS * 2 ** min(failures - 1, 10), LONGEST_RETRY_SECONDS))
        self._changed.set()
        return True


class _SignsOfLife:
    """When a store that is being opened was last seen to come on: it is made, or this process computes.

    Libraries are imported and tables made before a store is open; both take many seconds on a busy machine.
    """

    def __init__(self, delivery: FolderDelivery) -> None:
        self._delivery = delivery
        self._at = self._looked = time.monotonic()
        self._used = time.process_time()

    def last(self) -> float:
        """Return when that was, by the monotonic clock."""
        now = time.monotonic()
        if now - self._looked > LOOKING_SECONDS:
            used = time.process_time()
            is_computing = used - self._used > COMPUTING_SHARE * (now - self._looked)
            if is_computing or self._delivery.is_being_made():
                self._at = now
            self._looked, self._used = now, used
        return self._at


@contextmanager
def _noted(signals: tuple[signal.Signals, ...]) -> Iterator[list[str]]:
    """Yield a list that gets the names of signals that arrive in the block; only Python's main thread can take them."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
