"""What a sweep's own process costs a trial, and what it holds, as the number of trials grows.

    python -m benchmarks.sweep_growth [--trials 10000] [--pruner asha]

The trials are stubs: they write the files that a run leaves in its folder, at once, and end. So the times are those of
the process that leads the sweep: proposing (by random, which looks at nothing), composing and checking, writing down,
reading how each ended, ranking at the end. It prints milliseconds of processor time a trial in windows of trials.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from src.config.command_line import read_command_line
from src.config.frozen import config_hash
from src.records import Digest
from src.runtime.signals import StopRequest
from src.sweep.engines.engine import TrialJob
from src.sweep.plan import plan_sweep
from src.sweep.sweeper import lead

METRIC = "eval/validation/loss"
NUM_EVALUATIONS = 9


class Stubs:
    """Trials that end as soon as they start, as files in their folders say; looked at when so many have ended."""

    def __init__(self, windows: list[int]) -> None:
        self.running: list[int] = []
        self._ended: list[tuple[TrialJob, int]] = []
        self._num_ended, self._windows = 0, windows
        self._began, self._before = time.process_time(), 0
        self._own = 0.0  # seconds of the stubs themselves

    @property
    def room(self) -> int:
        return 1 - len(self.running)

    def open(self) -> None: ...

    def is_ready(self, seconds: float) -> bool:
        return True

    def start(self, job: TrialJob) -> None:
        began = time.process_time()
        self.running.append(job.number)
        self._write(job)
        self._ended.append((job, 0))
        self._own += time.process_time() - began

    def _write(self, job: TrialJob) -> None:
        """Leave what a run does that pauses at its rung, or finishes."""
        job.run_dir.mkdir(parents=True, exist_ok=True)
        pause_at = (job.link or {}).get("pause_at") or NUM_EVALUATIONS + 1
        count = min(pause_at, NUM_EVALUATIONS)
        loss = abs(float(job.config["optimizer"]["lr"]) - 3e-3)
        lines = [{"step": step, METRIC: loss + 1 / step} for step in range(1, count + 1)]
        metrics = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (job.run_dir / "metrics.jsonl").write_bytes(metrics)
        (job.run_dir / "summary.json").write_text(json.dumps({METRIC: loss}))
        start = {"config_hash": config_hash(job.config), "started": "2026-01-01T00:00:00+00:00"}
        (job.run_dir / "starts.jsonl").write_text(json.dumps(start) + "\n")
        state = "FINISHED" if count == NUM_EVALUATIONS else "PRUNED"
        status = {"state": state, "step": count, "num_steps": NUM_EVALUATIONS, "cause": None, "pid": 0}
        status["journal"] = {"metrics.jsonl": Digest(metrics).as_dict()}
        (job.run_dir / "status.json").write_text(json.dumps(status))

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        ended, self._ended, self.running = self._ended, [], []
        self._num_ended += len(ended)
        if self._windows and self._num_ended >= self._windows[0]:
            spent = time.process_time() - self._began - self._own
            each = 1000 * spent / (self._num_ended - self._before)
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            sys.stderr.write(
                f"{self._num_ended:>6} starts  {each:7.2f} ms a start since the last line  {held:6.0f} MiB\n"
            )
            self._windows.pop(0)
            self._began, self._before, self._own = time.process_time(), self._num_ended, 0.0
        return ended

    def ask_to_stop(self) -> None: ...

    def stop_at_once(self) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--pruner", choices=["none", "asha"], default="none")
    options = parser.parse_args()
    windows = [n for n in (100, 200, 1_000, 1_100, 3_000, 3_100, 10_000, 10_100) if n <= options.trials]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(Path(folder, "out").open("w")):
        plan = plan_sweep(
            read_command_line(
                [
                    *("-m", "sweep=tpe", "sweep.sampler=random", f"sweep.pruner={options.pruner}", "tracking=none"),
                    *("optimizer.lr=interval(1e-5,1e-2)", f"sweep.n_trials={options.trials}"),
                    f"hydra.sweep.dir={folder}/sweep",
                ]
            )
        )
        began = time.process_time()
        workers: Any = Stubs(windows)
        code = lead(plan, StopRequest(), workers)
        sys.stderr.write(f"exit code {code}, {time.process_time() - began:.1f} s of processor time in all\n")


if __name__ == "__main__":
    main()
