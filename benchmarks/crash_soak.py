"""Runs that are killed, again and again, against the same runs that went straight.

    python -m benchmarks.crash_soak [--kills 100] [--at calls|times] [--signal KILL] [--seed 0] [--variants best,…]
                                    [--jobs 2] [--fresh] [KEY=VALUE …]

Every variant (VARIANTS below: batchings, adapters, the best kept and loaded, mixtures, streams, thoughts that fade,
folds, an encoder-decoder, bf16, optimizers, MLflow, a pruned sweep, two processes) runs straight once. Then it is begun
anew elsewhere, gets the signal, and is started by the same command until it is finished; and that over and over, until
there were that many kills. Both must have the same weights, metrics.jsonl, samples.jsonl and summary.json, bit for bit
but for the clocks; with MLflow on its store must have each value of metrics.jsonl once; a sweep must have the same
trials in the same states. What may be expected of a single start is looked at too: after every end there is a whole
checkpoint that is not older than the one before, and the next start goes on from it; a signal that can be heard ends a
start with exit code 75, with what was done saved; nothing ends with a traceback.

`--at calls` (the default) draws a phase (configuration, data, a step, a save, an evaluation, the export, MLflow's
migration, …), one of the functions that the straight run called in it (Towline's own, and those that write, sync,
rename or remove files or change a database), and which of its calls; the start sends itself the signal there. What is
drawn follows from the seed alone. `--at times` draws moments, so where they fall depends on the machine. Of a sweep and
of two processes half of the kills are of a trial or of one of the two, at a moment; a process's own calls are watched
in the one that was started only, so with two processes the others are all at moments.

A start is a fork of a process that has imported everything and computed nothing; `--fresh` has it be `python -m
src.run`, killed at times. A kill takes about three seconds of one core (of a sweep or two processes half a minute, so
they get a quarter of the kills that others get). Run it from the project's root.

Exit code 0: all of that held. 1: the first difference, and where its folders are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.soaking import (
    BEFORE_TRAINING,
    PHASES,
    Call,
    Child,
    Difference,
    compare,
    compare_journals,
    compare_mlflow,
    forked,
    get_ready,
    newest_whole,
    read_lines,
    spawned,
    work,
)
from src.config.frozen import is_finished, read_status
from src.tracking.lock import LOCK, holder_of

NUM_STEPS = 14
SETTINGS = (
    "runtime.device=cpu",
    "data.limit=30",  # an epoch is eight windows, the last of them short
    "data.test_files=[data/tow_addition/test.jsonl]",
    f"training.max_train_steps={NUM_STEPS}",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.logging_steps=3",
    "evaluation.eval_steps=4",
    "evaluation.max_samples=6",
    "evaluation.sample_steps=7",
    "evaluation.sample_prompts=1",
    "generation.max_new_tokens=3",
    "checkpoint.checkpointing_steps=3",
)


@dataclass(frozen=True)
class Variant:
    """What a run is. In the overrides {base} stands for the folder of a trained model, {store} for a database's file.

    `share` is how many kills it gets, beside 1 for the others; `has_workers` says that what computes are other
    processes than the one that is started, which are then killed too.
    """

    overrides: tuple[str, ...]
    share: float = 1.0
    is_sweep: bool = False
    has_workers: bool = False

    @property
    def needs_base(self) -> bool:
        return any("{base}" in override for override in self.overrides)

    @property
    def has_store(self) -> bool:
        return any("{store}" in override for override in self.overrides)


UNTRACKED = "tracking=none"
ADDITION = "data/tow_addition"
SOURCES = (
    f"a:{{train_files:[{ADDITION}/train.jsonl],weight:2}},b:{{train_files:[{ADDITION}/validation.jsonl],weight:1}}"
)
BASE = ("model=causal_lm", "model.checkpoint={base}")
LORA = (UNTRACKED, "adapter=lora", "adapter.lora_dropout=0.1", "optimizer.lr=1e-2")
FADED = (UNTRACKED, "data.thought_dropout=0.3", "data.thought_schedule={tokens_per_epoch: 3, smoothing: 0.3}")
TWO = (UNTRACKED, "runtime.num_processes=2", "training.gradient_accumulation_steps=1")
VARIANTS = {
    **{f"full-{how}": Variant((UNTRACKED, f"data.batching={how}")) for how in ("padded", "length_grouped", "packed")},
    **{
        f"lora-{how}": Variant((*LORA, "export.merge=true", f"data.batching={how}"))
        for how in ("padded", "length_grouped", "packed")
    },
    "lora-tokens": Variant((*LORA, *BASE, "optimizer.embedding_lr=1e-3")),
    "best": Variant(
        (
            *(UNTRACKED, "checkpoint.load_best_model_at_end=true", "checkpoint.keep_best=2", "checkpoint.keep_last=1"),
            *("scheduler=constant", "optimizer.lr=3e-2", "evaluation.eval_steps=2", "training.logging_steps=1"),
        )
    ),
    "mixture": Variant((UNTRACKED, "data.train_files=null", f"data.mixture={{{SOURCES}}}")),
    "stream": Variant((UNTRACKED, "data.streaming=true")),
    "stream-mixture": Variant(
        (
            *(UNTRACKED, "data.streaming=true", "data.batching=length_grouped", "data.train_files=null"),
            f"data.mixture={{{SOURCES}}}",
        )
    ),
    **{f"faded-{how}": Variant((*FADED, f"data.batching={how}")) for how in ("padded", "packed")},
    "faded-stream": Variant((*FADED, "data.streaming=true", "data.batching=length_grouped")),
    "folds": Variant((UNTRACKED, "data.validation_files=null", "data.num_folds=3", "data.fold=1")),
    "encoder-decoder": Variant(
        (UNTRACKED, "model=tiny_bart", "data.max_seq_length=64", "data.max_target_length=128", "tokens.init.text=[-]")
    ),
    "bf16": Variant((UNTRACKED, "training.mixed_precision=bf16")),
    **{
        name: Variant((UNTRACKED, f"optimizer={name}"))
        for name in ("adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd")
    },
    "mlflow": Variant(("tracking=mlflow", "tracking.uri=sqlite:///{store}")),
    "asha": Variant(
        (
            *("-m", UNTRACKED, "sweep=asha", "sweep.n_trials=4", "sweep.sampler=random", "sweep.min_resource=1"),
            *("optimizer.lr=tag(log,interval(1e-6,1e-2))", "checkpoint.keep_best=0"),
        ),
        share=0.25,
        is_sweep=True,
        has_workers=True,
    ),
    "two": Variant(TWO, share=0.25, has_workers=True),
    "two-zero1": Variant((*TWO, "deepspeed=zero1"), share=0.25, has_workers=True),
}
"""What is run. Optimizers are those that step on a CPU, all there are."""
PREEMPTED = 75
KILLED_CODES = (0, 1)
"""How the process that was started may end when one that it started was killed: begun again by it, or told."""

LONGEST_START_SECONDS = 600.0
PATIENCE = 1.1
"""With each kill of a run its next moments are drawn from a time, or a number of calls, so much longer, so that every
run comes to its end."""
OUTERMOST = "_run_module_as_main\n"
"""The end of a stack: this module was started as a program."""
LOOKED_AT = "death by being looked at"
"""To write a stack down CPython 3.11 walks over frames that may just be made, and once in ten thousand looks that kills
the process: as good a kill as any."""
OF_A_WORKER = "worker"
"""The phase of a kill of a process that the started one started."""


@dataclass(frozen=True)
class Hit:
    """Where a signal met a start."""

    phase: str
    at_last_step: bool
    beside: bool
    """Whether a checkpoint was being completed, or an old one removed."""
    call: str = ""


@dataclass
class Tally:
    """What happened to a variant."""

    num_runs: int = 0
    num_starts: int = 0
    num_kills: int = 0
    num_damaged: int = 0
    num_beside: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    steps: list[int] = field(default_factory=list)


@dataclass
class Straight:
    """A run that nothing stopped. How long one takes follows what else the machine does."""

    folder: Path
    seconds: float
    calls: dict[str, dict[str, int]]
    """Of each phase, how often it called each function; empty where that was not counted."""


def main(arguments: Sequence[str] | None = None, *, is_ready: bool = False) -> int:
    """Run the soak; return the exit code.

    Args:
        is_ready: whether this process has imported what forks need.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--kills", type=int, default=100, help="how many starts are stopped, in all")
    parser.add_argument("--at", choices=("calls", "times"), default=None, help="what is drawn (calls; --fresh: times)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "USR1", "INT"), default="KILL")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--fresh", action="store_true", help="start `python -m src.run` instead of forking")
    given = parser.parse_args(arguments)
    names = given.variants.split(",")
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    if given.fresh and given.at == "calls":
        parser.error("--fresh starts processes that can't be watched from here: --at times")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not (given.fresh or is_ready):
        get_ready()
    folder = Path(tempfile.mkdtemp(prefix="towline-soak-"))
    number = signal.Signals[f"SIG{given.signal}"]
    at_calls = not given.fresh and given.at != "times"
    soak = Soak(names, given.overrides, number, given.seed, folder, at_calls=at_calls, is_fresh=given.fresh)
    found: Difference | None = None
    try:
        soak.straight_runs(given.jobs)
        soak.broken_runs(given.jobs, given.kills)
    except Difference as difference:
        found = difference
    finally:
        soak.close()
        if found is None:
            shutil.rmtree(folder)
    told = "all equal" if found is None else f"and then:\nDIFFERENT: {found}\nfolders: {folder}"
    print(f"\n{soak.account()}\n{soak.num_kills} kills, {soak.num_starts} starts, {told}", flush=True)
    return 0 if found is None else 1


