"""The leaderboard: the result of the ranking, as files, as a table in the terminal and as pictures."""

import csv
import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.markdown import code, inline
from src.markdown import table as markdown_table
from src.sweep.ensembles import EnsembleRow, read_ensembles
from src.sweep.ranking import Direction, Row, number
from src.sweep.trial import short
from src.util import replaced_when_written, write_atomically, write_json

if TYPE_CHECKING:
    from rich.table import Table

FIRST, REST, FAINT = "#4878a8", "#8a8a8a", "#dddddd"
WIDE_LABEL = 24  # characters; longer ones take the place of the differences in the terminal
LABEL_WIDTH, LABEL_LINES = 44, 4  # characters of a label's line in a picture, and lines
MOST_SHOWN = 60  # settings in a picture
DECADES = 2  # values that span more are drawn on a logarithmic axis
COLUMNS: Mapping[str, Callable[[Row], Any]] = {
    "rank": attrgetter("rank"),
    "tied": lambda row: str(row.is_tied).lower(),
    "model": attrgetter("group"),
    "setting": attrgetter("label"),
    **{name: attrgetter(name) for name in ("mean", "low", "high", "n")},
    **{name: attrgetter(name) for name in ("difference", "difference_low", "difference_high", "p_value")},
    **{name: attrgetter(name) for name in ("failed", "pruned", "unfinished")},
    "trials": lambda row: _spaced(row.trials),
    "seeds": lambda row: _spaced(seed for seed, _ in row.values),
    "folds": lambda row: _spaced(fold for _, fold in row.values if fold is not None),
    "values": lambda row: _spaced(row.values.values()),
    "setting_id": attrgetter("setting"),
    "verdict": attrgetter("verdict"),
}
"""The columns of leaderboard.csv; `model` only where models are compared."""


def import_what_draws() -> None:
    """Import what ranking and drawing will need, which takes half a second."""
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.ticker", "scipy.special"):
        import_module(name)


def write(rows: Sequence[Row], folder: Path, metric: str, direction: Direction, conclusion: str) -> None:
    """Write leaderboard.csv, leaderboard.json and leaderboard.md into a sweep's folder, each at once.

    The finished ensembles in that folder have rows of their own, which are not ranked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ensembles = read_ensembles(folder)
    write_atomically(folder / "leaderboard.csv", _csv(rows, ensembles, metric))
    content = {"metric": metric, "direction": direction, "conclusion": conclusion, "rows": list(map(_plain, rows))}
    if ensembles:
        content["ensembles"] = list(map(asdict, ensembles))
    write_json(folder / "leaderboard.json", content)
    write_atomically(folder / "leaderboard.md", _markdown(rows, ensembles, metric, direction, conclusion))


def _plain(row: Row) -> dict[str, Any]:
    values = [{"seed": seed, "fold": fold, "value": value} for (seed, fold), value in row.values.items()]
    return asdict(row) | {"n": row.n, "values": values}


def _csv(rows: Sequence[Row], ensembles: Sequence[EnsembleRow], metric: str) -> str:
    columns = {name: read for name, read in COLUMNS.items() if name != "model" or any(row.group for row in rows)}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([read(row) for read in columns.values()] for row in rows)
    for one in ensembles:
        cells = {
            "setting": f"ensemble.method={one.method}",
            "mean": one.scores.get(metric),
            "trials": _spaced(one.members),
            "setting_id": one.folder,
            "verdict": _beside_members(one, metric),
        }
        writer.writerow([cells.get(column) for column in columns])
    return file.getvalue()


def _beside_members(one: EnsembleRow, metric: str) -> str:
    """Return what an ensemble scores, and its members: by the leaderboard's metric, or another that it has."""
    name, value = one.score(metric)
    if value is None:
        return f"an ensemble of {len(one.members)}, without a score"
    text = f"an ensemble of {len(one.members)}: {name} {number(value, None)}"
    if (ends := one.range_of_members(name)) is not None:
        text += f", its members {' to '.join(number(end, None) for end in ends)}"
    return text


def _spaced(items: Iterable[Any]) -> str:
    return " ".join(str(item) for item in items)


