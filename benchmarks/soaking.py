"""What soaks share: starts of runs as forks of one process, deaths at drawn function calls, and how results compare.

A start is a fork of a process that has imported everything and computed nothing, which saves seconds. One thread, so
that forking is safe.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from src.checkpoint.manifest import is_resumable, problems_of
from src.cli.main import main as run_main
from src.config.places import folder_of, steps_in
from src.runtime.signals import STOP_SIGNALS
from src.tracking.mlflow_names import plain_name
from src.tracking.mlflow_state import TRACKING

HEAVY = (
    *("torch", "transformers.models.llama.modeling_llama", "transformers.models.bart.modeling_bart"),
    *("transformers.generation.utils", "accelerate", "peft", "datasets", "pandas"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_workspace_store", "alembic.command", "sqlalchemy.dialects.sqlite"),
    *("src.run", "src.cli.start"),
    *("src.predict", "src.evaluation.predictions", "src.data.dataset", "src.evaluation.generate"),
)
"""What a run imports, roughly."""
OWN = f"{Path(__file__).resolve().parents[1] / 'src'}{os.sep}"
"""What the files of Towline's own functions begin with."""
FILE_CALLS = frozenset(
    (
        *("open", "write", "flush", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "link"),
        *("chmod", "flock", "execute", "executemany", "commit", "serialize_file"),
    )
)
"""Functions written in C, by name, that change files or databases, or decide who may."""
PHASES = {
    ("model/export.py", "export"): "export",
    ("tracking/tracker.py", "finish"): "end",
    ("tracking/tracker.py", "_close"): "end",
    ("tracking/run_folder.py", "end"): "end",
    **{("checkpoint/store.py", name): "save" for name in ("save", "keep_if_best", "wait", "finish", "_complete")},
    ("evaluation/evaluate.py", "evaluate"): "evaluation",
    ("evaluation/samples.py", "sample"): "samples",
    ("training/loop.py", "train"): "step",
    **{("tracking/tracker.py", name): "journal" for name in ("progress", "log", "line", "rewind_to")},
    ("tracking/export_thread.py", "_work"): "mlflow",
    ("data/dataset.py", "build_data"): "data",
    ("training/resume.py", "find_resume_point"): "set-up",
    ("cli/main.py", "_admit_and_run"): "configuration",
    ("sweep/sweeper.py", "lead"): "sweep",
}
"""What a start is doing, by a file and a function of it that are on its stack; of several the innermost."""
POLL_SECONDS = 0.005
BEFORE_TRAINING = ("configuration", "set-up", "data", "first samples")
MIGRATION = f"{os.sep}alembic{os.sep}"


class Difference(Exception):
    """What was stopped or damaged is not what went straight, or a start ended as none may."""


@dataclass(frozen=True)
class Call:
    """A call that is made in a run: the phase, the function, and which of those calls it is, from 1."""

    phase: str
    function: str
    number: int

    def __str__(self) -> str:
        return f"{self.phase}: {self.function}, call {self.number}"


