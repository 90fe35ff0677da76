"""The leaderboard: the result of the ranking, as files, as a table in the terminal and as figures."""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import terminal
from src.figures import Figure, Kind, Series, is_logarithmic
from src.markdown import code, inline
from src.markdown import table as markdown_table
from src.terminal import short_numbers
from src.tracking.live import clock
from src.trials.ensembles import EnsembleRow, read_ensembles
from src.trials.pareto import FrontRow, Goals
from src.trials.ranking import MEMORY, SECONDS, Direction, Row, number, with_spread
from src.trials.significance import MOST_SEEDS, Replicate, p_text
from src.util import human_bytes, one_or_list, write_atomically, write_json

if TYPE_CHECKING:
    from rich.table import Table

NARROWEST = {"setting": 24, "n": 8, "p": 8}  # columns of the terminal that these need, which may be folded
NUM_NEEDED = 5  # columns of the leaderboard that are shown however narrow a terminal is
MOST_SHOWN = 60  # settings in a figure
MOST_NAMED = 6  # settings that have their names below a figure
NOTE = (
    "Intervals are 95 %; p and differences are to the reference: the best mean over two replicates or more. "
    "more: how many more seeds would tell a tied setting from it (two-sided test at 5 %, power 80 %)."
)
FRONT_NOTE = (
    "Intervals are 95 %. First is the Pareto front by means: no other setting is at least as good by every metric and "
    "better by one; p is of a setting's surest test against one that dominates it, corrected for all of them. "
    "more: how many more seeds would tell a tied setting from the front (two-sided test at 5 %, power 80 %)."
)


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard, wherever it is shown."""

    heading: str
    cell: Callable[[Row], str]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that say something of these rows, the most important first."""
    ranked = [row for row in rows if row.rank is not None]
    most = max((row.n for row in ranked if row.is_reference), default=0)
    shared = [name for name in (ranked[0].measures if ranked else ()) if all(name in row.measures for row in ranked)]
    columns = [
        Column("rank", lambda row: "–" if row.rank is None else f"{row.rank}{' tie' if row.is_tied else ''}"),
        Column("setting", lambda row: row.label or row.group or row.name),
        *_mean_columns(rows, shared),
        Column("n", lambda row: f"{row.n} ({row.lacks})" if row.lacks else str(row.n)),
    ]
    if len(ranked) > 1:
        columns += [Column("p", lambda row: _p(row, max(row.n, most))), Column("more", _more)]
    if len(ranked) > 1 and not metrics_of(rows):
        columns += [
            Column("difference", lambda row: with_spread(row.difference, row.difference_low, row.difference_high, "+"))
        ]
    return columns + [_measure(name, [*metrics_of(rows), *shared]) for name in shared]


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Return the metrics that rows are ranked by where they are several."""
    return [one.metric for one in rows[0].objectives] if rows and isinstance(rows[0], FrontRow) else []


def note_of(rows: Sequence[Row]) -> str:
    """Return what the columns of these rows mean."""
    return FRONT_NOTE if metrics_of(rows) else NOTE


def _mean_columns(rows: Sequence[Row], measures: Sequence[str]) -> Iterator[Column]:
    metrics = metrics_of(rows)
    if not metrics:
        yield Column("mean", lambda row: with_spread(row.mean, row.low, row.high))
    for place, metric in enumerate(metrics):
        yield Column(_heading(metric, [*metrics, *measures]), partial(_mean_by, place))


def _heading(name: str, among: Sequence[str]) -> str:
    """Return the last word of a metric's name, or all of it where others have the same last word."""
    last = name.rpartition("/")[2]
    return last if [one.rpartition("/")[2] for one in among].count(last) == 1 else name


def _mean_by(place: int, row: Row) -> str:
    one = by_metric([row], place)[0]
    return with_spread(one.mean, one.low, one.high)


def by_metric(rows: Sequence[Row], place: int) -> list[Row]:
    """Return rows as they are by one of their metrics."""
    return [row.by(place) if isinstance(row, FrontRow) else row for row in rows]


def _p(row: Row, most_pairs: int) -> str:
    text = "–" if row.p_value is None else p_text(row.p_value)
    if row.is_reference or row.n < 2 or row.num_pairs >= most_pairs:
        return text
    return f"{text}, {row.num_pairs} pairs" if row.num_pairs else f"{text}, unpaired"


def _more(row: Row) -> str:
    is_hopeless = row.is_tied and not row.is_reference and not row.is_unequal
    return f"+{row.more_seeds}" if row.more_seeds else f"> {MOST_SEEDS}" if is_hopeless else "–"


def _measure(name: str, among: Sequence[str]) -> Column:
    heading, write = MEASURES.get(name, (_heading(name, among), lambda value: number(value, None)))
    return Column(heading, lambda row: write(row.measures[name]) if name in row.measures else "–")


