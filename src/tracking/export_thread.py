"""The thread in which a folder's exporters deliver: training never waits for a tracker.

The exporters take turns, so a slow one holds up another for no longer than its turn; where a single call lasts longer,
a new thread takes over. What waits is the end of a run, for as long as calls deliver something new and within bounds,
and the command that delivers what is left, for as long as calls deliver something new.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from src.tracking.exporters import Exporter, Warn
from src.tracking.outage import OutageWatch

RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60.0
LONGEST_LAST_RETRY_SECONDS = 8.0
TURN_SECONDS = 5.0  # that an exporter may deliver before another one that is ready has its turn
OPENING_SECONDS = 5.0  # that what is local may take between two calls; not counted while it is being made
HEARTBEAT_SECONDS = 0.5
BUSY_CPU_SHARE = 0.05  # of a processor, from which on a process counts as computing, not waiting
CPU_SHARE = 0.1  # of a processor that an exporter may take from the training
LONGEST_PAUSE_SECONDS = 10.0
SERVER_SECONDS = 1.0  # that a sweep waits for a server before its trials start


@dataclass(frozen=True)
class WaitLimits:
    """How long the end of a run, or a command, waits for its exporters."""

    call_seconds: float  # for one call
    total_seconds: float = math.inf  # in all, while calls succeed
    attempts: int = 2  # of what fails, with nothing delivered in between that was not delivered before
    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that end the waiting


END_OF_RUN = WaitLimits(call_seconds=30.0, total_seconds=120.0)
AFTER_STOP = WaitLimits(call_seconds=10.0, total_seconds=10.0, signals=(signal.SIGINT,))
"""Limits of a run that was asked to stop: schedulers kill after half a minute, and repeat their signals."""
UNTIL_DELIVERED = WaitLimits(call_seconds=90.0, attempts=4)  # of a command that does nothing but deliver


@dataclass(frozen=True)
class Undelivered:
    """What an exporter could not deliver, and why, in words."""

    tracker: str
    reason: str
    needs_user_action: bool  # whether a retry is useless until the user has fixed what `reason` says
    can_be_synced: bool  # whether `make sync` delivers it

    def __str__(self) -> str:
        return f"{self.tracker}: {self.reason}"


class ExportThread:
    """Delivers a folder by its exporters, until `close`.

    Args:
        cleanup: an exporter whose last turn comes once all others are over.
        waits: hold everything back until `rewind`: it is not known yet which lines of the folder stay.
        pause_seconds: at most, before the first delivery; `release` ends it too: trackers' libraries take a second and
            more to be imported, which would slow down what is imported for the run, and its first steps.
        warn: takes, once each, the problems that the user must fix, and outages.
        say: takes the end of an outage.
    """

    def __init__(
        self,
        exporters: Sequence[Exporter],
        *,
        cleanup: Exporter | None = None,
        waits: bool = False,
        pause_seconds: float = 0.0,
        warn: Warn,
        say: Callable[[str], None] = print,
    ) -> None:
        self.exporters = exporters
        for exporter in exporters:
            exporter.begin()
        self._cleanup = cleanup
        self._lanes = [_Lane(one) for one in (*exporters, *([cleanup] if cleanup else []))]
        for lane in self._lanes:
            lane.pause(pause_seconds)
        self._is_held = pause_seconds > 0
        self._waits = waits
        self._warn, self._say = warn, say
        self._warned: set[str] = set()
        self._limits = END_OF_RUN
        self._is_closing = False
        self.ended_by = ""  # the signal that ended the waiting, or ''
        self._changed = threading.Condition()
        self._current: _Lane | None = None
        self._start_thread()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._work, name="export", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id in the first tracker that has one."""
        return next((one.run_id for one in self.exporters if one.run_id is not None), None)

    def notify(self) -> None:
        """Deliver what changed in the folder, in the thread; returns at once."""
        if not self._waits:
            with self._changed:
                for lane in self._lanes:
                    lane.is_notified = True
                    lane.outage.expect()
                self._replace_stuck_thread()
                self._changed.notify_all()
            self._report_outages()  # of a call that hangs too, where the export thread can say nothing

    def rewind(self, num_kept: int, cut: Sequence[Mapping[str, Any]]) -> None:
        """Deliver from now on, after the first lines of metrics; those that were cut off will be repeated."""
        if self._waits:
            for exporter in self.exporters:
                exporter.rewind(num_kept, cut)
            self._waits = False
        self.notify()

    def release(self) -> None:
        """End the pause before the first delivery, if it is not over."""
        if self._is_held:
            self._is_held = False
            for lane in self._lanes:
                lane.pause(0.0)

    def connect(self) -> None:
        """Wait until each tracker was reached, but not for a server that is slow or gone."""
        self.notify()
        started = time.monotonic()
        for lane in self._lanes:
            heartbeat = _Heartbeat(lane.exporter)
            while not lane.exporter.is_connected and not lane.last_error:
                until = heartbeat.last() + OPENING_SECONDS if lane.exporter.is_local else started + SERVER_SECONDS
                if time.monotonic() > until:
                    break
                time.sleep(0.02)

    def close(self, limits: WaitLimits = END_OF_RUN, show: Callable[[str], None] | None = None) -> list[Undelivered]:
        """Deliver the rest, and return what is left; `show` takes how far it has got, again and again."""
        started = time.monotonic()
        with self._changed:
            self._limits, self._is_closing = limits, True
            for lane in self._lanes:
                lane.prepare_last()
            self._changed.notify_all()
        with _noted(limits.signals) as received:
            while waiting := [lane for lane in self._lanes if not lane.is_over]:
                if received:
                    break
                for lane in waiting:
                    if reason := self._timeout_reason(lane, started):
                        self._give_up(lane, reason)
                if show is not None and time.monotonic() - started > 1.0:
                    slow = waiting[0]
                    why = f"; {slow.last_error}" if slow.last_error else ""
                    show(f"{slow.exporter.name} has {slow.exporter.progress}{why}")
                with self._changed:
                    self._replace_stuck_thread()
                    self._changed.wait(0.05)
        self.ended_by = received[0] if received else ""
        for lane in self._lanes:
            lane.exporter.activity.is_cancelled = True
        for text in filter(None, [lane.outage.good_news(is_last=True) for lane in self._lanes if lane.is_delivered]):
            self._say(text)
        left = [lane for lane in self._lanes if not lane.is_delivered and lane.exporter.pending]
        return [lane.undelivered(f"ended by {self.ended_by}") for lane in left]

    def _timeout_reason(self, lane: "_Lane", started: float) -> str:
        """Return why an exporter is not waited for any more, or ''."""
        now, limits, activity = time.monotonic(), self._limits, lane.exporter.activity
        if now - started > limits.total_seconds:
            return f"not all of it in {limits.total_seconds:g} seconds"
        if lane is not self._current and not lane.is_stuck:
            return ""
        last = max(activity.since, started, lane.turn_began)
        if activity.is_calling or not lane.exporter.is_local:
            seconds = limits.call_seconds + activity.extra_seconds
        else:
            seconds, last = OPENING_SECONDS, max(last, lane.heartbeat.last())
        return "no answer" if now - last > seconds else ""

    def _give_up(self, lane: "_Lane", reason: str) -> None:
        """Stop waiting for an exporter; where it has the thread, the others get a new one."""
        with self._changed:
            lane.end(reason)
            lane.exporter.activity.is_cancelled = True
            if lane is self._current:
                self._start_thread()
            self._changed.notify_all()

    def _replace_stuck_thread(self) -> None:
        """Start a new thread for the others where a call of the present exporter lasts longer than a turn."""
        lane, now = self._current, time.monotonic()
        if lane is None or lane.is_stuck or not lane.exporter.activity.is_calling:
            return
        since = max(lane.exporter.activity.since, lane.turn_began)
        others = [other for other in self._lanes if other is not lane and other.exporter is not self._cleanup]
        if now - since > TURN_SECONDS and any(self._is_ready(other, now) for other in others):
            lane.is_stuck = True
            self._start_thread()

    def _work(self) -> None:
        while (lane := self._next_lane()) is not None:
            self._take_turn(lane)
            with self._changed:
                lane.is_stuck = False
                self._changed.notify_all()
            self._report_outages()

    def _next_lane(self) -> "_Lane | None":
        """Wait for the exporter whose turn it is; None where all are over, or another thread has taken over."""
        with self._changed:
            while self._thread is threading.current_thread():
                self._current = None
                now = time.monotonic()
                if all(lane.is_over for lane in self._lanes):
                    return None
                if ready := [lane for lane in self._lanes if self._is_ready(lane, now)]:
                    self._current = min(ready, key=lambda lane: lane.turn_began)
                    self._current.turn_began = now
                    return self._current
                pauses = [lane.paused_until - now for lane in self._lanes if lane.has_work and lane.paused_until > now]
                self._changed.wait(min(pauses, default=None))
        return None

    def _is_ready(self, lane: "_Lane", now: float) -> bool:
        if lane.is_over or lane.is_stuck or not lane.has_work or lane.paused_until > now:
            return False
        if lane.exporter is not self._cleanup:
            return True
        others = [other for other in self._lanes if other is not lane]
        return all(other.is_over if self._is_closing else not other.is_stuck for other in others)

    def _take_turn(self, lane: "_Lane") -> None:
        """Deliver until all is delivered, or until another exporter is ready and this one's time is over."""
        until = time.monotonic() + TURN_SECONDS
        is_first = not lane.exporter.is_connected
        try:
            for _ in lane.turns(is_last=self._is_closing):
                now = time.monotonic()
                if now > until and any(self._is_ready(other, now) for other in self._lanes if other is not lane):
                    return
        except Exception as error:  # whatever a tracker's library raises: the folder is the truth, so training proceeds
            self._note_failure(lane, error)
        else:
            with self._changed:
                lane.note_success()
                lane.pause(0.0 if self._is_closing or is_first else min(lane.used / CPU_SHARE, LONGEST_PAUSE_SECONDS))

    def _note_failure(self, lane: "_Lane", error: Exception) -> None:
        """Record why a delivery failed, and when it is tried again, if at all."""
        problem = lane.exporter.explain(error)
        with self._changed:
            if lane.is_over:  # it was given up, and cancelled
                return
            lane.note_failure(str(problem), problem.is_lasting)
            wait = RETRY_SECONDS * 2.0 ** min(lane.failures - 1, 10)
            if lane.is_last:
                lane.pause(min(wait / 2, LONGEST_LAST_RETRY_SECONDS))
                if problem.is_lasting or lane.failures >= self._limits.attempts:
                    lane.end("")
            elif not self._is_closing:
                lane.pause(min(wait, LONGEST_RETRY_SECONDS))
        text = f"{lane.exporter.name}: {problem}"
        if problem.is_lasting and not lane.is_last and text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def _report_outages(self) -> None:
        """Say which trackers are out of reach, and which are not any more; at the end `close` returns what is left."""
        with self._changed:
            lanes = [] if self._is_closing else [lane for lane in self._lanes if lane.exporter is not self._cleanup]
            warnings = [lane.outage.warning(lane.last_error) for lane in lanes if not lane.needs_user_action]
            news = [lane.outage.good_news() for lane in lanes]
        for tell, texts in ((self._warn, warnings), (self._say, news)):
            for text in filter(None, texts):
                tell(text)


