"""What a run prints: what it assembled, a live line of progress while it trains, results, and where files are."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from src.errors import report, visible
from src.terminal import columns_of, cut_to, filled, shortened, width, wrapped

LABEL = 12  # columns of the label in front of a line
LONGEST_SAMPLE = 300  # characters of a text of a sample that are shown
REFRESH_SECONDS = 0.1
QUIET_SECONDS = 10.0  # between two lines of progress that is not shown on a terminal


class Console:
    """Prints to a stream; the progress line is rewritten in place on a terminal, and printed now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_live = self._stream.isatty()
        self._line_open = False
        self._last_refresh = 0.0
        self._started: float | None = None
        self._first_step = 0

    def say(self, text: str = "", *, is_painted: bool = False, hang: int | None = None) -> None:
        """Print lines that stay, each made to fit a terminal, with `hang` as of `wrapped`.

        Control characters are written out, unless the text is painted: then they are colours, meant for the terminal.
        """
        text = text if is_painted else visible(text)
        self._print(wrapped(text, columns_of(self._stream), hang=hang))

    def label(self, label: str, text: str, *, is_painted: bool = False) -> None:
        """Print a line with its label in the first column; further lines of the text are indented below."""
        text = text if is_painted else visible(text)
        columns = columns_of(self._stream)
        lines = wrapped(text, None if columns is None else columns - LABEL).split("\n")
        for number, line in enumerate(lines):
            self._print(f"{visible(label) if number == 0 else '':<{LABEL}}{line}")

    def warn(self, text: str) -> None:
        """Print a warning to the error stream."""
        self._close_line()
        report(f"warning: {text}")

    def working(self, text: str) -> None:
        """Show how far long work before training is: in place on a terminal, now and then elsewhere."""
        now, before = time.monotonic(), self._last_refresh
        if now - before < (REFRESH_SECONDS if self._is_live else QUIET_SECONDS):
            return
        self._last_refresh = now
        if self._is_live:
            self._rewrite(cut_to(visible(text, is_line=True), self._room))
        elif before:
            self.say(text)

    def progress(
        self, step: int, num_steps: int, loss: float, lr: float, tokens_per_second: float, *, logged: bool
    ) -> None:
        """Show how far training is; time left is judged by all that happened so far, evaluations included."""
        elapsed = time.monotonic()
        if self._started is None:
            self._started, self._first_step = elapsed, step
        spent, done = elapsed - self._started, step - self._first_step
        left = spent / done * (num_steps - step) if done else 0.0
        parts = {
            "step": f"step {step:>{len(str(num_steps))}}/{num_steps}",
            "loss": f"loss {loss:.4f}",
            "lr": f"lr {lr:.1e}",
            "speed": f"{tokens_per_second:>7,.0f} tokens/s",
            "left": f"{clock(left) if done else '?'} left",
        }
        if not self._is_live:
            if logged:
                self.say("  ".join(parts.values()))
        elif elapsed - self._last_refresh >= REFRESH_SECONDS or step == num_steps:
            self._last_refresh = elapsed
            for least in ("speed", "lr", "loss"):
                if self._room is not None and width("  ".join(parts.values())) > self._room:
                    del parts[least]
            self._rewrite("  ".join(parts.values()))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print an evaluation's metrics, a set after the other."""
        by_set: dict[str, list[str]] = {}
        for name, value in metrics.items():
            _, set_name, metric = name.split("/", 2)
            by_set.setdefault(set_name, []).append(visible(f"{metric} {value:.4f}"))
        for set_name, values in by_set.items():
            begin = visible(f"  evaluated at step {step}: {set_name}")
            self._print(filled(begin, values, columns_of(self._stream), hang=6))

    def samples(self, samples: Sequence[Any]) -> None:
        """Print samples: the prompt, the text that the model wrote, the answer in it, and what was expected.

        Text and answer are shown once where they are the same; line ends and such are written out.
        """
        for one in samples:
            texts = {"text": one.text, "answer": one.answer, "expected": one.reference}
            if one.text == one.answer:
                del texts["text"]
            lines = {f"    {name}": _shown(text) for name, text in texts.items()}
            lines[next(iter(lines))] += f"   [{one.stop_reason}]"
            for name, line in {"  prompt": _shown(one.prompt), **lines}.items():
                self.say(f"{name:<{LABEL + 2}}{line}", hang=LABEL + 2)

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print the run's final numbers."""
        longest = max(len(name) for name in summary)
        for name, value in summary.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            if isinstance(value, float):
                shown = f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:,.4f}"
            self.say(f"  {name:<{longest}}  {shown:>16}")

    @property
    def _room(self) -> int | None:
        """Columns of a line that is rewritten; the last one stays free, or the terminal begins another line."""
        columns = columns_of(self._stream)
        return None if columns is None else columns - 1

    def _rewrite(self, line: str) -> None:
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()
        self._line_open = True

    def _print(self, text: str) -> None:
        self._close_line()
        print(text, file=self._stream, flush=True)

    def _close_line(self) -> None:
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(text: str) -> str:
    return shortened(repr(text)[1:-1], LONGEST_SAMPLE) or "(nothing)"
