"""How long `python -m src.report` takes: the table of 1,000 runs, and the page of a run of 10,000 steps.

    python -m benchmarks.reports [--runs 1000] [--steps 10000] [--rounds 3]

Prints wall and processor seconds of whole commands, the best of the rounds. Not a test: times differ from machine to
machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from src.config.frozen import config_hash
from src.config.gate import admit

ROOT = Path(__file__).resolve().parents[1]
BEGAN = "2026-01-02T03:04:05+00:00"
LOSS = "eval/validation/loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    request = admit(["tracking=none"])
    assert request.run is not None
    config = json.loads(json.dumps(request.run.frozen))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for number in range(given.runs):
            own = config | {
                "seed": number % 5,
                "optimizer": config["optimizer"] | {"lr": 10 ** -(2 + number % 40 / 10)},
            }
            write_run(place / "outputs" / f"{number:05}", own, list(lines(4, number)))
        best(f"table of {given.runs:,} runs", [], place, given.rounds)
        write_run(place / "long", config, list(lines(given.steps, 0)))
        best(f"page of a run of {given.steps:,} steps", [f"dir={place / 'long'}"], place, given.rounds)
        print(f"report.html has {(place / 'long' / 'report.html').stat().st_size / 1e6:.2f} MB")


def lines(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a line of metrics for each step, with an evaluation at each twentieth and at the last."""
    draw = random.Random(seed)
    for step in range(1, count + 1):
        loss = 0.2 + math.exp(-step / count * 5) + draw.gauss(0, 0.05)
        line = {"step": step, "train/loss": loss, "train/thought_loss": loss * 1.2, "train/answer_loss": loss * 0.8}
        line |= {"perf/tokens_per_second": draw.gauss(5000, 200), "train/lr": 1e-3 * (1 - step / count)}
        line |= {"train/grad_norm": draw.gauss(1, 0.1), "perf/memory_bytes": 10**9, "perf/peak_memory_bytes": 10**9}
        if step % 20 == 0 or step == count:
            line |= {f"eval/validation/{leaf}": loss for leaf in ("loss", "thought_loss", "answer_loss", "perplexity")}
            line |= {
                f"tokens/{token}/{leaf}": draw.random()
                for token in ("<ToW>", "</ToW>")
                for leaf in ("norm", "cosine_to_start", "log_probability", "grad_norm")
            }
        yield line | {"perf/elapsed_seconds": 0.1 * step}


def write_run(folder: Path, config: Mapping[str, Any], metrics: list[dict[str, Any]]) -> None:
    """Write the files of a finished run, but for its weights."""
    folder.mkdir(parents=True)
    last = metrics[-1]
    start = {"time": BEGAN, "command": ["python", "-m", "src.run"], "config_hash": config_hash(config)}
    status = {"state": "FINISHED", "step": last["step"], "started": BEGAN}
    summary = last | {f"best/{LOSS}": min(line[LOSS] for line in metrics if LOSS in line), "train_seconds": 61.0}
    texts = {"prompt": "1+1=", "text": "<ToW>2</ToW>2", "answer": "2", "reference": "2", "stop_reason": "eos"}
    samples = [{"step": line["step"], **texts} for line in metrics if line["step"] % 1000 == 0]
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    for name, content in (("status", status), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for name, rows in (("starts", [start]), ("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def best(what: str, arguments: list[str], place: Path, rounds: int) -> None:
    """Print the fastest of some runs of a command, in wall and in processor seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    times = []
    for _ in range(rounds):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "src.report", *arguments]
        subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append((time.perf_counter() - began, cpu))
    wall, cpu = (min(of) for of in zip(*times, strict=True))
    print(f"{what}: {wall:.2f} s, of the processor {cpu:.2f} s (best of {rounds})")


if __name__ == "__main__":
    main()
