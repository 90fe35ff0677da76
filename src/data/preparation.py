"""Records to encoded rows, in chunks: in this process or in workers, always in the order of the records."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import pyarrow as pa

from src.config import plugins
from src.config.formats import declare_frozen, roles
from src.config.schema import DataConfig, Malformed, Overflow, TokensConfig, thought_tags
from src.config.schema.fields import key_info, later_default
from src.data.chat import ChatTemplate
from src.data.encoding import EncodedRow, Encoder, Lengths
from src.data.examples import Example, ExampleBuilder, Rewriter
from src.data.formats import BadRow
from src.data.readers.record import ENTRY_BYTES, ReadResult, Record, Unreadable, memory_of
from src.data.store import DroppedRow, Encoded, FadingText, to_batch
from src.data.text_encoder import BrokenTokenizerError
from src.data.thought_finder import MALFORMED
from src.errors import DataError, TokenError
from src.patterns import at
from src.util import plural

CHUNK_ROWS = 250  # rows encoded at once by a thread: what they take fits into a core's cache
CHUNK_BYTES = 2**20  # of their fields, or one row that is larger
BYTES_AHEAD = 8 * 2**20  # of the fields of all chunks being encoded: the tokenizer takes up to 150 times as much
MALFORMED_ROW = "malformed_thoughts"  # why a row is dropped
THREADS = min(5, os.cpu_count() or 1)  # of one process; Python's part, a fifth, runs in one thread at a time


@dataclass(frozen=True)
class EncodingConfig:
    """Everything that decides how a record is encoded; it can be sent to another process.

    `data` are the settings of the record's source. With `to_predict` its answer may be missing, and takes no room; with
    `keeps_texts` rows that have thoughts keep what they can be encoded of without some of them.
    """

    data: DataConfig
    tokens: TokensConfig
    tokenizer: Any
    lengths: Lengths
    is_chat: bool
    to_predict: bool = False
    keeps_texts: bool = False

    @property
    def tags(self) -> tuple[str, str] | None:
        """What opens and closes a thought; None where none is written."""
        return thought_tags(self.data, self.tokens)

    @property
    def tag_ids(self) -> tuple[int, int] | None:
        """The ids of these tags."""
        if self.tags is None:
            return None
        opened, closed = self.tokenizer.convert_tokens_to_ids(list(self.tags))
        return opened, closed

    @property
    def known_tags(self) -> tuple[str, str] | None:
        """The tags of the tokens, also where thoughts are dropped."""
        return thought_tags(replace(self.data, thoughts=None), self.tokens)

    def settings(self) -> dict[str, Any]:
        """Return all that shapes a row but the tokenizer, as plain values.

        A key of `data` or `tokens` is in it unless the schema says that it shapes no row, or is a field of this class,
        or unless it is as if it were not there: then rows are those of an earlier version, which did not have it.
        """
        return {
            **_shaping(self.data),
            **{f"tokens.{name}": value for name, value in _shaping(self.tokens).items()},
            "roles": roles(self.data.format),
            "tags": self.known_tags,
            "lengths": _shaping(self.lengths),
            **{flag: True for flag in ("to_predict", "keeps_texts") if getattr(self, flag)},
        }


def _shaping(section: Any) -> dict[str, Any]:
    """Return the values of a section's keys that shape rows and are not known to the cache by another name."""
    values: dict[str, Any] = {}
    for key in fields(section):
        value, info = getattr(section, key.name), key_info(key)
        if not info.shapes_rows or info.cache_key_field or value == later_default(key):
            continue
        if is_dataclass(value):
            values |= {f"{key.name}.{name}": inner for name, inner in _shaping(value).items()}
        else:
            values[key.name] = value.name if isinstance(value, Enum) else value
    return values


@dataclass
class EncodedChunk:
    """A chunk of records, formatted and encoded."""

    rows: pa.RecordBatch
    num_records: int
    dropped: list[DroppedRow] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # (place, reason) of rows that can't be used


Numbered = tuple[int, ReadResult]
Records = Sequence[Numbered]  # a chunk, by the ordinals of its records in their source