@dataclass(eq=False)
class _Lane:
    """The state of one exporter: whether there is work for it, and how its deliveries went."""

    exporter: Exporter
    is_notified: bool = False
    paused_until: float = 0.0  # by the monotonic clock
    turn_began: float = 0.0
    is_last: bool = False  # whether the present delivery began after the folder had changed for the last time
    is_stuck: bool = False  # whether a thread of its own waits for a call that lasted longer than a turn
    is_over: bool = False
    is_delivered: bool = False
    failures: int = 0
    last_error: str = ""  # why the last attempt failed, or ''
    needs_user_action: bool = False
    used: float = 0.0  # seconds of a processor that the present delivery has taken
    _end_reason: str = ""
    _delivery: Iterator[None] | None = None
    _num_before: int = 0

    def __post_init__(self) -> None:
        self.heartbeat = _Heartbeat(self.exporter)
        self.outage = OutageWatch(self.exporter)

    @property
    def has_work(self) -> bool:
        return self.is_notified or self._delivery is not None

    def prepare_last(self) -> None:
        """Schedule the last delivery, as if nothing had failed before."""
        self.is_notified, self.paused_until, self.failures = True, 0.0, 0
        self.last_error, self.needs_user_action = "", False
        self.heartbeat = _Heartbeat(self.exporter)

    def turns(self, *, is_last: bool) -> Iterator[None]:
        """Begin a delivery, or continue the one under way, and count the processor time that it takes."""
        if self._delivery is None:
            self.is_notified, self.is_last = False, is_last
            self._num_before, self.used = len(self.exporter.activity.delivered), 0.0
            self._delivery = self.exporter.deliver()
        began = time.thread_time()
        try:
            for _ in self._delivery:  # not `yield from`, which would end it with this turn
                yield
        finally:
            self.used += time.thread_time() - began

    def note_success(self) -> None:
        self._delivery, self.last_error, self.needs_user_action, self.failures = None, "", False, 0
        self.outage.note_success()
        if self.is_notified:
            self.outage.expect()
        if self.is_last:
            self.is_delivered = True
            self.end("")

    def note_failure(self, reason: str, is_lasting: bool) -> None:
        self._delivery, self.last_error, self.needs_user_action, self.is_notified = None, reason, is_lasting, True
        self.outage.note_failure()
        is_new = len(self.exporter.activity.delivered) > self._num_before
        self.failures = 1 if is_new else self.failures + 1

    def pause(self, seconds: float) -> None:
        self.paused_until = time.monotonic() + seconds

    def end(self, reason: str) -> None:
        if not self.is_over:
            self._end_reason = reason
            self.is_over = True

    def undelivered(self, reason: str) -> Undelivered:
        """Return what is left; `reason` counts where nothing else explains it."""
        why = self.last_error or self._end_reason or reason
        where = f"{self.exporter.name} at {self.exporter.where}"
        text = f"{self.exporter.pending} are not delivered ({why})"
        return Undelivered(where, text, self.needs_user_action, self.exporter.can_be_synced)


class _Heartbeat:
    """When what is being opened last showed progress: it is being made, or this process computes.

    Libraries are imported and tables made before a store is open; both take many seconds on a busy machine.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._at = self._looked = time.monotonic()
        self._used = time.process_time()

    def last(self) -> float:
        """Return when that was, by the monotonic clock."""
        now = time.monotonic()
        if now - self._looked > HEARTBEAT_SECONDS:
            used = time.process_time()
            is_computing = used - self._used > BUSY_CPU_SHARE * (now - self._looked)
            if is_computing or self._exporter.is_being_made():
                self._at = now
            self._looked, self._used = now, used
        return self._at


@contextmanager
def _noted(signals: tuple[signal.Signals, ...]) -> Iterator[list[str]]:
    """Yield a list that collects the names of signals received in the block; only Python's main thread gets them."""
    received: list[str] = []
    gets_signals = threading.current_thread() is threading.main_thread()

    def note(number: int, _frame: FrameType | None) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in signals if gets_signals}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