MEASURES: Mapping[str, tuple[str, Callable[[float], str]]] = {SECONDS: ("time", clock), MEMORY: ("memory", human_bytes)}
CSV_COLUMNS: Mapping[str, Callable[[Row], Any]] = {
    "rank": attrgetter("rank"),
    "tied": lambda row: str(row.is_tied).lower(),
    "model": attrgetter("group"),
    "setting": attrgetter("label"),
    **{name: attrgetter(name) for name in ("mean", "low", "high", "n", "more_seeds")},
    **{name: attrgetter(name) for name in ("difference", "difference_low", "difference_high", "p_value")},
    **{name: attrgetter(name) for name in ("failed", "pruned", "unfinished")},
    "trials": lambda row: _spaced(row.trials),
    "seeds": lambda row: _spaced(seed for seed, _ in row.values),
    "folds": lambda row: _spaced(fold for _, fold in row.values if fold is not None),
    "values": lambda row: _spaced(row.values.values()),
    "setting_id": attrgetter("setting"),
}
"""The columns of leaderboard.csv, before those of other measures; `model` only where models are compared."""
BY_METRIC = ("mean", "low", "high", "values")
OF_ONE_METRIC = (*BY_METRIC, "best_trial", "deviation", "difference", "difference_low", "difference_high")
"""What a row of several metrics does not have by itself, the first of them by each metric."""


def import_what_draws() -> None:
    """Import what ranking and drawing will need, which takes half a second."""
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.special"):
        import_module(name)


def write(rows: Sequence[Row], folder: Path, goals: Goals, conclusion: str) -> None:
    """Write leaderboard.csv, leaderboard.json and leaderboard.md into a sweep's folder, each at once.

    The finished ensembles in that folder have rows of their own, which are not ranked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ensembles = read_ensembles(folder)
    write_atomically(folder / "leaderboard.csv", _csv(rows, ensembles, goals))
    judged = {"metric": one_or_list([*goals]), "direction": one_or_list([*goals.values()])}
    content = {**judged, "conclusion": conclusion, "rows": list(map(_plain, rows))}
    write_json(folder / "leaderboard.json", content | {"ensembles": list(map(asdict, ensembles))})
    parts = [f"# {title(goals, inline)}", inline(conclusion), *_markdown(rows), note_of(rows)]
    if ensembles:
        lines = [
            [code(one.folder), inline(one.beside_members(next(iter(goals)))), _spaced(one.members)] for one in ensembles
        ]
        scored = "On rows that no member was trained on; not ranked with the settings above."
        parts += ["## Ensembles", markdown_table(["ensemble", "score", "members"], lines), scored]
    write_atomically(folder / "leaderboard.md", "\n\n".join(parts) + "\n")


def title(goals: Goals, written: Callable[[str], str] = str) -> str:
    """Return what rows are ranked by: `eval/test/loss, minimized`."""
    return "; ".join(f"{written(metric)}, {direction}d" for metric, direction in goals.items())


def _plain(row: Row) -> dict[str, Any]:
    plain = asdict(row) | {"n": row.n, "values": _plain_values(row.values)}
    if isinstance(row, FrontRow):
        plain["objectives"] = [vars(one) | {"values": _plain_values(one.values)} for one in row.objectives]
        plain = {key: value for key, value in plain.items() if key not in OF_ONE_METRIC}
    return plain


def _plain_values(values: Mapping[Replicate, float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "fold": fold, "value": value} for (seed, fold), value in values.items()]


def _csv(rows: Sequence[Row], ensembles: Sequence[EnsembleRow], goals: Goals) -> str:
    columns = {name: read for name, read in CSV_COLUMNS.items() if name != "model" or any(row.group for row in rows)}
    if metrics := metrics_of(rows):
        columns = dict(_front_columns(columns, metrics))
    measures = dict.fromkeys(name for row in rows for name in row.measures)
    file = io.StringIO()
    writer = csv.DictWriter(file, [*columns, *measures], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**{name: read(row) for name, read in columns.items()}, **row.measures} for row in rows)
    for one in ensembles:
        cells = {"setting": f"ensemble.method={one.method}", "setting_id": one.folder, "trials": _spaced(one.members)}
        writer.writerow({**one.scores, **cells, "mean": one.scores.get(next(iter(goals)))})
    return file.getvalue()


def _front_columns(
    columns: Mapping[str, Callable[[Row], Any]], metrics: Sequence[str]
) -> Iterator[tuple[str, Callable[[Row], Any]]]:
    """Yield columns of leaderboard.csv, those of one metric for each of several: its mean under its own name."""
    for name, read in columns.items():
        if name not in OF_ONE_METRIC:
            yield name, read
        elif name in BY_METRIC:
            for place, metric in enumerate(metrics):
                yield f"{metric} {name}".removesuffix(" mean"), partial(_read_by, place, read)
        if name == "tied":
            yield "on_front", lambda row: str(row.is_reference).lower()


def _read_by(place: int, read: Callable[[Row], Any], row: Row) -> Any:
    return read(by_metric([row], place)[0])


def _spaced(items: Iterable[Any]) -> str:
    return " ".join(str(item) for item in items)


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    columns = columns_of(rows)
    for group, members in _groups(rows):
        if group:
            yield f"## {inline(group)}"
        lines = [
            [
                *(code(one.cell(row)) if one.heading == "setting" else one.cell(row) for one in columns),
                _spaced(row.trials),
            ]
            for row in members
        ]
        yield markdown_table([*(inline(column.heading) for column in columns), "trials"], lines)


def table(rows: Sequence[Row], title: str, width: int) -> "Table":
    """Return a table for a terminal of that width, which has the columns that there is room for."""
    from src.tracking.cells import Cell, new_table

    columns = columns_of(rows)
    widths = [
        max(map(terminal.width, [one.heading, *(short_numbers(one.cell(row)) for row in rows)])) for one in columns
    ]
    widths = [min(most, NARROWEST.get(one.heading, most)) for one, most in zip(columns, widths, strict=True)]
    num_needed = NUM_NEEDED + max(0, len(metrics_of(rows)) - 1)
    while len(columns) > num_needed and sum(widths) + 3 * len(widths) > width:
        columns.pop(), widths.pop()
    made = new_table(title)
    for column, least in zip(columns, widths, strict=True):
        is_folded = column.heading in NARROWEST
        made.add_column(column.heading, overflow="fold", no_wrap=not is_folded, min_width=min(12, least))
    for group, members in _groups(rows):
        if group:
            made.add_section()
            made.add_row("", Cell(group, style="bold"))
        for row in members:
            made.add_row(*(Cell(short_numbers(one.cell(row))) for one in columns), style="" if row.rank == 1 else "dim")
    return made


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group, the group of the best row first."""
    for group in dict.fromkeys(row.group for row in rows):
        yield group, [row for row in rows if row.group == group]


