"""The time and memory that a chat template may use, counted while it renders one chat.

The template counts what it makes (sandbox). What it does in between is interrupted from another thread once the time is
up (docs/decisions/0035).
"""

import ctypes
import math
import threading
import time
from collections.abc import Mapping, MappingView
from queue import SimpleQueue
from typing import Any

from jinja2.utils import Namespace

from src.errors import LimitError

SECONDS, SECONDS_PER_MIB = 1.0, 4.0
"""The processor time of a chat, and of each MiB of its texts. Most chats take less than a millisecond."""
MAX_SIZE = 2**25  # the most characters of one text, or of one list with what is in it: see ENTRY and NAMED_ENTRY
MAX_MADE = 2**29  # the most characters of everything that is made for one chat
ENTRY, NAMED_ENTRY = 16, 128  # the size in characters that an entry of a list, or of a dict, counts as
LARGE, CLOCK_MASK = 2**16, 63
"""The clock is read after a value of this size, and whenever the count of made things has none of these bits."""
WATCH_SECONDS = 0.05
WALL_SECONDS_PER_CPU_SECOND = 10  # the limit where another thread's processor time is not available


class Budget:
    """What rendering one chat may still use."""

    __slots__ = ("begun", "count", "is_fired", "is_over", "left", "lock", "seconds", "thread", "until")

    def __init__(self, seconds: float, size: float) -> None:
        self.thread, self.begun = threading.get_ident(), time.monotonic()
        self.lock, self.is_over, self.is_fired = threading.Lock(), False, False
        self.seconds, self.until = seconds, time.thread_time() + seconds
        self.left, self.count = size, 0

    def spend(self, size: int) -> None:
        """Count something that was made, by its size; LimitError where it is too large, or too late."""
        self.left -= size
        self.count += 1
        if size > MAX_SIZE:
            raise LimitError(f"makes a text or list of more than {MAX_SIZE:,} characters")
        if self.left < 0:
            raise LimitError(f"makes more than {MAX_MADE:,} characters")
        if (size > LARGE or not self.count & CLOCK_MASK) and time.thread_time() > self.until:
            raise LimitError(self.timeout)

    def is_late(self) -> bool:
        """Return whether the time is up, asked from another thread than the one that renders."""
        if not hasattr(time, "pthread_getcpuclockid"):  # macOS
            return time.monotonic() - self.begun > WALL_SECONDS_PER_CPU_SECOND * self.seconds
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread)) > self.until

    @property
    def timeout(self) -> str:
        return f"does not terminate within {self.seconds:.3g} s"


class OutOfTime(BaseException):
    """Raised in a thread that renders for too long; no Exception, so that no template's code catches it."""


class Watchdog:
    """A thread that interrupts renderings whose time is up; only Python code can be interrupted."""

    def __init__(self) -> None:
        self._begun: SimpleQueue[Budget] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, budget: Budget) -> None:
        if self._thread is None or not self._thread.is_alive():  # not yet started, or lost in a fork
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._watch, name="templates", daemon=True)
                    self._thread.start()
        self._begun.put(budget)

    def end(self, budget: Budget) -> None:
        """Stop watching a rendering. May be called twice: an interruption may arrive during the first call."""
        with budget.lock:
            budget.is_over = True
            if budget.is_fired:
                _raise_in(budget.thread, None)

    def _watch(self) -> None:
        running: list[Budget] = []
        while True:
            if not running:
                running.append(self._begun.get())
            time.sleep(WATCH_SECONDS)
            while not self._begun.empty():
                running.append(self._begun.get())
            for budget in running:
                with budget.lock:
                    if not budget.is_over and budget.is_late():
                        budget.is_fired = True
                        _raise_in(budget.thread, OutOfTime)
            running = [budget for budget in running if not budget.is_over]


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread as soon as it runs Python code; None cancels that."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


UNLIMITED = Budget(math.inf, math.inf)


class _Rendering(threading.local):
    """The budget of the chat that this thread renders."""

    budget = UNLIMITED


rendering = _Rendering()


def spend(value: Any) -> Any:
    """Count a value that was made, and return it."""
    rendering.budget.spend(len(value) if type(value) is str else size_of(value))
    return value


def size_of(value: Any) -> int:
    """Return the size of a value when it is written out, or a little more than MAX_SIZE."""
    total, stack = 0, [value]
    while stack and total <= MAX_SIZE:
        one = stack.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, list | tuple):
            total += ENTRY * len(one)
            stack += one
        elif isinstance(one, Namespace):
            stack.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, Mapping):
            total += NAMED_ENTRY * len(one)
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, range | MappingView):
            total += ENTRY * len(one)
        elif isinstance(one, int):
            total += one.bit_length() // 3
    return total


def length_of(value: Any) -> int:
    """Return the size of a text or list without what is in it."""
    if isinstance(value, str):
        return len(value)
    return ENTRY * len(value) if isinstance(value, list | tuple) else 0


def check_size(size: int, limit: int) -> None:
    """Raise LimitError where something that is about to be made is too large."""
    if size > limit:
        raise LimitError(f"makes a text, list or number of more than {limit:,} characters or bits")
