"""Files of runs' folders that are damaged in drawn ways, one at a time, and what resume, rerun and predict make of it.

    python -m benchmarks.damage_soak [--damages 500] [--seed 0] [--mlflow 0.15] [--jobs 2] [--keep-going]

Two folders are made: of a run that was killed while it completed a save (its best checkpoint is not its newest, and is
to be loaded at the end), and of the same run finished, with predictions; a share of the damages is done to folders of
runs with MLflow on. For each damage a folder is copied, one of its files is drawn (all below it, checkpoints, model and
predictions included) and a way to damage it (WAYS below: bits, bytes, lines, other JSON, other kinds of file), and then
the commands that may read it run: the same command again, `rerun=FOLDER` into another folder, `src.predict`.

Each has to end with exit code 0 and what the undamaged folder gives, bit for bit but for the clocks (weights,
metrics.jsonl, samples.jsonl, summary.json, MLflow's history, predictions), whether or not it warns; or with exit code 2
and the damaged file's name, or its folder's, in the error. Nothing ends with a traceback, waits for ever, or costs a
checkpoint of a folder that is refused.

A damage takes about three seconds of one core. What is drawn follows from the seed alone. Run it from the project's
root. Exit code 0: all of that held. 1: the first damage with which it did not (`--keep-going`: all of them), and where
its folder is.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from benchmarks.soaking import Call, Child, Difference, compare, compare_mlflow, forked, get_ready, newest_whole, work
from src.cli.main import main as run_main
from src.predict import main as predict_main
from src.tracking.lock import LOCK

RUN = (
    *("runtime.device=cpu", "data.limit=40", "training.max_train_steps=11", "training.per_device_train_batch_size=4"),
    *("training.per_device_eval_batch_size=4", "training.logging_steps=1", "evaluation.eval_steps=2"),
    *("evaluation.max_samples=8", "evaluation.metrics=[]", "evaluation.sample_steps=3", "evaluation.sample_prompts=1"),
    *("generation.max_new_tokens=2", "checkpoint.checkpointing_steps=3", "checkpoint.load_best_model_at_end=true"),
    *("scheduler=constant", "optimizer.lr=1.0"),  # so that the first evaluation is the best
)
PREDICT = ("data.test_files=[data/tow_addition/test.jsonl]", "data.limit=4", "predict.batch_size=2")
DEATH = Call("save", "checkpoint/store.py _complete", 4)
"""The save of step 9, behind those of steps 2 (the best), 3 and 6, is written and not yet whole."""
SAVED = [2, 3, 6]
LONGEST_SECONDS = 300.0
LEFT_OUT = (LOCK, ".part")
"""Ends of names that are not looked at where a folder must be unchanged."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that is damaged."""

    name: str
    is_finished: bool
    has_mlflow: bool


