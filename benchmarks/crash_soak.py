"""Runs that are stopped from outside at random moments, again and again, against the same runs that went straight.

    python -m benchmarks.crash_soak [--kills 100] [--signal KILL] [--seed 0] [--variants full-padded,…] [--jobs 2]
                                    [--fresh] [KEY=VALUE …]

Every variant (full or LoRA, rows padded, length-grouped or packed) trains 60 steps straight. Then it is begun anew
elsewhere, gets the signal at a random moment of each start (set-up, steps, evaluations, samples, saving and export
alike), and is started by the same command until it is finished; and that over and over, until there were that many
kills. Both must have the same weights, metrics.jsonl, samples.jsonl and summary.json, bit for bit but for the clocks.
What may be expected of a single start is looked at too: after every end there is a whole checkpoint that is not older
than the one before, and the next start goes on from it; a signal that can be heard ends a start with exit code 75, with
what was done saved. Exit code 0: all of that held. 1: the first difference, and where its folders are.

A start is a fork of a process that has imported everything and computed nothing, which saves seconds; `--fresh` has it
be `python -m src.run`. Moments are drawn from the seed, but where they fall depends on the machine. A kill takes about
four seconds of one core, with `--fresh` ten, so 100 of them two jobs on two cores about four minutes. Run it from the
project's root.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from src.checkpoint.manifest import folder_of, is_resumable, problems_of, steps_in
from src.config.frozen import read_status
from src.run import main as towline
from src.runtime.signals import STOP_SIGNALS
from src.tracking.journal import is_finished

HEAVY = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "datasets",
    "src.overview",
    "src.model.export",
    "src.training.resume",
    "src.tracking.tracker",
    "src.tracking.provenance",
)
"""What a run imports, roughly."""

NUM_STEPS = 60
SETTINGS = (
    "tracking=none",
    "runtime.device=cpu",
    "data.limit=70",  # an epoch is six or three windows, the last of them short
    f"training.max_train_steps={NUM_STEPS}",
    "training.per_device_train_batch_size=3",
    "training.per_device_eval_batch_size=6",
    "training.gradient_accumulation_steps=4",
    "training.logging_steps=7",
    "evaluation.eval_steps=11",
    "evaluation.max_samples=24",
    "evaluation.sample_steps=25",
    "evaluation.sample_prompts=3",
    "generation.max_new_tokens=16",
    "checkpoint.checkpointing_steps=4",
)
ADAPTERS = {"full": (), "lora": ("adapter=lora", "adapter.lora_dropout=0.1", "optimizer.lr=1e-2", "export.merge=true")}
BATCHINGS = ("padded", "length_grouped", "packed")
VARIANTS = {
    f"{name}-{batching}": (*overrides, f"data.batching={batching}")
    for name, overrides in ADAPTERS.items()
    for batching in BATCHINGS
}
PREEMPTED = 75

POLL_SECONDS = 0.005
LONGEST_START_SECONDS = 300.0
PATIENCE = 1.1
"""With each kill of a run its next moments are drawn from a time so much longer, so that every run comes to its end."""
PHASES = (
    ("model/export.py", ("export",), "export"),
    ("tracking/tracker.py", ("finish",), "end"),
    ("tracking/journal.py", ("end",), "end"),
    ("checkpoint/store.py", ("save", "consider", "wait", "finish"), "save"),
    ("evaluation/evaluate.py", ("evaluate",), "evaluation"),
    ("evaluation/samples.py", ("sample",), "samples"),
    ("training/loop.py", ("train",), "step"),
    ("tracking/tracker.py", ("progress", "log", "line"), "journal"),
)
"""What a start is doing, by a file and functions of it that are on its stack."""
OUTERMOST = "_run_module_as_main\n"
"""The end of a stack: this module was started as a program."""
LOOKED_AT = "death by being looked at"
"""To write a stack down CPython 3.11 walks over frames that may just be made, and once in ten thousand looks that kills
the process: as good a kill as any."""
BEFORE_TRAINING = ("configuration", "set-up", "first samples")
ORDER = (*BEFORE_TRAINING, "step", "save", "evaluation", "samples", "journal", "export", "end", "training", LOOKED_AT)


class Difference(Exception):
    """What was stopped is not what went straight, or a start ended as none may."""


@dataclass
class Child:
    """A start of a run, in a process of its own."""

    pid: int
    log: Path
    """The file with its standard output; its errors are in the same name with `.errors`."""
    began: float
    """By the clock of file times."""
    code: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> str:
        return errors_of(self.log).read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Give the exit code, negative of a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stack(self) -> str:
        """Have a forked start write down where it is, and give that; nothing where it does not answer at once."""
        before = self.errors
        os.kill(self.pid, signal.SIGUSR2)
        deadline = time.monotonic() + 0.05
        written = ""
        while not written.endswith(OUTERMOST) and time.monotonic() < deadline:
            time.sleep(0.0005)
            written = self.errors[len(before) :]
        return written


@dataclass(frozen=True)
class Hit:
    """Where a signal met a start."""

    phase: str
    at_last_step: bool
    beside: bool
    """Whether a checkpoint was being completed, or an old one removed."""


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--kills", type=int, default=100, help="how many starts are stopped, in all")
    parser.add_argument("--signal", choices=("KILL", "TERM", "USR1", "INT"), default="KILL")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--fresh", action="store_true", help="start `python -m src.run` instead of forking")
    given = parser.parse_args()
    names = given.variants.split(",")
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not given.fresh:
        get_ready()
    folder = Path(tempfile.mkdtemp(prefix="towline-soak-"))
    soak = Soak(names, given.overrides, signal.Signals[f"SIG{given.signal}"], given.seed, folder, is_fresh=given.fresh)
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
    print(f"\n{soak.account()}\n{soak.num_kills} kills, {soak.num_starts} starts, {told}")
    return 0 if found is None else 1


def get_ready() -> None:
    """Import what forks will need, and have them write their stack on SIGUSR2; nothing is computed here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as src.training.optim does
    for name in HEAVY:
        import_module(name)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=False)
    started = [place.read_text().strip() for place in Path("/proc/self/task").glob("*/comm")][1:]
    if others := [name for name in started if not name.startswith("jemalloc")]:  # which looks after itself
        raise SystemExit(f"an import has started threads, which forks would lack ({others}): use --fresh")


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
        is_fresh: bool,
    ) -> None:
        self._overrides = overrides
        self._signal = number
        self._seed = seed
        self._folder = folder
        self._is_fresh = is_fresh
        self._num_wanted = 0
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
        """Run every variant once, undisturbed."""
        self._work(jobs, (self._run_straight(name) for name in self.tallies))

    def broken_runs(self, jobs: int, kills: int) -> None:
        """Run variants with kills until there were so many; whichever had the fewest is next."""
        self._num_wanted = kills

        def coming() -> Iterator[Iterator[None]]:
            while self.num_kills < kills:
                name = min(self.tallies, key=lambda one: (self.tallies[one].num_kills, self.tallies[one].num_runs))
                self.tallies[name].num_runs += 1
                yield self._run_broken(name, self.tallies[name].num_runs)

        self._work(jobs, coming())

    def _work(self, jobs: int, coming: Iterator[Iterator[None]]) -> None:
        """Keep so many generators going until all have ended."""
        running = list(itertools.islice(coming, jobs))
        while running:
            for one in list(running):
                try:
                    next(one)
                except StopIteration:
                    running.remove(one)
                    running += itertools.islice(coming, 1)
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End what still runs."""
        for child in self._children:
            child.kill()

    def _command(self, name: str, folder: Path) -> list[str]:
        places = (f"hydra.run.dir={folder}", f"data.cache_dir={folder.with_name(folder.name + '-rows')}")
        return [*SETTINGS, *VARIANTS[name], *self._overrides, *places]

    def _start(self, name: str, folder: Path, number: int) -> Child:
        log = folder.with_name(f"{folder.name}-{number}.log")
        start = spawned if self._is_fresh else forked
        began = time.time()
        child = Child(start(self._command(name, folder), log), log, began)
        self._children.append(child)
        return child

    def _run_straight(self, name: str) -> Iterator[None]:
        folder = self._folder / f"{name}-straight"
        started = time.monotonic()
        child = self._start(name, folder, 1)
        while child.poll() is None:
            yield
        seconds = time.monotonic() - started
        if child.code != 0:
            raise Difference(f"{name}: the straight run ended with {child.code}:\n{child.errors[-3000:]}")
        self._straight[name] = Straight(folder, seconds)
        print(f"{name} straight: {seconds:.1f} s", flush=True)

    def _run_broken(self, name: str, number: int) -> Iterator[None]:
        folder = self._folder / f"{name}-{number}"
        draw = random.Random(f"{self._seed} {name} {number}")
        tally, straight = self.tallies[name], self._straight[name]
        saved: int | None = None
        for start in itertools.count(1):
            moment = draw.uniform(0, straight.seconds * PATIENCE ** (start - 1))
            child = self._start(name, folder, start)
            tally.num_starts += 1
            hit = yield from self._until_it_ends(child, moment)
            seconds = time.time() - child.began
            if start == 1 and child.code == 0:
                straight.seconds = seconds
            before, saved = saved, newest_whole(folder)
            tally.num_damaged += child.errors.count("passed over")
            try:
                check_end(child, folder, hit, self._signal, before, saved)
                if child.code == 0:
                    compare(straight.folder, folder)
            except Difference as difference:
                raise Difference(f"{name}, run {number}, start {start} ({told(hit)}): {difference}") from None
            if child.code == 0:
                print(f"{name} {number}: equal after {start} starts", flush=True)
                break
            assert hit is not None
            step = last_step(child, folder, saved)
            tally.num_kills += 1
            tally.phases[hit.phase] += 1
            tally.num_beside += hit.beside
            tally.steps.append(step)
            where = f"from {'the beginning' if before is None else before}, {seconds:.2f} s, at step {step}"
            print(f"{name} {number}.{start} {where}: {told(hit)}", flush=True)
        for place in self._folder.glob(f"{folder.name}-*"):
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
        shutil.rmtree(folder)

    def _until_it_ends(self, child: Child, moment: float) -> Generator[None, None, Hit | None]:
        """Wait for a start, and send it the signal once its moment has come; gives where that met it."""
        hit: Hit | None = None
        started = time.monotonic()
        while child.poll() is None:
            spent = time.monotonic() - started
            if hit is None and spent >= moment and self.num_kills < self._num_wanted:
                stack = "" if self._is_fresh else child.stack()
                output = child.output
                if child.poll() == -signal.SIGSEGV and stack.rstrip().endswith("first):"):
                    hit = Hit(LOOKED_AT, f"step {NUM_STEPS}/{NUM_STEPS}" in output, self._is_beside(child))
                if child.poll() is None:
                    os.kill(child.pid, self._signal)
                    hit = Hit(
                        phase_of(stack, output, is_fresh=self._is_fresh),
                        f"step {NUM_STEPS}/{NUM_STEPS}" in output,
                        self._is_beside(child),
                    )
            if spent > LONGEST_START_SECONDS:
                child.kill()
                raise Difference(f"a start did not end within {LONGEST_START_SECONDS:.0f} s ({told(hit)})")
            yield
        return hit

    def _is_beside(self, child: Child) -> bool:
        folder = child.log.with_name(child.log.name.rpartition("-")[0]) / "checkpoints"
        times = []
        for place in folder.glob(".step-*"):
            with suppress(OSError):
                times.append(place.stat().st_mtime)
        return any(one >= child.began for one in times)

    def account(self) -> str:
        """Say of every variant how often and where it was stopped."""
        lines = []
        for name, tally in self.tallies.items():
            phases = ", ".join(f"{phase} {tally.phases[phase]}" for phase in ORDER if tally.phases[phase])
            span = f"steps {min(tally.steps)} to {max(tally.steps)}" if tally.steps else "no step"
            lines.append(
                f"{name:<20} {tally.num_runs} runs, {tally.num_starts} starts, {tally.num_kills} kills at {span} "
                f"({phases or 'nowhere'}; beside a save {tally.num_beside}); "
                f"{tally.num_damaged} checkpoints passed over as damaged"
            )
        return "\n".join(lines)


def forked(arguments: Sequence[str], log: Path) -> int:
    """Start a run in a copy of this process; gives its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the soak, which then ends its children
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for descriptor, file in ((1, log), (2, errors_of(log))):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(opened, descriptor)
        code = towline(arguments)
    except BaseException:
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
    """Start a run as a user does; gives the process's id."""
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


