"""The page of a sweep: ranking, hyperparameters, what was pruned, what failed."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.axes import REPLICATED
from src.errors import DamagedFileError
from src.figures import Figure, Series, is_logarithmic
from src.ranking.importance import importances
from src.ranking.leaderboard import NOTE, columns_of, settings_figure
from src.reporting.curves import file_name
from src.reporting.figures import MOST_SERIES, series_of
from src.reporting.page import Block, Figures, Page, Section, Table, Text
from src.reporting.run_page import number
from src.sweep.folder import TRIAL_STATES, SweepFolder, TrialStatus
from src.sweep.standings import Standings, read_standings
from src.sweep.trial import Trial
from src.terminal import short_numbers
from src.tracking.step_logs import METRICS, read_step_log
from src.util import plural


@dataclass
class Sweep:
    """A sweep's folder, and how its trials stand."""

    folder: SweepFolder
    standings: Standings

    @property
    def metric(self) -> str:
        return self.standings.metric

    @property
    def trials(self) -> Sequence[Trial]:
        return self.standings.trials

    @property
    def statuses(self) -> Mapping[int, TrialStatus]:
        return self.standings.statuses

    @property
    def keys(self) -> list[str]:
        """The keys that it varies; seed and fold only where nothing else varies."""
        found = dict.fromkeys(key for trial in self.trials for key in _values(trial))
        return [key for key in found if key not in REPLICATED] or list(found)

    @property
    def shared_keys(self) -> list[str]:
        """The keys that all trials with a value have; some are varied only with values of others."""
        valued = [_values(trial) for trial in self.trials if self.value(trial) is not None]
        return [key for key in self.keys if all(key in values for values in valued)]

    def value(self, trial: Trial) -> float | None:
        return self.statuses[trial.number].value


def sweep_page(folder: Path) -> Page:
    """Return the page of a sweep's folder; DamagedFileError or SweepError where it can't be read."""
    sweep = Sweep(SweepFolder(folder), read_standings(folder))
    content = sweep.folder.read()
    counts = Counter(status.state for status in sweep.statuses.values())
    about = ", ".join(f"{counts[state]} {state.lower()}" for state in TRIAL_STATES if counts[state])
    sections = [
        Section("Ranking", list(_ranking(sweep.standings))),
        Section("Hyperparameters", [*_figures([*_against_metric(sweep), *_parallel(sweep)]), *_importance(sweep)]),
        Section("Trials over steps", _figures(list(_curves(sweep)))),
        Section("Pruned", list(_pruned(sweep))),
        Section("Failed", list(_failed(sweep))),
        Section("All trials", [_all_trials(sweep)]),
    ]
    return Page(str(content["name"]), f"sweep, {content['state']}: {about}; {folder}", sections)


def _figures(figures: Sequence[Figure]) -> list[Block]:
    return [Figures(figures)] if figures else []


def _values(trial: Trial) -> dict[str, str]:
    """Return the overrides of a trial by key."""
    return {text.partition("=")[0]: text.partition("=")[2] for text in trial.overrides}


def _ranking(standings: Standings) -> Iterator[Block]:
    rows, columns = standings.rows, columns_of(standings.rows)
    yield Text(standings.conclusion)
    shown = [[*(short_numbers(column.cell(row)) for column in columns), " ".join(map(str, row.trials))] for row in rows]
    first = frozenset(place for place, row in enumerate(rows) if row.rank == 1)
    yield Table([*(column.heading for column in columns), "trials"], shown, standings.title, first)
    yield Text(NOTE)
    if sum(row.mean is not None for row in rows) > 1:
        yield Figures([settings_figure(rows, standings.metric)])


def _pairs(name: str, pairs: Sequence[tuple[float, float]], kind: Any) -> Series:
    return Series(name, [x for x, _ in pairs], [y for _, y in pairs], kind)


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """Return texts as numbers; None where one is none."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _against_metric(sweep: Sweep) -> Iterator[Figure]:
    """Yield a figure for each key: its values, and what the metric was with each."""
    for key in sweep.keys:
        valued = [(trial, values[key]) for trial in sweep.trials if key in (values := _values(trial))]
        valued = [(trial, text) for trial, text in valued if _last(sweep, trial) is not None]
        numbers, texts = _numbers([text for _, text in valued]), sorted({text for _, text in valued})
        places = numbers if numbers is not None else [float(texts.index(text)) for _, text in valued]
        finished = [(x, sweep.value(trial)) for x, (trial, _) in zip(places, valued, strict=True)]
        ended = [
            (x, _last(sweep, trial)) for x, (trial, _) in zip(places, valued, strict=True) if sweep.value(trial) is None
        ]
        both = {"finished": finished, "not finished, newest value": ended}
        series = [_pairs(name, [(x, y) for x, y in pairs if y is not None], "points") for name, pairs in both.items()]
        if series := [one for one in series if one.x]:
            ticks = None if numbers is not None else {float(place): text for place, text in enumerate(texts)}
            has_log = numbers is not None and is_logarithmic(numbers)
            name = f"hyperparameter_{file_name(key)}"
            yield Figure(name, key, key, sweep.metric, series, x_ticks=ticks, has_log_x=has_log)


def _last(sweep: Sweep, trial: Trial) -> float | None:
    """Return a trial's value, or its newest of the metric where it has not finished."""
    status = sweep.statuses[trial.number]
    return status.last if status.value is None else status.value