KINDS = [Kind(f"{name}{'-mlflow' * more}", name == "finished", more) for more in (False, True)
         for name in ("killed", "finished")]  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What is done to which file of which folder."""

    number: int
    kind: Kind
    file: Path
    """Below the folder."""
    way: str

    def __str__(self) -> str:
        return f"{self.number}: {self.kind.name}, {self.file}, {self.way}"

    @property
    def of(self) -> str:
        """The file, whichever step it is of."""
        return re.sub(r"\d{3,}", "*", str(self.file))


# Ways


def _flip_bit(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _other_byte(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([(content[place] + draw.randrange(1, 256)) % 256]) + content[place + 1 :]


def _zero_range(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.randrange(1, 4097))
    return content[:begin] + bytes(end - begin) + content[end:]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _append(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice([draw.randbytes(40), b"\n\n", b"{}\n", b"garbage\n", b'{"step": 1}\n', b"]"])


def _insert_nul(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + b"\0" + content[place:]


def _insert_invalid(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xfe\xff"]) + content[place:]


def _lines(content: bytes, draw: random.Random, how: str) -> bytes:
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    other = draw.randrange(len(lines))
    if how == "duplicate":
        lines.insert(other, lines[place])
    elif how == "remove":
        del lines[place]
    else:
        lines[place], lines[other] = lines[other], lines[place]
    return b"".join(lines)


def _other_shape(content: bytes, draw: random.Random) -> bytes:
    """Replace what JSON there is, whole or one value of it, by valid JSON of another shape."""
    shapes = [[], {}, 3, None, "x", True, [[1]], {"step": 1}, {"step": -1}, 1e400, [None], {"files": []}, -7, 10**30]
    try:
        found = json.loads(content)
        whole = draw.random() < 0.4
    except ValueError:
        found, whole = None, True
    node, places = found, []
    while not whole and isinstance(node, dict | list) and node:
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        places.append((node, key))
        node = node[key]
        if draw.random() < 0.5:
            break
    if places:
        places[-1][0][places[-1][1]] = draw.choice(shapes)
        return json.dumps(found, indent=2).encode()
    return json.dumps(draw.choice(shapes)).encode() + b"\n"


def _change_number(content: bytes, draw: random.Random) -> bytes:
    digits = [one.start() for one in re.finditer(rb"\d", content[:200_000])]
    place = draw.choice(digits)
    other = draw.choice([digit for digit in b"0123456789" if digit != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def _nest(content: bytes, draw: random.Random) -> bytes:
    depth = draw.choice([90, 500, 5_000, 100_000])
    kind = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return kind[0] * depth + b"1" + kind[1] * depth


def _bomb(content: bytes, draw: random.Random) -> bytes:
    lines = b"".join(b"a%d: &a%d [*a%d, *a%d, *a%d]\n" % (i + 1, i + 1, i, i, i) for i in range(60))
    return draw.choice([b"a0: &a0 [x, x]\n" + lines, b"a: &a [*a]\n", b"a: &a {b: *a}\n"])


WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip a bit": _flip_bit,
    "change a byte": _other_byte,
    "zero a range": _zero_range,
    "truncate": _cut,
    "truncate to nothing": lambda content, draw: b"",
    "append garbage": _append,
    "insert NUL": _insert_nul,
    "insert bytes that are no UTF-8": _insert_invalid,
    "duplicate a line": lambda content, draw: _lines(content, draw, "duplicate"),
    "remove a line": lambda content, draw: _lines(content, draw, "remove"),
    "swap two lines": lambda content, draw: _lines(content, draw, "swap"),
    "JSON of another shape": _other_shape,
    "change a number": _change_number,
    "nest deeply": _nest,
    "YAML bomb": _bomb,
}
"""Ways to damage a file's content."""
OTHER_FILE = "another file's content"
KINDS_OF_FILE: dict[str, Callable[[Path], object]] = {
    "delete": lambda file: None,
    "a folder": lambda file: file.mkdir(),
    "a pipe": lambda file: os.mkfifo(file),
    "a dangling link": lambda file: file.symlink_to(file.with_name("nowhere")),
    "a link to itself": lambda file: file.symlink_to(file),
}
"""What is put into a file's place."""
ALL_WAYS = (*WAYS, OTHER_FILE, *KINDS_OF_FILE)


def damage(folder: Path, file: Path, way: str, draw: random.Random) -> bool:
    """Damage a file below a folder; return False where the way leaves it as it is."""
    place = folder / file
    content = place.read_bytes()
    if way in KINDS_OF_FILE:
        place.unlink()
        KINDS_OF_FILE[way](place)
        return True
    if way == OTHER_FILE:
        others = [one for one in files_of(folder) if (folder / one).stat().st_size < 1 << 20 and one != file]
        changed = (folder / draw.choice(others)).read_bytes()
    else:
        try:
            changed = WAYS[way](content, draw)
        except (ValueError, IndexError):  # there is nothing of that kind in it
            return False
    if changed == content:
        return False
    place.write_bytes(changed)
    return True


def files_of(folder: Path) -> list[Path]:
    return sorted(one.relative_to(folder) for one in folder.rglob("*") if one.is_file())