class Soak:
    """Runs of all variants, some at the same time. One thread, so that forking is safe: each run is a generator that
    yields while its process works.
    """

    def __init__(
        self,
        names: Sequence[str],
        overrides: Sequence[str],
        number: signal.Signals,
        seed: str,
        folder: Path,
        *,
        at_calls: bool,
        is_fresh: bool,
    ) -> None:
        self._overrides = overrides
        self._signal = number
        self._seed = seed
        self._folder = folder
        self._at_calls = at_calls
        self._is_fresh = is_fresh
        self._num_wanted = 0
        self._num_under_way = 0
        """Starts that are to be stopped and have not ended."""
        self._straight: dict[str, Straight] = {}
        self._children: list[Child] = []
        self.tallies = {name: Tally() for name in names}

    @property
    def num_kills(self) -> int:
        return sum(tally.num_kills for tally in self.tallies.values())

    @property
    def num_starts(self) -> int:
        return sum(tally.num_starts for tally in self.tallies.values())

    def straight_runs(self, jobs: int) -> None:
        """Run every variant once, undisturbed; before them what they start from."""
        if any(VARIANTS[name].needs_base for name in self.tallies):
            work(jobs, iter([self._make_base()]))
        work(jobs, (self._run_straight(name) for name in self.tallies))

    def broken_runs(self, jobs: int, kills: int) -> None:
        """Run variants with kills until there were so many; whichever had the smallest part of its share is next."""
        self._num_wanted = kills

        def had(name: str) -> tuple[float, int]:
            return self.tallies[name].num_kills / VARIANTS[name].share, self.tallies[name].num_runs

        def coming() -> Iterator[Iterator[None]]:
            while self.num_kills < kills:
                name = min(self.tallies, key=had)
                self.tallies[name].num_runs += 1
                yield self._run_broken(name, self.tallies[name].num_runs)

        work(jobs, coming())

    def close(self) -> None:
        """End what still runs."""
        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(child.pid).children(recursive=True) if child.poll() is None else ():
                    process.kill()
            child.kill()

    def _command(self, variant: Variant, folder: Path) -> list[str]:
        place = "hydra.sweep.dir" if variant.is_sweep else "hydra.run.dir"
        places = (f"{place}={folder}", f"data.cache_dir={beside(folder, 'rows')}")
        base, store = self._folder / "base" / "model", beside(folder, "mlflow.db")
        own = [one.replace("{base}", str(base)).replace("{store}", str(store)) for one in variant.overrides]
        chosen = {one.partition("=")[0]: one for one in (*SETTINGS, *own, *self._overrides)}
        return [*chosen.values(), *places]

    def _start(
        self, variant: Variant, folder: Path, number: int, death: Call | None = None, counts: Path | None = None
    ) -> Child:
        log = beside(folder, f"{number}.log")
        began = time.time()
        command = self._command(variant, folder)
        if self._is_fresh:
            pid = spawned(command, log)
        else:
            pid = forked(command, log, death=death, number=self._signal, counts=counts)
        child = Child(pid, log, began)
        self._children.append(child)
        return child

    def _make_base(self) -> Iterator[None]:
        child = self._start(Variant((UNTRACKED, "tokens=none", "training.max_train_steps=2")), self._folder / "base", 1)
        while child.poll() is None:
            yield
        if child.code != 0:
            raise Difference(f"the run that others start from ended with {child.code}:\n{child.errors[-3000:]}")

    def _run_straight(self, name: str) -> Iterator[None]:
        folder, variant = self._folder / f"{name}-straight", VARIANTS[name]
        counts = beside(folder, "calls.json") if self._at_calls else None
        started = time.monotonic()
        child = self._start(variant, folder, 1, counts=counts)
        while child.poll() is None:
            yield
        seconds = time.monotonic() - started
        if child.code != 0:
            raise Difference(f"{name}: the straight run ended with {child.code}:\n{child.output}\n{child.errors}")
        if variant.has_store:
            compare_mlflow(folder, beside(folder, "mlflow.db"))
        calls = {} if counts is None else json.loads(counts.read_text(encoding="utf-8"))
        self._straight[name] = Straight(folder, seconds, calls)
        print(f"{name} straight: {seconds:.1f} s", flush=True)

    def _run_broken(self, name: str, number: int) -> Iterator[None]:
        folder, variant = self._folder / f"{name}-{number}", VARIANTS[name]
        draw = random.Random(f"{self._seed} {name} {number}")
        tally, straight = self.tallies[name], self._straight[name]
        saved: int | None = None
        for start in itertools.count(1):
            longer = PATIENCE ** (start - 1)
            is_of_worker = variant.has_workers and draw.random() < 0.5
            at_call = bool(straight.calls) and not is_of_worker and (variant.is_sweep or not variant.has_workers)
            call = drawn_call(draw, straight.calls, longer) if at_call else None
            moment = None if at_call else draw.uniform(0, straight.seconds * longer)
            is_wanted = self.num_kills + self._num_under_way < self._num_wanted
            self._num_under_way += is_wanted
            known = num_starts(folder)
            child = self._start(variant, folder, start, call if is_wanted else None)
            tally.num_starts += 1
            victim = draw.random() if is_of_worker else None
            hit = yield from self._until_it_ends(child, variant, folder, moment if is_wanted else None, victim)
            self._num_under_way -= is_wanted
            if variant.has_workers:
                yield from until_let_go(folder)
            seconds = time.time() - child.began
            tally.num_damaged += child.errors.count("passed over")
            before = saved
            try:
                if variant.is_sweep:
                    check_sweeps_end(child, hit, self._signal)
                else:
                    saved = newest_whole(folder)
                    check_end(child, folder, hit, self._signal, before, saved, known)
                if child.code == 0:
                    compare_all(variant, straight.folder, folder)
            except Difference as difference:
                raise Difference(f"{name}, run {number}, start {start} ({told(hit)}): {difference}") from None
            if hit is not None:
                step = NUM_STEPS if variant.is_sweep else last_step(child, folder, saved)
                tally.num_kills += 1
                tally.phases[hit.phase] += 1
                tally.num_beside += hit.beside
                tally.steps.append(step)
                where = f"from {'the beginning' if before is None else before}, {seconds:.2f} s, at step {step}"
                print(f"{name} {number}.{start} {where}: {told(hit)}", flush=True)
            if child.code == 0:
                print(f"{name} {number}: equal after {start} starts", flush=True)
                break
            assert hit is not None
        for place in self._folder.glob(f"{folder.name}-*"):
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
        shutil.rmtree(folder)

    def _until_it_ends(
        self, child: Child, variant: Variant, folder: Path, moment: float | None, victim: float | None
    ) -> Generator[None, None, Hit | None]:
        """Wait for a start, and send it the signal once its moment has come; return where that met it.

        Args:
            moment: when it gets the signal, in seconds; None: never from here.
            victim: which of the processes that it started gets it in its place, from 0 to 1.
        """
        hit: Hit | None = None
        started = time.monotonic()
        while child.poll() is None:
            spent = time.monotonic() - started
            if hit is None and moment is not None and spent >= moment:
                hit = self._signal_now(child, folder) if victim is None else self._kill_worker(child, folder, victim)
            if spent > LONGEST_START_SECONDS:
                child.kill()
                raise Difference(f"a start did not end within {LONGEST_START_SECONDS:.0f} s ({told(hit)})")
            yield
        if child.met:
            phase = child.met.partition(":")[0]
            return Hit(phase, is_at_last_step(child.output), is_beside(child), child.met)
        return hit

    def _signal_now(self, child: Child, folder: Path) -> Hit | None:
        """Send the signal to what was started."""
        stack = "" if self._is_fresh else child.stack(OUTERMOST)
        output = child.output
        if child.poll() == -signal.SIGSEGV and stack.rstrip().endswith("first):"):
            return Hit(LOOKED_AT, is_at_last_step(output), is_beside(child))
        if child.poll() is not None:
            return None
        os.kill(child.pid, self._signal)
        return Hit(phase_of(stack, output, is_fresh=self._is_fresh), is_at_last_step(output), is_beside(child))

    def _kill_worker(self, child: Child, folder: Path, victim: float) -> Hit | None:
        """Kill one of the processes that compute; None as long as there are none."""
        found = workers_of(child, folder)
        if not found:
            return None
        chosen = found[int(victim * len(found))]
        with suppress(psutil.NoSuchProcess):
            chosen.kill()
            return Hit(OF_A_WORKER, is_at_last_step(child.output), is_beside(child))
        return None

    def account(self) -> str:
        """Say of every variant how often and where it was stopped."""
        lines = []
        for name, tally in self.tallies.items():
            phases = ", ".join(f"{phase} {count}" for phase, count in sorted(tally.phases.items()))
            span = f"steps {min(tally.steps)} to {max(tally.steps)}" if tally.steps else "no step"
            lines.append(
                f"{name:<20} {tally.num_runs} runs, {tally.num_starts} starts, {tally.num_kills} kills at {span} "
                f"({phases or 'nowhere'}; beside a save {tally.num_beside}); "
                f"{tally.num_damaged} checkpoints passed over as damaged"
            )
        in_all = sum((tally.phases for tally in self.tallies.values()), Counter[str]())
        lines.append(", ".join(f"{phase} {count}" for phase, count in in_all.most_common()))
        return "\n".join(lines)


