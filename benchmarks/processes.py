"""What it costs to train in two processes instead of one, on the same two cores.

    python -m benchmarks.processes [--steps 100] [--rounds 3]

The same rows a step, by real commands in turn: one process with two threads, then two processes (DDP on gloo) with one
thread each, and the same under ZeRO-1, 2 and 3. Prints tokens per second of the steps, from each summary.json, and
their ratios to one process; medians over the rounds. Figures differ from machine to machine: two processes exchange
gradients, but each has its core for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "one process, two threads": ("1", "2", []),
    "two processes (DDP), one thread each": ("2", "1", []),
    "the same, deepspeed=zero1": ("2", "1", ["deepspeed=zero1"]),
    "the same, deepspeed=zero2": ("2", "1", ["deepspeed=zero2"]),
    "the same, deepspeed=zero3": ("2", "1", ["deepspeed=zero3"]),
}
ROWS = 32  # of a step


def tokens_per_second(run_dir: Path, way: str, steps: int) -> float:
    processes, threads, overrides = WAYS[way]
    command = [sys.executable, "-m", "src.run", f"hydra.run.dir={run_dir}", "tracking=none", "runtime.device=cpu"]
    command += [f"runtime.num_processes={processes}", *overrides, f"training.max_train_steps={steps}"]
    command += [f"training.per_device_train_batch_size={ROWS // int(processes)}"]
    command += ["evaluation.metrics=[]", "evaluation.max_samples=8", "evaluation.sample_prompts=0"]
    command += ["data.test_files=null", "checkpoint.checkpointing_steps=null", f"data.cache_dir={run_dir.parent}"]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{way}: exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    return float(json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for i, way in enumerate(WAYS):
                found[way].append(tokens_per_second(Path(folder, f"run-{number}-{i}"), way, given.steps))
    alone = statistics.median(found["one process, two threads"])
    for way, rates in found.items():
        median = statistics.median(rates)
        print(f"{median / alone:5.2f}   {median:10,.0f} tokens/s   ({min(rates):,.0f} to {max(rates):,.0f})   {way}")


if __name__ == "__main__":
    main()
