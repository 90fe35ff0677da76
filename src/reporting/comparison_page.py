"""The page that compares runs: curves, what differs in configuration, code, data and versions, and rows."""

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.figures import Figure, Series
from src.metrics import is_detail
from src.reporting.curves import file_name, names_of
from src.reporting.details import Details, read_details
from src.reporting.figures import MOST_POINTS, MOST_SERIES, series_of
from src.reporting.page import Block, Figures, Long, Page, Section, Table, Text
from src.reporting.rows import Agreement, agreements
from src.reporting.run_page import number, shown
from src.reporting.runs import differing_keys, dotted, is_number, is_same, when
from src.reporting.views import bits_of, by_view, scores_of
from src.tracking.live import clock
from src.trials.significance import p_text
from src.util import human_bytes, in_words, plural

MOST_ROWS = 100  # rows of each kind that are shown
POINTS_OF_ALL = 6000  # of all curves of a figure: of many runs each has fewer, so that the page stays small
COMPARED_TOO = ("train/loss", "train/thought_loss", "train/answer_loss", "train/lr", "perf/tokens_per_second")
"""Metrics with a figure besides those of evaluations."""
NOTHING = "(not there)"


def comparison_page(folders: Sequence[Path]) -> Page:
    """Return the page of several runs."""
    runs = [read_details(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    problems = [f"{one.name}: {problem}" for one in runs for problem in one.problems]
    rows = list(_rows(runs, problems))
    sections = [
        Section("Results", [*(Text(problem, is_warning=True) for problem in problems), *_results(runs)]),
        Section("Configuration", list(_configuration(runs))),
        Section("Right and wrong", rows),
        Section("What thoughts are worth", _figures(_views(runs))),
        Section("Over steps", _figures(curves(runs, "step", lambda _: None))),
        Section("Over tokens", _figures(curves([one for one in runs if tokens_at(one)], "tokens seen", tokens_at))),
        Section("Code", list(_code(runs))),
        Section("Data", list(_data(runs))),
        Section("Versions and hardware", list(_versions(runs))),
    ]
    about = ", ".join(str(folder) for folder in folders)
    return Page(f"{plural(len(runs), 'run')} compared", about, sections)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the ends of paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _figures(figures: Sequence[Figure]) -> list[Block]:
    return [Figures(figures)] if figures else []


def curves(
    runs: Sequence[Details], x_label: str, x_of: Callable[[Details], Callable[[int], float] | None]
) -> list[Figure]:
    """Return a figure for each metric of which at least one run has a curve, with a curve a run; details over steps
    only.
    """
    most = min(MOST_POINTS, POINTS_OF_ALL // max(1, len(runs)))
    names = dict.fromkeys(name for one in runs for name in names_of(one.lines))
    chosen = [name for name in names if name.startswith("eval/") or name in COMPARED_TOO]
    if x_label != "step":
        chosen = [name for name in chosen if not is_detail(name)]
    figures = []
    for metric in chosen:
        series = [_curve(one, metric, x_of(one), most) for one in runs[:MOST_SERIES]]
        series = [one for one in series if one.x]
        key = file_name(f"{'steps' if x_label == 'step' else 'tokens'}_{metric.replace('/', '_')}")
        if any(len(one.x) > 1 for one in series):  # single values are in the table of results
            figures.append(Figure(key, metric, x_label, metric.rpartition("/")[2], series))
    return figures


def _curve(one: Details, metric: str, x_of: Callable[[int], float] | None, most: int) -> Series:
    """Return a metric of a run under the run's name, over steps or what `x_of` makes of them."""
    found = series_of(one.lines, metric, one.name, most=most)
    return found if x_of is None else Series(found.name, [x_of(int(x)) for x in found.x], found.y)


def tokens_at(one: Details) -> Callable[[int], float] | None:
    """Return how many tokens a run had seen at a step: a share of all that it saw, as its steps are alike."""
    tokens, steps = one.run.metrics.get("tokens_seen"), one.run.metrics.get("steps")
    if not is_number(tokens) or not is_number(steps) or not steps:
        return None
    tokens_a_step = float(tokens or 0) / float(steps)
    return lambda step: tokens_a_step * step


def _results(runs: Sequence[Details]) -> Iterator[Block]:
    facts: dict[str, Callable[[Details], Any]] = {
        "state": lambda one: one.run.facts["state"],
        "started": lambda one: when(one.run.facts["started"]),
        "step": lambda one: number(one.run.facts["step"]),
        "time": lambda one: clock(one.run.facts["seconds"]) if is_number(one.run.facts["seconds"]) else "",
        "peak memory": lambda one: human_bytes(one.run.facts["memory"]) if is_number(one.run.facts["memory"]) else "",
    }
    rows = [[name, *(str(read(one) or "") for one in runs)] for name, read in facts.items()]
    metrics = dict.fromkeys(name for one in runs for name in one.run.metrics)
    chosen = [name for name in metrics if name.startswith(("eval/", "best/eval/")) or name == "tokens_seen"]
    rows += [[name, *(number(one.run.metrics.get(name)) for one in runs)] for name in chosen]
    yield Table(["", *(one.name for one in runs)], rows)


def _views(runs: Sequence[Details]) -> list[Figure]:
    """Return a figure of the bits per byte of each view, with a series for each set of a run."""
    bits = {
        f"{one.name}: {name}": views
        for one in runs[:MOST_SERIES]
        for name, views in bits_of(scores_of(one.evaluation)).items()
    }
    return list(by_view(dict(list(bits.items())[:MOST_SERIES])))


def _rows(runs: Sequence[Details], problems: list[str]) -> Iterator[Block]:
    for one, other in itertools.combinations(runs, 2):
        patterns = tuple(each.run.config.get("data.answer_pattern") for each in (one, other))
        for found in agreements(one.folder, other.folder, (patterns[0], patterns[1]), problems):
            yield from _agreement(found, one.name, other.name)


def _agreement(found: Agreement, one: str, other: str) -> Iterator[Block]:
    both, only_one, only_other, neither = (found.count(*kind) for kind in itertools.product((True, False), repeat=2))
    yield Text(
        f"{found.name}, {plural(len(found.pairs), 'row')} that both have predicted: {both:,} right in both, "
        f"{only_one:,} only in {one}, {only_other:,} only in {other}, {neither:,} in neither; McNemar's exact test: "
        f"p {p_text(found.p_value)}"
    )
    for name, kind in ((one, (True, False)), (other, (False, True))):
        pairs = [pair for pair in found.pairs if pair.is_right == kind]
        rows = [[pair.source, pair.prompt, *pair.answers, pair.reference] for pair in pairs[:MOST_ROWS]]
        first = f", the first {MOST_ROWS}" if len(pairs) > MOST_ROWS else ""
        title = f"{found.name}: right only in {name}: {plural(len(pairs), 'row')}{first}"
        if rows:
            yield Table(["row", "prompt", one, other, "expected"], rows, title, is_folded=True)


def _configuration(runs: Sequence[Details]) -> Iterator[Block]:
    yield from _differing(
        "key", [one.run.config for one in runs], runs, differing_keys([one.run.config for one in runs])
    )


def _differing(
    what: str, sides: Sequence[Mapping[str, Any]], runs: Sequence[Details], keys: Sequence[str]
) -> Iterator[Block]:
    """Yield the keys in which these mappings differ, a column for each run."""
    if not keys:
        yield Text("No difference.")
        return
    rows = [[key, *(shown(side[key]) if key in side else NOTHING for side in sides)] for key in keys]
    yield Table([what, *(one.name for one in runs)], rows)


def _others(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    missing = object()
    keys = dict.fromkeys(key for side in sides for key in side)
    return [
        key
        for key in keys
        if any(not is_same(sides[0].get(key, missing), side.get(key, missing)) for side in sides[1:])
    ]


def _code(runs: Sequence[Details]) -> Iterator[Block]:
    states = [one.provenance.get("git") for one in runs]
    git: list[Mapping[str, Any]] = [state if isinstance(state, Mapping) else {} for state in states]
    rows = [
        [one.name, str(state.get("commit") or "unknown"), _changes(state)] for one, state in zip(runs, git, strict=True)
    ]
    yield Table(["run", "commit", "changes since"], rows)
    diffs = [str(state.get("diff") or "").splitlines() for state in git]
    for (one, other), (before, now) in zip(
        itertools.combinations([one.name for one in runs], 2), itertools.combinations(diffs, 2), strict=True
    ):
        if before != now:
            lines = difflib.unified_diff(before, now, f"changes of {one}", f"changes of {other}", lineterm="")
            yield Long(f"What was changed since the commit differs: {one}, {other}", "\n".join(lines))


def _changes(state: Mapping[str, Any]) -> str:
    if not state.get("commit"):
        return ""
    return plural(len(str(state.get("diff") or "").splitlines()), "line") if state.get("dirty") else "none"


def _data(runs: Sequence[Details]) -> Iterator[Block]:
    sides = []
    for one in runs:
        files = one.provenance.get("data")
        sets = {name: dict(report) for name, report in one.data.items() if isinstance(report, Mapping)}
        kept = {f"{name}.{key}": value for name, of in sets.items() for key, value in of.items() if key in COUNTED}
        sides.append({**(files if isinstance(files, Mapping) else {}), **kept})
    yield from _differing("file, or count of a set", sides, runs, _others(sides))


COUNTED = ("rows_read", "rows_kept", "rows_truncated", "tokens", "supervised_tokens", "digest")
"""What is compared of data_report.json; the digest is of the encoded rows in their order."""


def _versions(runs: Sequence[Details]) -> Iterator[Block]:
    names = ("python", "versions", "hardware", "plugins")
    sides = [dotted({name: one.provenance.get(name) or {} for name in names}) for one in runs]
    keys = _others(sides)
    yield from _differing("library or hardware", sides, runs, keys)
    if not keys and runs:
        yield Text(f"{in_words(names)} are the same.")
