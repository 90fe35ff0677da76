"""Which trials of a sweep end early: when a trial pauses, which paused one resumes, and how a trial is told.

A trial is started with the evaluation at which it pauses by itself (asha), or waits after each of its evaluations for
a verdict of its sweep (median): what is decided depends on what trials have reported, not on when the sweep looked. No
torch here.
"""

import math
import time
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from src.errors import DamagedFileError, Pruned
from src.records import read_json
from src.util import write_json

VERDICT = "verdict.json"  # of the sweep, in the trial's folder
VERDICT_KEYS = {"evaluation": int, "reason": str}
VERDICT_SECONDS = 60.0  # that a trial waits for its sweep, and then continues
POLL_SECONDS = 0.02


class Halving:
    """Asynchronous successive halving: a trial pauses at each rung, and resumes once it is among the best there.

    Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934).

    Args:
        min_resource: the evaluation of the first rung.
        reduction_factor: 1 in so many resumes, up to so many times the evaluation.
        sign: -1 where higher values are better.
    """

    def __init__(self, min_resource: int, reduction_factor: int, sign: int = 1) -> None:
        self._min_resource, self._factor, self._sign = min_resource, reduction_factor, sign
        self._reached: defaultdict[int, list[float]] = defaultdict(list)  # rung -> values there, sorted
        self._paused: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)  # rung -> (value, unit), a heap
        self._num_seen: dict[int, int] = {}  # unit -> evaluations that are counted

    def rung_from(self, evaluation: int) -> int:
        """Return the first rung at an evaluation or after it."""
        rung = self._min_resource
        while rung < evaluation:
            rung *= self._factor
        return rung

    def note(self, unit: int, reports: Sequence[float]) -> None:
        """Count a unit's values at the rungs that it has reached."""
        rung = self.rung_from(self._num_seen.get(unit, 0) + 1)
        self._num_seen[unit] = max(len(reports), self._num_seen.get(unit, 0))
        while rung <= len(reports):
            insort(self._reached[rung], self._sign * reports[rung - 1])
            rung *= self._factor

    def pause(self, unit: int, reports: Sequence[float]) -> None:
        """Note that a unit is paused at its last report."""
        heappush(self._paused[len(reports)], (self._sign * reports[-1], unit))

    def promote(self, *, at_least_one: bool = False) -> int | None:
        """Take the paused unit to resume: the best of the highest rung where it is in the best 1 / reduction_factor of
        those that reached it; with `at_least_one` the best of the highest rung in any case. None: no unit.
        """
        rungs = sorted((rung for rung, paused in self._paused.items() if paused), reverse=True)
        for rung in rungs:
            values, (value, _) = self._reached[rung], self._paused[rung][0]
            num_kept = len(values) // self._factor
            if num_kept and value <= values[num_kept - 1]:
                return heappop(self._paused[rung])[1]
        return heappop(self._paused[rungs[0]])[1] if at_least_one and rungs else None

    def take_paused(self) -> list[int]:
        """Take all units that are paused, in their order."""
        units = sorted(unit for paused in self._paused.values() for _, unit in paused)
        self._paused.clear()
        return units

    def __bool__(self) -> bool:
        return any(self._paused.values())


def answer(run_dir: Path, evaluation: int, reason: str) -> None:
    """Tell a trial that waits after an evaluation whether to end there: why, or '' to continue."""
    write_json(run_dir / VERDICT, {"evaluation": evaluation, "reason": reason})


class Pruning:
    """A trial's side: `link`, made by `SweepController`, says when it pauses and whether it waits; None: it never ends
    early.

    `done` are the lines of metrics up to the step that the run resumes from.
    """

    def __init__(
        self,
        link: Mapping[str, Any] | None,
        run_dir: Path,
        done: Sequence[Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self._link, self._run_dir, self._warn = link, run_dir, warn
        self._metric = str(link["metric"]).removeprefix("best/") if link else ""
        self._values = [float(line[self._metric]) for line in done if self._metric in line]

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return why the run should end after an evaluation whose metrics are logged, or ''."""
        value = metrics.get(self._metric)
        if self._link is None or value is None:
            return ""
        self._values.append(value)
        if not math.isfinite(value):
            return ""  # a failure, which the end of the run reports
        return self._wait() if self._link["waits"] else self._pauses()

    def _pauses(self) -> str:
        if self._link is None or self._link["pause_at"] != len(self._values):
            return ""
        at = f"paused at evaluation {len(self._values)} ({self._metric} {self._values[-1]:.4g})"
        return f"{at}, to resume if it is among the best there"

    def _wait(self) -> str:
        """Wait until the sweep has answered this evaluation; return its reason to end, or ''."""
        deadline = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < deadline:
            for verdict in self._read():
                if verdict["evaluation"] == len(self._values):
                    return str(verdict["reason"])
            time.sleep(POLL_SECONDS)
        self._warn(f"the sweep has not said within {VERDICT_SECONDS:g} s whether to continue, so the run continues")
        return ""

    def _read(self) -> Iterator[Mapping[str, Any]]:
        try:
            yield read_json(self._run_dir / VERDICT, VERDICT_KEYS)
        except (FileNotFoundError, DamagedFileError):
            return


def end_early(reason: str) -> None:
    """Raise Pruned, unless the reason is empty."""
    if reason:
        raise Pruned(reason)