def beside(folder: Path, name: str) -> Path:
    """Name what lies next to a run's folder and belongs to it."""
    return folder.with_name(f"{folder.name}-{name}")


def drawn_call(draw: random.Random, calls: dict[str, dict[str, int]], longer: float) -> Call:
    """Draw a phase, a function that is called in it, and which of its calls; with `longer` above 1 also later ones."""
    phase = draw.choice(sorted(calls))
    function = draw.choice(sorted(calls[phase]))
    return Call(phase, function, 1 + int(draw.uniform(0, calls[phase][function]) * longer))


def is_beside(child: Child) -> bool:
    folder = child.log.with_name(child.log.name.rpartition("-")[0]) / "checkpoints"
    times = []
    for place in folder.glob(".step-*"):
        with suppress(OSError):
            times.append(place.stat().st_mtime)
    return any(one >= child.began for one in times)


def is_at_last_step(output: str) -> bool:
    return f"step {NUM_STEPS}/{NUM_STEPS}" in output


def workers_of(child: Child, folder: Path) -> list[psutil.Process]:
    """Return the processes that compute: of a sweep its trials, of a run in several processes all but the started."""
    pids = set()
    for status in folder.glob("*/status.json"):
        with suppress(OSError, ValueError):
            pids.add(json.loads(status.read_text())["pid"])
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.pid in pids or "--frozen" in process.cmdline():
                    found.append(process)
    return sorted(found, key=lambda process: process.pid)


