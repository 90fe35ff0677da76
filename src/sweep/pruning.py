"""A run's side of pruning: at every evaluation it asks its sweep's study whether to continue. No torch here."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from src.config.schema import Pruner
from src.errors import Pruned, one_line
from src.secrets import reveal
from src.sweep.study import open_storage, optuna, pruner_of


class Pruning:
    """Asks the study in `link`, made by `SweepController`, whether a run is worth continuing; None: nobody is asked.

    `done` are the lines of metrics up to the step that the run resumes from. Where the study can't be asked, the run
    continues, and warns.
    """

    def __init__(
        self, link: Mapping[str, Any] | None, done: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
    ) -> None:
        self._link, self._warn = link, warn
        self._metric = str(link["metric"]).removeprefix("best/") if link else ""
        self._count = sum(self._metric in line for line in done)
        self._trial: Any = None

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Report an evaluation; return why the run should end here, or ''."""
        value = metrics.get(self._metric)
        if self._link is None or value is None:
            return ""
        self._count += 1
        if not math.isfinite(value):
            return ""  # a failure, which the end of the run reports
        try:
            trial = self._trial or self._open(self._link)
            trial.report(value, self._count)
            is_worse = self._count > self._link["passed"] and trial.should_prune()
        except Exception as error:  # whatever the storage raises: a run does not end because nobody answers
            self._warn(f"the sweep's study can't be asked whether to prune the run, so it continues: {one_line(error)}")
            return ""
        others = f"{self._metric} {value:.4g} at evaluation {self._count}"
        return f"{others}: other trials of the sweep were better ({self._link['pruner']})" if is_worse else ""

    def _open(self, link: Mapping[str, Any]) -> Any:
        pruner = pruner_of(Pruner[link["pruner"]], link["min_resource"], link["reduction_factor"])
        storage = open_storage(reveal(link["storage"], [], "sweep.storage"))
        study = optuna().load_study(study_name=link["study"], storage=storage, pruner=pruner)
        self._trial = optuna().trial.Trial(study, link["trial_id"])
        return self._trial


def end_early(reason: str) -> None:
    """Raise Pruned, unless the reason is empty."""
    if reason:
        raise Pruned(reason)
