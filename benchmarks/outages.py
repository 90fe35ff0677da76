"""What a tracker that is gone costs a step: one run beside servers that refuse, never answer, freeze or are killed.

    python -m benchmarks.outages [--steps 60] [KEY=VALUE …]

Prints the median and the longest time of a step that no evaluation follows, its line of metrics included, and how much
longer the longest is than that of the same run without a tracker; such a run again shows what chance does. MLflow's own
server is frozen (SIGSTOP) or killed at a third of the steps. Not a test: times differ from machine to machine, and from
run to run on a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    *("debug=smoke", "data.limit=640", "training.per_device_train_batch_size=16", "evaluation.eval_steps=20"),
    *("evaluation.sample_steps=20", "runtime.device=cpu"),
)
Strike = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    overrides = [*RUN, f"training.max_train_steps={given.steps}", *given.overrides]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        alone = step_seconds(place / "none", ["tracking=none", *overrides], given.steps)
        show("no tracker", alone, alone)
        show("the same again", step_seconds(place / "again", ["tracking=none", *overrides], given.steps), alone)
        for mode, opened in {"refuses": refusing, "never answers": silent}.items():
            with opened() as uri:
                times = step_seconds(place / mode, [f"tracking.uri={uri}", *overrides], given.steps)
            show(mode, times, alone)
        for mode, sign in {"frozen": signal.SIGSTOP, "killed": signal.SIGKILL}.items():
            with mlflow_server(place) as (uri, server):
                strike = lambda server=server, sign=sign: os.killpg(server.pid, sign)  # noqa: E731
                times = step_seconds(place / mode, [f"tracking.uri={uri}", *overrides], given.steps, strike)
            show(mode, times, alone)


def show(mode: str, times: Mapping[int, float], alone: Mapping[int, float]) -> None:
    at, longest = max(times.items(), key=lambda item: item[1])
    more, median = longest - max(alone.values()), statistics.median(times.values())
    print(f"{mode:16}median {median:.3f} s, longest {longest:.3f} s ({more:+.3f} s) in step {at}", flush=True)


def step_seconds(folder: Path, overrides: list[str], num_steps: int, strike: Strike | None = None) -> dict[int, float]:
    """Return the seconds of each step that no evaluation follows, from line to line of a run's metrics.

    `strike` is called at a third of its steps.
    """
    command = [sys.executable, "-m", "src.run", f"hydra.run.dir='{folder}'", *overrides]
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while strike is not None:
            if metrics.exists() and len(metrics.read_bytes().splitlines()) > num_steps // 3:
                strike()
                break
            assert run.poll() is None, "the run ended before the server did"
            time.sleep(0.02)
    assert run.returncode == 0, f"exit code {run.returncode}"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    plain = [(before, line) for before, line in pairwise(lines) if "eval/validation/loss" not in line]
    return {line["step"]: line["perf/elapsed_seconds"] - before["perf/elapsed_seconds"] for before, line in plain}


@contextmanager
def refusing() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def silent() -> Iterator[str]:
    """Accept every connection, and never answer."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def mlflow_server(place: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start MLflow's own server, and wait until it answers."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place}/{port}.db"]
    command += ["--artifacts-destination", str(place / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=place,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    try:
        while True:
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield uri, server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    main()
