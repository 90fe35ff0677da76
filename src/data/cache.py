"""Encoded rows on disk, found again by what made them: content, format, templates, tokenizer, settings and this code.

An entry is a folder that is renamed into its place when it is whole, so a run that is killed leaves none that could be
used, and a lock lets one run prepare what several want.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.config import plugins
from src.data.encoding import PROBE
from src.data.preparation import EncodingConfig, Prepared, prepared, without_cycles
from src.data.sources import Source, file_hash, fingerprint_of
from src.data.store import RowWriter, Shard, SourceStats
from src.errors import DataError
from src.util import plural

MOST_TOLD = 10  # rows that an error names
MOST_BAD = 10_000
"""Where so many rows can't be used, and fewer can, nothing more is read: the file is something else."""

MOST_KEPT_FREE, SHARE_KEPT_FREE = 512 * 2**20, 0.05
"""What prepared rows leave free: so many bytes, or this share of a small disk. The first ROOM_BYTES may take it."""
ROOM_BYTES = 64 * 2**20

Tell = Callable[[str], None]
"""Is told how far long work is."""


class RowCache:
    """A folder of prepared rows; without one, a temporary folder that goes when the process ends."""

    def __init__(self, folder: str | None, tell: Tell, num_workers: int = 1) -> None:
        self._tell = tell
        self._num_workers = num_workers
        if folder is None:
            folder = tempfile.mkdtemp(prefix="towline-rows-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir = {folder} can't be made: {error.strerror}; give another, or null for none"
            ) from error

    def part(self, name: str, source: Source, recipe: EncodingConfig) -> Shard:
        """Give the encoded rows of a source, prepared now or by an earlier run.

        Raises:
            DataError: listing the rows that can't be used.
        """
        identity = source.fingerprint()
        tokenizer = tokenizer_fingerprint(recipe.tokenizer)
        code = [_code(), *plugins.versions(plugins.names()).values()]  # a plugin may have the format
        entry = self._folder / fingerprint_of(identity, recipe.settings(), tokenizer, *code)[:40]
        if (found := self._open(entry)) is not None:
            return found
        with self._held(entry, name):
            found = self._open(entry)  # another run may have made it meanwhile
            return self._write(name, source, recipe, entry, identity) if found is None else found

    @contextmanager
    def _held(self, entry: Path, name: str) -> Iterator[None]:
        """Be the one run that prepares an entry; the system lets go of it when the process ends, however it ends."""
        lock = FileLock(f"{entry}.lock")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                self._tell(f"{name}: waiting for another run that prepares the same rows")
            except OSError as error:
                raise DataError(f"data.cache_dir = {self._folder} can't be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def _open(self, entry: Path) -> Shard | None:
        if not entry.is_dir():
            return None
        try:
            return Shard.open(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tell(f"the cached rows in {entry} are damaged and prepared again ({type(error).__name__})")
            return None

    def _write(self, name: str, source: Source, recipe: EncodingConfig, entry: Path, identity: Any) -> Shard:
        unfinished = entry.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed: the lock says that nobody writes it
        shutil.rmtree(entry, ignore_errors=True)  # damaged
        writer = None
        try:
            writer = RowWriter(unfinished)
            with without_cycles():
                chunks = self._within_the_disk(prepared(source.records(), recipe, self._num_workers))
                account = write_rows(name, chunks, writer, self._tell)
            if source.fingerprint() != identity:
                raise DataError(f"{source.name} changed while being read; start again when it is whole")
            writer.close(account)
            os.rename(unfinished, entry)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise
        finally:
            if writer is not None:
                writer.abort()
            shutil.rmtree(unfinished, ignore_errors=True)
        return Shard.open(entry, verify=False)

    def _within_the_disk(self, chunks: Iterable[Prepared]) -> Iterator[Prepared]:
        """Yield the chunks while there is room for them and something left for others.

        Raises:
            DataError: where there is not.
        """
        written = 0
        for chunk in chunks:
            written += chunk.rows.nbytes
            if written > ROOM_BYTES:
                disk = shutil.disk_usage(self._folder)
                if disk.free < min(MOST_KEPT_FREE, SHARE_KEPT_FREE * disk.total):
                    raise self._no_space()
            yield chunk

    def _no_space(self) -> DataError:
        return DataError(
            f"no space left for prepared rows in {self._folder}: make room (make clean-cache removes those of earlier "
            "runs), give another folder with data.cache_dir=DIR, or take fewer rows with data.limit"
        )


def write_rows(name: str, chunks: Iterable[Prepared], writer: RowWriter, tell: Tell) -> SourceStats:
    """Write prepared rows to the end, or tell those that can't be used.

    Raises:
        DataError: with the first ten places and how many there are, up to where too many are.
    """
    account, bad, num_bad = SourceStats(), list[tuple[str, str]](), 0
    for chunk in chunks:
        account.num_records += chunk.num_records
        account.dropped += chunk.dropped
        bad += chunk.bad[: MOST_TOLD - len(bad)]
        num_bad += len(chunk.bad)
        if not num_bad:
            writer.write(chunk.rows)
        tell(f"{name}: {account.num_records:,} rows prepared")
        if are_too_many(num_bad, account.num_records):
            raise bad_rows(bad, num_bad, chunk.bad[-1][0])
    if num_bad:
        raise bad_rows(bad, num_bad)
    return account


def are_too_many(num_bad: int, num_records: int) -> bool:
    """Return whether so many of the records read so far can't be used that the others are not looked at."""
    return num_bad >= MOST_BAD and 2 * num_bad > num_records


def bad_rows(first: Sequence[tuple[str, str]], count: int, stopped_at: str = "") -> DataError:
    """Build the error that tells the first rows that can't be used, and how many there are.

    Args:
        stopped_at: the place of the last row that was looked at, where not all were.
    """
    lines, before = [], ""
    for place, reason in first[:MOST_TOLD]:
        lines.append(f"{place}  {'the same' if reason == before else reason}")
        before = reason
    if count > len(lines):
        lines.append(f"… and {count - len(lines)} more")
    if stopped_at:
        lines.append(f"stopped at {stopped_at}, after {count:,} rows that can't be used and fewer that can")
    told = "\n".join(f"  {line}" for line in lines)
    return DataError(f"{plural(count, 'row')} can't be used:\n{told}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Give a hash of all that decides how a tokenizer and its chat template write a text as ids."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = tokenizer.backend_tokenizer.to_str()
    framed = [list(tokenizer(PROBE)["input_ids"]), list(tokenizer(text_target=PROBE)["input_ids"])]
    versions = [version(library) for library in ("tokenizers", "transformers", "jinja2")]
    # a template that writes today's date gives other rows tomorrow
    today = datetime.now().date().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""
    return fingerprint_of(backend, tokenizer.chat_template, special, framed, versions, today)


@cache
def _code() -> str:
    """Give a hash of the code that makes rows: another version of it never gets this one's rows."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return fingerprint_of([file_hash(str(file)) for file in files])
