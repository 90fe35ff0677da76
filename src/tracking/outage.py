"""When a tracker takes nothing of what it is sent, and when it works again: each is said once."""

import time

from src.tracking.exporters import Exporter

OUTAGE_SECONDS = 30.0  # without anything delivered, although there is something to deliver
STEADY_SECONDS = 60.0  # that a tracker works before its outage counts as over: one that comes and goes is one outage


class OutageWatch:
    """Notes how the deliveries of one exporter go, and says what is new of an outage. Moments are time.monotonic's.

    A tracker that is slow and gets something through has no outage, however long it takes.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._waiting_since: float | None = None  # with nothing delivered since; None: nothing is to be delivered
        self._works_since: float | None = None  # with no failure since
        self._num_delivered = 0
        self._is_told = False

    def expect(self) -> None:
        """Note that there is something to deliver."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()

    def note_success(self) -> None:
        """Note that all was delivered."""
        self._waiting_since = None
        if self._works_since is None:
            self._works_since = time.monotonic()

    def note_failure(self) -> None:
        """Note that a delivery failed."""
        self._works_since = None

    def warning(self, problem: str) -> str:
        """Return what is to be said of an outage, once; '' where there is none.

        `problem` is why the last delivery failed, or ''. A call that has not returned explains an outage too.
        """
        now, activity = time.monotonic(), self._exporter.activity
        if (num_delivered := len(activity.delivered)) > self._num_delivered:
            self._num_delivered = num_delivered
            self._waiting_since = now
        if self._is_told or self._waiting_since is None:
            return ""
        begun = self._waiting_since
        if not problem:
            begun = max(begun, activity.since + activity.extra_seconds) if activity.is_calling else now
        if now - begun < OUTAGE_SECONDS:
            return ""
        self._is_told = True
        return (
            f"{self._where} has taken nothing for {now - self._waiting_since:.0f} seconds ({problem or 'no answer'}). "
            "Nothing waits for it; what is missing is delivered when it works again."
        )

    def good_news(self, *, is_last: bool = False) -> str:
        """Return what is to be said of an outage that is over, once; '' where there is nothing to say.

        `is_last`: nothing else will be delivered, so that it need not have worked for a while.
        """
        if not self._is_told or self._works_since is None:
            return ""
        if not is_last and time.monotonic() - self._works_since < STEADY_SECONDS:
            return ""
        self._is_told = False
        return f"{self._where} works again: what was missing is delivered"

    @property
    def _where(self) -> str:
        return f"{self._exporter.name} at {self._exporter.where}"
