"""What a sweep will take, before it starts: time, disk and memory, from the forecasts of its trials. No torch here."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from src.config.schema import EngineName
from src.errors import TowlineError, one_line
from src.runtime.devices import visible_gpus
from src.sweep.plan import Plan
from src.tracking.console import Console
from src.tracking.live import clock
from src.trials.trial import Trial
from src.util import human_bytes, plural

MOST_FORECASTS = 12  # of different trials, each of which takes seconds
WITHOUT_COST = ("name", "seed", "scheduler", "loss", "tracking", "hydra", "project_root", "data.fold", "optimizer.lr")
"""Keys and sections that change nothing of what a trial takes, or next to nothing."""


@dataclass(frozen=True)
class TrialCost:
    """A forecast of a trial: seconds of computing from below, bytes at most; None: unknown."""

    seconds: float | None
    memory_bytes: int | None  # of each process, on its device
    disk_bytes: int | None
    device_bytes: int | None = None  # what a GPU has; None on the CPU, whose memory all trials share


Forecast = Callable[[Mapping[str, Any], Console], TrialCost]
"""Forecasts a trial by its frozen configuration."""


def show_cost(plan: Plan, to_run: Sequence[Trial], num_trials: int, forecast: Forecast, console: Console) -> None:
    """Print what the trials that are to run will take, and warn of what this machine does not have.

    `num_trials` is how many there will be: more than are known where a sampler proposes them.
    """
    alike: dict[str, list[Trial]] = {}
    for trial in to_run:
        alike.setdefault(json.dumps(_costly(trial.config), sort_keys=True, default=str), []).append(trial)
    chosen, costs, counts, failed = list(alike.values())[:MOST_FORECASTS], list[TrialCost](), list[int](), list[str]()
    for trials in chosen:
        try:
            costs.append(forecast(trials[0].config, console))
            counts.append(len(trials))
        except TowlineError as error:  # the run says so itself, when it comes to it
            failed.append(f"without trial {trials[0].number}: {one_line(error)}")
    if not costs:
        console.label("cost", f"unknown, {failed[0]}")
        return
    scale = num_trials / sum(map(len, chosen))
    seconds, disk = (
        _total([getattr(cost, name) for cost in costs], counts, scale) for name in ("seconds", "disk_bytes")
    )
    memory = max((cost.memory_bytes for cost in costs if cost.memory_bytes is not None), default=None)
    jobs, processes = min(plan.config.n_jobs, num_trials), plan.sample.runtime.num_processes
    computing = "of computing, at this machine's speed now"
    console.label("time", "unknown" if seconds is None else f"at least {clock(seconds)} {computing}")
    console.label("disk", "unknown" if disk is None else f"at most {human_bytes(int(disk))}")
    each = f"{plural(jobs, 'trial')} at a time, {plural(processes, 'process', 'processes')} each"
    console.label("memory", "unknown" if memory is None else f"{human_bytes(memory)} for each process; {each}")
    if len(alike) > len(chosen):
        failed.append(f"by {len(chosen)} of {len(alike)} kinds of trials")
    for text in failed:
        console.label("", text)
    if memory is not None:
        _warn_of_memory(plan, memory, costs[0].device_bytes, jobs, console)
    free = shutil.disk_usage(_existing(plan.folder)).free
    if disk is not None and disk > free:
        console.warn(
            f"the sweep may write {human_bytes(int(disk))}, and {human_bytes(free)} are free in {plan.folder}: "
            "checkpoint.keep_last, keep_best and newest_optimizer_only decide what checkpoints take"
        )


def _warn_of_memory(plan: Plan, memory: int, device_bytes: int | None, jobs: int, console: Console) -> None:
    """Warn where a GPU can't hold the processes that share it, or the CPU's memory not all that run at a time."""
    processes = plan.sample.runtime.num_processes
    if device_bytes is not None:
        gpus = len(visible_gpus()) if plan.config.engine is EngineName.local else jobs * processes  # others share none
        sharing = math.ceil(jobs * processes / max(1, gpus))
        if memory * sharing > device_bytes:
            who = "a process needs" if sharing == 1 else f"the {sharing} processes that share a GPU need"
            needs = f"{who} {human_bytes(memory * sharing)}, and a GPU here has {human_bytes(device_bytes)}"
            console.warn(f"{needs}{'' if sharing == 1 else f': sweep.n_jobs={max(1, gpus // processes)}'}")
        return
    needed, free = memory * jobs * processes, psutil.virtual_memory().available
    if needed > free:
        fitting = free // (memory * processes)
        remedy = f"sweep.n_jobs={fitting}" if fitting else "smaller micro-batches, or a smaller model"
        console.warn(f"{plural(jobs, 'trial')} at a time need {human_bytes(needed)}, of {human_bytes(free)}: {remedy}")


def _total(values: Sequence[float | None], counts: Sequence[int], scale: float) -> float | None:
    known = [value * count for value, count in zip(values, counts, strict=True) if value is not None]
    return sum(known) * scale if len(known) == len(values) else None


def _costly(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the part of a configuration that decides what a trial takes."""
    return {
        key: _costly(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in WITHOUT_COST
    }


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.resolve().parents) if one.exists())
