"""What is known of a sweep's trials: their statuses, how far it is, its history, and what sweep.json says."""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from src.config.schema import Direction, Pruner, Sampler
from src.search.study import Unit
from src.sweep.plan import Plan
from src.sweep.progress import TableRow
from src.tracking.live import clock
from src.tracking.run_folder import now
from src.trials.folder import TRIAL_STATES, SweepFolder, TrialStatus
from src.trials.pareto import front, point_of
from src.trials.trial import Trial
from src.util import as_tuple, one_or_list, plural


class SweepState:
    """The trials of one sweep and their statuses."""

    def __init__(self, plan: Plan, folder: SweepFolder, trials: Sequence[Trial], todo: Sequence[int]) -> None:
        self.plan, self.folder = plan, folder
        self.trials: dict[int, Trial] = {}
        self._units: dict[int, list[Trial]] = {}
        self._sections: dict[str, Any] = {}
        self.unit_of: dict[str, int] = {}  # the identity of a trial -> its unit
        for trial in trials:
            self.add(trial)
        self.statuses = {number: folder.status(number, plan.config.metrics) for number in self.trials}
        self.todo = set(todo)  # the numbers of the trials that the command asks for
        self.queue = self._ordered(todo)
        self._better = [min if one is Direction.minimize else max for one in plan.config.directions]
        before = folder.read()
        judged = [before.get("sweep", {}).get(key) for key in ("metric", "direction")]
        is_same = judged == [plan.config.metric, plan.config.direction]
        self.history: list[dict[str, Any]] = list(before.get("history", [])) if is_same else []
        self._started, self._started_at = before.get("started") or now(), time.time()
        self._seconds_before = float(before.get("elapsed_seconds", 0.0))
        self.durations: list[float] = []  # seconds of the trials that ended since this start

    def _ordered(self, numbers: Sequence[int]) -> list[int]:
        """Return the trials left: those that were stopped, those that wait, those that failed or were killed."""
        order = {"PREEMPTED": 0, "RUNNING": 0, "WAITING": 1, "FAILED": 2}
        left = [number for number in numbers if not self.statuses[number].is_over]
        if self.plan.is_listed and self.plan.config.sampler is not Sampler.grid:
            units = sorted({self.trials[number].unit for number in left})
            random.Random(self.plan.config.seed).shuffle(units)  # in the order of their values each might beat the last
            place = {unit: i for i, unit in enumerate(units)}
            left.sort(key=lambda number: (place[self.trials[number].unit], number))
        return sorted(left, key=lambda number: order[self.statuses[number].state])

    def add(self, trial: Trial) -> None:
        """Take a trial into the sweep; sections of its configuration that others have too are kept once."""
        config = {key: self._shared(value) for key, value in trial.config.items()}
        trial = self.trials[trial.number] = replace(trial, config=config)
        self._units.setdefault(trial.unit, []).append(trial)
        self.unit_of[trial.identity] = trial.unit

    def _shared(self, section: Any) -> Any:
        return self._sections.setdefault(json.dumps(section, sort_keys=True), section)

    @property
    def units(self) -> Collection[int]:
        return self._units.keys()

    def states_of(self, trials: Iterable[Trial]) -> set[str]:
        return {self.statuses[trial.number].state for trial in trials}

    def of_unit(self, unit: int) -> list[Trial]:
        """Return the trials of a unit that count: those that are done, and those that the command asks for."""
        trials = self._units[unit]
        return [one for one in trials if one.number in self.todo or self.statuses[one.number].is_over]

    def means(self, unit: int) -> tuple[float, ...]:
        """Return the means of a unit's values, one of each metric; none where a value is missing."""
        values = [self.statuses[trial.number].values for trial in self.of_unit(unit)]
        return tuple(sum(of) / len(of) for of in zip(*values, strict=True)) if all(values) else ()

    def note(self, number: int, status: TrialStatus) -> None:
        """Add a finished trial to the history."""
        before = as_tuple(self.history[-1]["best"]) if self.history else status.values
        best = [better(pair) for better, *pair in zip(self._better, before, status.values, strict=True)]
        found = {"value": one_or_list(status.values), "best": one_or_list(best)}
        self.history.append({"trial": number, **found, "elapsed_seconds": self._elapsed()})

    def _elapsed(self) -> float:
        return round(self._seconds_before + time.time() - self._started_at, 3)

    @property
    def best(self) -> list[Trial]:
        """The trial with the best value so far; by several metrics those on the Pareto front of trials."""
        directions = self.plan.config.directions
        valued = {number: status.values for number, status in self.statuses.items() if status.values}
        found = front({number: point_of(of, (one.value for one in directions)) for number, of in valued.items()})
        return [self.trials[number] for number in (found if len(directions) > 1 else found[:1])]

    def counts(self) -> dict[str, int]:
        """Return the number of trials in each state."""
        counter = Counter(status.state for status in self.statuses.values())
        return {state: counter[state] for state in TRIAL_STATES}

    @property
    def total(self) -> int:
        """How many trials there will be."""
        if self.plan.is_listed:
            return len(self.trials)
        return max(len(self.trials), (self.plan.config.n_trials or 0) * self.plan.num_replicates)

    def summary(self, started: Collection[float]) -> str:
        """Return in a line how far the sweep is; `started`: when running trials were, by the monotonic clock."""
        counts = self.counts()
        done = counts["FINISHED"] + counts["PRUNED"]
        parts = [f"{done} of {plural(self.total, 'trial')} done"]
        parts += [f"{counts[state]} {state.lower()}" for state in ("RUNNING", "FAILED", "PRUNED") if counts[state]]
        left = self.total - done - counts["FAILED"]
        if left and self.durations and started:
            mean, now_at = sum(self.durations) / len(self.durations), time.monotonic()
            spent = sum(min(mean, now_at - begin) for begin in started)
            parts.append(f"about {clock(max(0.0, mean * left - spent) / self.plan.config.n_jobs)} left")
        return ", ".join(parts)

    def entries(self) -> list[TableRow]:
        """Return the rows of the table of progress."""
        best = {trial.number for trial in self.best}
        return [TableRow(trial, self.statuses[number], number in best) for number, trial in sorted(self.trials.items())]

    def content(self, state: str) -> dict[str, Any]:
        """Return what sweep.json says."""
        best = [
            {"trial": one.number, "value": one_or_list(self.statuses[one.number].values), "overrides": one.label}
            for one in self.best
        ]
        return {
            "name": self.plan.name,
            "id": self.plan.line.sweep_id,
            "state": state,
            "started": self._started,
            "updated": now(),
            "elapsed_seconds": self._elapsed(),
            "command": list(sys.orig_argv),
            "space": self.plan.space,
            "sweep": self.plan.settings,
            "num_trials": self.total,
            "counts": self.counts(),
            "best": best if len(self._better) > 1 else next(iter(best), None),
            "history": self.history,
            **({"signatures": self.plan.signatures} if self.plan.signatures else {}),
        }


