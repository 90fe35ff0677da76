"""How the trials of a sweep stand by what its folder says, without running it. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.frozen import SWEEP
from src.errors import DamagedFileError, SweepError, report
from src.metrics import METRICS, is_detail
from src.records import damaged
from src.tracking.late_metrics import read_summary
from src.tracking.lock import hold
from src.trials import leaderboard
from src.trials.folder import REMEDY, SweepFolder, TrialStatus
from src.trials.pareto import Goals, front_conclusion, rank_by_several
from src.trials.ranking import MEMORY, SECONDS, Result, Row, conclusion, rank
from src.trials.trial import Trial
from src.util import as_tuple

MOST_MEASURES = 3  # metrics beside the one that ranks


@dataclass(frozen=True)
class Standings:
    """What a sweep's folder says of its settings and trials."""

    folder: Path
    rows: Sequence[Row]
    trials: Sequence[Trial]
    statuses: Mapping[int, TrialStatus]
    goals: Goals
    conclusion: str

    @property
    def title(self) -> str:
        return leaderboard.title(self.goals)

    def finished(self, num_settings: int | None = None) -> list[Path]:
        """Return the folders of the finished trials of the best settings; None: of all."""
        ranked = [row for row in self.rows if row.rank is not None][:num_settings]
        numbers = (number for row in ranked for number in row.trials if self.statuses[number].state == "FINISHED")
        return [self.folder / str(number) for number in numbers]

    def write(self) -> None:
        """Write the leaderboard into the sweep's folder."""
        leaderboard.write(self.rows, self.folder, self.goals, self.conclusion)


def rank_trials(
    folder: Path, trials: Sequence[Trial], statuses: Mapping[int, TrialStatus], name: str, sweep: Mapping[str, Any]
) -> Standings:
    """Rank the settings of the trials in a sweep's folder; `sweep` are its own keys."""
    metrics = as_tuple(sweep["metric"])
    goals: Goals = dict(zip(metrics, as_tuple(sweep["direction"]), strict=True))
    results = [_result(trial, statuses[trial.number], name, folder, metrics) for trial in trials]
    has_folds = len({trial.fold for trial in trials}) > 1
    num_folds = trials[0].config["data"]["num_folds"] if has_folds else None
    can_add = sweep.get("sampler", "grid") == "grid"  # what a sampler proposed is not tried with other seeds
    named = name if can_add else None
    if len(goals) > 1:
        several = rank_by_several(results, goals, num_folds)
        return Standings(folder, several, trials, statuses, goals, front_conclusion(several, goals, named))
    rows = rank(results, direction=goals[metrics[0]], num_folds=num_folds)
    return Standings(folder, rows, trials, statuses, goals, conclusion(rows, metrics[0], named))


def _result(trial: Trial, status: TrialStatus, sweep_name: str, folder: Path, metrics: tuple[str, ...]) -> Result:
    """Return a trial as the ranking needs it."""
    label = trial.setting_label or sweep_name
    model = next((text.partition("=")[2] for text in trial.overrides if text.startswith("model=")), "")
    if model:
        label = " ".join(text for text in label.split(" ") if text != f"model={model}")
    measures = _measures(folder / str(trial.number), metrics) if status.values else {}
    replicate = (trial.seed, trial.fold)
    return Result(trial.number, trial.setting, label, model, replicate, status.state, status.values, measures)


def _measures(run_dir: Path, metrics: tuple[str, ...]) -> dict[str, float]:
    """Return what a run cost, and other scores of the set that the first metric is of, generated text's first."""
    try:
        summary = read_summary(run_dir)
    except DamagedFileError:  # its status says so
        return {}
    of_set, _, ranked = metrics[0].rpartition("/")
    scores = [name.rpartition("/")[2] for name in summary if of_set and name.rpartition("/")[0] == of_set]
    shown = [score for score in scores if not is_detail(score) and score not in (ranked, "perplexity")]
    shown.sort(key=lambda score: score not in METRICS)
    names = [SECONDS, MEMORY, *(f"{of_set}/{score}" for score in shown if f"{of_set}/{score}" not in metrics[1:])]
    names = [name for name in names[: 2 + MOST_MEASURES] if len(metrics) == 1 or name not in metrics]
    return {name: summary[name] for name in names if name in summary}


def read_standings(sweep: Path) -> Standings:
    """Rank the settings of a sweep by its folder; SweepError where there is none, DamagedFileError as SweepFolder."""
    record = SweepFolder(sweep)
    if not (sweep / SWEEP).exists():
        raise SweepError(f"{sweep} is no sweep's folder: there is no {SWEEP} in it")
    content, trials = record.read(), record.trials()
    judged = [as_tuple(content["sweep"].get(key)) for key in ("metric", "direction")]
    if len(judged[0]) != len(judged[1]) or not all(isinstance(one, str) for one in (*judged[0], *judged[1])):
        raise damaged(sweep / SWEEP, "sweep.metric and sweep.direction are not a name and a direction for each", REMEDY)
    record.check_places(trials)
    held = {number for number, _ in record.held([trial.number for trial in trials])}
    statuses = {
        trial.number: record.status(trial.number, judged[0], is_running=trial.number in held) for trial in trials
    }
    return rank_trials(sweep, trials, statuses, content["name"], content["sweep"])


class FinishedTrials:
    """The finished trials of a sweep that is named later, if any is: called with its folder, it returns theirs."""

    standings: Standings | None = None

    def __call__(self, sweep: Path) -> list[Path]:
        """Return the folders of a sweep's finished trials, by number.

        SweepError where there is no sweep, or none has finished; DamagedFileError as SweepFolder.
        """
        self.standings = read_standings(sweep)
        finished, num_trials = self.standings.finished(), len(self.standings.statuses)
        if not finished:
            raise SweepError(f"none of the {num_trials} trials in {sweep} has finished")
        if left := num_trials - len(finished):
            report(f"warning: {left} of the {num_trials} trials in {sweep} are not finished, and left out")
        return sorted(finished, key=lambda folder: int(folder.name))


def refresh_leaderboard(sweep: Path) -> None:
    """Write a sweep's leaderboard anew, with the ensembles that are in its folder by now, unless the sweep is running.

    RunFolderError says that it is; then it writes them itself when it ends.
    """
    with hold(sweep):
        read_standings(sweep).write()