class CallWatch:
    """Counts the calls of a process by phase and function, and may have it die at one of them.

    Args:
        death: where a signal is sent to this process; None: nowhere.
        note: a file that then gets a line, which is empty as long as the process has not met it.
    """

    def __init__(self, death: Call | None, number: signal.Signals, note: Path) -> None:
        self._death = death
        self._signal = number
        self._note = note
        self._is_own: dict[str, bool] = {}
        self._has_begun = self._trains = False
        self.counts: Counter[tuple[str, str]] = Counter()

    def begin(self) -> None:
        """Watch this thread, and all that begin from now on."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def end(self) -> None:
        sys.setprofile(None)

    def write(self, file: Path) -> None:
        """Write the counts as JSON: {phase: {function: count}}."""
        found: dict[str, dict[str, int]] = {}
        for (phase, function), count in sorted(self.counts.items()):
            found.setdefault(phase, {})[function] = count
        file.write_text(json.dumps(found), encoding="utf-8")

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            name = frame.f_code.co_filename
            is_own = self._is_own.get(name)
            if is_own is None:
                is_own = self._is_own[name] = name.startswith(OWN)
            if not is_own:
                return
            function = f"{name[len(OWN) :]} {frame.f_code.co_name}"
            if function == "run.py run":
                self._has_begun = True
            elif function == "training/loop.py train":
                self._trains = True
        elif event == "c_call" and called.__name__ in FILE_CALLS:
            function = called.__name__
        else:
            return
        if self._death is not None and function != self._death.function:
            return
        phase = self._phase(frame)
        self.counts[phase, function] += 1
        if self._death == Call(phase, function, self.counts[phase, function]):
            sys.setprofile(None)
            note = os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(note, f"{self._death}\n".encode())
            os.kill(os.getpid(), self._signal)

    def _phase(self, frame: FrameType | None) -> str:
        while frame is not None:
            name = frame.f_code.co_filename
            if MIGRATION in name:
                return "migration"
            if name.startswith(OWN) and (found := PHASES.get((name[len(OWN) :], frame.f_code.co_name))):
                if found == "samples" and not self._trains:
                    return "first samples"
                if found == "configuration" and self._has_begun:
                    return "training" if self._trains else "set-up"
                return found
            frame = frame.f_back
        return "training" if self._trains else "set-up" if self._has_begun else "configuration"


def get_ready() -> None:
    """Import what forks will need, and have them write their stack on SIGUSR2; nothing is computed here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as src.training.optim does
    for name in HEAVY:
        import_module(name)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
    started = [place.read_text().strip() for place in Path("/proc/self/task").glob("*/comm")][1:]
    if others := [name for name in started if not name.startswith("jemalloc")]:  # which looks after itself
        raise SystemExit(f"an import has started threads, which forks would lack ({others})")


def forked(
    arguments: Sequence[str],
    log: Path,
    main: Callable[[Sequence[str]], int] = run_main,
    death: Call | None = None,
    number: signal.Signals = signal.SIGKILL,
    counts: Path | None = None,
) -> int:
    """Start a command in a copy of this process; return its id.

    Args:
        log: the file of its standard output; its errors are in the same name with `.errors`.
        death: the call at which it sends itself a signal, which is noted in the name with `.met`.
        counts: a file for what it called, where it comes to its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the soak, which then ends its children
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)
        for descriptor, file in ((1, log), (2, errors_of(log))):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(opened, descriptor)
        if death is None and counts is None:
            code = main(arguments)
        else:
            watch = CallWatch(death, number, met_of(log))
            watch.begin()
            code = main(arguments)
            watch.end()
            if counts is not None:
                watch.write(counts)
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End a fork without what this process would do at its own end."""
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def spawned(arguments: Sequence[str], log: Path) -> int:
    """Start a run as a user does; return the process's id."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "src.run", *arguments],
        dict(os.environ),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
            (os.POSIX_SPAWN_OPEN, 2, str(errors_of(log)), flags, 0o644),
        ],
        setpgroup=0,
        setsigdef=STOP_SIGNALS,
    )


def work(jobs: int, coming: Iterator[Iterator[None]]) -> None:
    """Keep so many generators going, each of which yields while its process works, until all have ended."""
    running = list(itertools.islice(coming, jobs))
    while running:
        for one in list(running):
            try:
                next(one)
            except StopIteration:
                running.remove(one)
                running += itertools.islice(coming, 1)
        time.sleep(POLL_SECONDS)


def errors_of(log: Path) -> Path:
    return log.with_suffix(".errors")


def met_of(log: Path) -> Path:
    return log.with_suffix(".met")


def text_of(file: Path) -> str:
    """Return what a file holds, '' where it is not there."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