def until_let_go(folder: Path) -> Iterator[None]:
    """Wait until nobody holds a run's or sweep's folder, or one in it: what a dead process started ends by itself."""
    started = time.monotonic()

    def holders() -> list[str]:
        locked = [Path(place) for place, _, files in os.walk(folder) if LOCK in files]  # folders may go meanwhile
        return [holder for place in locked if (holder := holder_of(place))]

    while held := holders():
        if time.monotonic() - started > LONGEST_START_SECONDS:
            raise Difference(f"{folder} is still held by {held[0]}")
        yield


def phase_of(stack: str, output: str, *, is_fresh: bool) -> str:
    """Say what a start is doing, by its stack and by what it has printed; of a fresh one the latter only, roughly."""
    frames = re.findall(r'File "(.+)", line \d+ in (\S+)', stack)
    trains = "resumed " in output or "\nstep " in output
    for name, function in frames:
        for (file, called), phase in PHASES.items():
            if name.endswith(f"src/{file}") and function == called and phase != "configuration":
                return "first samples" if phase == "samples" and not trains else phase
    if not output:
        return "configuration"
    return "training" if is_fresh and "\nstep " in output else "set-up"


def told(hit: Hit | None) -> str:
    """Say where a signal met a start."""
    if hit is None:
        return "not signalled"
    place = hit.call or hit.phase
    return f"{place}{' of the last step' if hit.at_last_step else ''}{', beside a save' if hit.beside else ''}"


