"""What a run says when it has ended: what training changed, what it took, where all is and what can be done with it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.metrics import greater_is_better, has_direction, is_detail
from src.tracking.console import Console
from src.tracking.live import clock
from src.tracking.run_folder import SUMMARY
from src.tracking.step_logs import METRICS, SAMPLES
from src.util import human_bytes

CHANGING = ("train/loss", "eval/")


@dataclass
class MetricHistory:
    """The first and the best value of every metric that training improves, each with its step; and its last step."""

    first: dict[str, tuple[int, float]] = field(default_factory=dict)
    best: dict[str, tuple[int, float]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    untrained_loss: float | None = None  # of the rows of step 1

    def add_step(self, step: int, loss: float) -> None:
        """Note the loss of step 1, which was computed before the model was trained."""
        if step == 1:
            self.untrained_loss = loss

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line of metrics; of equally good ones the earlier is the best."""
        for name, value in metrics.items():
            if not (name.startswith(CHANGING) and has_direction(name)):
                continue
            self.first.setdefault(name, (step, value))
            self.last[name] = step
            sign = 1 if greater_is_better(name) else -1
            if name not in self.best or sign * value > sign * self.best[name][1]:
                self.best[name] = step, value

    def best_metrics(self) -> dict[str, float]:
        """Return the best values of evaluations as summary.json names them."""
        return {f"best/{name}": value for name, (_, value) in self.best.items() if name.startswith("eval/")}


def show_end(
    console: Console,
    folder: Path,
    history: MetricHistory,
    summary: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Print the end of a run; `samples` are the lines of samples.jsonl."""
    console.close()
    console.say()
    for line in changes(history, summary, console.columns):
        console.say(line)
    if samples:
        _show_change(console, samples)
    console.say()
    console.label("took", took(summary))
    console.label("model", str(folder / "model"))
    console.label("numbers", f"{folder / SUMMARY}, {METRICS}, {SAMPLES} beside it")
    for label, command in next_commands(folder).items():
        console.label(label, command)


def changes(history: MetricHistory, summary: Mapping[str, float], columns: int | None = None) -> list[str]:
    """Return a table of what training changed: the first, the last and the best value of each metric.

    Where it has no room in `columns`, the steps of the values are left out.
    """
    names = [name for name in history.first if name in summary and not is_detail(name)]
    if not names:
        return []
    full, short = ([("", "first", "last", "best")] for _ in range(2))
    for name in names:
        (begun, first), (best_step, best) = history.first[name], history.best[name]
        has_first, when = begun != history.last[name], f"step {begun}"
        if name == "train/loss" and history.untrained_loss is not None:
            has_first, first, when = True, history.untrained_loss, "untrained"
        has_best = has_first and name.startswith("eval/")
        last, begin, top = (_number(value) for value in (summary[name], first, best))
        steps = [f" ({when})", f" (step {best_step})"]
        for rows, (of_first, of_best) in ((full, steps), (short, ("", ""))):
            rows.append((name, begin + of_first if has_first else "", last, top + of_best if has_best else ""))
    lines = _aligned(full)
    return lines if columns is None or max(map(len, lines)) <= columns else _aligned(short)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _aligned(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Return the lines of a table: names to the left, numbers to the right of their columns."""
    name_width, *widths = (max(len(row[i]) for row in rows) for i in range(4))
    lines = []
    for name, *cells in rows:
        shown = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([f"{name:<{name_width}}", *shown]).rstrip())
    return lines


def _show_change(console: Console, samples: Sequence[Mapping[str, Any]]) -> None:
    """Print what the model writes for the first prompt, before training and now."""
    one = next(line for line in samples if line["step"] == samples[-1]["step"])
    console.say()
    texts = {"prompt": one["prompt"], "untrained": one["untrained"], "trained": one["text"]}
    console.texts(texts | {"expected": one["reference"]})


def took(summary: Mapping[str, float]) -> str:
    """Return what a run took, in one line."""
    parts = [
        f"{int(summary['steps']):,} steps" if summary.get("steps") else "",
        clock(summary["perf/elapsed_seconds"]) if "perf/elapsed_seconds" in summary else "",
        f"{clock(summary['train_seconds'])} of it in steps" if "train_seconds" in summary else "",
        f"{summary['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in summary else "",
        f"{human_bytes(int(summary['peak_memory_bytes']))} of memory" if summary.get("peak_memory_bytes") else "",
    ]
    return ", ".join(part for part in parts if part)


def next_commands(folder: Path) -> dict[str, str]:
    """Return what can be done with a run that has ended: label -> command."""
    place = shlex.quote(str(folder))
    return {
        "look at it": f"python -m src.report dir={place}",
        "generate": f"python -m src.predict run={place}",
        "score it": f"python -m src.evaluate run={place}",
        "export it": f"python -m src.export run={place}",
    }
