"""A file with a line a row that grows a few rows at a time, and what decided it.

`<name>.jsonl` has the lines, `<name>.json` what decided them: lines that something else decided are never mixed with
them. What was written is kept through any stop: the file is cut back to its last whole block and continued.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any

from src import records
from src.config.schema import LATER_KEYS
from src.errors import RunFolderError
from src.records import Digest, damaged
from src.util import write_json

RECORD_KEYS: Mapping[str, records.Types] = {"rows": int, "decided_by": dict, "written": (dict, NoneType)}


class RowLog:
    """A file of lines and the record of what decided them, in a folder that this process holds.

    Args:
        line: the dataclass of a line; a field with a default is a list, and in no line where it is None.
        decided_by: what decides the lines, as plain values by name.
        kind: what the lines are, for messages: predictions.
        what: what they are of, for messages: set test.
        title: what stands beside its progress; the name where it is ''.
        elsewhere: what to choose instead where other files have these names, for messages.
    """

    more: Sequence[Path] = ()
    """Files that are made of the lines, and removed with them."""

    def __init__(
        self,
        folder: Path,
        name: str,
        line: type,
        decided_by: Mapping[str, Any],
        *,
        kind: str,
        what: str,
        elsewhere: str,
        title: str = "",
    ) -> None:
        self.name, self.folder, self.title = name, folder, title or name
        self.lines, self.record = folder / f"{name}.jsonl", folder / f"{name}.json"
        columns = fields(line)
        self.line_keys: dict[str, Any] = {one.name: one.type for one in columns if one.default is MISSING}
        self._lists: dict[str, Any] = {one.name: list for one in columns if one.default is not MISSING}
        self._decided_by, self._kind, self._what, self._elsewhere = dict(decided_by), kind, what, elsewhere
        self._num_rows, self._digest = 0, Digest()

    def claim(self, *, force: bool) -> list[str]:
        """Continue what is there of it, or with `force` remove it; return what decided it otherwise.

        RunFolderError where a file is there that this command did not write, which nothing removes; DamagedFileError
        where what is there is no plain file, or the record can't be read.
        """
        files = (self.lines, *self.more, self.record)
        there = [file for file in files if os.path.lexists(file)]
        if not there:
            return []
        for file in files:
            records.check_plain(file, f"Move it away, and the same command writes what belongs there; {self._anew}")
        before = self.read_record().get("decided_by")
        if before is None:
            names = ", ".join(file.name for file in there)
            raise RunFolderError(
                f"{self.folder} holds files that are no {self._kind} of the {self._what}: {names}; "
                f"choose {self._elsewhere}"
            )
        if not force:
            return differences(before, self._decided_by)
        for file in files:  # the record last: without it the others are not removed
            file.unlink(missing_ok=True)
        return []

    @property
    def _anew(self) -> str:
        names = " and ".join(file.name for file in (self.lines, *self.more))
        return f"without {self.record.name}, move {names} away too: then it starts the {self._what} anew"

    def read_record(self) -> dict[str, Any]:
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
        rows = self.read_record().get("rows")
        return rows is not None and self.lines.exists() and sum(1 for _ in self.read()) == rows

    def resume(self, rows: Sequence[int], block_rows: int) -> int:
        """Cut the file back to the end of its last whole block, and return how many rows are in it; RunFolderError
        where more than its end is not as it was written. `rows` is the number of each row that the set has.
        """
        self._write_record(len(rows), self.read_record().get("written"))
        self.lines.touch()
        count = size = kept = kept_size = 0
        with open(self.lines, "rb") as file:
            for line in file:
                one = self._parsed(line)
                if one is None or count == len(rows) or one["row"] != rows[count]:
                    break
                count, size = count + 1, size + len(line)
                if count % block_rows == 0 or count == len(rows):
                    kept, kept_size = count, size
            if file.readline():  # more follows what could be a torn line
                raise RunFolderError(
                    f"{self.lines}, line {count + 1}: not what was written there; "
                    f"force=true starts the {self._what} anew"
                )
        os.truncate(self.lines, kept_size)
        if kept < len(rows):
            for made in self.more:
                made.unlink(missing_ok=True)
        self._digest = Digest(self._content())
        self._write_record(len(rows), self._digest.as_dict())
        return kept

    def _write_record(self, num_rows: int, written: Mapping[str, Any] | None) -> None:
        """Write what decides the predictions, and what was written of them."""
        self._num_rows = num_rows
        write_json(self.record, {"rows": num_rows, "decided_by": self._decided_by, "written": written})

    def check_unchanged(self) -> None:
        """Raise DamagedFileError where what is there is not what was written; what was cut off is generated again."""
        remedy = f"Restore it; or force=true starts the {self._what} anew."
        record = self.read_record()
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

    def append(self, lines: Sequence[Any]) -> None:
        """Add lines; they are on the disk when this returns."""
        written = [
            {key: value for key, value in asdict(one).items() if value is not None or key not in self._lists}
            for one in lines
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written)
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
                one = self._parsed(line)
                if one is None or one["row"] <= before:
                    return
                before = one["row"]
                yield one

    def check(self, content: Mapping[str, Any]) -> None:
        """Raise ValueError where an object is no line of this file."""
        records.check_keys(content, self.line_keys | self._lists, optional=self._lists)
        if list(content) != [*self.line_keys, *(name for name in self._lists if name in content)]:
            raise ValueError("other keys, or in another order")

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        """Return what a line says; None of one that is not whole, or is no such line."""
        try:
            content = records.parse(line) if line.endswith(b"\n") else {}
            self.check(content)
        except ValueError:
            return None
        return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each name whose value has changed, with what it was and what it is."""
    hashed = {
        "data.test_files": "other content than now",
        "task.documents": "other content than now",
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