def errors_of(log: Path) -> Path:
    return log.with_suffix(".errors")


def phase_of(stack: str, output: str, *, is_fresh: bool) -> str:
    """Say what a start is doing, by its stack and by what it has printed; of a fresh one the latter only, roughly."""
    frames = re.findall(r'File "(.+)", line \d+ in (\S+)', stack)
    for file, functions, phase in PHASES:
        if any(name.endswith(f"src/{file}") and function in functions for name, function in frames):
            is_first = phase == "samples" and "resumed " not in output and "\nstep " not in output
            return "first samples" if is_first else phase
    if not output:
        return "configuration"
    return "training" if is_fresh and "\nstep " in output else "set-up"


def told(hit: Hit | None) -> str:
    """Say where a signal met a start."""
    if hit is None:
        return "not signalled"
    return f"{hit.phase}{' of the last step' if hit.at_last_step else ''}{', beside a save' if hit.beside else ''}"


def last_step(child: Child, folder: Path, saved: int | None) -> int:
    """Give the last step that is known to be done."""
    shown = re.findall(rf"^step +(\d+)/{NUM_STEPS} ", child.output, re.MULTILINE)
    status = read_status(folder)
    return max(saved or 0, *map(int, shown), status.get("step", 0) if status.get("pid") == child.pid else 0)


