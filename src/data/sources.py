"""Where rows come from: JSONL files and the hub become records that know their place. The door to datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DataError, listed, one_line


@dataclass(frozen=True)
class Record:
    """One row as it was read, with the source and the number of its line or row, for messages."""

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.source}:{self.number}"


def read_files(files: Sequence[str], limit: int | None = None) -> list[Record]:
    """Read JSONL files, one object a line, in the order given; blank lines are no rows.

    Raises:
        DataError: naming file and line of the first ten rows that can't be read.
    """
    records: list[Record] = []
    bad: list[str] = []
    for file in files:
        if Path(file).suffix not in (".jsonl", ".ndjson"):
            raise DataError(f"{file}: only JSONL is read (one JSON object a line, named .jsonl)")
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if limit is not None and len(records) >= limit:
                        break
                    if line.strip():
                        _read_line(line, file, number, records, bad)
        except OSError as error:
            raise DataError(f"{file} can't be read: {error.strerror}") from error
    if bad:
        raise DataError(f"{len(bad)} row{'s' if len(bad) > 1 else ''} can't be read:\n{listed(bad)}")
    return records


def _read_line(line: bytes, file: str, number: int, records: list[Record], bad: list[str]) -> None:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad.append(f"{file}:{number}  not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        bad.append(f"{file}:{number}  not JSON: {error.msg.removesuffix(' at')}, column {error.colno}")
    else:
        if isinstance(fields, dict):
            records.append(Record(fields, file, number))
        else:
            bad.append(f"{file}:{number}  a JSON object is needed, this is a {type(fields).__name__}")


def read_hub(
    name: str, config_name: str | None, split: str, revision: str | None, limit: int | None = None
) -> list[Record]:
    """Read one split of a data set on the Hugging Face hub.

    Raises:
        DataError: where it can't be had, with the library's own words.
    """
    import datasets  # heavy, and only this needs it

    try:
        rows = datasets.load_dataset(name, config_name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds: network, missing names, broken files
        raise DataError(
            f"{name} ({config_name or 'default'}, split {split}) can't be had from the hub: {one_line(error)}\n"
            "Without a network, give local files: data.train_files=[FILE.jsonl]"
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return [Record(dict(row), f"{name}/{split}", number) for number, row in enumerate(rows, start=1)]


def file_hash(file: str) -> str:
    """Give the SHA-256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
