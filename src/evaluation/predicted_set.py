"""The files of one set's predictions, and what decided them.

`<set>.jsonl` has a line a row, `<set>.csv` the same once the set is whole, and `<set>.json` what decided them:
predictions that something else decided are never mixed with them.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from src import records
from src.config.schema import LATER_KEYS, RunConfig
from src.errors import RunFolderError
from src.metrics import compute_metrics
from src.records import Digest, damaged
from src.util import finite, write_atomically, write_json


@dataclass(frozen=True)
class Sample:
    """A text that was generated for a row: `text` has the thoughts, `answer` has not."""

    text: str
    answer: str
    stop_reason: str


@dataclass(frozen=True)
class Prediction:
    """One line: `row` counts the rows of the set's files from 0; `text`, `answer` and `stop_reason` are those of the
    first sample. `samples` is in the line where there are several.
    """

    row: int
    source: str
    prompt: str
    text: str
    answer: str
    reference: str | None
    stop_reason: str
    samples: list[Sample] | None = None


RECORD_KEYS: Mapping[str, records.Types] = {"rows": int, "decided_by": dict, "written": (dict, NoneType)}
SAMPLES = "samples"
LINE_KEYS: Mapping[str, Any] = {column.name: column.type for column in fields(Prediction) if column.name != SAMPLES}
SAMPLE_KEYS: Mapping[str, Any] = {column.name: column.type for column in fields(Sample)}
METRICS = "metrics.json"


class PredictedSet:
    """The files of one set's predictions, in a folder that this process holds; `decided_by` is what decides them, as
    plain values by name.
    """

    def __init__(self, folder: Path, name: str, decided_by: Mapping[str, Any]) -> None:
        self.name, self.folder = name, folder
        self.lines, self.table, self.record = (folder / f"{name}{end}" for end in (".jsonl", ".csv", ".json"))
        self._decided_by = dict(decided_by)
        self._num_rows, self._digest = 0, Digest()

    def claim(self, *, force: bool) -> list[str]:
        """Continue what is there of it, or with `force` remove it; return what decided it otherwise.

        RunFolderError where a file is there that src.predict did not write, which nothing removes; DamagedFileError
        where what is there is no plain file, or the record can't be read.
        """
        files = (self.lines, self.table, self.record)
        there = [file for file in files if os.path.lexists(file)]
        if not there:
            return []
        for file in files:
            records.check_plain(file, f"Move it away, and the same command writes what belongs there; {self._anew}")
        before = self._read().get("decided_by")
        if before is None:
            names = ", ".join(file.name for file in there)
            raise RunFolderError(
                f"{self.folder} holds files that are no predictions of the set {self.name}: {names}; choose another "
                "predict.output, or another name for the set (data.test_files={NAME: [FILE]})"
            )
        if not force:
            return differences(before, self._decided_by)
        for file in files:  # the record last: without it the others are not removed
            file.unlink(missing_ok=True)
        return []

    @property
    def _anew(self) -> str:
        names = " and ".join(file.name for file in (self.lines, self.table))
        return f"without {self.record.name}, move {names} away too: then it starts the set {self.name} anew"

    def _read(self) -> dict[str, Any]:
        """Return what the record says; empty where there is none, or it is another's. DamagedFileError where it can't
        be read, or has not what a record has.
        """
        remedy = f"Restore it; or move it away: {self._anew}"
        try:
            record = records.read_json(self.record, remedy=remedy)
            if "decided_by" not in record:
                return {}
            records.check_keys(record, RECORD_KEYS)
            if others := record.keys() - RECORD_KEYS.keys():
                raise ValueError(f"it has the keys {', '.join(sorted(others))}")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise damaged(self.record, str(error), remedy) from error
        return record

    def is_generated(self) -> bool:
        """Return whether every row has its line."""
        rows = self._read().get("rows")
        return rows is not None and self.lines.exists() and sum(1 for _ in self.read()) == rows

    def resume(self, rows: Sequence[int], block_rows: int) -> int:
        """Cut the file back to the end of its last whole block, and return how many rows are in it; RunFolderError
        where more than its end is not as it was written. `rows` is the number of each row that the set has.
        """
        self._write_record(len(rows), self._read().get("written"))
        self.lines.touch()
        count = size = kept = kept_size = 0
        with open(self.lines, "rb") as file:
            for line in file:
                one = _parsed(line)
                if one is None or count == len(rows) or one["row"] != rows[count]:
                    break
                count, size = count + 1, size + len(line)
                if count % block_rows == 0 or count == len(rows):
                    kept, kept_size = count, size
            if file.readline():  # more follows what could be a torn line
                raise RunFolderError(
                    f"{self.lines}, line {count + 1}: not what was written there; force=true starts the set anew"
                )
        os.truncate(self.lines, kept_size)
        if kept < len(rows):
            self.table.unlink(missing_ok=True)
        self._digest = Digest(self._content())
        self._write_record(len(rows), self._digest.as_dict())
        return kept

    def _write_record(self, num_rows: int, written: Mapping[str, Any] | None) -> None:
        """Write what decides the predictions, and what was written of them."""
        self._num_rows = num_rows
        write_json(self.record, {"rows": num_rows, "decided_by": self._decided_by, "written": written})

    def check_unchanged(self) -> None:
        """Raise DamagedFileError where what is there is not what was written; what was cut off is generated again."""
        remedy = f"Restore it; or force=true starts the set {self.name} anew."
        record = self._read()
        if others := record.get("decided_by", {}).keys() - self._decided_by.keys():
            raise damaged(self.record, f"it has the keys {', '.join(sorted(others))}", remedy)
        if not record or not self.lines.is_file():
            return
        content, written = self._content(), record["written"]
        if written is None:
            if content:
                raise damaged(self.record, f"it does not say what was written into {self.lines.name}", remedy)
            return
        size = written.get("num_bytes")
        is_cut = isinstance(size, int) and len(content) < size and not self.is_generated()
        if not is_cut and not records.begins_with(content, written):
            raise damaged(self.lines, f"it is not what {self.record.name} says was written there", remedy)

    def _content(self) -> bytes:
        """Return what is in the file of lines; DamagedFileError where it can't be read."""
        try:
            return records.read_bytes(self.lines, None)
        except ValueError as error:
            raise damaged(self.lines, str(error), "") from error

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add lines; they are on the disk when this returns."""
        lines = [
            {key: value for key, value in asdict(one).items() if (key, value) != (SAMPLES, None)} for one in predictions
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with open(self.lines, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._digest.add(text.encode())
        self._write_record(self._num_rows, self._digest.as_dict())

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines that are there, up to one that is torn or out of place."""
        before = -1
        with open(self.lines, "rb") as file:
            for line in file:
                one = _parsed(line)
                if one is None or one["row"] <= before:
                    return
                before = one["row"]
                yield one

    def write_table(self) -> None:
        """Write the CSV, where it is not there as it should be: of each row its first sample."""
        text = io.StringIO(newline="")
        # ends lines as RFC 4180 does, and so quotes both kinds of line ends
        writer = csv.DictWriter(text, list(LINE_KEYS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.read())
        if not self.table.is_file() or self.table.read_bytes() != text.getvalue().encode():
            write_atomically(self.table, text.getvalue())

    def score(self, config: RunConfig) -> tuple[dict[str, float], int]:
        """Compare the answers with their references, and put the metrics into metrics.json, `eval/<set>/…`.

        Returns: the metrics, none where a row has no reference; and how many rows have none.
        """
        lines, pattern = list(self.read()), config.data.answer_pattern
        answers, references, places = ([line[key] for line in lines] for key in ("answer", "reference", "source"))
        values = {}
        if config.metrics and None not in references:
            samples = [[one["answer"] for one in line.get(SAMPLES, [line])] for line in lines]
            computed = compute_metrics(config.metrics, answers, references, pattern, places.__getitem__, samples)
            values = {f"eval/{self.name}/{metric}": value for metric, value in computed.items()}
        before = read_metrics(self.folder)
        others = {key: value for key, value in before.items() if not key.startswith(f"eval/{self.name}/")}
        if finite(others | values) != before:
            write_json(self.folder / METRICS, others | values)
        return values, references.count(None)


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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each name whose value has changed, with what it was and what it is."""
    hashed = {
        "data.test_files": "other content than now",
        "model": "another model's weights, settings or tokenizer",
        "base": "other weights under the adapter",
    }
    later = {f"{section}.{key}": value for section, keys in LATER_KEYS.items() for key, value in keys.items()}
    was, is_now = ({name: one.get(name, later.get(name)) for name in {**before, **now}} for one in (before, now))
    changed = {
        name: f"{json.dumps(value)} there, {json.dumps(is_now[name])} now"
        for name, value in was.items()
        if value != is_now[name]
    }
    return [f"{name}   {hashed.get(name, text)}" for name, text in changed.items()]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None of one that is not whole, or no prediction."""
    try:
        content = records.parse(line) if line.endswith(b"\n") else {}
        records.check_keys(content, {**LINE_KEYS, SAMPLES: list}, optional=[SAMPLES])
        for sample in content.get(SAMPLES, []):
            records.check_keys(sample if isinstance(sample, dict) else {}, SAMPLE_KEYS)
    except ValueError:
        return None
    return content if list(content) == [*LINE_KEYS, *([SAMPLES] if SAMPLES in content else [])] else None
