"""What a sweep says in the terminal: a live table while it runs, a line an event elsewhere, and the results."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from src.errors import visible
from src.terminal import columns_of, short_numbers, wrapped
from src.tracking.console import Console
from src.tracking.live import clock
from src.trials.folder import TrialStatus
from src.trials.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"FINISHED": "green", "FAILED": "red", "PRUNED": "yellow", "PREEMPTED": "yellow", "RUNNING": "cyan"}
REFRESH_SECONDS = 0.5
QUIET_SECONDS = 30.0  # between two lines of progress where nobody watches
MARGIN = 8  # lines of the terminal that the table leaves free


@dataclass
class TableRow:
    """A trial in the table."""

    trial: Trial
    status: TrialStatus
    is_best: bool = False


class ProgressTable:
    """Shows how far a sweep is. On a terminal the table is drawn anew in place; elsewhere only events are printed."""

    def __init__(self, name: str, metrics: Sequence[str]) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live

        self._terminal = terminal = Terminal()
        self._name, self._metrics = name, metrics
        self._last = time.monotonic()
        self._live = Live(console=terminal, auto_refresh=False, transient=True) if terminal.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the table; what is printed afterwards stays."""
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays, above the table."""
        shown = wrapped(visible(text), columns_of(self._terminal.file))
        self._terminal.print(shown, markup=False, highlight=False, soft_wrap=True)

    def is_due(self) -> bool:
        """Return whether it is time to show how far it is."""
        return time.monotonic() - self._last >= (REFRESH_SECONDS if self._live else QUIET_SECONDS)

    def show(self, entries: Sequence[TableRow], summary: str) -> None:
        """Show how far the sweep is."""
        self._last = time.monotonic()
        if self._live:
            self._live.update(self._table(entries, summary), refresh=True)
        else:
            self.say(summary)

    def _table(self, entries: Sequence[TableRow], summary: str) -> "Table":
        from src.tracking.cells import Cell, new_table

        table = new_table(f"{self._name}   {summary}")
        for heading in ("trial", "overrides", "state", "step", *self._metrics, "left"):
            is_text = heading in ("overrides", "state")
            table.add_column(Cell(heading), justify="left" if is_text else "right", overflow="fold")
        shown, hidden = _chosen(entries, self._terminal.size.height - MARGIN)
        for entry in shown:
            state = entry.status.state
            cells = [Cell(cell) for cell in _cells(entry, len(self._metrics))]
            cells[2].stylize(COLOURS.get(state, ""))
            table.add_row(*cells, style="dim" if state == "WAITING" else "bold" if entry.is_best else "")
        if hidden:
            table.add_row("…", f"and {hidden} more")
        return table

    def show_results(self, table: Callable[[int], "Table"]) -> None:
        """Print a table of results, made for the terminal's width, in place of the one of progress."""
        self.close()
        self._terminal.print(table(self._terminal.width))


def _chosen(entries: Sequence[TableRow], most: int) -> tuple[list[TableRow], int]:
    """Choose what there is room for: what runs, then the best and what failed, then the others."""
    order = {"RUNNING": 0, "FAILED": 2, "WAITING": 4}
    urgent = sorted(entries, key=lambda entry: 1 if entry.is_best else order.get(entry.status.state, 3))
    shown = {entry.trial.number for entry in urgent[: max(3, most)]}
    return [entry for entry in entries if entry.trial.number in shown], len(entries) - len(shown)


def _cells(entry: TableRow, num_metrics: int) -> tuple[str, ...]:
    status = entry.status
    shown = ["" if value is None else f"{value:.4g}" for value in status.newest] or [""] * num_metrics
    if entry.is_best:
        shown[-1] += " best" if num_metrics == 1 else " front"
    step = f"{status.step}/{status.num_steps}" if status.num_steps else str(status.step or "")
    left = ""
    if status.state == "RUNNING" and status.num_steps and status.step and status.elapsed_seconds:
        left = clock(status.elapsed_seconds / status.step * (status.num_steps - status.step))
    return str(entry.trial.number), short_numbers(entry.trial.label), status.state.lower(), step, *shown, left


def listing(
    trials: Sequence[Trial], statuses: Mapping[int, TrialStatus], marked: Collection[int], console: Console
) -> None:
    """Print the trials that a sweep has, and the status of each; those that are marked are to run."""
    width = max((len(trial.label) for trial in trials), default=0)
    for trial in trials:
        status = statuses[trial.number]
        value = "".join(f"  {value:.4g}" for value in status.values)
        mark = "  to run" if trial.number in marked else ""
        console.say(f"  {trial.number:>4}  {trial.label:<{width}}  {status.state.lower()}{value}{mark}")


def failures(failed: Sequence[tuple[Trial, TrialStatus]], console: Console) -> None:
    """Print what went wrong, each with its cause and its log."""
    for trial, status in failed:
        console.say(f"  {trial.number:>4}  {trial.label}")
        console.say(f"        {status.cause or 'no cause is known'}")
        if status.log is not None:
            is_below = status.log.is_relative_to(Path.cwd())
            console.say(f"        {status.log.relative_to(Path.cwd()) if is_below else status.log}")


def ending(status: TrialStatus, metrics: Sequence[str]) -> str:
    """Return how a trial ended, in a line."""
    if status.state == "WAITING":
        return "stopped before it began"
    if status.state == "FINISHED":
        return ", ".join(["finished", *(f"{m} {value:.6g}" for m, value in zip(metrics, status.values, strict=True))])
    return f"{status.state.lower()}{f': {status.cause}' if status.cause else ''}"
