"""The page of a sweep: ranking, hyperparameters, what was pruned, what failed."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.config.axes import REPLICATED
from src.errors import DamagedFileError
from src.figures import Figure, Series, is_logarithmic
from src.reporting.curves import file_name
from src.reporting.figures import MOST_SERIES, series_of
from src.reporting.page import Block, Figures, Page, Section, Table, Text
from src.reporting.run_page import number
from src.terminal import short_numbers
from src.tracking.step_logs import METRICS, read_step_log
from src.trials.folder import TRIAL_STATES, SweepFolder, TrialStatus
from src.trials.front_figures import front_figures, numbered, settings_figures
from src.trials.importance import importances
from src.trials.leaderboard import columns_of, note_of
from src.trials.standings import Standings, read_standings
from src.trials.trial import Trial
from src.util import plural


@dataclass
class Sweep:
    """A sweep's folder, and how its trials stand; looked at by one of its metrics."""

    folder: SweepFolder
    standings: Standings
    place: int = 0

    @property
    def by_metric(self) -> list["Sweep"]:
        """The same by each of its metrics."""
        return [replace(self, place=place) for place in range(len(self.standings.goals))]

    @property
    def metric(self) -> str:
        return list(self.standings.goals)[self.place]

    @property
    def is_maximized(self) -> bool:
        return self.standings.goals[self.metric] == "maximize"

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
        values = self.statuses[trial.number].values
        return values[self.place] if values else None

    def last(self, trial: Trial) -> float | None:
        """Return a trial's value, or its newest where it has not finished."""
        newest = self.statuses[trial.number].newest
        return newest[self.place] if newest else None


def sweep_page(folder: Path) -> Page:
    """Return the page of a sweep's folder; DamagedFileError or SweepError where it can't be read."""
    sweep = Sweep(SweepFolder(folder), read_standings(folder))
    content = sweep.folder.read()
    counts = Counter(status.state for status in sweep.statuses.values())
    about = ", ".join(f"{counts[state]} {state.lower()}" for state in TRIAL_STATES if counts[state])
    sections = [
        Section("Ranking", list(_ranking(sweep.standings))),
        Section(
            "Hyperparameters", [*_figures([*_by_each(sweep, _against_metric), *_parallel(sweep)]), *_importance(sweep)]
        ),
        Section("Trials over steps", _figures([*_by_each(sweep, _curves)])),
        Section("Pruned", list(_pruned(sweep))),
        Section("Failed", list(_failed(sweep))),
        Section("All trials", [_all_trials(sweep)]),
    ]
    return Page(str(content["name"]), f"sweep, {content['state']}: {about}; {folder}", sections)


def _figures(figures: Sequence[Figure]) -> list[Block]:
    return [Figures(figures)] if figures else []


def _by_each(sweep: Sweep, figures_of: Callable[[Sweep], Iterator[Figure]]) -> Iterator[Figure]:
    """Yield figures by each metric."""
    for one in sweep.by_metric:
        for figure in figures_of(one):
            yield numbered(figure, one.place, sweep.standings.goals)


def _values(trial: Trial) -> dict[str, str]:
    """Return the overrides of a trial by key."""
    return {text.partition("=")[0]: text.partition("=")[2] for text in trial.overrides}


def _ranking(standings: Standings) -> Iterator[Block]:
    rows, columns = standings.rows, columns_of(standings.rows)
    yield Text(standings.conclusion)
    shown = [[*(short_numbers(column.cell(row)) for column in columns), " ".join(map(str, row.trials))] for row in rows]
    first = frozenset(place for place, row in enumerate(rows) if row.rank == 1)
    yield Table([*(column.heading for column in columns), "trials"], shown, standings.title, first)
    yield Text(note_of(rows))
    if sum(row.mean is not None for row in rows) > 1:
        yield Figures([*front_figures(rows, standings.goals), *settings_figures(rows, standings.goals)])


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
        valued = [(trial, text) for trial, text in valued if sweep.last(trial) is not None]
        numbers, texts = _numbers([text for _, text in valued]), sorted({text for _, text in valued})
        places = numbers if numbers is not None else [float(texts.index(text)) for _, text in valued]
        finished = [(x, sweep.value(trial)) for x, (trial, _) in zip(places, valued, strict=True)]
        ended = [
            (x, sweep.last(trial)) for x, (trial, _) in zip(places, valued, strict=True) if sweep.value(trial) is None
        ]
        both = {"finished": finished, "not finished, newest value": ended}
        series = [_pairs(name, [(x, y) for x, y in pairs if y is not None], "points") for name, pairs in both.items()]
        if series := [one for one in series if one.x]:
            ticks = None if numbers is not None else {float(place): text for place, text in enumerate(texts)}
            has_log = numbers is not None and is_logarithmic(numbers)
            name = f"hyperparameter_{file_name(key)}"
            yield Figure(name, key, key, sweep.metric, series, x_ticks=ticks, has_log_x=has_log)


def _parallel(sweep: Sweep) -> Iterator[Figure]:
    """Yield parallel coordinates: an axis for each key and each metric, a line for each trial with a value."""
    keys = sweep.shared_keys
    trials = [trial for trial in sweep.trials if sweep.value(trial) is not None]
    if len(trials) < 2 or len(keys) < 2:
        return
    better = sorted(trials, key=lambda one: sweep.value(one) or 0.0, reverse=sweep.is_maximized)[:MOST_SERIES]
    columns = {key: _scaled([_values(trial)[key] for trial in better]) for key in keys}
    columns |= {one.metric: _scaled([repr(one.value(trial)) for trial in better]) for one in sweep.by_metric}
    axes = [float(place) for place in range(len(columns))]
    series = [
        Series(
            f"trial {trial.number}: {', '.join(map(number, sweep.statuses[trial.number].values))}",
            axes,
            [column[0][i] for column in columns.values()],
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
    """Yield which key explains how much of each metric."""
    tables = [table for one in sweep.by_metric for table in _shares(one)]
    yield from tables
    if not tables:
        yield Text("Importance needs four finished trials or more, and two keys that vary among them.")


def _shares(sweep: Sweep) -> Iterator[Table]:
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


def _newest(sweep: Sweep, trial: Trial) -> list[str]:
    return [number(one.last(trial)) for one in sweep.by_metric]


def _pruned(sweep: Sweep) -> Iterator[Block]:
    rows = [
        [str(trial.number), short_numbers(trial.label), f"{status.step:,}", *_newest(sweep, trial), status.cause]
        for trial in sweep.trials
        if (status := sweep.statuses[trial.number]).state == "PRUNED"
    ]
    if rows:
        yield Table(["trial", "what it tried", "step", *sweep.standings.goals, "why"], rows, plural(len(rows), "trial"))


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
        [str(trial.number), status.state, *_newest(sweep, trial), f"{status.step:,}", short_numbers(trial.label)]
        for trial in sweep.trials
        for status in [sweep.statuses[trial.number]]
    ]
    title = (
        f"{plural(len(rows), 'trial')}; each has its own page: python -m src.report dir={sweep.folder.folder}/NUMBER"
    )
    return Table(["trial", "state", *sweep.standings.goals, "step", "what it tried"], rows, title, is_folded=True)