def last_step(child: Child, folder: Path, saved: int | None) -> int:
    """Return the last step that is known to be done."""
    shown = re.findall(rf"^step +(\d+)/{NUM_STEPS} ", child.output, re.MULTILINE)
    status = read_status(folder)
    return max(saved or 0, *map(int, shown), status.get("step", 0) if status.get("pid") == child.pid else 0)


def num_starts(folder: Path) -> int:
    """Return how many starts a run has recorded."""
    file = folder / "starts.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def check_recorded(child: Child, folder: Path, before: int | None, known: int) -> None:
    """Check what a start recorded of itself; one that was killed just then has its status only.

    Args:
        before: the step that could be gone on from when it started; None: none.
        known: how many starts were recorded before.
    Raises:
        Difference: where it went on from elsewhere, or ended unrecorded.
    """
    if num_starts(folder) > known:
        resumed = read_lines(folder / "starts.jsonl")[-1]["resumed_step"]
        if resumed != before:
            raise Difference(f"it went on from step {resumed}, and not from {before}")
    elif child.code == 0:
        raise Difference("it ended and had not recorded that it started")


def check_end(
    child: Child,
    folder: Path,
    hit: Hit | None,
    number: signal.Signals,
    before: int | None,
    saved: int | None,
    known: int,
) -> None:
    """Check that a start ended as one must that met a signal there.

    Args:
        hit: None where it was not signalled.
        before: the step that could be gone on from when it started; None: none.
        saved: the same now.
        known: how many starts were recorded before.
    Raises:
        Difference: where something else happened.
    """
    status = read_status(folder)
    is_own = status.get("pid") == child.pid  # else it never came to hold its folder
    state = status.get("state")
    if before is not None and (saved is None or saved < before):
        raise Difference(f"step {before} was saved, and now the last is {saved}")
    if is_own:
        check_recorded(child, folder, before, known)
    told = f"{state}, exit code {child.code}:\n{child.errors[-3000:]}"
    if "Traceback" in child.errors:
        raise Difference(f"it ended with a traceback, {told}")
    if hit is not None and hit.phase == OF_A_WORKER:
        if child.code == 0 and is_finished(folder):
            return  # it was done
        if child.code != 1 or "SIGKILL" not in child.errors:
            raise Difference(f"one of its processes was killed, and it is {told}")
        return
    if child.code == 0:
        if not is_finished(folder):
            raise Difference(f"it ended as if finished, but is {told}")
        if hit and not hit.at_last_step and hit.phase not in ("end", "mlflow", "migration"):
            raise Difference("it did not hear the signal")
        return
    if hit is None:
        raise Difference(f"it was not signalled, and is {told}")
    if hit.phase == LOOKED_AT:
        return
    if number is signal.SIGKILL:
        if child.code != -number:
            raise Difference(f"it was killed, and is {told}")
        return
    if child.code == -number and not is_own and hit.phase in BEFORE_TRAINING:
        return  # before the program could hear it
    if child.code != PREEMPTED:
        raise Difference(f"after {number.name} it is {told}")
    if not is_own:
        return
    if state != "PREEMPTED":
        raise Difference(f"after {number.name} status.json says {told}")
    if (saved or 0) != status["step"] or (saved is None and hit.phase not in BEFORE_TRAINING):
        raise Difference(f"it stopped at step {status['step']}, and saved is {saved}")