def settings_figure(rows: Sequence[Row], metric: str, first: str = "the best") -> Figure:
    """Return a figure of the settings' means, their intervals and each replicate, in their order: who is `first`.

    Intervals much wider than the values are apart run out of it.
    """
    shown = list(enumerate([row for row in rows if row.mean is not None][:MOST_SHOWN], 1))
    ends = [(place, end) for place, row in shown for end in (row.low, row.high) if end is not None]
    values = [(place, value) for place, row in shown for value in row.values.values()]
    means = [(place, row.mean or 0.0) for place, row in shown]
    found: dict[str, tuple[Kind, list[tuple[int, float]]]] = {
        "mean": ("points", means),
        "95 % interval": ("intervals", ends),
        "replicates": ("points", values),
    }
    series = [
        Series(name, [x for x, _ in pairs], [y for _, y in pairs], kind)
        for name, (kind, pairs) in found.items()
        if pairs
    ]
    only = [value for _, value in values] or [0.0]
    low, high, has_log = min(only), max(only), is_logarithmic(only)
    span = (high - low) or abs(low) / 10 or 1.0
    limits = (low / 1.5, high * 1.5) if has_log else (low - span, high + span)
    is_cut = any(not limits[0] <= end <= limits[1] for _, end in ends)
    return Figure(
        "settings",
        f"{metric}: settings, {first} first" + (f" {MOST_SHOWN}" if len(shown) == MOST_SHOWN else ""),
        "setting, by its place in the table",
        metric,
        series,
        note="an interval without an end is wider than the figure" if is_cut else "",
        x_ticks={float(place): short_numbers(row.name) for place, row in shown} if len(shown) <= MOST_NAMED else None,
        has_log_y=has_log,
        y_range=limits if is_cut or has_log else None,
        names=[short_numbers(row.name) for _, row in shown],
    )


def history_figure(values: Sequence[float], metric: str, direction: Direction) -> Figure:
    """Return a figure of the value of each finished trial, as they finished, and the best so far."""
    finite = [value for value in values if math.isfinite(value)]
    best = list(itertools.accumulate(finite, min if direction == "minimize" else max))
    places, has_log, title = range(1, len(finite) + 1), is_logarithmic(finite), f"{metric}, {direction}d"
    series = [Series("a trial", places, finite, "points"), Series("best so far", places, best)]
    return Figure("history", title, "finished trials", metric, series, has_log_y=has_log, is_joined=False)
