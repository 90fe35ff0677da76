"""MLflow as the mirror of a sweep's folder: a run of the sweep's own, and its trials' runs nested under it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from src.config.frozen import read_status
from src.config.schema import MlflowConfig
from src.tracking.journal import hold
from src.tracking.mlflow_mirror import Delivery
from src.tracking.mlflow_store import STATES, FolderDelivery, flat, milliseconds

ARTIFACTS = ("sweep.json", "leaderboard.csv", "leaderboard.json", "leaderboard.md")
COUNTED = ("FINISHED", "FAILED", "PRUNED")
TRIALS_AT_ONCE = 100
OF_A_TRIAL = ("experiment_name", "run_name", "tags", "log_model")
"""Of the tracker's configuration, what a trial may have of its own."""


class SweepDelivery(FolderDelivery):
    """What of a sweep's folder MLflow has.

    A trial's run is its own process's to write, but for the tags that tie it to the sweep. What that process did not
    deliver is brought from here when the sweep is over and nobody else is at the trial.
    """

    @property
    def _run_name(self) -> str:
        return self._read("sweep.json")["name"]

    @property
    def _own_tags(self) -> Mapping[str, str]:
        return {"towline.sweep": self._run_name}

    @property
    def pending(self) -> str:
        new = len(self._read("sweep.json").get("history", ())) - self._num_delivered
        return f"values of {new} trials, or what became of the sweep or a trial,"

    @property
    def _num_delivered(self) -> int:
        return int(self._done.get("history", 0))

    def _connect(self) -> None:
        """Find the sweep's run, or begin one; judged by another metric it is another run, with the same trials."""
        sweep = self._read("sweep.json").get("sweep", {})
        judged = [sweep.get("metric"), sweep.get("direction")]
        if self._done.get("judged", judged) != judged:
            self._done = {"uri": self.uri, "run_id": None}
        super()._connect()
        self._remember(judged=judged)

    def _bring(self) -> None:
        sweep = self._read("sweep.json")
        state, version = sweep["state"], f"{sweep['state']} {sweep['updated']}"
        self._deliver_once("params", lambda: self._log_search(sweep))
        if state not in STATES and self._done.get("ended"):  # it goes on
            self._set_running()
            self._remember(ended=None)
        self._log_history(sweep)
        self._deliver_once("counts", lambda: self._log_counts(sweep), self._counts(sweep))
        if state in STATES:
            self._deliver_once("artifacts", self._log_artifacts, version)
            self._deliver_once("ended", lambda: self._set_ended(state), version)
        self._bring_trials(is_over=state in STATES)

    def _log_search(self, sweep: Mapping[str, Any]) -> None:
        """Log what is searched and how; what is longer than a param may be is in sweep.json, an artifact."""
        self._log_params({name: text for key in ("space", "sweep") for name, text in flat(sweep[key], key)})

    def _log_history(self, sweep: Mapping[str, Any]) -> None:
        """Log the values that are new and the best so far; the step is the number of trials that have finished."""
        history = sweep["history"]
        for first in range(self._num_delivered, len(history), TRIALS_AT_ONCE):
            some = history[first : first + TRIALS_AT_ONCE]
            self._log_points(
                (name, trial[name], milliseconds(sweep["started"], trial["elapsed_seconds"]), step)
                for step, trial in enumerate(some, first + 1)
                for name in ("value", "best")
                if trial[name] is not None
            )
            self._remember(history=first + len(some))

    def _counts(self, sweep: Mapping[str, Any]) -> dict[str, int]:
        return {f"trials_{state.lower()}": sweep["counts"].get(state, 0) for state in COUNTED}

    def _log_counts(self, sweep: Mapping[str, Any]) -> None:
        """Log those numbers of trials that have changed; they are dated by the file, as they may become less again."""
        before, at, step = self._done.get("counts") or {}, milliseconds(sweep["updated"]), len(sweep["history"])
        now = self._counts(sweep)
        self._log_points((name, now[name], at, step) for name in now if now[name] != before.get(name))

    def _log_artifacts(self) -> None:
        self._log_files(ARTIFACTS)
        plots = sorted((self._folder / "plots").glob("*.png"))
        self._log_files((f"plots/{file.name}" for file in plots), artifact_path="plots")
        if rows := self._read("leaderboard.json").get("rows"):
            columns = list(dict.fromkeys(chain.from_iterable(rows)))
            self._log_table("leaderboard_table.json", columns, [[_cell(row.get(c)) for c in columns] for row in rows])

    def _bring_trials(self, *, is_over: bool) -> None:
        """Bring what is new of each trial; one that can't be brought does not stop the others.

        Raises:
            Exception: the first trial's that could not be brought.
        """
        problems = []
        for line in self._lines("trials.jsonl"):
            trial = json.loads(line)
            folder = self._folder / str(trial["number"])
            try:
                if is_over:
                    self._bring_rest_of(folder)
                self._tie(trial, folder)
            except Exception as error:  # whatever MLflow raises, of a run that somebody deleted for example
                problems.append(error)
        if problems:
            raise problems[0]

    def _bring_rest_of(self, folder: Path) -> None:
        done = _tracking(folder)
        if not done or (done["uri"] == self.uri and done.get("ended")):
            return
        with hold(folder):
            own = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("tracking", {})
            config: MlflowConfig = replace(self._config, **{key: own[key] for key in OF_A_TRIAL if key in own})
            Delivery(config, folder, within=self).deliver()

    def _tie(self, trial: Mapping[str, Any], folder: Path) -> None:
        """Nest a trial's run under the sweep's, and say in its tags which trial it is and what became of it."""
        done, number = _tracking(folder), str(trial["number"])
        if done.get("uri") != self.uri or not done.get("run_id"):
            return
        said = {"run_id": done["run_id"], "state": read_status(folder).get("state")}
        known = self._done.get("trials", {})
        if known.get(number) == said:
            return
        self._log_tags(
            {
                "mlflow.parentRunId": self.run_id,
                "towline.sweep": self._run_name,
                "towline.trial": number,
                "towline.identity": trial["identity"],
                "towline.setting": trial["setting"],
                "towline.state": said["state"],
            },
            run_id=said["run_id"],
        )
        self._remember(trials=known | {number: said})


def _tracking(folder: Path) -> dict[str, Any]:
    file = folder / "tracking.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _cell(value: Any) -> Any:
    """Give what a cell of a table shows: a text in place of what has parts."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
