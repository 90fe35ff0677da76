"""The table of runs: which rows and columns, and how they are printed and written."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from src import terminal
from src.config.problems import Problem, refuse
from src.errors import show as show_text
from src.errors import visible
from src.reporting.runs import FACTS, Run, differing_keys, is_number, when
from src.reporting.where import WhereError, read_where
from src.tracking.live import clock
from src.util import did_you_mean, human_bytes, plural, storable, write_atomically

DIFFERENCES = "configuration"
"""The column of what differs among the runs: all keys that do, each with its value."""
COLUMNS = ("folder", "state", "started", DIFFERENCES, "last", "best", "seconds", "memory", "cause")
"""The columns of the table unless others are asked for; `cause` only where a run has one."""
MOST_ON_TERMINAL = 100  # rows that a terminal shows, the newest
MOST_KEYS = 6
"""Differing keys that each row has; of more, a row has those whose value is not the usual one."""
LONG = (DIFFERENCES, "cause")
"""Columns that have lines of their own on a terminal."""
LONGEST_CAUSE = 120  # characters


@dataclass(frozen=True)
class Table:
    """Rows of runs, and the names of their columns; `keys` are those that differ among the runs."""

    runs: Sequence[Run]
    columns: Sequence[str]
    keys: Sequence[str]

    @cached_property
    def usual(self) -> dict[str, Any]:
        """The commonest value of each key where many differ: then a cell has only what departs from it."""
        if len(self.keys) <= MOST_KEYS:
            return {}
        configs = [run.config for run in self.runs if run.config]
        texts = {key: Counter(shown(config.get(key)) for config in configs) for key in self.keys}
        return {key: counts.most_common(1)[0][0] for key, counts in texts.items()}


def select(runs: Sequence[Run], where: str | None, columns: Sequence[str] | None) -> Table:
    """Return the table that is asked for, oldest first; ConfigError says where a condition or a column is unknown."""
    known = {*FACTS, DIFFERENCES, *(key for run in runs for key in run.keys)}
    problems = [
        Problem.on_command_line("report.columns", f"no run has it{did_you_mean(name, known)}", name)
        for name in columns or ()
        if name not in known and runs
    ]
    if where:
        try:
            condition = read_where(where)
            problems += [
                Problem.on_command_line(
                    "report.where",
                    f"at character {one.place}: no run has {one.text}{did_you_mean(one.text, known)}",
                    where,
                )
                for one in condition.keys
                if one.text not in known and runs
            ]
            runs = [run for run in runs if condition.holds(run.value)]
        except WhereError as error:
            problems.append(Problem.on_command_line("report.where", str(error), where))
    if problems:
        raise refuse(problems)
    runs = sorted(runs, key=lambda run: str(run.facts.get("started") or ""))
    keys = differing_keys([run.config for run in runs])
    chosen = columns or [name for name in COLUMNS if name != "cause" or any(run.facts["cause"] for run in runs)]
    return Table(runs, [name for name in chosen if name != DIFFERENCES or keys or columns], keys)


def show(table: Table) -> None:
    """Print a table: on a terminal the newest runs, long values on lines of their own; elsewhere a line a run."""
    columns = terminal.columns_of(sys.stdout)
    left_out = 0 if columns is None else max(0, len(table.runs) - MOST_ON_TERMINAL)
    below = [] if columns is None else [name for name in table.columns if name in LONG]
    if columns is not None and _width_of(table, below, left_out) > columns:
        below = [name for name in table.columns if name in ("folder", *LONG)]
    names = [name for name in table.columns if name not in below]
    rows = [[_cell(run, name, table) for name in names] for run in table.runs[left_out:]]
    first, *lines = _aligned([names, *rows])
    shown_lines = [*_legend(table), first]
    for run, line in zip(table.runs[left_out:], lines, strict=True):
        cells = (visible(_cell(run, name, table), is_line=True) for name in below)
        texts = [line, *(f"    {cell}" for cell in cells if cell)]
        shown_lines += texts if columns is None else [terminal.wrapped(text, columns) for text in texts]
    if left_out:
        note = f"{plural(left_out, 'older run')} not shown: report.where='…' chooses, report.csv=FILE has all"
        shown_lines.append(terminal.wrapped(note, columns))
    show_text("\n".join(shown_lines))


def _legend(table: Table) -> list[str]:
    """Return a line that says of which metric `last` and `best` are, where they are shown, and of one."""
    metrics = {str(run.facts["metric"]) for run in table.runs if run.config}
    values = [name for name in ("last", "best") if name in table.columns]
    which = (
        visible(metrics.pop(), is_line=True) if len(metrics) == 1 else "of each run's checkpoint.metric_for_best_model"
    )
    return [f"{' and '.join(values)}: {which}", ""] if values else []


def _width_of(table: Table, below: Sequence[str], left_out: int) -> int:
    names = [name for name in table.columns if name not in below]
    rows = [[_cell(run, name, table) for name in names] for run in table.runs[left_out:]]
    return max(map(terminal.width, _aligned([names, *rows])))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[visible(cell, is_line=True) for cell in row] for row in rows]
    widths = [max(map(terminal.width, column)) for column in zip(*cells, strict=True)]
    padded = ((cell + " " * (widths[i] - terminal.width(cell)) for i, cell in enumerate(row)) for row in cells)
    return ["  ".join(row).rstrip() for row in padded]


def write_csv(table: Table, file: Path) -> None:
    """Write a table with a column for each differing key, values as they are: nothing rounded or left out."""
    columns = [name for one in table.columns for name in (table.keys if one == DIFFERENCES else [one])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(run.value(name)) for name in columns] for run in table.runs)
    write_atomically(file, storable(text.getvalue()))


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _cell(run: Run, name: str, table: Table) -> str:
    if name == DIFFERENCES:
        values = {key: shown(run.config[key]) for key in table.keys if key in run.config}
        return " ".join(f"{key}={value}" for key, value in values.items() if value != table.usual.get(key))
    value = run.value(name)
    if value is None:
        return ""
    return SHOWN[name](value) if name in SHOWN else shown(value)


SHOWN: Mapping[str, Callable[[Any], str]] = {
    "started": when,
    "ended": when,
    "seconds": lambda value: clock(value) if is_number(value) else "",
    "memory": lambda value: human_bytes(value) if is_number(value) else "",
    "cause": lambda value: terminal.shortened(" ".join(str(value).split()), LONGEST_CAUSE),
}


def shown(value: Any) -> str:
    """Return a value in a cell: numbers with four digits that matter."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
