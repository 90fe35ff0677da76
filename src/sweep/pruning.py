"""Which trials of a sweep end early: when a trial pauses, which paused one resumes, and how a trial is told.

A trial is started with the evaluation at which it pauses by itself (asha), or waits after each of its evaluations for
a verdict of its sweep (median): what is decided depends on what trials have reported, not on when the sweep looked. No
torch here.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DamagedFileError, Pruned
from src.records import read_json
from src.util import write_json

VERDICT = "verdict.json"  # of the sweep, in the trial's folder
VERDICT_KEYS = {"evaluation": int, "reason": str}
VERDICT_SECONDS = 60.0  # that a trial waits for its sweep, and then continues
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving: a trial pauses at each rung, and resumes once it is among the best there.

    Values are by the evaluations that have them, lower ones are better.

    Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934).
    """

    min_resource: int  # the evaluation of the first rung
    reduction_factor: int  # 1 in so many resumes, up to so many times the evaluation

    def rung_from(self, evaluation: int) -> int:
        """Return the first rung at an evaluation or after it."""
        rung = self.min_resource
        while rung < evaluation:
            rung *= self.reduction_factor
        return rung

    def is_among_best(self, value: float, values: Sequence[float]) -> bool:
        """Return whether a value is in the best 1 / reduction_factor of those that reached its rung."""
        num_kept = len(values) // self.reduction_factor
        return num_kept > 0 and value <= sorted(values)[num_kept - 1]

    def promotable(
        self, paused: Mapping[int, int], reports: Mapping[int, Sequence[float]], *, at_least_one: bool = False
    ) -> int | None:
        """Return the paused unit to resume; None where none is among the best of its rung.

        Args:
            paused: unit -> the rung at which it is paused.
            reports: unit -> its values at evaluations 1, 2, …, of all that have reported.
            at_least_one: the best of the highest rung, where none is among the best.
        """
        order = sorted(paused, key=lambda unit: (-paused[unit], reports[unit][paused[unit] - 1], unit))
        for unit in order:
            rung = paused[unit]
            reached = [values[rung - 1] for values in reports.values() if len(values) >= rung]
            if self.is_among_best(reports[unit][rung - 1], reached):
                return unit
        return order[0] if at_least_one and order else None


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
