"""What a figure shows, apart from how it is drawn, and its picture as PNG: for reports and sweeps."""

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.errors import visible
from src.terminal import shortened
from src.util import replaced_when_written

COLOURS = ("#4c84d4", "#d9683c", "#3f9c5a", "#a06cd0", "#b8930b", "#1a9aa8", "#cf5c92", "#8a7a5c", "#7488a0", "#c2484a")
"""Of series, in turn; each can be seen on white and on black."""
DASHES = ("solid", "dashed", "dotted")
FEW_POINTS = 80  # up to which each point has a mark
LONGEST_TICK = 24  # characters
LABEL_WIDTH, LABEL_LINES = 44, 4  # characters and lines of a name beside a picture
Kind = Literal["line", "points", "dashes", "intervals"]
"""Of intervals each two points in turn are the ends of one."""


@dataclass(frozen=True)
class Series:
    """Points in the order in which they are joined."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Kind = "line"
    is_listed: bool = True
    """Whether a legend has its name."""


@dataclass(frozen=True)
class Figure:
    """A figure: from it the page, the CSV and the PNG are made; `key` is the name of its files."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    x_ticks: Mapping[float, str] | None = None  # texts in place of numbers
    has_log_x: bool = False
    has_log_y: bool = False
    y_range: tuple[float, float] | None = None
    is_joined: bool = True
    """Whether a series of few points has a mark at each."""
    names: Sequence[str] = ()
    """What stands at 1, 2, …: where there are names, a picture has them one below the other, each in full."""


def styled(figure: Figure) -> Iterator[tuple[Series, str, str]]:
    """Yield the series of a figure, each with its colour and its dashes; intervals have those of the series before."""
    number = -1
    for series in figure.series:
        number += series.kind != "intervals"
        turn, place = divmod(max(0, number), len(COLOURS))
        yield series, COLOURS[place], DASHES[min(turn + (series.kind == "dashes"), len(DASHES) - 1)]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether positive numbers span so much that their logarithms are what is compared."""
    return bool(values) and min(values) > 0 and max(values) > 50 * min(values)


def write_png(figure: Figure, file: Path) -> None:
    """Draw a figure as a PNG of 9 inches by 4, or more for many names; matplotlib's door for figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    names = [
        textwrap.wrap(visible(name), LABEL_WIDTH, max_lines=LABEL_LINES, placeholder=" …") for name in figure.names
    ]
    height = 1.4 + (0.27 + 0.13 * max(map(len, names))) * max(2, len(names)) if names else 4
    picture = Picture(figsize=(9, height), layout="constrained")
    axes = picture.subplots()
    _draw_series(figure, axes, is_sideways=bool(names))
    if names:
        axes.set_yticks(
            range(1, 1 + len(names)), ["\n".join(lines) for lines in names], parse_math=False, fontsize="small"
        )
        axes.set_ylim(max(2, len(names)) + 0.6, 0.4)
    elif figure.x_ticks is not None:
        labels = [_line(text, LONGEST_TICK) for text in figure.x_ticks.values()]
        axes.set_xticks(list(figure.x_ticks), labels, parse_math=False, fontsize="small")
    axes.set_title(figure.title, parse_math=False, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_written(file) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a label in letters that the font lacks is drawn as boxes
        FigureCanvasAgg(picture).print_figure(part, dpi=120, format="png")


def _draw_series(figure: Figure, axes: Any, *, is_sideways: bool) -> None:
    """Draw what a figure shows; sideways its y is the horizontal axis. No text is taken for a formula."""
    from matplotlib.collections import LineCollection

    handles = []
    for series, colour, dash in styled(figure):
        ends = (series.y, series.x) if is_sideways else (series.x, series.y)
        if series.kind == "intervals":
            points = list(zip(*ends, strict=True))
            handles.append(
                axes.add_collection(LineCollection(list(zip(points[::2], points[1::2], strict=True)), color=colour))
            )
            axes.autoscale_view()
            continue
        has_marks = series.kind == "points" or (figure.is_joined and len(series.x) <= FEW_POINTS)
        style = "none" if series.kind == "points" else dash
        handles += axes.plot(*ends, color=colour, linestyle=style, marker="o" if has_marks else "", markersize=4)
    x, y = "yx" if is_sideways else "xy"
    scales = {f"{x}scale": figure.has_log_x, f"{y}scale": figure.has_log_y}
    axes.set(**{name: "log" if has_log else "linear" for name, has_log in scales.items()})
    if figure.x_label == "step" and not figure.has_log_x and not is_sideways:
        axes.xaxis.get_major_locator().set_params(integer=True)
    getattr(axes, f"set_{y}label")(figure.y_label, parse_math=False)
    if not is_sideways:
        axes.set_xlabel(figure.x_label, parse_math=False)
    if figure.y_range is not None:
        axes.set(**{f"{y}lim": figure.y_range})
    if len(handles) > 1:
        listed = [(handle, one.name) for handle, one in zip(handles, figure.series, strict=True) if one.is_listed]
        names = [_line(name, 40) for _, name in listed]
        for text in axes.legend([handle for handle, _ in listed], names, frameon=False, fontsize="x-small").get_texts():
            text.set_parse_math(False)


def _line(text: str, most: int) -> str:
    return shortened(visible(text, is_line=True), most, "…")