def early_replicates(trials: Sequence[Trial], statuses: Mapping[int, TrialStatus]) -> dict[int, TrialStatus]:
    """Return the status of trials that wait for the first of their setting, where that was pruned."""
    pruned = {trial.unit for trial in trials if statuses[trial.number].state == "PRUNED"}
    waiting = [t.number for t in trials if t.unit in pruned and statuses[t.number].state == "WAITING"]
    return {number: TrialStatus("PRUNED", cause="the first trial of its setting was") for number in waiting}


def units_of(state: SweepState) -> Iterator[Unit]:
    """Yield what the folder says of each unit, in their order; paused ones are being tried."""
    plan = state.plan
    ends_early = plan.config.pruner is not Pruner.none
    for number in sorted(state.units):
        trials = state.of_unit(number)
        if not trials:
            continue
        states = state.states_of(trials)
        found = next((one for one in ("PRUNED", "FAILED") if one in states), "RUNNING")
        if states == {"FINISHED"}:
            found = "FINISHED"
        elif found == "PRUNED" and plan.config.pruner is Pruner.asha:
            found = "RUNNING"
        elif states == {"WAITING"} and plan.is_listed:
            found = "WAITING"
        values = state.means(number) if found == "FINISHED" else ()
        first = min(trials, key=lambda trial: trial.number)
        reports = state.folder.reports(first.number, plan.config.metrics[0]) if ends_early else []
        yield Unit(number, first.overrides, found, values, tuple(reports), first.sampler)