@dataclass
class Child:
    """A command in a process of its own."""

    pid: int
    log: Path
    began: float
    """By the clock of file times."""
    code: int | None = None

    @property
    def output(self) -> str:
        return text_of(self.log)

    @property
    def errors(self) -> str:
        return text_of(errors_of(self.log))

    @property
    def met(self) -> str:
        """The call at which it sent itself a signal, or ''."""
        return text_of(met_of(self.log)).strip()

    def poll(self) -> int | None:
        """Return the exit code, negative of a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stack(self, last: str) -> str:
        """Return where a forked start is, which it writes down; nothing where it does not answer at once.

        Args:
            last: how the stack ends.
        """
        before = self.errors
        os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + 0.05
        written = ""
        while not written.endswith(last) and time.monotonic() < deadline:
            time.sleep(0.0005)
            written = self.errors[len(before) :]
        return written


def newest_whole(folder: Path) -> int | None:
    """Return the last step that a run can go on from, every byte of it read.

    Raises:
        Difference: where a checkpoint is there, and is not whole.
    """
    newest = None
    for step in steps_in(folder / "checkpoints"):
        place = folder_of(folder / "checkpoints", step)
        if problems := list(problems_of(place)):
            raise Difference(f"{place} is damaged: {'; '.join(problems)}")
        if is_resumable(place):
            newest = step
    return newest


def compare(straight: Path, broken: Path) -> None:
    """Check that two runs came to the same, bit for bit.

    Raises:
        Difference: naming the first thing that differs.
    """
    compare_journals(straight, broken)
    numbers = [plain(json.loads((place / "summary.json").read_text())) for place in (straight, broken)]
    if numbers[0] != numbers[1]:
        raise Difference(f"summary.json: {first_difference(*numbers)}")
    first, second = (exported(place / "model") for place in (straight, broken))
    if wrong := sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key)):
        raise Difference(f"model/: {len(wrong)} of {len(first)} tensors, the first {wrong[0]}")


def compare_journals(straight: Path, broken: Path) -> None:
    """Check that two runs logged the same, bit for bit.

    Raises:
        Difference: naming the first thing that differs.
    """
    steps = [line["step"] for line in read_lines(broken / "metrics.jsonl")]
    if steps != sorted(set(steps)):
        raise Difference(f"metrics.jsonl has steps out of order, or twice: {steps}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines, others = ([plain(line) for line in read_lines(place / name)] for place in (straight, broken))
        for line, other in zip(lines, others, strict=False):
            if line != other:
                raise Difference(f"{name}, step {line['step']}: {first_difference(line, other)}")
        if len(lines) != len(others):
            raise Difference(f"{name} has {len(lines)} lines straight and {len(others)} broken")


def compare_mlflow(folder: Path, database: Path) -> None:
    """Check that MLflow's store has each value of a run's metrics.jsonl once, and nothing else.

    A step that came again after a kill has the clocks of its first time there (decision 0005).

    Raises:
        Difference: saying what is missing, and what is too much.
    """
    run_id = json.loads((folder / TRACKING).read_text())["run_id"]
    logged = Counter(
        (line["step"], plain_name(name), None if value is None or is_clock(name) else float(value))
        for line in read_lines(folder / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    )
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as store:
        (count,) = store.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'").fetchone()
        rows = store.execute("SELECT step, key, value, is_nan FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
    if count != 1:
        raise Difference(f"MLflow has {count} runs of {folder}")
    there = Counter((step, name, None if is_nan or is_clock(name) else value) for step, name, value, is_nan in rows)
    if wrong := [*(logged - there), *(there - logged)]:
        missing, added = (logged - there).total(), (there - logged).total()
        raise Difference(f"MLflow lacks {missing} values of metrics.jsonl and has {added} more, as {wrong[:3]}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without what may differ between two identical runs."""
    return {key: one for key, one in values.items() if not is_clock(key)}


def is_clock(name: str) -> bool:
    return name.startswith(("perf/", "tokens_per_second", "peak_memory_bytes")) or name.endswith("_seconds")


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the first key that differs, with both values."""
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key) or (key in one) != (key in other))
    return f"{key} is {one.get(key, 'not there')} straight and {other.get(key, 'not there')} broken"


def exported(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return all tensors of a model, merged or not, and of an adapter: type with shape, and bytes.

    Without torch, which must not run here. Source: the format's description, github.com/huggingface/safetensors#format.
    """
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                kind = f"{entry['dtype']} {entry['shape']}"
                found[f"{file.relative_to(folder)} {name}"] = (kind, content[begin + start : begin + stop])
    if not found:
        raise Difference(f"{folder} holds no weights")
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []  # a pruned trial has no samples
    return [json.loads(line) for line in lines]