class RowEncoder:
    """Formats and encodes records, chunk by chunk."""

    def __init__(self, config: EncodingConfig) -> None:
        self._encoder = Encoder(config.tokenizer, config.tags)
        template = ChatTemplate(config.tokenizer, self._encoder.control_tokens) if config.is_chat else None
        self._examples = ExampleBuilder(
            config.data, config.tags, template, known_tags=config.known_tags, to_predict=config.to_predict
        )
        self._lengths = config.lengths
        self._rewriter = Rewriter(config.tags, template) if config.keeps_texts and config.tags else None
        self._drops_malformed = config.data.malformed_thoughts is Malformed.drop

    def encode_chunk(self, chunk: Records) -> EncodedChunk:
        """Format and encode a chunk; DataError where a row takes so much time or memory that many would stop all."""
        bad, good, dropped = list[tuple[str, str]](), list[tuple[int, Record, Example]](), list[DroppedRow]()
        for ordinal, record in chunk:
            if isinstance(record, Unreadable):
                bad.append((record.place, record.reason))
                continue
            try:
                with at("{0.place}".format, record):
                    example = self._examples.build(record)
                if self._drops_malformed and not MALFORMED.keys().isdisjoint(example.about_thoughts):
                    dropped.append(DroppedRow(ordinal, record.place, MALFORMED_ROW))
                else:
                    good.append((ordinal, record, example))
            except (BadRow, TokenError) as problem:
                bad.append((record.place, str(problem)))
        rows = list[Encoded]()
        for (ordinal, record, example), row in zip(good, self._encode(good), strict=True):
            if isinstance(row, TokenError):
                bad.append((record.place, str(row)))
            elif row is not None and row.is_supervised:
                rows.append((ordinal, record, example, row))
            elif row is None and self._lengths.overflow is Overflow.error:
                bad.append((record.place, f"longer than {self._longest()}, and data.overflow = error"))
            else:
                dropped.append(DroppedRow(ordinal, record.place, "too_long" if row is None else "no_supervised_token"))
        return EncodedChunk(to_batch(rows, self._fading(rows, bad)), len(chunk), dropped, bad)

    def _fading(self, rows: Sequence[Encoded], bad: list[tuple[str, str]]) -> dict[int, FadingText] | None:
        """Return what rows with thoughts are encoded of without some of them, by their ordinals; None: it is not kept.

        Those that can't be encoded without any are added to the bad ones: training must not stop at them.
        """
        if (rewriter := self._rewriter) is None:
            return None
        found, thinking = dict[int, FadingText](), [row for row in rows if rewriter.num_thoughts(row[2])]
        examples = [example for _, _, example, _ in thinking]
        lengths = self._encoder.thought_lengths(examples, is_causal=self._lengths.target is None)
        for (ordinal, record, example, _), its_lengths in zip(thinking, lengths, strict=True):
            num_thoughts, wrong = rewriter.num_thoughts(example), "its thoughts can't be left out one by one"
            if num_thoughts != len(its_lengths):
                reason = f"{plural(num_thoughts, 'thought')} in its text, {len(its_lengths)} in what is supervised"
                bad.append((record.place, f"{wrong}: {reason}"))
                continue
            try:
                bare = rewriter.without(range(num_thoughts), example.prompt, example.completion, example.chat)
                (of_template,) = self._encoder.thought_lengths([bare], is_causal=self._lengths.target is None)
            except (BadRow, TokenError) as problem:
                bad.append((record.place, f"without its thoughts: {problem}"))
                continue
            if len(of_template) not in (0, num_thoughts):
                reason = f"the chat template writes {len(of_template)} in place of {num_thoughts}"
                bad.append((record.place, f"{wrong}: {reason}"))
            found[ordinal] = FadingText(its_lengths, example.chat, has_others=bool(of_template))
        return found

    def _encode(self, good: list[tuple[int, Record, Example]]) -> Sequence[EncodedRow | TokenError | None]:
        """Encode examples: None if too long, an error if one can't be written; DataError where the tokenizer fails."""
        try:
            return self._encoder.encode([example for _, _, example in good], self._lengths)
        except TokenError:
            rows: list[EncodedRow | TokenError | None] = []
            for _, record, example in good:
                try:
                    rows += self._encoder.encode([example], self._lengths)
                except BrokenTokenizerError as problem:
                    raise DataError(f"{record.place}: {problem}") from problem
                except TokenError as problem:
                    rows.append(problem)
            return rows

    def _longest(self) -> str:
        words = f"data.max_seq_length = {self._lengths.sequence}"
        target = self._lengths.target
        return words if target is None else f"{words} or data.max_target_length = {target}"


