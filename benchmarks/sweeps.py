"""What a sweep costs beside Hydra's own launchers: the same trials, one after the other in one run of this program.

    python -m benchmarks.sweeps                    # 16 trials of about 3 s of training, on two CPU cores
    python -m benchmarks.sweeps --trials 4 --rounds 1

hydra-joblib-launcher is no dependency of Towline: pip install hydra-joblib-launcher.

Each way is a whole process, started as a user would. `basic` runs the trials in one process, one after the other;
`joblib` (hydra-joblib-launcher) in two. What a trial adds is the wall time of a trial less that of its own training and
evaluation: (wall - start) * jobs / trials - the trial's seconds, by its own clock.
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

WAYS = {
    "towline, 2 jobs": ["sweep.n_jobs=2"],
    "towline, 1 job": ["sweep.n_jobs=1"],
    "basic": ["hydra/sweeper=basic", "hydra/launcher=basic"],
    "joblib, 2 jobs": ["hydra/sweeper=basic", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


def timed(way: str, trials: int, steps: int, cache: Path) -> tuple[float, float]:
    """Run one way of sweeping; gives its wall seconds, and the mean of what its trials took by their own clocks."""
    with tempfile.TemporaryDirectory(prefix="towline-bench-") as folder:
        command = [
            *(sys.executable, "-m", "src.run", "-m", *WAYS[way], f"hydra.sweep.dir={folder}/sweep"),
            *(f"seed=range(1,{trials + 1})", f"training.max_train_steps={steps}", "evaluation.metrics=[]"),
            *("evaluation.eval_steps=null", "evaluation.sample_prompts=0", "checkpoint.checkpointing_steps=null"),
            *(f"tracking.uri=sqlite:///{folder}/mlflow.db", f"data.cache_dir={cache}", "evaluation.max_samples=100"),
        ]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        lines = [file.read_text().splitlines()[-1] for file in Path(folder, "sweep").glob("*/metrics.jsonl")]
        assert len(lines) == trials
        return wall, statistics.mean(json.loads(line)["perf/elapsed_seconds"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="towline-bench-cache-"))
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    try:
        timed("towline, 1 job", 1, 1, cache)  # the rows are encoded once
        for _ in range(asked.rounds):
            for way in WAYS:
                found[way].append(timed(way, asked.trials, asked.steps, cache))
    finally:
        shutil.rmtree(cache)
    own = [wall for wall, _ in found["towline, 2 jobs"]]
    print(f"{asked.trials} trials of {asked.steps} steps, medians of {asked.rounds} rounds")
    print(f"{'':<18}{'wall s':>8}{'s a trial':>11}{'own clock s':>13}{'added s':>9}{'/ towline':>11}")
    for way, times in found.items():
        wall = statistics.median(wall for wall, _ in times)
        ratio = statistics.median(wall / ours for (wall, _), ours in zip(times, own, strict=True))  # of each round
        inside = statistics.median(inside for _, inside in times)
        jobs = 2 if "2 jobs" in way else 1
        each = wall * jobs / asked.trials
        print(f"{way:<18}{wall:>8.1f}{wall / asked.trials:>11.2f}{inside:>13.2f}{each - inside:>9.2f}{ratio:>11.2f}")


if __name__ == "__main__":
    main()
