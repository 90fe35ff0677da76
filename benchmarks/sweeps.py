"""What a sweep costs beside Hydra's own launchers: the same trials, one after the other in one run of this program.

    python -m benchmarks.sweeps                    # 16 trials of about 3 s of training, on two CPU cores
    python -m benchmarks.sweeps --trials 4 --rounds 1

hydra-joblib-launcher is no dependency of Towline: pip install hydra-joblib-launcher.

Each way is a whole process, started as a user would. `basic` runs the trials in one process, one after the other;
`joblib` (hydra-joblib-launcher) in two. Of each way:

    wall    from the command to its end
    start   until the first trial has its folder and prints its first line
    train   train_seconds of a trial, the mean, as the next two are
    beside  what else there is until a trial's last metrics: setting up, evaluating, and in the first trials of the
            other launchers the imports, which Towline's fork server has done in `start`
    added   from a trial's last metrics to the first line of the one that takes its place: exporting the model,
            ending the trial, starting the next
    end     from the last metrics of all until the command has ended
"""

from __future__ import annotations

import argparse
import json
import math
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
    """Seconds of one sweep, see above."""

    wall: float
    start: float
    train: float
    beside: float
    added: float
    end: float


class Trial(NamedTuple):
    """When a trial printed its first line and when it logged its last metrics, in seconds since the epoch."""

    first: float
    last: float


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
        files = list(Path(folder, "sweep").glob("*/metrics.jsonl"))
        assert len(files) == trials
        seen = [Trial(file.with_name("config.yaml").stat().st_mtime, file.stat().st_mtime) for file in files]
        sums = [json.loads(file.with_name("summary.json").read_text()) for file in files]
        train = statistics.mean(summary["train_seconds"] for summary in sums)
        beside = statistics.mean(trial.last - trial.first for trial in seen) - train
        start, end = min(trial.first for trial in seen) - began, began + wall - max(trial.last for trial in seen)
        gaps = between(seen)
        return Timing(wall, start, train, beside, statistics.mean(gaps) if gaps else math.nan, end)


def between(trials: list[Trial]) -> list[float]:
    """Give the seconds between each trial and the one whose place it took."""
    gaps: list[float] = []
    free: list[float] = []
    """When the last trial of each place logged its last metrics."""
    for trial in sorted(trials):
        if over := [last for last in free if last <= trial.first]:
            gaps.append(trial.first - min(over))
            free.remove(min(over))
        free.append(trial.last)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="towline-bench-cache-"))
    found: dict[str, list[Timing]] = {way: [] for way in WAYS}
    try:
        timed("towline, 1 job", 1, 1, cache)  # the rows are encoded once
        for _ in range(asked.rounds):
            for way in WAYS:
                found[way].append(timed(way, asked.trials, asked.steps, cache))
                print(f"{way}: {found[way][-1].wall:.1f} s", file=sys.stderr)
    finally:
        shutil.rmtree(cache)
    print(f"{asked.trials} trials of {asked.steps} steps, medians of {asked.rounds} rounds, in seconds")
    print(
        f"{'':<18}{'wall':>8}{'start':>8}{'train':>8}{'beside':>8}{'added':>8}{'end':>8}{'wall / towline, 2 jobs':>24}"
    )
    for way, times in found.items():
        columns = "".join(f"{statistics.median(one):>8.2f}" for one in zip(*times, strict=True))
        ours = zip(times, found["towline, 2 jobs"], strict=True)  # in the same round
        ratio = statistics.median(one.wall / our.wall for one, our in ours)
        print(f"{way:<18}{columns}{ratio:>24.2f}")


if __name__ == "__main__":
    main()
