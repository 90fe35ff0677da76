"""Sources of records: data files and data sets of the Hugging Face hub. The only module that imports datasets."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from src.config.files import expand
from src.data.readers import read_file
from src.data.readers.record import MAX_ROW_BYTES, ReadResult, Record, Unreadable
from src.errors import DataError, one_line


@dataclass(frozen=True)
class FileSource:
    """Rows of data files, one file after the other."""

    files: tuple[str, ...]
    limit: int | None = None

    @property
    def name(self) -> str:
        return ", ".join(self.files)

    def records(self) -> Iterator[ReadResult]:
        """Read the rows, at most `limit` of them."""
        yield from itertools.islice((row for file in self.files for row in read_file(file)), self.limit)

    def identity(self) -> Any:
        """Return what identifies the rows: every file with the hash of its content."""
        return {"files": [[file, file_hash(file)] for file in self.files], "limit": self.limit}


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the Hugging Face hub, or of a local folder in its form."""

    dataset_name: str
    config_name: str | None
    split: str
    revision: str | None
    streaming: bool = False
    limit: int | None = None

    @property
    def name(self) -> str:
        return f"{self.dataset_name}/{self.split}"

    def _load(self) -> Any:
        """Return the rows, streamed where that is asked for or only the first are needed."""
        import datasets  # heavy, and only this needs it

        datasets.disable_progress_bars()
        load = partial(
            datasets.load_dataset, self.dataset_name, self.config_name, split=self.split, revision=self.revision
        )
        if self.limit is not None and not self.streaming:
            with suppress(Exception):  # can't stream a part of a split, or what is only in the library's own cache
                return load(streaming=True)
        with self._load_errors():
            return load(streaming=self.streaming)

    @contextmanager
    def _load_errors(self) -> Iterator[None]:
        """Raise what the library raises, of many kinds (network, missing names, broken files), as a DataError."""
        try:
            yield
        except Exception as error:
            raise DataError(
                f"{self.dataset_name} ({self.config_name or 'default'}, split {self.split}) can't be loaded from the "
                f"hub: {one_line(error)}\nWithout a network, use local files: data.train_files=[FILE]"
            ) from error

    def records(self) -> Iterator[ReadResult]:
        """Read the rows, at most `limit` of them; DataError, in the library's own words, where they can't be loaded."""
        rows, number = itertools.islice(self._load(), self.limit), 0
        try:
            for number, fields in enumerate(map(dict[str, Any], rows), start=1):
                if sum(len(value) for value in fields.values() if isinstance(value, str)) > MAX_ROW_BYTES:
                    yield Unreadable(self.name, number, f"its texts have more than {MAX_ROW_BYTES:,} characters")
                else:
                    yield Record(fields, self.name, number)
        except Exception as error:  # a stream reads from the network as it goes
            yield Unreadable(self.name, number + 1, f"the library can't read it: {one_line(error)}")

    def identity(self) -> Any:
        """Return what identifies the rows: the library's own hash changes with the files and how they are read."""
        import datasets

        with self._load_errors():
            builder = datasets.load_dataset_builder(self.dataset_name, self.config_name, revision=self.revision)
        rows = [builder.config_id, str(builder.config.version), builder.hash]
        return {"hub": [self.name, self.config_name], "rows": rows, "limit": self.limit}


Source = FileSource | HubSource


def file_source(patterns: Sequence[str], limit: int | None) -> FileSource:
    """Return the source of files, globs and folders."""
    return FileSource(tuple(expand(patterns)), limit)


def file_hash(file: str) -> str:
    """Return the SHA-256 of a file's content; DataError where it can't be read."""
    try:
        status = os.stat(file)
        return _hash(file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from error


@lru_cache(maxsize=1024)
def _hash(file: str, *_state: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of(*parts: Any) -> str:
    """Return a hash of plain values, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
