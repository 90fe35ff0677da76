"""How the trials of a sweep stand by what its folder says, without running it. No torch here."""

from pathlib import Path

from src.errors import SweepError
from src.sweep.folder import SweepFolder, TrialStatus
from src.sweep.ranking import Result, Row, rank
from src.sweep.trial import Trial


def result_of(trial: Trial, status: TrialStatus, sweep_name: str) -> Result:
    """Return a trial as the ranking needs it."""
    label = trial.setting_label or sweep_name
    model = next((text.partition("=")[2] for text in trial.overrides if text.startswith("model=")), "")
    if model:
        label = " ".join(text for text in label.split(" ") if text != f"model={model}")
    replicate = (trial.seed, trial.fold)
    return Result(trial.number, trial.setting, label, model, replicate, status.state, status.value)


def finished_settings(folder: Path) -> list[list[Path]]:
    """Return the folders of a sweep's finished trials, a list for each setting, the best one by its metric first.

    SweepError where there is no sweep, or none of its trials has finished; DamagedFileError as SweepFolder.
    """
    record = SweepFolder(folder)
    content = record.read()
    if not content:
        raise SweepError(f"{folder} is no sweep's folder: there is no sweep.json in it")
    trials, settings = record.trials(), content["sweep"]
    record.check_places(trials)
    statuses = {trial.number: record.status(trial.number, settings["metric"]) for trial in trials}
    results = [result_of(trial, statuses[trial.number], content["name"]) for trial in trials]
    rows = [row for row in rank(results, direction=settings["direction"]) if row.rank is not None]
    if not rows:
        raise SweepError(f"none of the {len(trials)} trials in {folder} has finished")
    return [[record.run_dir(number) for number in _finished(row, statuses)] for row in rows]


def _finished(row: Row, statuses: dict[int, TrialStatus]) -> list[int]:
    return [number for number in row.trials if statuses[number].state == "FINISHED"]
