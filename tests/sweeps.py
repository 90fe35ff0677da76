"""What the tests of sweeps share: sweeps of runs of a second, and how they stand."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config.command_line import read_command_line
from src.config.identity import new_identity
from src.sweep.plan import Plan, plan_sweep
from tests.conftest import ROWS, read_lines

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


def board_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "leaderboard.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study_of(folder: Path) -> Any:
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)
