"""What a sweep will take is said before it starts: sums over its trials, and what this machine does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import pytest

from src.errors import ModelError
from src.inspection.sweep_cost import TrialCost, show_cost
from src.inspection.trial_cost import forecast_trial
from src.tracking.console import Console
from tests.sweeps import planned

GRID = ("training.per_device_train_batch_size=2,4", "optimizer.lr=1e-3,1e-4", "seed=1,2")
ASKED: list[int] = []


def by_rows(config: Mapping[str, Any], _: Console) -> TrialCost:
    rows = config["training"]["per_device_train_batch_size"]
    ASKED.append(rows)
    return TrialCost(rows * 10.0, rows * 2**20, rows * 2**30)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, num_trials: int | None = None, **changes: Any) -> str:
    plan = planned(*arguments)
    trials = plan.trials or plan.unit([axis.ends[0] for axis in plan.axes], 0, 0)[0][:1]
    ASKED.clear()
    show_cost(plan, trials, num_trials or len(trials), changes.get("forecast", by_rows), Console())
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def test_trials_that_differ_in_what_costs_nothing_are_forecast_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *GRID, "sweep.n_jobs=3")
    assert ASKED == [2, 4]
    assert "time at least 4:00 of computing" in text  # 4 x 20 s + 4 x 40 s
    assert "disk at most 24.0 GiB" in text
    assert "memory 4.0 MiB for each process; 3 trials at a time, 1 process each" in text


def test_a_search_is_forecast_by_one_of_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    search = ("sweep=tpe", "optimizer.lr=interval(1e-5,1e-2)", "training.per_device_train_batch_size=2")
    text = said(capsys, *search, num_trials=20)
    assert "time at least 6:40 of computing" in text
    assert "memory 2.0 MiB for each process; 1 trial at a time" in text


def test_memory_and_disk_that_are_not_there_are_told_before(capsys: pytest.CaptureFixture[str]) -> None:
    half = psutil.virtual_memory().available // 2

    def large(config: Mapping[str, Any], _: Console) -> TrialCost:
        return TrialCost(None, half * 3 // 4, 2**60)

    text = said(capsys, "seed=1,2,3", "sweep.n_jobs=3", forecast=large)
    assert "time unknown" in text
    assert "3 trials at a time need" in text
    assert "sweep.n_jobs=2" in text
    assert "the sweep may write" in text
    text = said(capsys, "seed=1,2", forecast=lambda *_: TrialCost(1.0, 2**33, 1, 2**32))
    assert "a process needs 8.0 GiB, and a GPU here has 4.0 GiB" in text

    def refuse(config: Mapping[str, Any], _: Console) -> TrialCost:
        raise ModelError("no such model")

    assert said(capsys, "seed=1,2", forecast=refuse) == "cost unknown, without trial 0: no such model"

    def refuse_some(config: Mapping[str, Any], console: Console) -> TrialCost:
        return (
            by_rows(config, console)
            if config["training"]["per_device_train_batch_size"] == 2
            else refuse(config, console)
        )

    text = said(capsys, *GRID, forecast=refuse_some)
    assert "time at least 1:20 of computing" in text  # of the four that are known
    assert "without trial 4: no such model" in text


def test_trials_that_share_a_gpu_have_to_fit_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(config: Mapping[str, Any], _: Console) -> TrialCost:
        return TrialCost(1.0, 3 * 2**30, 1, 4 * 2**30)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    shared = said(capsys, "seed=1,2,3,4", "sweep.n_jobs=4", forecast=half)
    assert "the 2 processes that share a GPU need 6.0 GiB, and a GPU here has 4.0 GiB: sweep.n_jobs=2" in shared
    assert "GPU" not in said(capsys, "seed=1,2", "sweep.n_jobs=2", forecast=half)


def test_a_trial_is_forecast_from_its_own_configuration() -> None:
    large, small = (forecast_trial(one.config, Console()) for one in planned("tokens=tow,none").trials)
    assert large.seconds is not None
    assert (large.disk_bytes or 0) > (small.disk_bytes or 0) > 2**20  # two more rows
    assert (large.memory_bytes or 0) > 2**26
    assert large.device_bytes is None
