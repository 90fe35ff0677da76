"""From a configuration to sets of encoded rows and the account of them: sources, formats, encoding, in this order."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import numpy as np

from src.config.files import expand
from src.config.formats import roles
from src.config.schema import DataConfig, ModelType, Overflow, RunConfig
from src.data.answers import AnswerFrame
from src.data.cache import RowCache, Tell
from src.data.chat import ChatTemplate
from src.data.chat_render import give_chat_template
from src.data.encoding import Encoder, Lengths
from src.data.examples import PromptRecord
from src.data.folds import assign_folds, assign_group_folds, read_groups, told
from src.data.mixture import interleave, sample_counts
from src.data.preparation import EncodingConfig
from src.data.readers import Record, Unreadable
from src.data.report import SplitReport
from src.data.sets import EncodedSet
from src.data.sources import FileSource, HubSource, Source, file_hash, file_source
from src.data.store import Shard
from src.data.stream import StreamedSet, StreamSource
from src.errors import DataError
from src.patterns import Pattern, at
from src.util import listed, plural

TrainSet = EncodedSet | StreamedSet


@dataclass
class Data:
    """All sets of a run. `encoder` is the one that made them, for generation to use.

    `stop_ids` end what is generated: EOS, and the tokens that end the assistant's turns in a chat template; `frame` is
    what that template writes around an answer.
    """

    train: TrainSet
    validation: dict[str, EncodedSet]
    test: dict[str, EncodedSet]
    reports: dict[str, SplitReport]
    encoder: Encoder
    stop_ids: list[int]
    frame: AnswerFrame = AnswerFrame()
    uses_fallback_template: bool = False

    def for_samples(self) -> EncodedSet:
        """Give the set whose first rows are generated as samples: one that is not trained on, where there is one."""
        return first_block(next(iter([*self.validation.values(), *self.test.values(), self.train])))

    def train_digest(self) -> str:
        """Give a hash of the encoded train rows in their order; of a streamed set, of its files and settings."""
        return self.train.digest()

    def validation_digest(self, count: int | None) -> str:
        """Give a hash of the rows that are evaluated, the first `count` of each set; None: all."""
        told = [f"{name} {count} {rows.digest()}" for name, rows in self.validation.items()]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]

    @property
    def num_train_rows(self) -> int | None:
        """How many rows are trained on in an epoch; None where nobody knows."""
        return None if isinstance(self.train, StreamedSet) else len(self.train)

    def report(self) -> dict[str, Any]:
        """Give the account of every set; of a streamed one as far as it was read."""
        if isinstance(self.train, StreamedSet) and self.train.account.num_records:
            report, account = self.reports["train"], self.train.account
            report.rows_read, report.rows_dropped = account.num_records, Counter(account.dropped)
            report.rows_kept = account.num_kept
            report.dropped_places = {}
            for row in account.first_dropped:
                report.dropped_places.setdefault(row.reason, []).append(row.place)
        return {name: report.as_dict() for name, report in self.reports.items()}


@dataclass(frozen=True)
class Prompts:
    """The rows of the test sets to be predicted: `prompt_ids` are fed, the answers are only there to compare with."""

    sets: dict[str, EncodedSet]
    encoder: Encoder
    stop_ids: list[int]
    frame: AnswerFrame = AnswerFrame()


def file_hashes(data: DataConfig) -> dict[str, str]:
    """Give the SHA-256 of every data file that the configuration names."""
    return {file: file_hash(file) for patterns in data.files().values() for file in expand(patterns)}


def is_chat(data: DataConfig) -> bool:
    """Whether rows are written by a chat template: messages always, pairs where there is a system prompt."""
    return roles(data.format) == ("messages",) or data.system_prompt is not None


def build_data(config: RunConfig, tokenizer: Any, tell: Tell = lambda _: None) -> Data:
    """Read, format and encode every set, or find it in the cache.

    A tokenizer without a chat template is given one where the data needs it.

    Args:
        tell: is told how far it is, often.
    Raises:
        DataError: where rows can't be read or are malformed, or too few are left.
        TokenError: where the tokenizer can't be used.
    """
    return _Builder(config, tokenizer, tell).build()


def build_prompts(config: RunConfig, tokenizer: Any, tell: Tell = lambda _: None) -> Prompts:
    """Read, format and encode the test sets to be predicted, each prompt as it would be trained and evaluated with.

    A row may have no answer, and the one that it has takes no room: only a row whose prompt alone fills
    data.max_seq_length is too long. Where data.overflow cuts, it cuts the prompt's start: it must end where the answer
    begins.

    Raises:
        DataError, TokenError: as `build_data`.
    """
    return _Builder(config, tokenizer, tell).build_prompts()


class _PromptSource(FileSource):
    """Rows of files that are to be predicted."""

    def records(self) -> Iterator[Record | Unreadable]:
        for row in super().records():
            yield row if isinstance(row, Unreadable) else PromptRecord(*row)

    def fingerprint(self) -> Any:
        return super().fingerprint() | {"rows": "to predict"}


class _Builder:
    """What every set needs alike."""

    def __init__(self, config: RunConfig, tokenizer: Any, tell: Tell) -> None:
        self.config, self.data, self.tokenizer, self.tell = config, config.data, tokenizer, tell
        self.sources = self.data.train_sources()
        self.chats = any(is_chat(data) for data in [self.data, *(source.data for source in self.sources.values())])
        if self.chats:
            give_chat_template(tokenizer)
        self.encoder = Encoder(tokenizer, config.thought_tags)
        self.cache = RowCache(self.data.cache_dir, tell, self.data.preprocessing_num_workers)
        is_pair = config.model.type is ModelType.encoder_decoder
        target = self.data.max_target_length if is_pair else None
        self.lengths = Lengths(self.data.max_seq_length, target, self.data.overflow)
        self.new_tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in config.tokens.additional_special_tokens}
        self.reports: dict[str, SplitReport] = {"train": SplitReport()}

    def build(self) -> Data:
        train, held_out = self._train()
        validation = {
            name: self._evaluated(name, file_source(files, self.data.limit))
            for name, files in self.data.validation_sets().items()
        }
        if self.data.has_hub_validation:
            hub = _hub(self.data, str(self.data.validation_split), self.data.limit)
            validation = {"validation": self._evaluated("validation", hub)}
        elif held_out is not None:
            validation = {"validation": held_out}
        test = {
            name: self._evaluated(name, file_source(files, self.data.limit))
            for name, files in self.data.test_sets().items()
        }
        template = self._template()
        return Data(
            train,
            validation,
            test,
            self.reports,
            self.encoder,
            self._stop_ids(template),
            AnswerFrame() if template is None else template.frame,
            uses_fallback_template=template is not None and template.is_fallback,
        )

    def build_prompts(self) -> Prompts:
        is_pair = self.lengths.target is not None
        cuts = self.data.overflow in (Overflow.truncate, Overflow.truncate_prompt)
        self.lengths = Lengths(
            self.data.max_seq_length,  # of a causal model with EOS behind it: trained prompts left room for a token too
            sys.maxsize if is_pair else None,
            Overflow.truncate_prompt if cuts else self.data.overflow,
        )
        sets = {}
        for name, files in self.data.test_sets().items():
            source = _PromptSource(tuple(expand(files)), self.data.limit)
            part = self.cache.part(name, source, self._recipe(self.data))
            self._check_dropped(name, part, source)
            sets[name] = EncodedSet(name, [part])
            if all(sets[name].completion(i) for i in range(len(part))):
                self._check_answers(sets[name])
        template = self._template()
        frame = AnswerFrame() if template is None else template.frame
        return Prompts(sets, self.encoder, self._stop_ids(template), frame)

    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self.tokenizer, self.encoder.control_tokens) if self.chats else None

    def _stop_ids(self, template: ChatTemplate | None) -> list[int]:
        ends = self.tokenizer.convert_tokens_to_ids(list(template.ends)) if template else []
        return list(dict.fromkeys([self.encoder.eos_token_id, *ends]))

    def _recipe(self, data: DataConfig) -> EncodingConfig:
        return EncodingConfig(data, self.config.tokens, self.tokenizer, self.lengths, is_chat(data))

    def _train(self) -> tuple[TrainSet, EncodedSet | None]:
        """Give the train set, and the validation set that was held out of it, where one was."""
        data = self.data
        has_folds, fraction = data.num_folds is not None, data.held_out_fraction
        sources = {name: _source(source.data, data.limit) for name, source in self.sources.items()}
        if data.streaming:
            return self._streamed(sources), None
        groups, identity = self._groups(sources)
        parts = {
            name: self.cache.part(name, source, self._recipe(self.sources[name].data))
            for name, source in sources.items()
        }
        for name, part in parts.items():
            self._check_dropped(name, part, sources[name])
        if identity is not None and identity != [source.fingerprint() for source in sources.values()]:
            raise DataError("train changed while being read; start again when it is whole")
        sizes = [part.account.num_records for part in parts.values()]
        held = self._folded(sizes, groups) if has_folds else [hold_out(n, fraction, self.config.seed) for n in sizes]
        are_held = [np.isin(part.ordinals, list(out)) for part, out in zip(parts.values(), held, strict=True)]
        train = self._left(parts, held, [np.flatnonzero(~is_held) for is_held in are_held])
        if not has_folds and not fraction:
            return train, None
        return train, self._held_out(parts, held, [np.flatnonzero(is_held) for is_held in are_held])

    def _groups(self, sources: dict[str, Source]) -> tuple[list[list[str]] | None, list[Any] | None]:
        """Read the group of each record, and say which rows that was read from; None where there are no groups."""
        if (column := self.data.group_column) is None:
            return None, None
        identity = [source.fingerprint() for source in sources.values()]
        return read_groups(sources, column, self.tell), identity

    def _folded(self, sizes: list[int], groups: list[list[str]] | None) -> list[set[int]]:
        """Give the ordinals of each part's records that are in the fold to validate with."""
        num_folds, seed = self.data.num_folds, self.config.seed
        assert num_folds is not None
        folds = assign_folds(sizes, num_folds, seed) if groups is None else assign_group_folds(groups, num_folds, seed)
        return [set(np.flatnonzero(of_part == self.data.fold).tolist()) for of_part in folds]

    def _left(self, parts: dict[str, Shard], held: list[set[int]], rows: list[np.ndarray]) -> EncodedSet:
        """Make the train set of the rows of each part that are left to it, mixed where there is a mixture."""
        for name, some in zip(parts, rows, strict=True):
            if not len(some):
                raise DataError(f"{name}: all its rows are held out or dropped; nothing of it is left to train on")
        shares = self.sources.values()
        taken = sample_counts([len(some) for some in rows], [s.weight for s in shares], [s.count for s in shares])
        train = EncodedSet("train", list(parts.values()), self._chosen(rows, taken))
        self._report_train(train, list(parts), held)
        if not len(train):
            raise DataError("train has no rows: the weights of the mixture leave none of its smallest source")
        return train

    def _held_out(self, parts: dict[str, Shard], held: list[set[int]], rows: list[np.ndarray]) -> EncodedSet:
        """Make the validation set of the rows of each part that are held out of train."""
        has_folds = self.data.num_folds is not None
        chosen = self._chosen(rows, [len(some) for some in rows])
        validation = EncodedSet("validation", list(parts.values()), chosen)
        if not len(validation):
            raise DataError(
                f"every row of fold {self.data.fold} is dropped: give fewer folds (data.num_folds)"
                if has_folds
                else "every row that data.validation_fraction holds out is dropped: give a larger fraction"
            )
        self._report(validation, held, is_held=True).fold = told(self.data)
        self._check_answers(validation)
        return validation

    def _chosen(self, rows: list[np.ndarray], taken: list[int]) -> np.ndarray:
        """Give (part, row) of a set's rows in their order: part after part, or mixed."""
        return interleave(rows, taken, self.config.seed) if self.data.mixture else _all(rows)

    def _streamed(self, sources: dict[str, Source]) -> StreamedSet:
        shares = {name: source.weight or source.count or 1 for name, source in self.sources.items()}
        train = StreamedSet(
            "train",
            [
                StreamSource(source, self._recipe(one.data), shares[name] / sum(shares.values()), one.count)
                for (name, source), one in zip(sources.items(), self.sources.values(), strict=True)
            ],
            self.data.preprocessing_num_workers,
            self.data.max_dropped_fraction,
        )
        self._report(train.first)
        self.reports["train"].is_streamed = True
        return train

    def _evaluated(self, name: str, source: Source) -> EncodedSet:
        """Build a set that is evaluated."""
        part = self.cache.part(name, source, self._recipe(self.data))
        self._check_dropped(name, part, source)
        rows = EncodedSet(name, [part])
        self._report(rows)
        self._check_answers(rows)
        return rows

    def _report(self, rows: EncodedSet, held: list[set[int]] | None = None, *, is_held: bool = False) -> SplitReport:
        """Account for a set.

        Args:
            held: the ordinals of each part's records that are held out of train; None where none are.
            is_held: whether the set is what was held out, rather than what is left.
        """
        report = self.reports[rows.name] = SplitReport()
        for part, out in zip(rows.parts, held or [set() for _ in rows.parts], strict=True):
            report.rows_read += len(out) if is_held else part.account.num_records - len(out)
            report.drop([row for row in part.account.dropped if (row.ordinal in out) == is_held])
        report.count(rows, self.encoder, self.new_tokens)
        return report

    def _report_train(self, train: EncodedSet, names: list[str], held: list[set[int]]) -> None:
        report = self._report(train, held)
        if not self.data.mixture:
            return
        report.sources = {name: int((train.chosen[:, 0] == number).sum()) for number, name in enumerate(names)}
        distinct = len(np.unique(train.chosen, axis=0))
        report.rows_repeated = report.rows_kept - distinct
        left_out = report.rows_read - report.rows_dropped.total() - distinct
        if left_out:
            report.rows_dropped["not_in_mixture"] = left_out

    def _check_dropped(self, name: str, part: Shard, source: Source) -> None:
        """Refuse a source of which nothing is left, or more would be dropped than is allowed."""
        dropped, read = part.account.dropped, part.account.num_records
        if not read:
            raise DataError(f"{name} has no rows: {source.name}")
        if len(dropped) <= self.data.max_dropped_fraction * read and len(part):
            return
        report = SplitReport()
        report.drop(dropped)
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.rows_dropped.items())
        allowed = f"more than data.max_dropped_fraction = {self.data.max_dropped_fraction:g}"
        raise DataError(
            f"{name}: {len(dropped)} of {read} rows would be dropped ({reasons}), "
            f"{allowed if len(part) else 'so nothing would be left'}.\n"
            f"{listed([row.place for row in dropped])}\n"
            f"Raise data.max_seq_length (now {self.lengths.sequence}), choose another data.overflow, or allow a larger "
            "fraction."
        )

    def _check_answers(self, rows: EncodedSet) -> None:
        """Refuse rows whose answer can't be found, where answers are compared."""
        pattern = self.data.answer_pattern
        if pattern is None or "exact_match" not in self.config.metrics:
            return
        found = Pattern("data.answer_pattern", normalize("NFC", pattern))  # as exact match compares
        without = []
        for i in range(len(rows)):
            with at(rows.place, i):
                if not found.is_in(normalize("NFC", rows.reference(i))):
                    without.append(rows.place(i))
        if without:
            raise DataError(
                f"{plural(len(without), 'row')} of {rows.name} can't be used: no answer in them, "
                f"data.answer_pattern {pattern!r} finds nothing\n{listed(without)}"
            )


