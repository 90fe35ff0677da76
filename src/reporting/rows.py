"""Rows that one run answers right and another wrong, from what both have predicted; and how sure the difference is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import DamagedFileError
from src.metrics import is_full_marks
from src.records import check_keys, read_lines

NEEDED = {"source": str, "prompt": str, "answer": str}
PREDICTIONS, EVALUATED = "predictions", "evaluations"
"""Folders of a run: `predictions/<set>.jsonl` of src.predict, `evaluations/<set>/predictions.jsonl` of src.evaluate."""


@dataclass(frozen=True)
class Pair:
    """A row that both have answered."""

    source: str
    prompt: str
    reference: str
    answers: tuple[str, str]
    is_right: tuple[bool, bool]


@dataclass(frozen=True)
class Agreement:
    """Which rows of a set two runs answered right, paired by file and line."""

    name: str
    pairs: Sequence[Pair] = field(default_factory=list)

    def count(self, first: bool, second: bool) -> int:
        return sum(pair.is_right == (first, second) for pair in self.pairs)

    @property
    def p_value(self) -> float:
        return mcnemar(self.count(True, False), self.count(False, True))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test: whether two are right equally often, by the rows that differ.

    Under the hypothesis each of those rows is as likely the first's as the second's: a binomial test with 1/2.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def prediction_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a run's predictions by the name of their set; src.predict's come last."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob(f"{EVALUATED}/*/predictions.jsonl")):
        files.setdefault(file.parent.name, []).append(file)
    for file in sorted(folder.glob(f"{PREDICTIONS}/*.jsonl")):
        files.setdefault(file.stem, []).append(file)
    return files


def agreements(
    first: Path, second: Path, patterns: tuple[str | None, str | None], problems: list[str]
) -> Iterator[Agreement]:
    """Yield for each set that both have predicted which rows each answered right, as exact_match says.

    Args:
        patterns: `data.answer_pattern` of each run.
        problems: gets what can't be read.
    """
    ours, theirs = prediction_files(first), prediction_files(second)
    for name in ours:
        if name not in theirs:
            continue
        try:
            one, other = _rows(ours[name]), _rows(theirs[name])
        except DamagedFileError as error:
            problems.append(str(error))
            continue
        shared = [source for source in one if source in other and _is_same_row(one[source], other[source])]
        if shared:
            yield Agreement(name, [_pair(one[source], other[source], patterns) for source in shared])


def _rows(files: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
    """Return the lines of predictions that have a reference, by file and line of their rows; later files count."""

    def check(line: dict[str, Any], _: dict[str, Any] | None) -> None:
        check_keys(line, {**NEEDED, "reference": (str, type(None))})

    lines = [line.content for file in files for line in read_lines(file, check)]
    return {line["source"]: line for line in lines if line["reference"] is not None}


def _is_same_row(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two lines are of one row: of a file that was changed meanwhile they need not be."""
    return str(one["reference"]).strip() == str(other["reference"]).strip()


def _pair(one: Mapping[str, Any], other: Mapping[str, Any], patterns: tuple[str | None, str | None]) -> Pair:
    both = tuple(
        is_full_marks("exact_match", line["answer"], line["reference"], pattern)
        for line, pattern in zip((one, other), patterns, strict=True)
    )
    answers = one["answer"], other["answer"]
    return Pair(one["source"], one["prompt"], one["reference"], answers, (both[0], both[1]))
