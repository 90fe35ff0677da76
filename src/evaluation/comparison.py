"""What a view saves of the bits of the answers: against another view of the same rows, or the same view of another
model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src import records
from src.config.schema.entries import VIEWS
from src.errors import RunFolderError
from src.evaluation.bootstrap import compare_bits
from src.evaluation.evaluated_set import FILES, EvaluatedSet
from src.evaluation.row_log import RowLog
from src.evaluation.scores import RowScore, columns
from src.util import in_words, listed

Line = Mapping[str, Any]
RowKey = tuple[str, str]
"""What a row is in any evaluation: the hash of its file, and its line."""
BASELINES = ("none", "gold")
"""The views that others are compared with."""


@dataclass(frozen=True)
class Comparison:
    """How many bits per byte of the answers `view` saves against `baseline`, with the 95 % interval and p value."""

    view: str
    baseline: str
    bits_per_byte_saved: float
    low: float
    high: float
    p_value: float
    num_rows: int


def compare(view: str, ours: Sequence[Line], baseline: str, theirs: Sequence[Line], seed: int) -> list[Comparison]:
    """Compare the lines of the same rows, in the same order; [] where their answers have no byte."""
    found = compare_bits(*columns(theirs), *columns(ours), seed)
    if found is None:
        return []
    values = asdict(found)
    return [Comparison(view, baseline, values.pop("difference"), **values)]


def between_views(lines: Mapping[str, Sequence[Line]], seed: int) -> list[Comparison]:
    """Compare every view with none, then those of other thoughts with gold; `lines` are those of each view."""
    return [
        one
        for baseline in BASELINES
        for view in lines
        if baseline in lines and view not in (baseline, "none")
        for one in compare(view, lines[view], baseline, lines[baseline], seed)
    ]


@dataclass
class OtherEvaluation:
    """The scores in another evaluation's folder, by view and row."""

    folder: Path
    views: dict[str, dict[RowKey, Line]] = field(default_factory=dict)

    def check_common(
        self, places: Mapping[str, Sequence[str]], sets: Mapping[str, EvaluatedSet], views: Mapping[str, Sequence[str]]
    ) -> None:
        """Raise RunFolderError where no row of any set, by its place, is in the same view there."""
        for name, one in sets.items():
            keys = {key_of(place, one.hashes) for place in places[name]}
            if any(keys & self.views[view].keys() for view in views[name] if view in self.views):
                return
        num_rows, num_there = sum(map(len, places.values())), len(set().union(*self.views.values()))
        raise RunFolderError(
            f"evaluate.against = {self.folder}: of {num_rows:,} rows here and {num_there:,} there none are common, in "
            f"the views {in_words(sorted({view for each in views.values() for view in each}))} here and "
            f"{in_words(sorted(self.views))} there; evaluate both on the same files"
        )

    def compare(self, lines: Mapping[str, Sequence[Line]], hashes: Mapping[str, str], seed: int) -> list[Comparison]:
        """Compare each view that both have on the rows that both have."""
        found = list[Comparison]()
        for view in lines.keys() & self.views.keys():
            theirs = self.views[view]
            ours = {key_of(line["source"], hashes): line for line in lines[view]}
            common = [key for key in ours if key in theirs]
            if common:
                pairs = [ours[key] for key in common], [theirs[key] for key in common]
                found += compare(view, pairs[0], str(self.folder), pairs[1], seed)
        return sorted(found, key=lambda one: VIEWS.index(one.view))


def key_of(source: str, hashes: Mapping[str, str]) -> RowKey:
    """Return what a row is in any evaluation; `hashes` are those of the files, by name (rows of a hub have none)."""
    file, _, line = source.rpartition(":")
    return hashes.get(file, file), line


def read_other(folder: Path) -> OtherEvaluation:
    """Read another run's evaluation, of all sets together; `folder` is the run's, or the evaluation's own.

    RunFolderError where there is none, or one that is not whole; DamagedFileError where it can't be read.
    """
    there = folder / "evaluations" if (folder / "evaluations").is_dir() else folder
    other, unfinished = OtherEvaluation(folder), list[str]()
    for record in sorted(there.glob("*/*.json")):
        if record.stem not in VIEWS:
            continue
        log = RowLog(
            record.parent, record.stem, RowScore, {}, kind="scores", what=f"set {record.parent.name}", elsewhere=""
        )
        decided_by = log.read_record().get("decided_by")
        if decided_by is None or not isinstance(hashes := decided_by.get(FILES), dict):
            continue
        records.check_plain(log.lines)
        if not log.is_generated():
            unfinished.append(str(log.lines))
            continue
        rows = other.views.setdefault(record.stem, {})
        rows |= {key_of(line["source"], hashes): line for line in log.read()}
    if unfinished:
        raise RunFolderError(
            f"evaluate.against = {folder}: this evaluation is not finished; give its command again\n"
            f"{listed(unfinished)}"
        )
    if not other.views:
        raise RunFolderError(
            f"evaluate.against = {folder}: no evaluation there; make one first: python -m src.evaluate run={folder}"
        )
    return other


def comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Return comparisons as lines of a table."""
    cells = [
        (
            one.view,
            one.baseline,
            f"{one.bits_per_byte_saved:.4f}",
            f"{one.low:.4f} to {one.high:.4f}",
            f"{one.p_value:.4f}" if one.p_value >= 0.001 else "< 0.001",
            f"{one.num_rows:,}",
        )
        for one in comparisons
    ]
    return _aligned(("view", "against", "bits per byte saved", "95 % interval", "p", "rows"), cells) if cells else []


def score_table(metrics: Mapping[str, float], name: str, views: Sequence[str]) -> list[str]:
    """Return the losses and bits per byte of a set's views as lines of a table."""
    shown = ("loss", "thought_loss", "answer_loss", "bits_per_byte")
    values = [[metrics.get(f"evaluate/{name}/{view}/{metric}") for metric in shown] for view in views]
    cells = [
        (view, *("–" if value is None else f"{value:.4f}" for value in row))
        for view, row in zip(views, values, strict=True)
    ]
    return _aligned(("view", *shown), cells)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "   ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