def _parallel(sweep: Sweep) -> Iterator[Figure]:
    """Yield parallel coordinates: an axis for each key and one for the metric, a line for each trial with a value."""
    keys = sweep.shared_keys
    trials = [trial for trial in sweep.trials if sweep.value(trial) is not None]
    if len(trials) < 2 or len(keys) < 2:
        return
    better = sorted(trials, key=lambda one: sweep.value(one) or 0.0, reverse=sweep.standings.direction == "maximize")[
        :MOST_SERIES
    ]
    columns = {key: _scaled([_values(trial)[key] for trial in better]) for key in keys}
    columns[sweep.metric] = _scaled([repr(sweep.value(trial)) for trial in better])
    axes = [float(place) for place in range(len(columns))]
    series = [
        Series(
            f"trial {trial.number}: {number(sweep.value(trial))}", axes, [column[0][i] for column in columns.values()]
        )
        for i, trial in enumerate(better)
    ]
    ticks = dict(zip(axes, columns, strict=True))
    note = "; ".join(f"{key}: {ends}" for key, (_, ends) in columns.items())
    yield Figure("parallel", "Trials across all hyperparameters", "", "share of the range", series, note, ticks)


def _scaled(texts: Sequence[str]) -> tuple[list[float], str]:
    """Return values between 0 and 1, and what 0 and 1 stand for; several texts are in alphabetical order."""
    numbers = _numbers(texts)
    if numbers is None:
        known = sorted(set(texts))
        return [known.index(text) / max(1, len(known) - 1) for text in texts], ", ".join(known)
    has_log = is_logarithmic(numbers)
    places = [math.log(one) if has_log else one for one in numbers]
    low, span = min(places), max(places) - min(places)
    ends = f"{number(min(numbers))} to {number(max(numbers))}{', logarithmic' if has_log else ''}"
    return [(place - low) / span if span else 0.5 for place in places], ends


def _importance(sweep: Sweep) -> Iterator[Block]:
    """Yield which key explains how much of the metric."""
    keys = sweep.shared_keys
    numeric = {key for key in keys if _numbers([_values(one)[key] for one in sweep.trials if key in _values(one)])}
    trials = [
        ({key: float(text) if key in numeric else text for key, text in _values(trial).items() if key in keys}, value)
        for trial in sweep.trials
        if (value := sweep.value(trial)) is not None
    ]
    if shares := importances(trials):
        rows = [[key, f"{100 * share:.0f} %"] for key, share in shares.items()]
        yield Table(
            ["key", "share"], rows, f"Importance: share of the variation of {sweep.metric}, by functional ANOVA"
        )
    else:
        yield Text("Importance needs four finished trials or more, and two keys that vary among them.")


def _curves(sweep: Sweep) -> Iterator[Figure]:
    """Yield the metric of each trial over its steps; of those that did not finish dashed."""
    name, series = sweep.metric.removeprefix("best/"), []
    for trial in sweep.trials:
        try:
            lines = [line.content for line in read_step_log(sweep.folder.run_dir(trial.number), METRICS)]
        except DamagedFileError:  # its status says so, see `_failed`
            continue
        is_finished = sweep.statuses[trial.number].state == "FINISHED"
        series.append(series_of(lines, name, f"trial {trial.number}", "line" if is_finished else "dashes"))
    series = [one for one in series if one.x]
    note = "dashed: did not finish" + (f"; the first {MOST_SERIES}" if len(series) > MOST_SERIES else "")
    if series:
        yield Figure("trials", name, "step", name, series[:MOST_SERIES], note)


def _pruned(sweep: Sweep) -> Iterator[Block]:
    rows = [
        [str(trial.number), short_numbers(trial.label), f"{status.step:,}", number(status.last), status.cause]
        for trial in sweep.trials
        if (status := sweep.statuses[trial.number]).state == "PRUNED"
    ]
    if rows:
        yield Table(["trial", "what it tried", "step", sweep.metric, "why"], rows, plural(len(rows), "trial"))


def _failed(sweep: Sweep) -> Iterator[Block]:
    rows = [
        [str(trial.number), short_numbers(trial.label), f"{status.step:,}", status.cause, str(status.log or "")]
        for trial in sweep.trials
        if (status := sweep.statuses[trial.number]).state == "FAILED"
    ]
    if rows:
        yield Table(["trial", "what it tried", "step", "cause", "log"], rows, plural(len(rows), "trial"))


def _all_trials(sweep: Sweep) -> Block:
    rows = [
        [str(trial.number), status.state, number(_last(sweep, trial)), f"{status.step:,}", short_numbers(trial.label)]
        for trial in sweep.trials
        for status in [sweep.statuses[trial.number]]
    ]
    title = (
        f"{plural(len(rows), 'trial')}; each has its own page: python -m src.report dir={sweep.folder.folder}/NUMBER"
    )
    return Table(["trial", "state", sweep.metric, "step", "what it tried"], rows, title, is_folded=True)
