"""What a run says in the terminal: what it assembled, a live line while it trains, results, and where things lie."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from src.errors import report, visible

LABEL = 12  # columns of the label in front of a line
REFRESH_SECONDS = 0.1
QUIET_SECONDS = 10.0  # between two lines of progress where nobody watches


class Console:
    """Prints to a stream; the progress line is rewritten in place on a terminal and printed now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_live = self._stream.isatty()
        self._line_open = False
        self._last_refresh = 0.0
        self._started: float | None = None
        self._first_step = 0

    def say(self, text: str = "", *, is_painted: bool = False) -> None:
        """Print a line that stays.

        Args:
            is_painted: its control characters are colours, meant for the terminal; else they are written out.
        """
        self._close_line()
        print(text if is_painted else visible(text), file=self._stream, flush=True)

    def label(self, label: str, text: str, *, is_painted: bool = False) -> None:
        """Print a line with its label in a column of its own; further lines of the text are indented below."""
        first, *rest = text.split("\n")
        self.say(f"{label:<{LABEL}}{first}", is_painted=is_painted)
        for line in rest:
            self.say(" " * LABEL + line, is_painted=is_painted)

    def warn(self, text: str) -> None:
        """Print a warning to the error stream."""
        self._close_line()
        report(f"warning: {text}")

    def working(self, text: str) -> None:
        """Show how far long work is that comes before training: in place on a terminal, now and then elsewhere."""
        now = time.monotonic()
        if not self._is_live:
            if now - self._last_refresh >= QUIET_SECONDS:
                if self._last_refresh:
                    self.say(text)
                self._last_refresh = now
        elif now - self._last_refresh >= REFRESH_SECONDS:
            self._last_refresh = now
            self._stream.write(f"\r\x1b[2K{visible(text, is_line=True)}")
            self._stream.flush()
            self._line_open = True

    def progress(
        self, step: int, num_steps: int, loss: float, lr: float, tokens_per_second: float, *, logged: bool
    ) -> None:
        """Show how far training is; time left is judged by all that happened so far, evaluations included."""
        elapsed = time.monotonic()
        if self._started is None:
            self._started, self._first_step = elapsed, step
        spent, done = elapsed - self._started, step - self._first_step
        left = spent / done * (num_steps - step) if done else 0.0
        width = len(str(num_steps))
        line = (
            f"step {step:>{width}}/{num_steps}  loss {loss:.4f}  lr {lr:.1e}  {tokens_per_second:>7,.0f} tokens/s"
            f"  {clock(left) if done else '?'} left"
        )
        if not self._is_live:
            if logged:
                self.say(line)
        elif elapsed - self._last_refresh >= REFRESH_SECONDS or step == num_steps:
            self._last_refresh = elapsed
            self._stream.write(f"\r\x1b[2K{line}")
            self._stream.flush()
            self._line_open = True

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print an evaluation's metrics, a line a set."""
        by_set: dict[str, list[str]] = {}
        for name, value in metrics.items():
            _, set_name, metric = name.split("/", 2)
            by_set.setdefault(set_name, []).append(f"{metric} {value:.4f}")
        for set_name, values in by_set.items():
            self.say(f"  evaluated at step {step}: {set_name}  {'  '.join(values)}")

    def samples(self, samples: Sequence[Any]) -> None:
        """Print samples: prompt, what the model wrote, and what was expected."""
        for one in samples:
            self.say(f"  {_shown(one.prompt)} → {_shown(one.text)}   [{one.stop_reason}]")
            self.say(f"      answer {_shown(one.answer)}   expected {_shown(one.reference)}")

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print the run's final numbers."""
        width = max(len(name) for name in summary)
        for name, value in summary.items():
            shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            if isinstance(value, float) and value and abs(value) < 1e-3:
                shown = f"{value:.3e}"
            self.say(f"  {name:<{width}}  {shown:>16}")

    def _close_line(self) -> None:
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False


def clock(seconds: float) -> str:
    """Give a duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(text: str) -> str:
    return textwrap.shorten(repr(text)[1:-1], width=300, placeholder=" …")
