"""What an exporter is: it keeps one tracker up to date with a folder, reading the folder's files.

So training never waits for a tracker, one that is gone costs a warning, and what is missing can be delivered later from
the same files, as the folder remembers how far an exporter has got. A tracker of one's own is a `LineExporter`
(src/tracking/line_exporter.py), registered under the name of its YAML in conf/tracking/.
"""

import hashlib
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from src import secrets
from src.config.schema import TrackingConfig
from src.errors import DamagedFileError, TowlineError, one_line
from src.records import LogLine
from src.registry import Registry
from src.tracking.step_logs import METRICS, read_step_log
from src.util import write_json

Warn = Callable[[str], None]
"""What takes a warning."""
_HEX_ID = re.compile(r"\b[0-9a-f]{32}\b")
MOST_CHARACTERS = 400  # of an error in words


class DeliveryError(Exception):
    """A tracker can't be used; says why and what to do. `is_lasting`: a retry is useless until the user has done it."""

    def __init__(self, text: str, *, is_lasting: bool = True) -> None:
        super().__init__(text)
        self.is_lasting = is_lasting


class Cancelled(Exception):
    """Nobody waits for this delivery any more, and the folder may be another process's."""


class Activity:
    """What an exporter is doing, for those who wait for it."""

    def __init__(self) -> None:
        self.since = time.monotonic()  # when the last call began or ended, by the monotonic clock
        self.is_calling = False
        self.num_calls = 0  # that have succeeded
        self.extra_seconds = 0.0  # how much longer than others the present call may take
        self.is_cancelled = False
        self.delivered: set[bytes] = set()  # digests of what was delivered, each once, however often it was

    def check(self) -> None:
        """Raise Cancelled where nobody waits any more."""
        if self.is_cancelled:
            raise Cancelled("cancelled")

    def call(self, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a method of the tracker's client, and return its result."""
        self.check()
        self.since, self.is_calling = time.monotonic(), True
        try:
            result = method(*given, **named)
        finally:
            self.since, self.is_calling = time.monotonic(), False
        self.num_calls += 1
        return result

    def note_delivered(self, *what: object) -> None:
        """Count something that was delivered, once for the same content; ids of runs in it are ignored."""
        self.delivered.add(hashlib.sha256(_HEX_ID.sub("", repr(what)).encode()).digest())


class Exporter(Protocol):
    """Delivers a folder to one tracker. Runs in the folder's export thread, but for `begin` and `rewind`."""

    name: str  # the tracker, for messages: "MLflow"
    activity: Activity
    is_local: bool = True  # whether what it delivers to is a file: it opens in seconds, or not at all
    can_be_synced: bool = False  # whether `make sync` knows it

    @property
    def where(self) -> str:
        """Where it delivers to, without credentials."""

    @property
    def run_id(self) -> str | None:
        """The run's id in the tracker; None where it has none."""
        return None

    @property
    def is_connected(self) -> bool:
        """Whether the tracker was reached."""

    @property
    def pending(self) -> str:
        """What is not delivered yet, as words in the plural; '' where that is not reported."""

    @property
    def progress(self) -> str:
        """How much of the folder is delivered."""

    def is_being_made(self) -> bool:
        """Return whether what it delivers to is still being made, by this or another process."""
        return False

    def begin(self) -> None:
        """Record in the folder that it is to be delivered, even if the tracker is never reached."""
        return

    def rewind(self, num_kept: int, cut: Sequence[Mapping[str, Any]]) -> None:
        """Prepare for a run that resumes after its first lines of metrics, and repeats those that were cut off."""
        return

    def deliver(self) -> Iterator[None]:
        """Deliver what is new in the folder; yields wherever another exporter may have its turn.

        May raise anything; a later call delivers what is left.
        """

    def explain(self, error: Exception) -> DeliveryError:
        """Return what an error of `deliver` means, in words and without secrets."""


EXPORTERS: Registry[Callable[..., Exporter]] = Registry("tracker")
"""Name in conf/tracking/ -> makes the exporter of a run's folder: (config, folder, *, is_over, warn)."""
SWEEP_EXPORTERS: Registry[Callable[..., Exporter]] = Registry("tracker of sweeps")
"""Name in conf/tracking/ -> makes the exporter of a sweep's folder; without one a tracker has only the trials' runs."""


def exporters_of(
    trackers: Iterable[TrackingConfig], folder: Path, *, kinds: Mapping[str, Callable[..., Exporter]], **given: Any
) -> list[Exporter]:
    """Return the exporters of those trackers that have one of this kind, EXPORTERS or SWEEP_EXPORTERS."""
    return [kinds[one.type](one, folder, **given) for one in trackers if one.type in kinds]


class FolderExporter(Exporter):
    """An exporter with a file in the folder that remembers what was delivered; another process may deliver the rest.

    Args:
        state_file: the name of that file.
        is_over: whether no process uses the folder, so that a run or sweep whose status says RUNNING was killed.
        warn: takes, once each, what is not as it should be and costs nothing.
    """

    def __init__(
        self, folder: Path, state_file: str, *, is_over: bool = False, warn: Warn, activity: Activity | None = None
    ) -> None:
        self.folder = folder
        self.activity = activity or Activity()
        self._state_file = folder / state_file
        self._is_over = is_over
        self._warn = warn
        self._warned: set[str] = set()
        self._files: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = {}
        self._state: dict[str, Any] = self._load_state()

    @abstractmethod
    def _load_state(self) -> dict[str, Any]:
        """Return what the state file says; where it says nothing that can be used, the state to start from."""

    def begin(self) -> None:
        self._save_state()

    def explain(self, error: Exception) -> DeliveryError:
        is_lasting = error.is_lasting if isinstance(error, DeliveryError) else isinstance(error, TowlineError)
        return DeliveryError(secrets.clean(one_line(error, MOST_CHARACTERS)), is_lasting=is_lasting)

    def warn_once(self, text: str) -> None:
        """Warn of something, unless that was done."""
        text = secrets.clean(text)
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def _save_state(self, **changes: Any) -> None:
        self.activity.check()
        self._state |= changes
        try:
            write_json(self._state_file, self._state)
        except OSError as error:
            lost = f"what {self.name} has is not remembered, and is looked up there the next time"
            self.warn_once(f"{self._state_file} can't be written ({error.strerror}): {lost}")

    def _deliver_once(self, what: str, do: Callable[[], None], version: Any = True) -> None:
        """Do what was not done yet for this version of what the folder holds."""
        if self._state.get(what) != version:
            do()
            self._save_state(**{what: version})

    def _set_aside(self, error: DamagedFileError, then: str) -> None:
        """Rename a damaged state file, and warn of it."""
        kept = next(file for file in numbered(self._state_file, ".damaged") if not os.path.lexists(file))
        try:
            os.replace(self._state_file, kept)
            then += f" It is kept as {kept.name}."
        except OSError:  # it stays where it is
            pass
        self.warn_once(f"{error} {then}")

    @property
    def _num_delivered(self) -> int:
        """How many lines of metrics were delivered."""
        return int(self._state.get("lines", 0))

    def _metrics(self) -> list[dict[str, Any]]:
        return self._lines(METRICS, read_step_log)

    def _lines(self, name: str, read: Callable[[Path, str], list[LogLine]]) -> list[dict[str, Any]]:
        """Return what the whole lines of a file that grows say."""
        try:
            status = os.stat(self.folder / name)
            version = (status.st_ino, status.st_size)
        except OSError:  # that it is not there, or can't be read, is for its reader to say
            version = (-1, -1)
        known, lines = self._files.get(name, ((0, 0), []))
        if known != version or version == (-1, -1):
            lines = [line.content for line in read(self.folder, name)]
            self._files[name] = (version, lines)
        return lines


def numbered(file: Path, ending: str) -> Iterator[Path]:
    """Yield names for a file that is moved away: with the ending, and with the ending and -2, -3 and so on."""
    for number in count(1):
        yield file.with_name(f"{file.name}{ending}{f'-{number}' if number > 1 else ''}")


def exhaust(turns: Iterator[None]) -> None:
    """Deliver in one turn."""
    for _ in turns:
        pass