def _markdown(
    rows: Sequence[Row], ensembles: Sequence[EnsembleRow], metric: str, direction: Direction, conclusion: str
) -> str:
    parts = [f"# {inline(metric)}, {direction}d", inline(conclusion)]
    for group, members in _groups(rows):
        if group:
            parts.append(f"## {inline(group)}")
        lines = []
        for row in members:
            rank, label, *numbers, verdict = cells(row)
            lines.append([rank, code(label), *numbers, inline(verdict), _spaced(row.trials)])
        parts.append(markdown_table(["rank", "setting", "mean", "n", "difference", "verdict", "trials"], lines))
    parts.append("Intervals are 95 %; differences are to the reference: the best mean over two replicates or more.")
    if ensembles:
        lines = [[code(one.folder), inline(_beside_members(one, metric)), _spaced(one.members)] for one in ensembles]
        scored = "On rows that no member was trained on; not ranked with the settings above."
        parts += ["## Ensembles", markdown_table(["ensemble", "score", "members"], lines), scored]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row], metric: str, direction: Direction) -> "Table":
    """Return a table for the terminal; it can be read at 80 columns."""
    from rich import box
    from rich.table import Table

    from src.sweep.cells import Cell

    made = Table(box=box.SIMPLE, title=Cell(f"{metric}, {direction}d"), title_justify="left", pad_edge=False)
    has_room = max((len(short(_label(row))) for row in rows), default=0) <= WIDE_LABEL
    made.add_column("rank", no_wrap=True)
    made.add_column("setting", overflow="fold", min_width=12)
    made.add_column("mean", overflow="fold", no_wrap=not has_room)
    made.add_column("n", justify="right", no_wrap=True)
    if has_room:
        made.add_column("difference", overflow="fold")
    made.add_column("verdict", overflow="fold")
    for group, members in _groups(rows):
        if group:
            made.add_section()
            made.add_row("", Cell(group, style="bold"))
        for row in members:
            rank, label, mean, n, difference, verdict = cells(row)
            shown = [rank, short(label), mean, n, *([difference] if has_room else []), verdict]
            made.add_row(*map(Cell, shown), style="" if row.rank == 1 else "dim")
    return made


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group, the group of the best row first."""
    for group in dict.fromkeys(row.group for row in rows):
        yield group, [row for row in rows if row.group == group]


def _label(row: Row) -> str:
    return row.label or row.group or row.name


def cells(row: Row) -> list[str]:
    """Return rank, setting, mean, n, difference and verdict, as tables show them."""
    rank = "–" if row.rank is None else f"{row.rank}{' tie' if row.is_tied else ''}"
    difference = _with_half(row.difference, row.difference_low, row.difference_high)
    sign = "+" if (row.difference or 0) > 0 else ""
    return [rank, _label(row), _with_half(row.mean, row.low, row.high), str(row.n), sign + difference, row.verdict]


def _with_half(middle: float | None, low: float | None, high: float | None) -> str:
    if middle is None:
        return "–"
    if low is None or high is None:
        return number(middle, None)
    half = (high - low) / 2
    return f"{number(middle, half)} ± {number(half, half)}"


def plot(rows: Sequence[Row], file: Path, metric: str, direction: Direction) -> None:
    """Draw each setting's mean with its interval, and a dot below for each replicate, the best on top, as a PNG."""
    shown = [row for row in rows if row.mean is not None][:MOST_SHOWN]
    names = [textwrap.wrap(short(row.name), LABEL_WIDTH, max_lines=LABEL_LINES, placeholder=" …") for row in shown]
    height = (0.27 + 0.13 * max(map(len, names), default=1)) * max(2, len(shown))  # inches
    with picture(file, 1.4 + height) as axes:
        for place, row in enumerate(shown):
            colour = FIRST if row.rank == 1 else REST
            axes.axhline(place, color=FAINT, linewidth=0.6, zorder=0)
            half = 0 if row.low is None or row.high is None else (row.high - row.low) / 2
            axes.errorbar(
                row.mean or 0, place, xerr=half, color=colour, linewidth=1.6, capsize=3, marker="|", markersize=13
            )
            values, heights = list(row.values.values()), [place + 0.22] * row.n
            axes.plot(values, heights, "o", color=colour, markersize=4.5, alpha=0.6, markeredgewidth=0)
        axes.set_yticks(range(len(shown)), ["\n".join(lines) for lines in names], parse_math=False, fontsize="small")
        axes.set_ylim(max(1, len(shown) - 1) + 0.6, -0.6)
        ends = [end for row in shown for end in (row.low, row.high) if end is not None]
        _set_span([value for row in shown for value in row.values.values()], ends, axes.set_xscale, axes.set_xlim)
        axes.set_xlabel(f"{metric} ({direction}d)", parse_math=False)
        lacking = sum(row.mean is None for row in rows)
        title = "mean, 95 % interval, one dot a replicate" + (f"; {lacking} without a value" if lacking else "")
        if (left := len(rows) - lacking - len(shown)) > 0:
            title += f"; the best {len(shown)}, {left} more not shown"
        left_end, right_end = axes.get_xlim()
        if any(not left_end <= end <= right_end for end in ends):
            title += "; one without an end is wider than this picture"
        axes.set_title(title, fontsize="medium", loc="left")


def plot_history(values: Sequence[float], file: Path, metric: str, direction: Direction) -> None:
    """Draw the value of each finished trial, in the order in which they finished, and the best so far, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    finite_values = [value for value in values if math.isfinite(value)]
    best = list(itertools.accumulate(finite_values, min if direction == "minimize" else max))
    places = range(1, len(best) + 1)
    with picture(file, 4) as axes:
        axes.plot(places, finite_values, "o", color=REST, markersize=5, alpha=0.7, markeredgewidth=0, label="a trial")
        axes.step(places, best, where="post", color=FIRST, linewidth=1.6, label="best so far")
        _set_span(finite_values, [], axes.set_yscale, axes.set_ylim)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("finished trials")
        axes.set_ylabel(f"{metric} ({direction}d)", parse_math=False)
        axes.legend(frameon=False, fontsize="small")


def _set_span(
    values: Sequence[float], ends: Sequence[float], set_scale: Callable[..., Any], set_limits: Callable[..., Any]
) -> None:
    """Scale an axis so that the values can be distinguished; an interval much wider than they are runs out of it."""
    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and high > 10**DECADES * low:
        set_scale("log")
        set_limits(low / 1.5, high * 1.5)
        return
    span = (high - low) or abs(low) / 10 or 1.0
    start, stop = max(min([low, *ends]), low - span), min(max([high, *ends]), high + span)
    margin = (stop - start or span) / 20
    set_limits(start - margin, stop + margin)


@contextmanager
def picture(file: Path, height: float) -> Iterator[Any]:
    """Yield the axes of a picture of 9 inches by `height`; the picture is written as a PNG when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_written(file) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a label in letters that the font lacks is drawn as boxes
        FigureCanvasAgg(figure).print_figure(part, dpi=120, format="png")