def contents(folder: Path) -> dict[str, str]:
    """Return what lies below a folder: of each file a hash, of all else its kind."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            place = Path(root, name)
            if not name.endswith(LEFT_OUT):
                is_plain = place.is_file() and not place.is_symlink()
                told = xxhash.xxh3_128_hexdigest(place.read_bytes()) if is_plain else oct(place.lstat().st_mode)
                found[str(place.relative_to(folder))] = told
    return found


# The soak


class DamageSoak:
    """Folders that are made once, copied, damaged and worked with; one thread, so that forking is safe."""

    def __init__(self, folder: Path, seed: str, mlflow_share: float, *, keep_going: bool) -> None:
        self._folder = folder
        self._seed = seed
        self._mlflow_share = mlflow_share
        self._keep_going = keep_going
        self._children: list[Child] = []
        self.num_damages = self.num_commands = 0
        self.endings: Counter[str] = Counter()
        self.by_file: dict[str, Counter[str]] = {}
        self.by_way: dict[str, Counter[str]] = {}
        self.violations: list[str] = []

    def make(self) -> Iterator[None]:
        """Make the folders that are damaged."""
        for kind in KINDS:
            if kind.has_mlflow and not self._mlflow_share:
                continue
            folder = self._at(kind)
            child = self._start(kind, folder, "made", death=None if kind.is_finished else DEATH)
            yield from self._until_it_ends(child)
            if (child.code == 0) != kind.is_finished:
                raise Difference(f"making {kind.name} ended with {child.code}:\n{child.errors}")
            if not kind.is_finished:
                saved = [int(one.name[5:]) for one in sorted((folder / "checkpoints").glob("step-*"))]
                if saved != SAVED or newest_whole(folder) != SAVED[-1]:
                    raise Difference(f"{folder} holds the steps {saved}, not {SAVED}")
            else:
                child = self._predict(kind, folder, None)
                yield from self._until_it_ends(child)
                if child.code != 0:
                    raise Difference(f"predictions of {kind.name} ended with {child.code}:\n{child.errors}")
        print(f"made {', '.join(kind.name for kind in KINDS if self._at(kind).exists())}", flush=True)

    def damages(self, count: int) -> Iterator[Iterator[None]]:
        """Yield what does each damage and works with the folder."""
        for number in range(1, count + 1):
            if self.violations and not self._keep_going:
                return
            yield self._try(number)

    def close(self) -> None:
        for child in self._children:
            child.kill()

    def account(self) -> str:
        """Count endings by file and by way."""
        lines = []
        for title, counts in (("by file", self.by_file), ("by way", self.by_way)):
            lines.append(f"{title}:")
            for name, endings in sorted(counts.items()):
                told = ", ".join(f"{ending} {number}" for ending, number in sorted(endings.items()))
                lines.append(f"  {name:<50} {told}")
        lines.append("endings: " + ", ".join(f"{ending} {number}" for ending, number in self.endings.most_common()))
        return "\n".join(lines)

    def _at(self, kind: Kind) -> Path:
        return self._folder / kind.name

    def _try(self, number: int) -> Iterator[None]:
        draw = random.Random(f"{self._seed} {number}")
        has_mlflow = draw.random() < self._mlflow_share
        is_finished = draw.random() < 0.4
        kind = next(one for one in KINDS if (one.is_finished, one.has_mlflow) == (is_finished, has_mlflow))
        place = self._folder / f"damage-{number}"
        folder = place / "run"
        shutil.copytree(self._at(kind), folder)
        if self._store(self._at(kind)).exists():  # a run may be killed before its tracker is reached
            shutil.copy(self._store(self._at(kind)), self._store(folder))
        file, way = draw.choice(files_of(folder)), draw.choice(ALL_WAYS)
        while not damage(folder, file, way, draw):
            way = draw.choice(ALL_WAYS)
        one = Damage(number, kind, file, way)
        self.num_damages += 1
        found = []
        for command in self._commands(one, draw):
            before = contents(folder)
            try:
                ending = yield from command(one, folder, before)
            except Difference as difference:
                ending = "VIOLATION"
                self.violations.append(f"{one}: {difference}\nfolder: {place}")
                print(f"VIOLATION {self.violations[-1]}", flush=True)
            found.append(ending)
            self._count(one, ending)
            if ending == "VIOLATION":
                break
        print(f"{one}: {', '.join(found)}", flush=True)
        if "VIOLATION" not in found:
            shutil.rmtree(place)

    def _commands(
        self, one: Damage, draw: random.Random
    ) -> Iterator[Callable[[Damage, Path, dict[str, str]], Generator[None, None, str]]]:
        """Yield what is tried with a damaged folder; a rerun reads little of it, so mostly where that is damaged."""
        is_drawn = draw.random() < 0.2
        if one.kind.is_finished:
            yield self._predict_again
            yield self._predict_anew
        if one.file.name in ("config.yaml", "starts.jsonl", "status.json") or is_drawn:
            yield self._rerun
        yield self._resume  # last: it may write anew what is damaged

    def _resume(self, one: Damage, folder: Path, before: dict[str, str]) -> Generator[None, None, str]:
        child = self._start(one.kind, folder, "resume")
        yield from self._until_it_ends(child)
        if child.code != 0:
            return self._refused("resume", one, child, folder, before)
        after = contents(folder)
        if one.kind.is_finished and unlike(before, after) <= {"tracking.json", "status.json"}:
            return "resume: left as it is"
        compare(self._finished(one.kind), folder)
        newest_whole(folder)
        if one.kind.has_mlflow:
            compare_mlflow(folder, self._store(folder))
        return self._equal("resume", one, child)

    def _rerun(self, one: Damage, folder: Path, before: dict[str, str]) -> Generator[None, None, str]:
        again = folder.with_name("again")
        arguments = [f"rerun={folder}", f"hydra.run.dir={again}"]
        if one.kind.has_mlflow:
            arguments.append(f"tracking.uri=sqlite:///{self._store(again)}")
        child = self._fork(arguments, again.with_name("again.log"))
        yield from self._until_it_ends(child)
        if child.code != 0:
            return self._refused("rerun", one, child, folder, before)
        if changed := unlike(before, contents(folder)):
            raise Difference(f"a rerun changed the folder that it repeats: {sorted(changed)}")
        compare(self._finished(one.kind), again)
        return self._equal("rerun", one, child)

    def _predict_again(self, one: Damage, folder: Path, before: dict[str, str]) -> Generator[None, None, str]:
        return (yield from self._predicted("predict again", one, folder, before, None))

    def _predict_anew(self, one: Damage, folder: Path, before: dict[str, str]) -> Generator[None, None, str]:
        return (yield from self._predicted("predict", one, folder, before, folder.with_name("predicted")))

    def _predicted(
        self, name: str, one: Damage, folder: Path, before: dict[str, str], output: Path | None
    ) -> Generator[None, None, str]:
        child = self._predict(one.kind, folder, output)
        yield from self._until_it_ends(child)
        if child.code != 0:
            return self._refused(name, one, child, folder, before)
        undamaged, there = self._at(one.kind) / "predictions", output or folder / "predictions"
        names = [file.name for file in undamaged.iterdir() if file.suffix in (".jsonl", ".csv", ".json")]
        wrong = [one for one in names if (undamaged / one).read_bytes() != (there / one).read_bytes()]
        if wrong:
            raise Difference(f"{name} ended with 0, and {wrong} are not as without the damage")
        return self._equal(name, one, child)

    def _refused(self, name: str, one: Damage, child: Child, folder: Path, before: dict[str, str]) -> str:
        """Check how a command ended that did not end well.

        Raises:
            Difference: where it did not name what is damaged, or did more than to refuse it.
        """
        text = f"exit code {child.code}:\n{child.output[-1500:]}\n{child.errors[-3000:]}"
        if child.code != 2:
            raise Difference(f"{name} ended with {text}")
        names = [one.file.name, *(part.name for part in one.file.parents if part.name)]
        if not any(part in child.errors for part in names):
            raise Difference(f"{name} does not name {one.file}: {text}")
        kept = ("checkpoints", "metrics.jsonl", "samples.jsonl", "model", "predictions")
        lost = [file for file in unlike(before, contents(folder)) if file.startswith(kept)]
        if lost:
            raise Difference(f"{name} refused, and changed {sorted(lost)}: {text}")
        return f"{name}: refused"

    def _equal(self, name: str, one: Damage, child: Child) -> str:
        is_told = any(part in child.errors for part in (one.file.name, one.file.parent.name or one.file.name))
        return f"{name}: equal{', told' if is_told else ''}"

    def _finished(self, kind: Kind) -> Path:
        return self._folder / ("finished-mlflow" if kind.has_mlflow else "finished")

    def _store(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}-mlflow.db")

    def _start(self, kind: Kind, folder: Path, name: str, death: Call | None = None) -> Child:
        tracking = ["tracking=none"]
        if kind.has_mlflow:
            tracking = ["tracking=mlflow", f"tracking.uri=sqlite:///{self._store(folder)}"]
        places = [f"hydra.run.dir={folder}", f"data.cache_dir={self._folder / 'rows'}"]
        return self._fork([*RUN, *tracking, *places], folder.with_name(f"{folder.name}-{name}.log"), death=death)

    def _predict(self, kind: Kind, folder: Path, output: Path | None) -> Child:
        into = [] if output is None else [f"predict.output={output}"]
        log = folder.with_name(f"{folder.name}-predict{'-anew' * bool(into)}.log")
        return self._fork([f"run={folder}", *PREDICT, *into], log, predict_main)

    def _fork(
        self,
        arguments: Sequence[str],
        log: Path,
        command: Callable[[Sequence[str]], int] = run_main,
        death: Call | None = None,
    ) -> Child:
        child = Child(forked(arguments, log, command, death=death), log, time.time())
        self.num_commands += 1
        self._children.append(child)
        return child

    def _until_it_ends(self, child: Child) -> Iterator[None]:
        """Wait for a command.

        Raises:
            Difference: where it does not end, or with a traceback.
        """
        started = time.monotonic()
        while child.poll() is None:
            if time.monotonic() - started > LONGEST_SECONDS:
                child.kill()
                raise Difference(f"it did not end within {LONGEST_SECONDS:.0f} s:\n{child.output}\n{child.errors}")
            yield
        if "Traceback" in child.output + child.errors:
            raise Difference(f"it ended with a traceback, exit code {child.code}:\n{child.errors[-4000:]}")

    def _count(self, one: Damage, ending: str) -> None:
        self.endings[ending] += 1
        self.by_file.setdefault(one.of, Counter())[ending] += 1
        self.by_way.setdefault(one.way, Counter())[ending] += 1


def unlike(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return what is not the same, or not there, in one of the two."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def main(arguments: Sequence[str] | None = None, *, is_ready: bool = False) -> int:
    """Run the soak; return the exit code.

    Args:
        is_ready: whether this process has imported what forks need.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--mlflow", type=float, default=0.15, help="share of the damages to runs with MLflow on")
    parser.add_argument("--jobs", type=int, default=2, help="damages at the same time")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first violation")
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not is_ready:
        get_ready()
    folder = Path(tempfile.mkdtemp(prefix="towline-damage-"))
    soak = DamageSoak(folder, given.seed, given.mlflow, keep_going=given.keep_going)
    try:
        work(1, iter([soak.make()]))
        work(given.jobs, soak.damages(given.damages))
    finally:
        soak.close()
        if not soak.violations:
            shutil.rmtree(folder)
    print(f"\n{soak.account()}")
    end = f"{len(soak.violations)} violations" if soak.violations else "all equal or refused by name"
    print(f"{soak.num_damages} damages, {soak.num_commands} commands, {end}", flush=True)
    if soak.violations:
        print(f"folders: {folder}", flush=True)
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