def check_sweeps_end(child: Child, hit: Hit | None, number: signal.Signals) -> None:
    """Check that a start of a sweep ended as one must that met a signal.

    Raises:
        Difference: where something else happened.
    """
    told = f"exit code {child.code}:\n{child.output[-2000:]}\n{child.errors[-3000:]}"
    if "Traceback" in child.errors:
        raise Difference(f"it ended with a traceback, {told}")
    if hit is None:
        allowed: Sequence[int | None] = (0,)
    elif hit.phase == OF_A_WORKER:
        allowed = KILLED_CODES
    else:
        allowed = (0, -number) if number is signal.SIGKILL else (0, -number, PREEMPTED)
    if child.code not in allowed:
        raise Difference(f"a sweep that was {'not ' if hit is None else ''}signalled ended with {told}")


def compare_all(variant: Variant, straight: Path, broken: Path) -> None:
    """Check that what was stopped came to the same as what went straight.

    Raises:
        Difference: naming the first thing that differs.
    """
    if variant.is_sweep:
        compare_sweeps(straight, broken)
        return
    compare(straight, broken)
    if variant.has_store:
        compare_mlflow(broken, beside(broken, "mlflow.db"))


def compare_sweeps(straight: Path, broken: Path) -> None:
    """Check that two sweeps have the same trials, that ended alike and came to the same.

    Raises:
        Difference: naming the first thing that differs.
    """
    for folder in (straight, broken):
        if (state := json.loads((folder / "sweep.json").read_text())["state"]) != "FINISHED":
            raise Difference(f"the sweep in {folder} is {state}")
    states, others = (
        {file.parent.name: read_status(file.parent).get("state") for file in sorted(place.glob("*/status.json"))}
        for place in (straight, broken)
    )
    if states != others:
        raise Difference(f"trials are {states} straight and {others} broken")
    for name, state in states.items():
        check = compare if state == "FINISHED" else compare_journals
        try:
            check(straight / name, broken / name)
        except Difference as difference:
            raise Difference(f"trial {name}: {difference}") from None
    boards = [(place / "leaderboard.csv").read_text(encoding="utf-8").splitlines() for place in (straight, broken)]
    if len(boards[0]) != len(boards[1]):
        raise Difference(f"leaderboard.csv has {len(boards[0])} lines straight and {len(boards[1])} broken")


if __name__ == "__main__":
    sys.exit(main())
