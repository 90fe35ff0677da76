"""Encoded rows on disk, by a key of all that shaped them: content, format, templates, tokenizer, settings and code.

An entry is a folder that is renamed into place when it is complete, so a run that is killed leaves none that could be
used, and with a lock one run prepares what several need.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.config import plugins
from src.data.bad_rows import BadRows
from src.data.preparation import EncodedChunk, EncodingConfig, encode_chunks, without_cycles
from src.data.sources import Source, file_hash, hash_of
from src.data.store import RowWriter, Shard, SourceStats
from src.data.text_encoder import PROBE
from src.errors import DataError, is_disk_full

FREE_BYTES, FREE_SHARE = 512 * 2**20, 0.05
"""The space that prepared rows leave free on the disk: this size, or on a small disk this share."""
UNCHECKED_BYTES = 64 * 2**20  # prepared rows up to this size are written without a look at the disk

ShowProgress = Callable[[str], None]  # called often during long work, with how far it is


class RowCache:
    """A folder of prepared rows; without one, a temporary folder that is removed when the process ends."""

    def __init__(self, folder: str | None, show_progress: ShowProgress, num_workers: int = 1) -> None:
        self._show_progress, self._num_workers = show_progress, num_workers
        if folder is None:
            folder = tempfile.mkdtemp(prefix="towline-rows-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir = {folder} can't be made: {error.strerror}; set another, or null for none"
            ) from error

    def shard(self, name: str, source: Source, encoding: EncodingConfig) -> Shard:
        """Return the encoded rows of a source, prepared now or by an earlier run; DataError lists unusable rows."""
        identity = source.identity()
        tokenizer = tokenizer_fingerprint(encoding.tokenizer)
        code = [_code(), *plugins.versions(plugins.names()).values()]  # a plugin may have the format
        entry = self._folder / hash_of(identity, encoding.settings(), tokenizer, *code)[:40]
        if (found := self._open(entry)) is not None:
            return found
        with self._locked(entry, name):
            found = self._open(entry)  # another run may have written it meanwhile
            return self._write(name, source, encoding, entry, identity) if found is None else found

    @contextmanager
    def _locked(self, entry: Path, name: str) -> Iterator[None]:
        """Hold the lock of an entry; the system releases it when the process ends, however it ends."""
        lock = FileLock(f"{entry}.lock")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                self._show_progress(f"{name}: waiting for another run that prepares the same rows")
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
            self._show_progress(f"the cached rows in {entry} are damaged and prepared again ({type(error).__name__})")
            return None

    def _write(self, name: str, source: Source, encoding: EncodingConfig, entry: Path, identity: Any) -> Shard:
        unfinished = entry.with_suffix(".tmp")
        # one of a run that was killed: the lock shows that no other writes it
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(entry, ignore_errors=True)  # damaged
        try:
            with closing(RowWriter(unfinished)) as writer, without_cycles():
                chunks = self._within_the_disk(encode_chunks(source.records(), encoding, self._num_workers))
                stats = write_rows(name, chunks, writer, self._show_progress)
                stats.tag_ids = encoding.tag_ids
                if source.identity() != identity:
                    raise DataError(f"{source.name} changed while being read; start again when it is complete")
                writer.finish(stats)
            os.rename(unfinished, entry)
        except OSError as error:
            if is_disk_full(error):
                raise self._no_space() from error
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return Shard.open(entry, verify=False)

    def _within_the_disk(self, chunks: Iterable[EncodedChunk]) -> Iterator[EncodedChunk]:
        """Yield the chunks; raise DataError once too little of the disk is left."""
        written = 0
        for chunk in chunks:
            written += chunk.rows.nbytes
            if written > UNCHECKED_BYTES:
                disk = shutil.disk_usage(self._folder)
                if disk.free < min(FREE_BYTES, FREE_SHARE * disk.total):
                    raise self._no_space()
            yield chunk

    def _no_space(self) -> DataError:
        return DataError(
            f"no space left for prepared rows in {self._folder}: make room (make clean-cache removes those of earlier "
            "runs), set another folder with data.cache_dir=DIR, or use fewer rows with data.limit"
        )


def write_rows(
    name: str, chunks: Iterable[EncodedChunk], writer: RowWriter, show_progress: ShowProgress
) -> SourceStats:
    """Write prepared rows to the end; DataError lists those that can't be used."""
    stats, bad = SourceStats(), BadRows()
    for chunk in chunks:
        stats.num_records += chunk.num_records
        stats.dropped += chunk.dropped
        bad.add(chunk.bad, stats.num_records)
        if not bad.count:
            writer.write(chunk.rows)
        show_progress(f"{name}: {stats.num_records:,} rows prepared")
    bad.raise_if_any()
    return stats


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of all that decides how a tokenizer and its chat template write a text as ids."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = tokenizer.backend_tokenizer.to_str()
    with_special_tokens = [list(tokenizer(PROBE)["input_ids"]), list(tokenizer(text_target=PROBE)["input_ids"])]
    versions = [version(library) for library in ("tokenizers", "transformers", "jinja2")]
    # a template that writes the date writes other rows tomorrow
    today = datetime.now().date().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""
    return hash_of(backend, tokenizer.chat_template, special, with_special_tokens, versions, today)


@cache
def _code() -> str:
    """Return a hash of the code that makes rows, so that another version of it never gets this one's."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hash_of([file_hash(str(file)) for file in files])
