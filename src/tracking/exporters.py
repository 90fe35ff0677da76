"""What an exporter is: it keeps one tracker up to date with a folder, reading the folder's files.

So training never waits for a tracker, one that is gone costs a warning, and what is missing can be delivered later from
the same files. A tracker of one's own is a `LineExporter` (src/tracking/line_exporter.py), registered under the name of
its YAML in conf/tracking/.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from src.registry import Registry

_HEX_ID = re.compile(r"\b[0-9a-f]{32}\b")


class DeliveryError(Exception):
    """A tracker can't be used; says why and what to do.

    Args:
        is_lasting: whether a retry is useless until the user has fixed something.
    """

    def __init__(self, text: str, *, is_lasting: bool = True) -> None:
        super().__init__(text)
        self.is_lasting = is_lasting


class Cancelled(Exception):
    """Nobody waits for this delivery any more, and the folder may be another process's."""


class Activity:
    """What an exporter is doing, for those who wait for it."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        """When the last call began or ended, by the monotonic clock."""
        self.is_calling = False
        self.num_calls = 0
        """How many calls have succeeded."""
        self.extra_seconds = 0.0
        """How much longer than others the present call may take."""
        self.is_cancelled = False
        self._delivered: set[bytes] = set()

    @property
    def num_delivered(self) -> int:
        """How many things were delivered, each counted once, however often it was delivered."""
        return len(self._delivered)

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
        self._delivered.add(hashlib.sha256(_HEX_ID.sub("", repr(what)).encode()).digest())


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
