"""Look at what runs have left: `python -m src.report KEY=VALUE …`.

Without a folder it prints a table of all runs below outputs/ and multirun/, oldest first: state, when, what differs in
the configuration, last and best value of the metric that chooses the best checkpoint, seconds, memory.
- report.where="KEY OP VALUE and …" chooses runs. KEY is a key of the configuration, a metric (as in summary.json) or
  one of folder, name, state, started, ended, step, metric, last, best, seconds, memory, cause; OP is =, !=, <, <=, >,
  >= or ~ (contains); and, or, not and parentheses join them. Names that hold such characters are quoted.
- report.columns=[…] are the columns, of the same names, and configuration: all that differs.
- report.csv=FILE gets the whole table, a column for each key that differs.

Nothing of a run is changed. A folder that can't be read is a row that says why.

dir=DIR writes a page of the run or sweep in that folder, finished or not: report.html there. dirs=[A,B] compares runs:
comparison.html here. report.output=FILE is another place. A page is one file that needs no network; the folder
FILE_figures next to it has each figure as PNG and CSV. A file that is neither an earlier page nor table stays.

Exit code 0, 2 where the user can fix something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.cli.entry import answer, as_command
from src.reporting.request import Request, read_request
from src.reporting.runs import PLACES, find_runs, is_sweep, read_run

if TYPE_CHECKING:
    from src.reporting.page import Page


def report(request: Request) -> int:
    """Print the table, or write the page; return the exit code."""
    if request.folders:
        return write(request)
    return show_table(request)


def write(request: Request) -> int:
    """Write the page of the folders that are named; return the exit code."""
    from src.reporting.page import write_page
    from src.tracking.console import Console

    write_page(page_of(request.folders), request.output, Console())
    return 0


def page_of(folders: Sequence[Path]) -> Page:
    """Return the page of a run, of a sweep or of a comparison."""
    from src.reporting.comparison_page import comparison_page
    from src.reporting.run_page import run_page
    from src.reporting.sweep_page import sweep_page

    if len(folders) > 1:
        return comparison_page(folders)
    return (sweep_page if is_sweep(folders[0]) else run_page)(folders[0])


def show_table(request: Request) -> int:
    """Print the table of all runs; return the exit code."""
    from src.reporting.table import select, show, write_csv

    folders = find_runs([Path(place) for place in PLACES])
    table = select([read_run(folder) for folder in folders], request.own.where, request.own.columns)
    if request.own.csv is not None:
        write_csv(table, Path(request.own.csv))
    if not folders:
        print(f"There are no runs below {' or '.join(PLACES)} in {Path.cwd()}.")
    elif not table.runs:
        print(f"None of {len(folders):,} runs is meant by report.where.")
    else:
        show(table)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then report; return the exit code."""
    return answer("report", __doc__, argv, lambda arguments: report(read_request(arguments)))


if __name__ == "__main__":
    as_command(main)
