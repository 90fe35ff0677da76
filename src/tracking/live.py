"""Lines that show how far long work is, drawn in place at the end of a terminal. rich draws them."""

import atexit
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from src.errors import visible
from src.runtime.launch import CopiedStream
from src.terminal import columns_of, cut_to, width

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

NARROWEST_BAR, WIDEST_BAR = 8, 30  # columns


@dataclass
class Work:
    """Long work that is under way."""

    title: str
    total: int | None = None  # None: unknown
    unit: str = "rows"
    done: int = 0
    details: Sequence[str] = ()  # shown where there is room; the last one goes first
    ends: float | None = None  # when it will have ended, on the monotonic clock; None: not known
    is_least: bool = False  # whether it will take longer
    begun: float = field(default_factory=time.monotonic)
    first: int = field(init=False)  # how much was done when it began here

    def __post_init__(self) -> None:
        self.first = self.done

    @property
    def left_seconds(self) -> float | None:
        """How long it still takes; None where that can't be said yet."""
        return None if self.ends is None else max(0.0, self.ends - time.monotonic())

    def advance(self, count: int) -> None:
        """Count what is done; of several processes this one counts what all do, which may be less at the end."""
        self.done = self.done + count if self.total is None else min(self.total, self.done + count)
        if self.total and self.done > self.first:
            now = time.monotonic()
            self.ends = now + (now - self.begun) / (self.done - self.first) * (self.total - self.done)

    @property
    def left(self) -> str:
        """The time left, in words; for work whose length is unknown, the time that it takes already."""
        if self.total is None:
            spent = time.monotonic() - self.begun
            return clock(spent) if spent >= 1 else ""
        seconds = self.left_seconds
        return "? left" if seconds is None else f"{'over ' if self.is_least else ''}{clock(seconds)} left"

    @property
    def line(self) -> str:
        """How far it is, as a line of a log."""
        count = f"{self.done:,} of {self.total:,} {self.unit}" if self.total is not None else ""
        if not count and self.done:
            count = f"{self.done:,} {self.unit}"
        begin = f"{self.title}: {count}" if count else self.title
        return "  ".join(part for part in (begin, *self.details, self.left) if part)


class LiveLines:
    """Draws work under way below what is printed; on a terminal only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Live | None = None

    def draw(self, works: Sequence[Work]) -> None:
        """Draw a line for each work in place of those that are drawn."""
        from rich.console import Group

        room = (columns_of(self._stream) or 80) - 1  # the last column stays free, or the terminal begins another line
        with self._drawing(len(works)):
            live = self._live or self._open()
            live.console.width = room
            live.update(Group(*(_drawn(work, room) for work in works)), refresh=True)

    def close(self) -> None:
        """Remove the lines; what is printed next takes their place."""
        if self._live is not None:
            with self._drawing(0):
                self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def _drawing(self, num_lines: int) -> AbstractContextManager[None]:
        """Keep what is drawn out of a log that the stream is copied to."""
        return self._stream.drawing(num_lines) if isinstance(self._stream, CopiedStream) else nullcontext()

    def _open(self) -> "Live":
        """Begin to draw. What is written through sys.stdout and sys.stderr meanwhile is put above the lines."""
        from rich.console import Console as Terminal
        from rich.live import Live

        on_terminal = {name: getattr(sys, name).isatty() for name in ("stdout", "stderr")}
        redirected = {f"redirect_{name}": is_terminal for name, is_terminal in on_terminal.items()}
        terminal = Terminal(file=self._stream, force_terminal=True, highlight=False, markup=False)
        self._live = live = Live(console=terminal, auto_refresh=False, transient=True, **redirected)
        live.start()
        terminal.show_cursor(True)  # a process that is killed leaves the terminal as it was
        atexit.register(self.close)
        return live


def _drawn(work: Work, room: int) -> "RenderableType":
    """Draw a work as: title, how much is done, a bar, details, time left; what has no room is left out."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    title = visible(work.title, is_line=True)
    if work.total is None:
        count = f"{work.done:,} {work.unit}" if work.done else ""
        return Text(cut_to("  ".join(part for part in (title, count, work.left) if part), room), no_wrap=True)
    unit = f" {work.unit}" if work.unit else ""
    begin = f"{title} {work.done:>{len(f'{work.total:,}')},}/{work.total:,}{unit}"
    details, left = [*work.details], work.left
    while details and width("  ".join([begin, *details, left])) > room:
        details.pop()
    end = "  ".join([*details, left])
    bar = min(WIDEST_BAR, room - width(f"{begin}  {end}") - 2)
    if bar < NARROWEST_BAR:
        return Text(cut_to(f"{begin}  {end}", room), no_wrap=True)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(begin), ProgressBar(total=work.total, completed=work.done, width=bar), Text(end))
    return grid


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
