"""How a run grows: with its rows (1, 10 and 100 times as many, also streamed), with its tokens, with its processes.

    python -m benchmarks.growth [--rows 6400] [--times 1,10,100] [--steps 50] [KEY=VALUE …]

Each line of the table is one run of the default model, whole commands in fresh processes, one after the other: until
its first step was logged with an empty cache, and with the rows in the cache; the tokens per second of its steps; and
the peak of its memory, of one process. Only `--steps` steps are trained of however many rows there are. Then the same
rows are trained for 1, 2 and 4 times as many steps, and in two processes. Not a test: figures differ from machine to
machine, and with what else it computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.01
SHORT = (
    *("tracking=none", "data.validation_files=null", "data.test_files=null", "training.logging_steps=1"),
    *("evaluation.eval_steps=null", "evaluation.sample_steps=null", "evaluation.sample_prompts=0"),
    *("checkpoint.checkpointing_steps=null", "data.max_dropped_fraction=0"),
)


@dataclass(frozen=True)
class Measured:
    """What was measured of one run."""

    seconds_to_first_step: float
    seconds_in_steps: float
    tokens: int
    peak_mib: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds_in_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--rows", type=int, default=6400, help="rows that are multiplied (default: %(default)s)")
    parser.add_argument("--times", default="1,10,100", help="by what (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a run (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grow_rows(folder, given.rows, [int(times) for times in given.times.split(",")], given.steps, given.overrides)
        grow_steps(folder, given.rows, given.steps, given.overrides)


def grow_rows(folder: Path, num_rows: int, times: Sequence[int], steps: int, overrides: Sequence[str]) -> None:
    """Print the table of runs of more and more rows."""
    print("| rows | | first step after, s | from the cache, s | tokens/s | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for factor in times:
        file = rows_in(folder, factor * num_rows)
        for is_streamed in (False, True):
            streamed = f"data.streaming={str(is_streamed).lower()}"
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                places = (f"data.train_files=['{file}']", f"data.cache_dir='{cache}'", streamed)
                first = measure(folder, [*places, f"training.max_train_steps={steps}", *overrides])
                again = measure(folder, [*places, f"training.max_train_steps={steps}", *overrides])
            cached = "" if is_streamed else f"{again.seconds_to_first_step:.1f}"
            print(
                f"| {factor * num_rows:,} | {'streamed' if is_streamed else ''} | {first.seconds_to_first_step:.1f} "
                f"| {cached} | {again.tokens_per_second:,.0f} | {max(first.peak_mib, again.peak_mib):,.0f} |",
                flush=True,
            )
        file.unlink()


def grow_steps(folder: Path, num_rows: int, steps: int, overrides: Sequence[str]) -> None:
    """Print the table of runs of more and more steps, and of one in two processes."""
    print("\n| steps | processes | tokens | seconds in steps | tokens/s | peak memory of a process, MiB |")
    print("|---|---|---|---|---|---|")
    file = rows_in(folder, num_rows)
    for factor, processes in ((1, 1), (2, 1), (4, 1), (4, 2)):
        length = f"training.max_train_steps={factor * steps}"
        shared = f"runtime.num_processes={processes}"
        found = measure(folder, [f"data.train_files=['{file}']", length, shared, *overrides])
        print(
            f"| {factor * steps:,} | {processes} | {found.tokens:,} | {found.seconds_in_steps:.1f} "
            f"| {found.tokens_per_second:,.0f} | {found.peak_mib:,.0f} |",
            flush=True,
        )


def rows_in(folder: Path, num_rows: int) -> Path:
    """Write so many distinct sums; return their file."""
    script = ROOT / "data" / "make_tow_addition.py"
    sizes = [f"--train={num_rows}", "--validation=1", "--test=1", f"--out={folder / 'rows'}"]
    subprocess.run([sys.executable, str(script), *sizes], check=True, capture_output=True)
    return folder / "rows" / "train.jsonl"


def measure(folder: Path, overrides: Sequence[str]) -> Measured:
    """Run a command to its end, and measure it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run_dir = Path(name) / "run"
        command = [sys.executable, "-m", "src.run", f"hydra.run.dir={run_dir}", *SHORT, *overrides]
        with (Path(name) / "output.log").open("w+") as output:
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            seconds = None
            while process.poll() is None:
                if seconds is None and has_line(run_dir / "metrics.jsonl"):
                    seconds = time.monotonic() - started
                time.sleep(POLL_SECONDS)
            output.seek(0)
            if process.returncode or seconds is None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()}")
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return Measured(
        seconds, summary["train_seconds"], int(summary["tokens_seen"]), summary["peak_memory_bytes"] / 2**20
    )


def has_line(file: Path) -> bool:
    return file.exists() and b"\n" in file.read_bytes()


if __name__ == "__main__":
    main()
