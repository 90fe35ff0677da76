"""How the trials of a sweep stand by what its folder says, without running it. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.frozen import SWEEP
from src.errors import SweepError, report
from src.sweep import leaderboard
from src.sweep.folder import SweepFolder, TrialStatus
from src.sweep.ranking import Direction, Result, Row, conclusion, rank
from src.sweep.trial import Trial
from src.tracking.lock import hold


def result_of(trial: Trial, status: TrialStatus, sweep_name: str) -> Result:
    """Return a trial as the ranking needs it."""
    label = trial.setting_label or sweep_name
    model = next((text.partition("=")[2] for text in trial.overrides if text.startswith("model=")), "")
    if model:
        label = " ".join(text for text in label.split(" ") if text != f"model={model}")
    replicate = (trial.seed, trial.fold)
    return Result(trial.number, trial.setting, label, model, replicate, status.state, status.value)


class FinishedTrials:
    """The finished trials of a sweep that is named later, if any is: called with its folder, it returns theirs."""

    def __init__(self) -> None:
        self.sweep: Path | None = None
        self._settings: list[list[Path]] = []

    def __call__(self, sweep: Path) -> list[Path]:
        """Return the folders of a sweep's finished trials, by number.

        SweepError where there is no sweep, or none has finished; DamagedFileError as SweepFolder.
        """
        self.sweep = sweep
        standings = read_standings(sweep)
        ranked = [row for row in standings.rows if row.rank is not None]
        if not ranked:
            raise SweepError(f"none of the {len(standings.statuses)} trials in {sweep} has finished")
        self._settings = [[sweep / str(number) for number in standings.finished(row)] for row in ranked]
        numbers = sorted(number for row in ranked for number in standings.finished(row))
        if left := len(standings.statuses) - len(numbers):
            report(f"warning: {left} of the {len(standings.statuses)} trials in {sweep} are not finished, and left out")
        return [sweep / str(number) for number in numbers]

    def of_best(self, num_settings: int | None) -> set[Path]:
        """Return the folders of the trials of the best settings; None: of all."""
        return {folder for setting in self._settings[:num_settings] for folder in setting}


@dataclass(frozen=True)
class Standings:
    """What a sweep's folder says of its settings and trials."""

    rows: list[Row]
    trials: list[Trial]
    statuses: Mapping[int, TrialStatus]
    metric: str
    direction: Direction
    content: Mapping[str, Any]  # of sweep.json

    def finished(self, row: Row) -> list[int]:
        """Return the numbers of a setting's finished trials."""
        return [number for number in row.trials if self.statuses[number].state == "FINISHED"]


def read_standings(sweep: Path) -> Standings:
    """Rank the settings of a sweep by its folder; SweepError where there is none, DamagedFileError as SweepFolder."""
    record = SweepFolder(sweep)
    if not (sweep / SWEEP).exists():
        raise SweepError(f"{sweep} is no sweep's folder: there is no {SWEEP} in it")
    content = record.read()
    trials, settings = record.trials(), content["sweep"]
    record.check_places(trials)
    held = {number for number, _ in record.held([trial.number for trial in trials])}
    statuses = {
        trial.number: record.status(trial.number, settings["metric"], is_running=trial.number in held)
        for trial in trials
    }
    results = [result_of(trial, statuses[trial.number], content["name"]) for trial in trials]
    has_folds = len({trial.fold for trial in trials}) > 1
    num_folds = trials[0].config["data"]["num_folds"] if has_folds else None
    rows = rank(results, direction=settings["direction"], num_folds=num_folds)
    return Standings(rows, trials, statuses, settings["metric"], settings["direction"], content)


def refresh_leaderboard(sweep: Path) -> None:
    """Write a sweep's leaderboard anew, with the ensembles that are in its folder by now, unless the sweep is running.

    RunFolderError says that it is; then it writes them itself when it ends.
    """
    with hold(sweep):
        found = read_standings(sweep)
        sentence = conclusion(found.rows, found.metric, found.direction)
        leaderboard.write(found.rows, sweep, found.metric, found.direction, sentence)
