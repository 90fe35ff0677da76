"""What thoughts are worth, as src.evaluate has scored it: figures and a table of evaluation.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from src.figures import Figure, Series
from src.reporting.page import Block, Figures, Table
from src.reporting.runs import is_number
from src.trials.significance import p_text

VIEWS = ("gold", "own", "shuffled", "none")
"""The views of a row in the order of the figures."""
COLUMNS = ("loss", "thought_loss", "answer_loss", "bits_per_byte")
NUMBERS = ("bits_per_byte_saved", "low", "high", "p_value", "num_rows")
APART, MOST_APART = 0.12, 0.8  # between two series of one view, and the first and the last; the next view is at 1

Values = Mapping[str, Mapping[str, float]]
"""Numbers by the name of a series, and by view."""


def view_blocks(evaluation: Mapping[str, Any]) -> Iterator[Block]:
    """Yield what a run's evaluation.json says of the views of each of its sets."""
    scores = scores_of(evaluation)
    figures = [*by_view(bits_of(scores)), *_savings(evaluation)]
    if figures:
        yield Figures(figures)
    rows = [
        [name, view, *(_shown(values.get(column)) for column in COLUMNS)]
        for name, views in scores.items()
        for view, values in views.items()
    ]
    if rows:
        yield Table(["set", "view", *(column.replace("_", " ") for column in COLUMNS)], rows)
    compared = [
        [name, one["view"], one["baseline"], _shown(one["bits_per_byte_saved"]),
         f"{_shown(one['low'])} to {_shown(one['high'])}", p_text(one["p_value"]), f"{one['num_rows']:,}"]
        for name, one in _comparisons(evaluation)
    ]  # fmt: skip
    if compared:
        yield Table(["set", "view", "against", "bits per byte saved", "95 % interval", "p", "rows"], compared)


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the metrics of each view of each set that was evaluated, `evaluate/<set>/<view>/<metric>`."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in evaluation.get("metrics", {}).items():
        name, _, rest = key.removeprefix("evaluate/").rpartition("/")
        name, _, view = name.rpartition("/")
        if name and view in VIEWS and is_number(value):
            found.setdefault(name, {}).setdefault(view, {})[rest] = value
    return {name: {view: views[view] for view in VIEWS if view in views} for name, views in found.items()}


def bits_of(scores: Mapping[str, Values]) -> dict[str, dict[str, float]]:
    """Return the bits per byte of each view of each set."""
    return {
        name: {view: values["bits_per_byte"] for view, values in views.items() if "bits_per_byte" in values}
        for name, views in scores.items()
    }


def by_view(bits: Values, title: str = "Bits per byte of the answers, by the thoughts before them") -> Iterator[Figure]:
    """Yield a figure of the bits per byte of views, if there are any; its series are in different places."""
    bits = {name: views for name, views in bits.items() if views}
    ticks = _ticks(bits)
    series = [
        Series(name, [_place(ticks, view, number, len(bits)) for view in views], [*views.values()], "points")
        for number, (name, views) in enumerate(bits.items())
    ]
    if series:
        yield Figure("bits_per_byte_by_view", title, "thoughts", "bits per byte", series, x_ticks=ticks)


def _savings(evaluation: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield a figure of the bits per byte that thoughts save, with intervals: against none, or else against gold."""
    compared = list(_comparisons(evaluation))
    baseline = "none" if any(one["baseline"] == "none" for _, one in compared) else "gold"
    sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, one in compared:
        if one["baseline"] == baseline:
            sets.setdefault(name, {})[one["view"]] = one
    ticks, series = _ticks(sets), list[Series]()
    for number, (name, views) in enumerate(sets.items()):
        ordered = [views[view] for view in VIEWS if view in views]
        places = [_place(ticks, one["view"], number, len(sets)) for one in ordered]
        ends = [end for one in ordered for end in (one["low"], one["high"])]
        series.append(Series(name, places, [one["bits_per_byte_saved"] for one in ordered], "points"))
        series.append(Series(f"{name}: 95 % interval", [x for x in places for _ in range(2)], ends, "intervals"))
    if series:
        title = f"Bits per byte saved against {'no' if baseline == 'none' else 'the given'} thoughts"
        yield Figure("bits_per_byte_saved", title, "thoughts", "bits per byte saved", series, x_ticks=ticks)


def _comparisons(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the comparisons of views with others of the same rows, each with its set."""
    for name, compared in evaluation.get("comparisons", {}).items():
        for one in compared if isinstance(compared, list) else ():
            is_whole = isinstance(one, Mapping) and all(is_number(one.get(key)) for key in NUMBERS)
            if is_whole and one.get("view") in VIEWS and one.get("baseline") in VIEWS:
                yield name, one


def _ticks(sets: Mapping[str, Mapping[str, Any]]) -> dict[float, str]:
    return dict(enumerate((view for view in VIEWS if any(view in views for views in sets.values())), 1))


def _place(ticks: Mapping[float, str], view: str, number: int, count: int) -> float:
    """Return where the `number`-th of `count` series has its value of a view."""
    (tick,) = (place for place, name in ticks.items() if name == view)
    return tick + min(APART, MOST_APART / count) * (number - (count - 1) / 2)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "–"
