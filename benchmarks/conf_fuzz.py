"""Command lines and configuration files that no person would write, given to the gate.

    python -m benchmarks.conf_fuzz [--lines 1000] [--files 1000] [--seed 0]

A command line is one to three overrides of drawn keys, groups and values, some of them sweeps. A file is an option of
conf/, or conf/config.yaml, with one to three mutations (MUTATIONS below: lines that are removed, doubled or indented,
values and keys that are others, characters that mean something to YAML), put into a folder of its own and chosen from
there. Each is given to the gate of a run, a sweep, preflight or predict, and has to be admitted or refused
(ConfigError); anything else is a fault, and so is an answer that takes longer than LONGEST_SECONDS.

Counts are printed. Exit code 0: no fault. 1: at least one, each printed with what reproduces it. What is drawn follows
from the seed alone. Nothing is trained.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.config.gate import admit, admit_finished
from src.config.keys import known_keys
from src.config.options import CONF
from src.errors import ConfigError
from src.sweep.plan import plan_sweep

LONGEST_SECONDS = 60
GROUPS = sorted(place.name for place in CONF.iterdir() if place.is_dir())
KEYS = sorted(
    {*known_keys(), *GROUPS, "sweep.params", "sweep.n_jobs", "sweep.storage", "hydra.run.dir", "rerun", "run"}
    | {"hydra.mode", "hydra.sweeper.params", "hydra.searchpath", "hydra.launcher.timeout_min", "hydra.job.chdir"}
)
VALUES = (
    *("null", "true", "[]", "{}", "''", "[null]", "[1]", "[[1]]", "[[[]]]", "{a: 1}", "{a: {b: [1]}}", "{1: 2}"),
    *("0", "-1", "1", "1.5", "1e400", "-inf", "nan", ".inf", "9" * 30, "-" + "9" * 30, "1e-300", "0x10", "1_000"),
    *("text", "'*'", "'('", "'(a+)+$'", "'[a-'", "'a{99999999999}'", "'(?P<x>a)(?P<x>b)'", "'" + "(" * 500 + "'"),
    *("x" * 300, "안" * 100, "'a\tb'", "'a\nb'", "'\x1b[31m'", "🦜", "'../..'", "/", "/dev/null", "/proc/self/fd/0"),
    *("~", "'~root'", "'${seed}'", "'${nothing}'", "'${oc.env:NOT_SET}'", "'${'", "'%41'", "'?'", "a=b", "'a=b'"),
    *("'a,b'", "???", "@", "_self_", "'{'", "none", "tow", "lora", "auto", "epoch", "cpu", "adamw", "zero3"),
    *("MULTIRUN", "mine/a", "'\\${x}'", "'${hydra:runtime.choices.data}'", "'${hydra:nothing}'", "file"),
)
VARIED = (
    *("1,2", "a,b", "range(0,3)", "range(3,0)", "range(0,1,0)", "interval(0,1)", "choice(1,a)", "glob(*)"),
    *("tag(log,interval(0,1))", "glob(mine/*)", "interval(1,8)"),
)
YAML_VALUES = (
    *("null", "~", "[]", "{}", "[1, [2]]", "{a: {b: 1}}", "- x", "'", '"', "@x", "`x`", "%x", "a: b", "&a [*a]", "*no"),
    *("!!python/object:os.system x", "!!binary x", "2024-01-01", "0o17", "1e400", "${name}", "${", "\\${x}", "???"),
    *("on", "|", ">-", "\t", "#", "<<", "x" * 3000, "안", "\u2028", "\ufeff", "12:30:45", ".nan", "\x07", "\ud800"),
)


def lines(seed: int | str, count: int) -> Iterator[list[str]]:
    """Draw command lines."""
    draw = random.Random(seed)
    for _ in range(count):
        is_sweep = draw.random() < 0.15
        values = (*VALUES, *VARIED) if is_sweep or draw.random() < 0.1 else VALUES
        overrides = [
            f"{draw.choice(['', '', '', '+', '++', '~'])}{draw.choice(KEYS)}={draw.choice(values)}"
            for _ in range(draw.choice([1, 1, 1, 2, 3]))
        ]
        yield [*(["-m"] if is_sweep else []), *overrides]


# Files


def _at_a_line(change: Callable[[list[str], int, random.Random], None]) -> Callable[[str, random.Random], str]:
    def mutate(text: str, draw: random.Random) -> str:
        found = text.split("\n")
        change(found, draw.randrange(len(found)), draw)
        return "\n".join(found)

    return mutate


def _remove(found: list[str], at: int, draw: random.Random) -> None:
    del found[at]


def _double(found: list[str], at: int, draw: random.Random) -> None:
    found.insert(draw.randrange(len(found) + 1), found[at])


def _indent(found: list[str], at: int, draw: random.Random) -> None:
    found[at] = draw.choice([" ", "  ", "\t", "   "]) + found[at]


def _other_value(found: list[str], at: int, draw: random.Random) -> None:
    key, sign, _ = found[at].partition(":")
    found[at] = f"{key}{sign or ':'} {draw.choice(YAML_VALUES)}"


def _other_key(found: list[str], at: int, draw: random.Random) -> None:
    key = draw.choice([*KEYS, "defaults", "hydra", "@package", "?", "1", "null", "[a]", "a b", "a.b.c"])
    found[at] = f"{key}:{found[at].partition(':')[2]}"


def _character(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(list("\t:{}[]'\"@`%&*!|>#-?,\x00\x07\r\u2028$\\=~")) + text[place:]


def _cut(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text) + 1)]


def _defaults(text: str, draw: random.Random) -> str:
    entries = ["/model/causal_lm@_here_", "/model/causal_lm", "nothing", "override /model: tiny_llama", "_self_", "1"]
    entries += ["optional nothing", "{a: b}", "/etc/passwd", "../model/causal_lm", "mutated", "override /sweep: grid"]
    return f"{text}\ndefaults:\n  - {draw.choice(entries)}\n" if "defaults:" not in text else _cut(text, draw)


MUTATIONS = (
    *map(_at_a_line, (_remove, _double, _indent, _other_value, _other_value, _other_key)),
    *(_character, _character, _cut, _defaults),
)


def files(seed: int | str, count: int, folder: Path) -> Iterator[list[str]]:
    """Write mutated files, each in the place of the one before, and yield the command line that chooses it."""
    draw = random.Random(seed)
    sources = sorted(CONF.rglob("*.yaml"))
    for number in range(count):
        source = draw.choice(sources)
        text = source.read_text(encoding="utf-8")
        for _ in range(draw.choice([1, 1, 2, 3])):
            text = draw.choice(MUTATIONS)(text, draw)
        group = "" if source.parent == CONF else source.parent.name
        own = folder / str(number)
        (own / group).mkdir(parents=True)
        (own / group / "mutated.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
        chosen = [f"{group}=mutated"] if group else ["-cn", "mutated"]
        is_sweep = group == "sweep" or draw.random() < 0.2
        yield [*(["-m", "seed=1,2"] if is_sweep else []), "--config-dir", str(own), *chosen]


# What the gate says


def ask(line: Sequence[str], seed: int | str) -> str:
    """Give a command line to one of the entries' gates, and return what it said: admitted or refused."""
    kind = random.Random(f"{seed} {[one for one in line if '/' not in one]}").choice(
        ["run", "run", "run", "preflight", "predict"]
    )
    try:
        if kind == "predict":
            admit_finished([part for part in line if part != "-m"], "predict")
        else:
            request = admit(line, None if kind == "run" else kind)
            if request.run is None and request.line.flags.multirun:
                plan_sweep(request.line)
    except ConfigError:
        return "refused"
    return "admitted"


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzz; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", default="0")
    given = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    longest, faults = 0.0, set[tuple[str, str, int]]()
    with tempfile.TemporaryDirectory() as folder:
        drawn = [("line", one) for one in lines(given.seed, given.lines)]
        of_files = (("file", one) for one in files(given.seed, given.files, Path(folder)))
        for kind, line in (*drawn, *of_files):
            started = time.monotonic()
            try:
                with _no_longer_than(LONGEST_SECONDS):
                    said = ask(line, given.seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                said, place = "FAULT", traceback.extract_tb(error.__traceback__)[-1]
                if (key := (type(error).__name__, place.filename, place.lineno or 0)) not in faults:
                    faults.add(key)
                    print(f"FAULT {line}\n{traceback.format_exc()}", flush=True)
                    if kind == "file":
                        text = next(Path(line[line.index("--config-dir") + 1]).rglob("mutated.yaml")).read_bytes()
                        print(f"the file: {text!r}", flush=True)
            counts[f"{kind} {said}"] += 1
            longest = max(longest, time.monotonic() - started)
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    print(f"{told}; the longest answer took {longest:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