def _source(data: DataConfig, limit: int | None) -> Source:
    if data.train_files:
        return file_source(data.train_files, limit)
    return _hub(data, data.train_split or "train", limit, streaming=data.streaming)


def _hub(data: DataConfig, split: str, limit: int | None, *, streaming: bool = False) -> HubSource:
    where = (str(data.dataset_name), data.dataset_config_name, split, data.revision)
    return HubSource(*where, streaming=streaming, limit=limit)


def _all(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Give (part, row) of all rows, part after part."""
    found = [np.stack([np.full(len(some), number), some], axis=1) for number, some in enumerate(rows)]
    return np.concatenate(found).astype(np.int64)


def hold_out(num_records: int, fraction: float, seed: int) -> set[int]:
    """Choose a share of the records by seed, at least one where there are two; gives their ordinals."""
    count = min(max(1, round(num_records * fraction)), num_records - 1) if num_records > 1 and fraction else 0
    return set(np.random.default_rng([seed, 0x5EED]).permutation(num_records)[:count].tolist())


def blocks(rows: TrainSet) -> Iterator[EncodedSet]:
    """Give a train set's rows, a streamed one's block after block."""
    return rows.blocks() if isinstance(rows, StreamedSet) else iter([rows])


def first_block(rows: TrainSet) -> EncodedSet:
    """Give a train set, or of a streamed one what is read first."""
    return rows.first if isinstance(rows, StreamedSet) else rows
