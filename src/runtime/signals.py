"""Signals that ask a run to stop: SIGINT (Ctrl-C) and SIGTERM. No torch here.

While a run is being set up nothing is worth waiting for, so the first signal ends it where it is. Once it trains, the
first signal is a request, which the run follows where it can end properly; a second one ends it at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from src.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal came, and whether the run is at a place where it must be followed at once."""

    def __init__(self) -> None:
        self.name = ""
        self.is_deferred = False
        """Set once there is something to end properly: a signal is then followed by the next `check`."""

    def check(self) -> None:
        """Come out of the run here, if a signal asked for it.

        Raises:
            Interrupted: naming the signal.
        """
        if self.name:
            raise Interrupted(self.name)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if not self.is_deferred:
            self.check()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take over SIGINT and SIGTERM until the end of the block; only Python's main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
