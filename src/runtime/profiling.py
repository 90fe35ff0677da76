"""Where time and memory of training steps go: a trace by torch's profiler, and a table by part of the work.

The parts are marked by `region` where the work is called: data, forward, head, backward, optimizer, evaluation and
checkpoint; what is left between two steps is tracking.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from src.config.job import Job
from src.markdown import code, table
from src.runtime.session import Runtime
from src.util import human_bytes, write_atomically

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "table.md"
WARM_UP = 3  # steps before the first one that is traced: they allocate what later ones use again
MOST_OPERATIONS = 10
_PREFIX = "towline/"
WHOLE = ("evaluation", "checkpoint")  # parts in which all that is marked within counts as theirs
StepT = TypeVar("StepT")


def region(name: str) -> record_function:
    """Mark what is done in a `with` block, or by a function that this decorates, as a part of the work."""
    return record_function(_PREFIX + name)


@dataclass(frozen=True)
class Part:
    """A marked piece of work on the traced thread: seconds since the trace began, and what a GPU computed for it."""

    name: str
    start: float
    end: float
    device_seconds: float = 0.0


@dataclass
class PartTotals:
    """Sums over the pieces of a part, without the parts within them."""

    seconds: float = 0.0
    device_seconds: float = 0.0
    count: int = 0
    peak_bytes: int = 0  # held at most during it, above what was held when the trace began


def profiled(steps: Iterator[StepT], job: Job, runtime: Runtime, say: Callable[[str, str], None]) -> Iterator[StepT]:
    """Yield steps; the main process traces `runtime.profile_steps` of them after WARM_UP others, with all that is done
    between two of them.

    The trace and the table go into the run's folder; `say` takes a label and the table as text.
    """
    num_traced = job.config.runtime.profile_steps
    if num_traced is None or not runtime.is_main:
        yield from steps
        return
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    tracer = profile(activities=kinds, profile_memory=True)
    number, is_tracing = 0, False
    try:
        for number, step in enumerate(steps, start=1):
            with region("tracking"):
                yield step
            if number == WARM_UP:
                tracer.start()
                is_tracing = True
            if number == WARM_UP + num_traced:
                break
    finally:  # a run that is stopped has its checkpoint to write, and no table
        if is_tracing:
            tracer.stop()
    try:
        _write(tracer, number - WARM_UP, job.run_dir / FOLDER, say)
    except OSError as error:
        say("profile", f"not written: {error}")
    yield from steps


def _write(tracer: Any, num_steps: int, folder: Path, say: Callable[[str, str], None]) -> None:
    if num_steps < 1:
        say("profile", f"no step was traced: the first {WARM_UP} warm up, and there were no more")
        return
    say("profile", f"{num_steps} steps are traced; summing up")
    folder.mkdir(parents=True, exist_ok=True)
    tracer.export_chrome_trace(str(folder / TRACE))
    totals, span = totals_by_part(*_read(tracer))
    by_part = _part_lines(totals, span)
    title = f"{num_steps} steps in {span:.2f} s, traced (a step takes longer than without)"
    operations = table(["operation", "time", "share", "calls"], _operation_lines(tracer))
    parts = [f"# {title}", table(by_part[0], by_part[1:]), operations, f"`{TRACE}` opens in https://ui.perfetto.dev."]
    write_atomically(folder / TABLE, "\n\n".join(parts) + "\n")
    widths = [max(map(len, column)) for column in zip(*by_part, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in by_part]
    say("profile", "\n".join([title, *lines, f"{folder / TABLE}; {TRACE} beside it opens in https://ui.perfetto.dev"]))


def _read(tracer: Any) -> tuple[list[Part], list[tuple[float, int]]]:
    """Return the marked pieces of the thread that trained, and each change of the memory held: seconds and bytes."""
    marked = [event for event in tracer.events() if event.name.startswith(_PREFIX) and event.device_type.name == "CPU"]
    thread = marked[0].thread if marked else None
    parts = [
        Part(
            event.name.removeprefix(_PREFIX),
            event.time_range.start / 1e6,
            event.time_range.end / 1e6,
            event.device_time_total / 1e6,
        )
        for event in marked
        if event.thread == thread
    ]
    results = tracer.profiler.kineto_results
    begin = results.trace_start_ns()
    uses_gpu = torch.cuda.is_available()
    changes = [
        ((event.start_ns() - begin) / 1e9, event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and (event.device_type().name != "CPU") == uses_gpu
    ]
    return parts, sorted(changes)


def totals_by_part(parts: Sequence[Part], changes: Sequence[tuple[float, int]]) -> tuple[dict[str, PartTotals], float]:
    """Return the sums of each part, and the seconds from the first piece's start to the last one's end.

    A piece within another one counts there no more; within a part of WHOLE it counts as that. `changes` are moments and
    bytes that were allocated (or freed, below 0), in their order. Time between the pieces is `other`.
    """
    totals: dict[str, PartTotals] = {}
    open_pieces: list[tuple[Part, str]] = []
    moments = [moment for moment, _ in changes]
    held = list(accumulate((change for _, change in changes), initial=0))  # before the first, after it, …
    for part in sorted(parts, key=lambda part: (part.start, -part.end)):
        while open_pieces and open_pieces[-1][0].end <= part.start:
            open_pieces.pop()
        around, of_around = open_pieces[-1] if open_pieces else (None, part.name)
        name = of_around if of_around in WHOLE else part.name
        total = totals.setdefault(name, PartTotals())
        total.seconds += part.end - part.start
        total.device_seconds += part.device_seconds
        total.count += name == part.name
        if around is not None:
            totals[of_around].seconds -= part.end - part.start
            totals[of_around].device_seconds -= part.device_seconds
        first, last = bisect_left(moments, part.start), bisect_right(moments, part.end)
        total.peak_bytes = max(total.peak_bytes, *held[first : last + 1])
        open_pieces.append((part, name))
    span = max((part.end for part in parts), default=0.0) - min((part.start for part in parts), default=0.0)
    if (rest := span - sum(total.seconds for total in totals.values())) > 0:
        totals["other"] = PartTotals(rest)
    return totals, span


def _part_lines(totals: dict[str, PartTotals], span: float) -> list[list[str]]:
    has_gpu = any(total.device_seconds for total in totals.values())
    lines = [["part", "time", "share", *(["GPU time"] if has_gpu else []), "times", "memory held at most"]]
    for name, total in sorted(totals.items(), key=lambda item: -item[1].seconds):
        on_gpu = [f"{total.device_seconds:.2f} s"] if has_gpu else []
        shares = [f"{total.seconds:.2f} s", f"{100 * total.seconds / (span or 1):.1f} %", *on_gpu]
        lines.append([name, *shares, str(total.count or "–"), f"+{human_bytes(total.peak_bytes)}"])
    return lines


def _operation_lines(tracer: Any) -> list[list[str]]:
    """Return the operations that took the most time themselves, on the GPU where there is one."""
    kind = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    found = [one for one in tracer.key_averages() if not one.key.startswith((_PREFIX, "ProfilerStep"))]
    times = {one.key: (getattr(one, kind) / 1e6, one.count) for one in found}
    whole = sum(seconds for seconds, _ in times.values()) or 1.0
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:MOST_OPERATIONS]
    return [
        [code(key), f"{seconds:.2f} s", f"{100 * seconds / whole:.1f} %", str(count)]
        for key, (seconds, count) in longest
    ]
