"""The files of one set's predictions, and what decided them.

`<set>.jsonl` has a line a row, `<set>.csv` the same once the set is whole, and `<set>.json` what decided them:
predictions that something else decided are never mixed with them.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from src import records
from src.config.schema import RunConfig
from src.evaluation.row_log import RowLog
from src.evaluation.thought_counts import Thought, thought_metrics
from src.metrics import compute_metrics
from src.records import damaged
from src.util import finite, write_atomically, write_json


@dataclass(frozen=True)
class Sample:
    """A text that was generated for a row: `text` has the thoughts, `answer` has not.

    `thoughts` says of each how long it is, and whether it was closed; None where the run has no tags.
    """

    text: str
    answer: str
    stop_reason: str
    thoughts: list[Thought] | None = None


@dataclass(frozen=True)
class Prediction:
    """One line: `row` counts the rows of the set's files from 0; `text`, `answer` and `stop_reason` are those of the
    first sample, and so are `thoughts`. `samples` is in the line where there are several.
    """

    row: int
    source: str
    prompt: str
    text: str
    answer: str
    reference: str | None
    stop_reason: str
    samples: list[dict[str, Any]] | None = None
    thoughts: list[Thought] | None = None


SAMPLES, THOUGHTS = "samples", "thoughts"
SAMPLE_KEYS: Mapping[str, Any] = {column.name: column.type for column in fields(Sample)} | {THOUGHTS: list}
THOUGHT_KEYS: Mapping[str, Any] = {column.name: column.type for column in fields(Thought)}
METRICS = "metrics.json"


class PredictionLog(RowLog):
    """A file of predictions, and the record of what decided them; see RowLog."""

    def __init__(self, folder: Path, name: str, decided_by: Mapping[str, Any], **named: str) -> None:
        super().__init__(folder, name, Prediction, decided_by, kind="predictions", **named)

    def check(self, content: Mapping[str, Any]) -> None:
        super().check(content)
        for sample in content.get(SAMPLES, []):
            records.check_keys(sample if isinstance(sample, dict) else {}, SAMPLE_KEYS, optional=[THOUGHTS])
        for thought in (one for text in _texts(content) for one in text.get(THOUGHTS, [])):
            records.check_keys(thought if isinstance(thought, dict) else {}, THOUGHT_KEYS)


class PredictedSet(PredictionLog):
    """The files of one set's predictions, in a folder that this process holds; `decided_by` is what decides them, as
    plain values by name.
    """

    def __init__(self, folder: Path, name: str, decided_by: Mapping[str, Any]) -> None:
        elsewhere = "another predict.output, or another name for the set (data.test_files={NAME: [FILE]})"
        super().__init__(folder, name, decided_by, what=f"set {name}", elsewhere=elsewhere)
        self.table = folder / f"{name}.csv"
        self.more = (self.table,)

    def write_table(self) -> None:
        """Write the CSV, where it is not there as it should be: of each row its first sample."""
        text = io.StringIO(newline="")
        # ends lines as RFC 4180 does, and so quotes both kinds of line ends
        writer = csv.DictWriter(text, list(self.line_keys), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.read())
        if not self.table.is_file() or self.table.read_bytes() != text.getvalue().encode():
            write_atomically(self.table, text.getvalue())

    def score(self, config: RunConfig) -> tuple[dict[str, float], int]:
        """Compare the answers with their references, and put the metrics into metrics.json, `eval/<set>/…`.

        Returns: the metrics, none where a row has no reference; and how many rows have none.
        """
        computed, num_lacking = score_lines(list(self.read()), config)
        values = {f"eval/{self.name}/{metric}": value for metric, value in computed.items()}
        before = read_metrics(self.folder)
        others = {key: value for key, value in before.items() if not key.startswith(f"eval/{self.name}/")}
        if finite(others | values) != before:
            write_json(self.folder / METRICS, others | values)
        return values, num_lacking


def score_lines(lines: Sequence[Mapping[str, Any]], config: RunConfig) -> tuple[dict[str, float], int]:
    """Compute the metrics of predictions, of which those of answers need a reference in each; return also how many have
    none.
    """
    answers, references, places = ([line[key] for line in lines] for key in ("answer", "reference", "source"))
    num_lacking = references.count(None)
    if not config.metrics:
        return {}, num_lacking
    thoughts = _score_thoughts([text for line in lines for text in _texts(line)])
    if num_lacking:
        return thoughts, num_lacking
    pattern = config.data.answer_pattern
    samples = [[one["answer"] for one in _texts(line)] for line in lines]
    scores = compute_metrics(config.metrics, answers, references, pattern, places.__getitem__, samples)
    return scores | thoughts, 0


def _texts(line: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the samples of a line; of one that has none, the line, which has their keys."""
    samples: Sequence[Mapping[str, Any]] = line.get(SAMPLES, [line])
    return samples


def _score_thoughts(texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute what is measured of the thoughts in texts; {} where one was written by a run without tags, or by an
    earlier version, which did not count them.
    """
    if not texts or any(THOUGHTS not in text for text in texts):
        return {}
    return thought_metrics([[Thought(**one) for one in text[THOUGHTS]] for text in texts])


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics of the sets that were predicted into a folder; empty where there are none. DamagedFileError
    where they can't be read.
    """
    remedy = "Restore it; or move it away: it is written anew, with the metrics of the sets that are named then"
    try:
        metrics = records.read_json(folder / METRICS, remedy=remedy)
        records.check_keys(metrics, dict.fromkeys(metrics, (*records.NUMBER, NoneType)))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise damaged(folder / METRICS, str(error), remedy) from error
    return metrics
