"""What commands leave in the folder of a run that has ended, told from what its user has put there."""

import os
from collections.abc import Iterator
from pathlib import Path

from src.config.places import remove_tree
from src.errors import DamagedFileError
from src.records import read_json

PAGE, FIGURES = "report.html", "report_figures"
"""What python -m src.report writes into a run's or a sweep's folder."""
GENERATOR = '<meta name="generator" content="Towline report">'
"""Stands at the head of each page, by which it is known from other files of that name."""
LONGEST_HEAD = 1000  # characters
RESULTS = ("predictions", "evaluations", "benchmarks", "export")
"""Folders of a run's folder that commands write into, each with records of what they wrote."""
_SCORES = ("metrics.json", "evaluation.json")
_EXPORT, _OF_EXPORT = "export.json", ("README.md", "generation_config.json")  # the latter have no checksum there
_UNFINISHED = (".*.part", ".*.gone*", ".*.lock")


def is_page(file: Path) -> bool:
    """Return whether a file is a page of python -m src.report."""
    return GENERATOR in _head(file)


def remove_report(folder: Path) -> None:
    """Remove the page in a folder, and the figures of it."""
    page, figures = folder / PAGE, folder / FIGURES
    if not (page.is_file() and is_page(page)):
        return
    for table in [] if figures.is_symlink() else list(figures.glob("*.csv")):
        if _head(table).startswith("series,"):
            for file in (table, table.with_suffix(".png")):
                file.unlink(missing_ok=True)
    _remove_empty(figures)
    page.unlink()  # last: without it the figures would not be known


def remove_results(folder: Path) -> None:
    """Remove what the records in one of RESULTS say was written there; a damaged record and its files stay."""
    if folder.is_symlink() or not folder.is_dir():
        remove_tree(folder)
        return
    for record in sorted(folder.rglob("*.json")):
        for file in _written(record):
            file.unlink(missing_ok=True)
    for unfinished in (place for pattern in _UNFINISHED for place in list(folder.rglob(pattern))):
        remove_tree(unfinished)
    for lock in list(folder.rglob("lock")):
        lock.unlink()
    _remove_empty(folder)


def _written(record: Path) -> Iterator[Path]:
    """Yield the files that a record says were written, itself last; none where it is no record."""
    try:
        content = read_json(record)
    except (FileNotFoundError, DamagedFileError):  # removed as part of an export; or nobody knows what it was
        return
    if "decided_by" in content:
        yield from (record.with_suffix(ending) for ending in (".jsonl", ".csv"))
    elif record.name == _EXPORT and isinstance(files := content.get("files"), dict):
        names, folder = {*files, *_OF_EXPORT}, record.parent
        yield from (file for file in list(folder.rglob("*")) if str(file.relative_to(folder)) in names - {_EXPORT})
    elif record.name not in _SCORES:
        return
    yield record


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those in it, that hold nothing."""
    for place, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(place):
            os.rmdir(place)


def _head(file: Path) -> str:
    with open(file, encoding="utf-8", errors="replace") as content:
        return content.read(LONGEST_HEAD)
