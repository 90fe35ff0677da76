"""What asks a run to stop: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), and its time limit.

While a run is being set up nothing is worth waiting for, so a signal ends it where it is. Once it trains, a signal is a
request, which the run follows where it can end properly. Schedulers repeat theirs, so only a further SIGINT ends the
run at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from src.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the run was asked to stop, and whether it is at a place where that must be followed at once."""

    def __init__(self) -> None:
        self.name = ""
        self.number = signal.SIGTERM
        """The signal that asked, to be passed on to other processes."""
        self.is_deferred = False
        """Whether a request waits for the next `check`, rather than ending the run where it is; see `deferred`."""
        self._deadline: float | None = None
        self._limit = ""

    def set_time_limit(self, seconds: float | None, key: str = "training.max_seconds") -> None:
        """Ask for a stop in N seconds, the value of a key; None: never."""
        self._limit = f"{key} = {seconds or 0.0:g}"
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Have requests wait for the next `check` within the block, which has something to end properly."""
        before, self.is_deferred = self.is_deferred, True
        try:
            yield
        finally:
            self.is_deferred = before

    def asked(self) -> str:
        """Name what asked the run to stop; '' where nothing did."""
        if not self.name and self._deadline is not None and time.monotonic() >= self._deadline:
            self.name = self._limit
        return self.name

    def check(self) -> None:
        """End the run here, with an Interrupted that names what asked for it, if something did."""
        if name := self.asked():
            raise Interrupted(name)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.name:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = signal.Signals(number)
        self.name = self.number.name
        if not self.is_deferred:
            self.check()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take over the signals until the end of the block; only Python's main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.on_signal) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
