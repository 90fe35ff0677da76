"""What the tests of sweeps share: sweeps of runs of a second, and how they stand."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from src.config.command_line import read_command_line
from src.config.identity import new_identity
from src.sweep.plan import Plan, plan_sweep
from tests.conftest import ROWS, read_lines, towline

TINY = (
    "debug=smoke",
    f"data.cache_dir={ROWS}",
    "evaluation.metrics=[]",
    "evaluation.sample_prompts=0",
    "checkpoint.keep_best=0",
)


def planned(*arguments: str) -> Plan:
    new_identity()
    return plan_sweep(read_command_line(["-m", *TINY, *untracked(arguments), *arguments]))


def sleep_before_it_begins(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    """Be a trial that has not come to its first line."""
    Path(run_dir, "sleeps").touch()
    time.sleep(600)
    return 0


def untracked(arguments: Sequence[str]) -> list[str]:
    return [] if any(one.startswith("tracking") for one in arguments) else ["tracking=none"]


def states(folder: Path) -> list[str]:
    numbers = sorted(int(file.parent.name) for file in folder.glob("*/status.json"))
    return [json.loads((folder / str(n) / "status.json").read_text())["state"] for n in numbers]


def starts(folder: Path) -> list[int]:
    """Count how often each trial was started."""
    numbers = sorted(int(file.parent.name) for file in folder.glob("*/starts.jsonl"))
    return [len(read_lines(folder / str(n) / "starts.jsonl")) for n in numbers]


def steps_of(folder: Path) -> list[int]:
    return [json.loads(file.read_text())["step"] for file in folder.glob("*/status.json")]


def values_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without what differs from start to start."""
    lines = read_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def board_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "leaderboard.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study_of(folder: Path) -> Any:
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


# ---- from the command line

LONG = ("training.max_train_steps=100000", "training.num_train_epochs=90000", "evaluation.eval_steps=null",
        "checkpoint.checkpointing_steps=null", "sweep.n_jobs=2", "seed=1,2,3,4")  # fmt: skip


ASHA = ("sweep=asha", "optimizer.lr=1e-7,1e-6,1e-5,5e-5,3e-4,2e-3", "training.max_train_steps=9",
        "training.num_train_epochs=9", "evaluation.eval_steps=1", "data.limit=36", "scheduler=constant",
        "checkpoint.checkpointing_steps=null")  # fmt: skip


def command(*arguments: str) -> list[str]:
    return ["-m", *TINY, *untracked(arguments), *arguments]


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Give a sweep's command, and wait for its end."""
    return towline(*command(*arguments))


def until(holds: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until something holds; gives it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def pid_of(folder: Path, number: int) -> int | None:
    """Give the process of a trial that trains."""
    try:
        status = json.loads((folder / str(number) / "status.json").read_text())
    except (OSError, ValueError):
        return None
    return status["pid"] if status["state"] == "RUNNING" and status["step"] > 0 else None


def left_of(folder: Path) -> list[psutil.Process]:
    """Find the processes that have a file of the sweep open or as an argument."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            files = [file.path for file in process.open_files()]
            if process.pid != os.getpid() and any(
                str(folder) in one for one in [*files, *(process.info["cmdline"] or [])]
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found
