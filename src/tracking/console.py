"""What a run prints: what it assembled, how far long work is, results, and where files are."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from src.errors import report, visible
from src.metrics import is_detail
from src.progress import Advance, TimeLeft
from src.terminal import columns_of, filled, shortened, wrapped
from src.tracking.live import LiveLines, Work

LABEL = 12  # columns of the label in front of a line
LONGEST_SAMPLE = 300  # characters of a text of a sample that are shown
REFRESH_SECONDS = 0.1
QUIET_SECONDS = 10.0  # between two lines of progress that is not shown on a terminal
TICK_SECONDS = 1.0  # between two looks at work that says nothing
UNMOVABLE = ("dumb", "unknown")  # terminals without a cursor that moves


class Console:
    """Prints to a stream; work under way is drawn in place on a terminal, and printed now and then elsewhere.

    A Progress. May be used from several threads.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_live = self._stream.isatty() and os.environ.get("TERM") not in UNMOVABLE
        self._lines = LiveLines(self._stream)
        self._lock = threading.RLock()
        self._works: list[Work] = []  # under way, each within the one before
        self._notice: Work | None = None  # what `working` said last
        self._training: Work | None = None
        self._last_refresh = 0.0
        self.pace: dict[str, float] = {}  # seconds a batch, of the longest work of each kind that has ended
        self._longest: dict[str, int] = {}  # units of it

    @property
    def columns(self) -> int | None:
        """The width of the terminal; None where it prints to none."""
        return columns_of(self._stream)

    def say(self, text: str = "", *, is_painted: bool = False, hang: int | None = None) -> None:
        """Print lines that stay, each made to fit a terminal, with `hang` as of `wrapped`.

        Control characters are written out, unless the text is painted: then they are colours, meant for the terminal.
        """
        text = text if is_painted else visible(text)
        self._print(wrapped(text, self.columns, hang=hang))

    def label(self, label: str, text: str, *, is_painted: bool = False) -> None:
        """Print a line with its label in the first column; further lines of the text are indented below."""
        text = text if is_painted else visible(text)
        lines = wrapped(text, None if self.columns is None else self.columns - LABEL).split("\n")
        for number, line in enumerate(lines):
            self._print(f"{visible(label) if number == 0 else '':<{LABEL}}{line}")

    def warn(self, text: str) -> None:
        """Print a warning to the error stream."""
        with self._lock:
            self._lines.close()
            report(f"warning: {text}")
            self._redraw(is_due=bool(self._training or self._works))

    def close(self) -> None:
        """Remove what is drawn in place."""
        with self._lock:
            self._notice = self._training = None
            self._lines.close()

    @contextmanager
    def work(
        self, kind: str, what: str = "", total: int | None = None, unit: str = "rows", batch: int = 1
    ) -> Iterator[Advance]:
        """See Progress.work; its pace is kept when it ends."""
        work = Work(f"{kind} {what}".rstrip(), total, unit)
        with self._lock:
            self._notice = None
            self._works.append(work)
            if self._is_live:
                self._redraw(is_due=True)
        is_over = threading.Event()
        threading.Thread(target=self._tick, args=(work, is_over), name="progress", daemon=True).start()

        def advance(count: int = 1, detail: str = "") -> None:
            with self._lock:
                work.details = [detail] if detail else []
                if count:
                    work.advance(count)
                self._show(work)

        try:
            yield advance
        finally:
            is_over.set()
            with self._lock:
                self._works.remove(work)
                self._redraw(is_due=True)
        if work.done >= self._longest.get(kind, 1):  # a short one says less of the pace
            self._longest[kind] = max(1, work.done)
            self.pace[kind] = (time.monotonic() - work.begun) / max(1, math.ceil(work.done / batch))

    def working(self, text: str) -> None:
        """Show how far work of unknown length is, in words."""
        with self._lock:
            self._notice = Work(text, begun=time.monotonic() if self._notice is None else self._notice.begun)
            self._show(self._notice)

    def begin_training(self, step: int, num_steps: int) -> None:
        """Show how far training is before its next step, which may take long."""
        with self._lock:
            self._notice, self._training = None, Work("step", num_steps, "", step)
            self._redraw(is_due=True)

    def progress(
        self,
        step: int,
        num_steps: int,
        loss: float,
        lr: float,
        tokens_per_second: float,
        left: TimeLeft | None,
        *,
        logged: bool,
    ) -> None:
        """Show how far training is; `left` is how long all that is to come will take."""
        parts = [f"loss {loss:.4f}", f"lr {lr:.1e}", f"{tokens_per_second:>7,.0f} tokens/s"]
        with self._lock:
            self._notice = None
            self._training = work = Work("step", num_steps, "", step, parts)
            if left is not None:
                work.ends, work.is_least = time.monotonic() + left.seconds, left.is_lower_bound
            if self._is_live:
                self._redraw(is_due=step == num_steps)
            elif logged:
                self.say("  ".join([f"step {step:>{len(str(num_steps))}}/{num_steps}", *parts, work.left]))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print an evaluation's metrics, a set after the other, without details."""
        by_set: dict[str, list[str]] = {}
        for name, value in metrics.items():
            _, set_name, metric = name.split("/", 2)
            if not is_detail(name):
                by_set.setdefault(set_name, []).append(visible(f"{metric} {value:.4f}"))
        for set_name, values in by_set.items():
            begin = visible(f"  evaluated at step {step}: {set_name}")
            self._print(filled(begin, values, self.columns, hang=6))

    def samples(self, samples: Sequence[Any]) -> None:
        """Print samples: the prompt, the text that the model wrote, the answer in it, and what was expected.

        Text and answer are shown once where they are the same; line ends and such are written out.
        """
        for one in samples:
            texts = {"text": one.text, "answer": one.answer, "expected": one.reference}
            if one.text == one.answer:
                del texts["text"]
            lines = {name: _shown(text) for name, text in texts.items()}
            lines[next(iter(lines))] += f"   [{one.stop_reason}]"
            self._labelled({"prompt": _shown(one.prompt), **lines})

    def texts(self, texts: Mapping[str, str]) -> None:
        """Print texts of a prompt, which is the first of them, each with its label; line ends are written out."""
        self._labelled({label: _shown(text) for label, text in texts.items()})

    def _labelled(self, lines: Mapping[str, str]) -> None:
        for number, (label, line) in enumerate(lines.items()):
            begin = f"  {label}" if number == 0 else f"    {label}"
            self.say(f"{begin:<{LABEL + 2}}{line}", hang=LABEL + 2)

    def table(self, summary: Mapping[str, Any]) -> None:
        """Print numbers by name."""
        longest = max(len(name) for name in summary)
        for name, value in summary.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            if isinstance(value, float):
                shown = f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:,.4f}"
            self.say(f"  {name:<{longest}}  {shown:>16}")

    def _tick(self, work: Work, is_over: threading.Event) -> None:
        """Show that a work is under way while it says nothing."""
        while not is_over.wait(TICK_SECONDS):
            with self._lock:
                if work in self._works:
                    self._show(work)

    def _show(self, work: Work) -> None:
        """Show how far a work is, where it is time to."""
        if self._is_live:
            self._redraw()
        elif time.monotonic() - max(self._last_refresh, work.begun) >= QUIET_SECONDS:
            self._last_refresh = time.monotonic()
            self.say(work.line)

    def _redraw(self, *, is_due: bool = False) -> None:
        """Draw what is under way, if it is due or some time after it was drawn last."""
        if not self._is_live or not (is_due or time.monotonic() - self._last_refresh >= REFRESH_SECONDS):
            return
        self._last_refresh = time.monotonic()
        if works := [work for work in (self._training, *self._works, self._notice) if work is not None]:
            self._lines.draw(works)
        else:
            self._lines.close()

    def _print(self, text: str) -> None:
        with self._lock:
            self._lines.close()
            print(text, file=self._stream, flush=True)
            if self._training or self._works:
                self._redraw(is_due=True)


def _shown(text: str) -> str:
    return shortened(repr(text)[1:-1], LONGEST_SAMPLE) or "(nothing)"