@contextmanager
def without_cycles() -> Iterator[None]:
    """Disable the cyclic collector: rows are many small lists without cycles, and it took a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def encode_chunks(
    records: Iterable[ReadResult],
    config: EncodingConfig,
    num_workers: int = 1,
    chunk_rows: int = CHUNK_ROWS,
    first_ordinal: int = 0,
) -> Iterator[EncodedChunk]:
    """Encode records in chunks, in their order, with ordinals from `first_ordinal` on.

    Chunks are smaller where rows are long, so memory does not depend on them. DataError where a worker process dies.
    """
    chunks = _chunks(enumerate(records, first_ordinal), chunk_rows)
    if num_workers == 1:
        encoder = RowEncoder(config)
        with ThreadPoolExecutor(THREADS, "prepare") as pool:
            yield from _in_order(pool, encoder.encode_chunk, chunks, THREADS, BYTES_AHEAD)
        return
    fresh = multiprocessing.get_context("spawn")  # a fork would copy locks that the tokenizer's threads hold
    try:
        with ProcessPoolExecutor(num_workers, fresh, _start_worker, (config, plugins.names())) as pool:
            bytes_ahead = max(BYTES_AHEAD, 2 * num_workers * CHUNK_BYTES)
            yield from _in_order(pool, _encode_in_worker, chunks, 2 * num_workers, bytes_ahead)
    except BrokenProcessPool as error:
        remedy = "try fewer: data.preprocessing_num_workers"
        raise DataError(f"a process that prepares rows died (out of memory?); {remedy}") from error


def _chunks(records: Iterator[Numbered], chunk_rows: int) -> Iterator[tuple[Records, int]]:
    """Yield records in chunks, each with its size in bytes; one ends at every multiple of chunk_rows."""
    chunk, total = list[Numbered](), 0
    for ordinal, record in records:
        size = memory_of(record) if isinstance(record, Record) else ENTRY_BYTES
        if chunk and (ordinal % chunk_rows == 0 or total + size > CHUNK_BYTES):
            yield chunk, total
            chunk, total = [], 0
        chunk.append((ordinal, record))
        total += size
    if chunk:
        yield chunk, total


def _in_order(
    pool: Executor,
    encode: Callable[[Records], EncodedChunk],
    chunks: Iterator[tuple[Records, int]],
    num_ahead: int,
    bytes_ahead: int,
) -> Iterator[EncodedChunk]:
    """Yield the chunks that a pool encodes, a few ahead of the one that is yielded."""
    ahead, total = deque[tuple[Future[EncodedChunk], int]](), 0
    try:
        for chunk, size in chunks:
            while ahead and (len(ahead) > num_ahead or total + size > bytes_ahead):
                done, its_size = ahead.popleft()
                yield done.result()
                total -= its_size
            ahead.append((pool.submit(encode, chunk), size))
            total += size
        while ahead:
            yield ahead.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: RowEncoder | None = None


def _start_worker(config: EncodingConfig, plugins_of_run: Sequence[str]) -> None:
    """Set up a worker process: one thread each, and the parent answers Ctrl-C."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.disable()  # see without_cycles
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    declare_frozen(vars(config.data))  # a format of the user's own, and the plugin that reads it
    plugins.require(plugins_of_run)
    _worker = RowEncoder(config)


def _end_with(sentinel: int) -> None:
    """Exit once the parent process has ended, however it did."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode_in_worker(chunk: Records) -> EncodedChunk:
    assert _worker is not None
    return _worker.encode_chunk(chunk)