def newest_whole(folder: Path) -> int | None:
    """Give the last step that a run can go on from, every byte of it read.

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


def check_end(
    child: Child, folder: Path, hit: Hit | None, number: signal.Signals, before: int | None, saved: int | None
) -> None:
    """See that a start ended as one must that met a signal there.

    Args:
        hit: None where it was not signalled.
        before: the step that could be gone on from when it started; None: none.
        saved: the same now.
    Raises:
        Difference: where something else happened.
    """
    status = read_status(folder)
    is_own = status.get("pid") == child.pid  # else it never came to hold its folder
    state = status.get("state")
    if before is not None and (saved is None or saved < before):
        raise Difference(f"step {before} was saved, and now the last is {saved}")
    if is_own and (resumed := read_lines(folder / "starts.jsonl")[-1]["resumed_step"]) != before:
        raise Difference(f"it went on from step {resumed}, and not from {before}")
    told = f"{state}, exit code {child.code}:\n{child.errors[-3000:]}"
    if child.code == 0:
        if not is_finished(folder):
            raise Difference(f"it ended as if finished, but is {told}")
        if hit and (not hit.at_last_step or hit.phase == "evaluation"):
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


def compare(straight: Path, broken: Path) -> None:
    """See that two runs came to the same, bit for bit.

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
    numbers = [plain(json.loads((place / "summary.json").read_text())) for place in (straight, broken)]
    if numbers[0] != numbers[1]:
        raise Difference(f"summary.json: {first_difference(*numbers)}")
    first, second = (exported(place / "model") for place in (straight, broken))
    if wrong := sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key)):
        raise Difference(f"model/: {len(wrong)} of {len(first)} tensors, the first {wrong[0]}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what may differ between two identical runs."""
    clocks = ("perf/", "tokens_per_second", "peak_memory_bytes")
    return {key: one for key, one in values.items() if not key.startswith(clocks) and not key.endswith("_seconds")}


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name the first key that differs, with both values."""
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key) or (key in one) != (key in other))
    return f"{key} is {one.get(key, 'not there')} straight and {other.get(key, 'not there')} broken"


def exported(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Give all tensors of a model, merged or not, and of an adapter: type with shape, and bytes.

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
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
