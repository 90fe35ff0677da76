"""What a sweep costs beside Hydra's own launchers: the same trials, one after the other in one run of this program.

    python -m benchmarks.sweeps                    # 16 trials of about 3 s of training, on two CPU cores
    python -m benchmarks.sweeps --trials 4 --rounds 1

hydra-joblib-launcher is no dependency of Towline: pip install hydra-joblib-launcher.

Each way is a whole process, started as a user would. `basic` runs the trials in one process, one after the other;
`joblib` (hydra-joblib-launcher) in two. `start` ends with the first line of the first trial. What a trial adds to its
own clock, which begins with its first line and ends with its last metrics, is (wall - start) * jobs / trials - clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

WAYS = {
    "towline, 2 jobs": ["sweep.n_jobs=2"],
    "towline, 1 job": ["sweep.n_jobs=1"],
    "basic": ["hydra/sweeper=basic", "hydra/launcher=basic"],
    "joblib, 2 jobs": ["hydra/sweeper=basic", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


class Timing(NamedTuple):
    """Seconds of one sweep: all, until its first trial's first line, and the mean of its trials' own clocks."""

    wall: float
    start: float
    clock: float


def timed(way: str, trials: int, steps: int, cache: Path) -> Timing:
    """Run one way of sweeping."""
    with tempfile.TemporaryDirectory(prefix="towline-bench-") as folder:
        command = [
            *(sys.executable, "-m", "src.run", "-m", *WAYS[way], f"hydra.sweep.dir={folder}/sweep"),
            *(f"seed=range(1,{trials + 1})", f"training.max_train_steps={steps}", "evaluation.metrics=[]"),
            *("evaluation.eval_steps=null", "evaluation.sample_prompts=0", "checkpoint.checkpointing_steps=null"),
            *(f"tracking.uri=sqlite:///{folder}/mlflow.db", f"data.cache_dir={cache}", "evaluation.max_samples=100"),
        ]
        began, started = time.time(), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = [file.read_text().splitlines()[-1] for file in Path(folder, "sweep").glob("*/metrics.jsonl")]
        assert len(lines) == trials
        first = min(file.stat().st_mtime for file in Path(folder, "sweep").glob("*/config.yaml"))
        clock = statistics.mean(json.loads(line)["perf/elapsed_seconds"] for line in lines)
        return Timing(wall, first - began, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="towline-bench-cache-"))
    found: dict[str, list[Timing]] = {way: [] for way in WAYS}
    try:
        timed("towline, 1 job", 1, 1, cache)  # the rows are encoded once
        for _ in range(asked.rounds):
            for way in WAYS:
                found[way].append(timed(way, asked.trials, asked.steps, cache))
    finally:
        shutil.rmtree(cache)
    print(f"{asked.trials} trials of {asked.steps} steps, medians of {asked.rounds} rounds, in seconds")
    print(f"{'':<18}{'wall':>8}{'start':>8}{'clock':>8}{'added':>8}{'wall / towline, 2 jobs':>24}")
    for way, times in found.items():
        wall, start, clock = (statistics.median(one) for one in zip(*times, strict=True))
        added = (wall - start) * (2 if "2 jobs" in way else 1) / asked.trials - clock
        ours = zip(times, found["towline, 2 jobs"], strict=True)  # in the same round
        ratio = statistics.median(one.wall / our.wall for one, our in ours)
        print(f"{way:<18}{wall:>8.1f}{start:>8.1f}{clock:>8.2f}{added:>8.2f}{ratio:>24.2f}")


if __name__ == "__main__":
    main()
