"""Figures drawn by bokeh in the page, and written as CSV. Bokeh's one door."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.config.problems import shortened
from src.figures import FEW_POINTS, LONGEST_TICK, Figure, styled, write_png
from src.util import storable, write_atomically

HEIGHT = 300  # pixels


def bokeh_script() -> str:
    """Return the JavaScript that draws, as the library has it in its own folder."""
    from bokeh.resources import Resources

    (script,) = Resources(mode="inline", components=["bokeh"]).js_raw[:1]
    return str(script)


def bokeh_item(figure: Figure, target: str) -> dict[str, Any]:
    """Return what Bokeh.embed.embed_item draws into the element of the page with the id `target`."""
    import numpy as np
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import BasicTickFormatter, ColumnDataSource, FixedTicker, HoverTool, Range1d
    from bokeh.plotting import figure as new_figure

    plot = new_figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset",
        active_drag=None,  # a finger on a figure scrolls the page
        active_scroll=None,
        x_axis_type="log" if figure.has_log_x else "linear",
        y_axis_type="log" if figure.has_log_y else "linear",
        x_axis_label=_plain(figure.x_label),
        y_axis_label=_plain(figure.y_label),
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=12,
    )
    plot.toolbar.logo = None
    if figure.y_range is not None:
        plot.y_range = Range1d(start=figure.y_range[0], end=figure.y_range[1])
    for series, colour, dash in styled(figure):
        if series.kind == "intervals":
            ends = [[list(pair) for pair in zip(of[::2], of[1::2], strict=True)] for of in (series.x, series.y)]
            plot.multi_line(*ends, line_color=colour, line_width=1.8, name=series.name)
            continue
        data = {"x": np.asarray(series.x, dtype="float64"), "y": np.asarray(series.y, dtype="float64")}
        source = ColumnDataSource(data)
        if series.kind != "points":
            plot.line("x", "y", source=source, line_color=colour, line_width=1.8, line_dash=dash, name=series.name)
        if series.kind == "points" or (figure.is_joined and len(series.x) <= FEW_POINTS):
            plot.scatter("x", "y", source=source, size=6, fill_color=colour, line_color=None, name=series.name)
    if not figure.has_log_x:
        plot.xaxis.formatter = BasicTickFormatter(power_limit_high=9)
    if figure.x_ticks is not None:
        plot.xaxis.ticker = FixedTicker(ticks=list(figure.x_ticks))
        labels: dict[float | str, Any] = {
            place: _plain(shortened(text, LONGEST_TICK)) for place, text in figure.x_ticks.items()
        }
        plot.xaxis.major_label_overrides = labels
        plot.xaxis.major_label_orientation = 0.5 if max(map(len, labels.values()), default=0) > 6 else "horizontal"
    plot.add_tools(HoverTool(tooltips=[("series", "$name"), ("x", "@x{0.[000000]}"), ("y", "@y{0.[000000]}")]))
    return dict(json_item(plot, ID(target)))


def _plain(text: str) -> str:
    """Return a text in which Bokeh sees no formula."""
    return text.replace("$$", "$\u200b$").replace("\\(", "\\\u200b(").replace("\\[", "\\\u200b[")


def page_json(items: Sequence[dict[str, Any]]) -> str:
    """Return JSON for an element `script`: nothing in it ends the element."""
    text = json.dumps(items, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_files(figure: Figure, file: Path) -> None:
    """Write a figure's CSV and PNG; `file` is their path without the ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series", figure.x_label, figure.y_label])
    ticks = figure.x_ticks or {}
    for series in figure.series:
        x = [ticks.get(round(place), place) for place in series.x] if ticks else series.x
        writer.writerows(zip(itertools.repeat(series.name), x, series.y))
    write_atomically(file.with_name(f"{file.name}.csv"), storable(text.getvalue()))
    write_png(figure, file.with_name(f"{file.name}.png"))
