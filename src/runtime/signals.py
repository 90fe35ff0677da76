"""What asks a run to stop: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), its time limit, and the file `stop` in its folder.

While a run is being set up nothing is worth waiting for, so a signal ends it where it is. Once it trains, a signal is a
request, which the run follows where it can end properly. Schedulers repeat theirs, so only a further SIGINT ends the
run at once. Where no signal can be sent, `touch DIR/stop` asks for the same, and `touch DIR/save` for a checkpoint.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from types import FrameType

from src.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_FILE, SAVE_FILE = "stop", "save"
"""Empty files in a run's folder that ask for something; they are removed when it is done, and when a run starts."""


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
        self._folder: Path | None = None

    def set_time_limit(self, seconds: float | None, key: str = "training.max_seconds") -> None:
        """Ask for a stop in N seconds, the value of a key; None: never."""
        self._limit = f"{key} = {seconds or 0.0:g}"
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def follow_files(self, run_dir: Path) -> None:
        """Follow the files `stop` and `save` in a run's folder from now on; earlier ones are removed."""
        self._folder = run_dir
        self._remove(STOP_FILE, SAVE_FILE)

    def is_save_asked(self) -> bool:
        """Return whether a file asks for a checkpoint, until `note_saved`."""
        return self._is_there(SAVE_FILE)

    def note_saved(self) -> None:
        """Remove the file that asked for a checkpoint: whoever made it sees that there is one."""
        self._remove(SAVE_FILE)

    def _is_there(self, name: str) -> bool:
        """Return whether somebody made this file by `touch`; one with content is no request, but somebody's data."""
        if self._folder is None:
            return False
        try:
            found = (self._folder / name).stat()
        except OSError:
            return False
        return S_ISREG(found.st_mode) and found.st_size == 0

    def _remove(self, *names: str) -> None:
        for name in names:
            if self._folder is not None and self._is_there(name):
                try:
                    (self._folder / name).unlink()
                except OSError:  # it would ask again at every step
                    self._folder = None

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
        if not self.name and self._is_there(STOP_FILE):
            self.name = "the file stop"
            self._remove(STOP_FILE)
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
