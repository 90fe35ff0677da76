"""From a configuration to sets of encoded rows and their reports: sources, formats, encoding, splits, in this order."""

import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unicodedata import normalize

import numpy as np

from src.config.files import expand
from src.config.formats import roles
from src.config.schema import DataConfig, ModelType, Overflow, RunConfig, Thoughts
from src.data import splits
from src.data.answers import AnswerFrame
from src.data.cache import RowCache, ShowProgress
from src.data.chat import ChatTemplate
from src.data.chat_render import set_chat_template
from src.data.encoding import Encoder, Lengths
from src.data.epochs import fader_of
from src.data.groups import read_groups
from src.data.preparation import MALFORMED_ROW, EncodingConfig
from src.data.report import SplitReport, describe_fold
from src.data.sets import EncodedSet
from src.data.sources import HubSource, Source, file_hash, file_source
from src.data.store import Shard
from src.data.stream import StreamedSet, StreamSource
from src.errors import DataError
from src.patterns import Pattern, at
from src.util import listed, plural

TrainSet = EncodedSet | StreamedSet


@dataclass
class Data:
    """All sets of a run, and the encoder that made them.

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
        """Return the set whose first rows are generated as samples: one that is not trained on, where there is one."""
        return next(iter([*self.validation.values(), *self.test.values(), self.train])).first

    def validation_digest(self, count: int | None) -> str:
        """Return a hash of the rows that are evaluated, the first `count` of each set; None: all."""
        lines = [f"{name} {count} {rows.digest()}" for name, rows in self.validation.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @property
    def num_train_rows(self) -> int | None:
        """Rows of an epoch; None for a streamed set."""
        return None if isinstance(self.train, StreamedSet) else len(self.train)

    def report(self) -> dict[str, Any]:
        """Return the report of every set; for a streamed one, of what was read so far."""
        reports = self.reports
        if isinstance(self.train, StreamedSet) and self.train.account.num_records:
            reports = reports | {"train": reports["train"].with_account(self.train.account)}
        return {name: report.as_dict() for name, report in reports.items()}


@dataclass(frozen=True)
class Prompts:
    """The rows of the test sets to be predicted; their answers, where they have one, are only for comparison.

    `template` is the chat template of rows that have one.
    """

    sets: dict[str, EncodedSet]
    encoder: Encoder
    stop_ids: list[int]
    frame: AnswerFrame = AnswerFrame()
    template: ChatTemplate | None = None


@dataclass(frozen=True)
class EvaluatedRows(Prompts):
    """The rows of validation and test sets, exactly as a run evaluates them, and the reports of these sets."""

    reports: dict[str, SplitReport] = field(default_factory=dict)


def file_hashes(data: DataConfig) -> dict[str, str]:
    """Return the SHA-256 of every data file that the configuration names."""
    return {file: file_hash(file) for patterns in data.files().values() for file in expand(patterns)}


def is_chat(data: DataConfig) -> bool:
    """Return whether rows are written by a chat template: messages always, pairs where there is a system prompt."""
    return roles(data.format) == ("messages",) or data.system_prompt is not None


def build_data(config: RunConfig, tokenizer: Any, show_progress: ShowProgress = lambda _: None) -> Data:
    """Read, format and encode every set, or find it in the cache.

    A tokenizer without a chat template gets one where the data needs it. DataError where rows can't be read or are
    malformed, or too few are left; TokenError where the tokenizer can't be used.
    """
    builder = _Builder(config, tokenizer, show_progress)
    train, held_out = builder.train_and_held_out()
    validation = builder.validation_sets() if held_out is None else {"validation": held_out}
    test, template = builder.sets_from_files(config.data.test_sets()), builder.template
    is_fallback = template is not None and template.is_fallback
    return Data(train, validation, test, builder.reports, builder.encoder, builder.stop_ids, builder.frame, is_fallback)


def build_prompts(config: RunConfig, tokenizer: Any, show_progress: ShowProgress = lambda _: None) -> Prompts:
    """Read, format and encode the test sets to be predicted, each prompt as it is trained with; raises as `build_data`.

    A row may lack an answer, and one that it has takes no room: only a row whose prompt alone fills data.max_seq_length
    is too long. Where data.overflow truncates, it cuts the prompt's start: it must end where the answer begins.
    """
    builder = _Builder(config, tokenizer, show_progress, to_predict=True)
    sets = builder.sets_from_files(config.data.test_sets())
    return Prompts(sets, builder.encoder, builder.stop_ids, builder.frame, builder.template)


def build_encoder(config: RunConfig, tokenizer: Any) -> Prompts:
    """Return what encodes the prompts of a configuration, and what ends its answers, without any rows."""
    return build_prompts(replace(config, data=replace(config.data, test_files=None)), tokenizer)


def build_evaluated(
    config: RunConfig, tokenizer: Any, names: Collection[str], show_progress: ShowProgress = lambda _: None
) -> EvaluatedRows:
    """Build the validation and test sets of these names as `build_data` does, and train only where one is held out of
    it; raises as that.
    """
    builder, data = _Builder(config, tokenizer, show_progress), config.data
    sets: dict[str, EncodedSet] = {}
    if set(data.validation_names()) & set(names):
        held_out = builder.train_and_held_out()[1] if data.is_held_out else None
        sets |= builder.validation_sets(names) if held_out is None else {"validation": held_out}
    sets |= builder.sets_from_files({name: files for name, files in data.test_sets().items() if name in names})
    return EvaluatedRows(sets, builder.encoder, builder.stop_ids, builder.frame, builder.template, builder.reports)


def without_thoughts(config: RunConfig) -> RunConfig:
    """Return a configuration whose rows are written without their thoughts, and are the same otherwise."""
    return replace(config, data=replace(config.data, thoughts=Thoughts.drop))


class _Builder:
    """Builds the sets of a run."""

    def __init__(
        self, config: RunConfig, tokenizer: Any, show_progress: ShowProgress, *, to_predict: bool = False
    ) -> None:
        self.config, self.data, self.tokenizer, self.show_progress = config, config.data, tokenizer, show_progress
        self.to_predict = to_predict
        self.sources = self.data.train_sources()
        has_chats = any(is_chat(data) for data in [self.data, *(source.data for source in self.sources.values())])
        if has_chats:
            set_chat_template(tokenizer)
        self.encoder = Encoder(tokenizer, config.thought_tags)
        self.cache = RowCache(self.data.cache_dir, show_progress, self.data.preprocessing_num_workers)
        self.lengths = _lengths(config, to_predict=to_predict)
        self.new_tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in config.tokens.additional_special_tokens}
        self.reports: dict[str, SplitReport] = {"train": SplitReport()}
        self.template = ChatTemplate(tokenizer, self.encoder.control_tokens) if has_chats else None
        self.frame = AnswerFrame() if self.template is None else self.template.frame
        self.fader = fader_of(config, self.encoder, self.template, self.lengths, show_progress)
        ends = tokenizer.convert_tokens_to_ids(list(self.template.ends)) if self.template else []
        self.stop_ids = list(dict.fromkeys([self.encoder.eos_token_id, *ends]))

    def _encoding(self, data: DataConfig, *, is_train: bool = False) -> EncodingConfig:
        keeps_texts = is_train and self.fader is not None
        settings = self.config.tokens, self.tokenizer, self.lengths, is_chat(data), self.to_predict, keeps_texts
        return EncodingConfig(data, *settings)

    def _shard(self, name: str, source: Source, data: DataConfig, *, is_train: bool = False) -> Shard:
        shard = self.cache.shard(name, source, self._encoding(data, is_train=is_train))
        self._check_dropped(name, shard, source)
        return shard

    def sets_from_files(self, sets: Mapping[str, list[str]]) -> dict[str, EncodedSet]:
        return {name: self.eval_set(name, file_source(files, self.data.limit)) for name, files in sets.items()}

    def validation_sets(self, names: Collection[str] | None = None) -> dict[str, EncodedSet]:
        """Build the validation sets that are not held out of train: those of these names, or all."""
        if self.data.has_hub_validation:
            source = _hub_source(self.data, str(self.data.validation_split))
            return {"validation": self.eval_set("validation", source)}
        files = self.data.validation_sets()
        return self.sets_from_files({name: files[name] for name in files if names is None or name in names})

    def eval_set(self, name: str, source: Source) -> EncodedSet:
        """Build a set that is evaluated or predicted."""
        rows = EncodedSet(name, [self._shard(name, source, replace(self.data, weight_column=None))])
        if not self.to_predict:
            self._report(rows).unread_keys.pop(self.data.weight_column or "", None)  # weights are for training
        if not self.to_predict or all(rows.completion(i) for i in range(len(rows))):
            self._check_answers(rows)
        return rows

    def train_and_held_out(self) -> tuple[TrainSet, EncodedSet | None]:
        """Build the train set, and the validation set that is held out of it, where one is."""
        data, seed = self.data, self.config.seed
        sources = {name: train_source(source.data) for name, source in self.sources.items()}
        if data.streaming:
            return self._streamed(sources), None
        identities = [source.identity() for source in sources.values()] if data.group_column is not None else []
        groups = None if data.group_column is None else read_groups(sources, data.group_column, self.show_progress)
        described = {name: one.data for name, one in self.sources.items()}
        shards = {name: self._shard(name, source, described[name], is_train=True) for name, source in sources.items()}
        if identities and identities != [source.identity() for source in sources.values()]:
            raise DataError("train changed while being read; start again when it is complete")
        sizes = [shard.stats.num_records for shard in shards.values()]
        held_out = held_out_records(data, seed, sizes, groups)
        train = self._train_set(shards, held_out)
        if not data.is_held_out:
            return train, None
        return train, self._validation_set(shards, held_out)

    def _train_set(self, shards: dict[str, Shard], held_out: list[np.ndarray]) -> EncodedSet:
        """Build the train set of the records that are not `held_out`, [records] a source; mixed for a mixture."""
        rows = _rows(shards, [~is_out for is_out in held_out])
        for name, indices in zip(shards, rows, strict=True):
            if not len(indices):
                raise DataError(f"{name}: all its rows are held out or dropped; none of it is left to train on")
        sources = self.sources.values()
        weights, counts = [source.weight for source in sources], [source.count for source in sources]
        sample_counts = splits.sample_counts([len(indices) for indices in rows], weights, counts)
        order = self._row_order(rows, sample_counts)
        train = EncodedSet("train", list(shards.values()), order, is_weighted=True, fader=self.fader)
        report = self._report(train, held_out)
        if len(train) and not report.supervised_tokens:
            raise DataError("train has nothing to learn: the weight of every row is 0 (data.weight_column)")
        if self.data.mixture:
            _report_mixture(report, train, list(shards))
        if not len(train):
            raise DataError("train has no rows: the weights of the mixture leave none of its smallest source")
        return train

    def _validation_set(self, shards: dict[str, Shard], held_out: list[np.ndarray]) -> EncodedSet:
        """Build the validation set of the records that are held out of train."""
        rows = _rows(shards, held_out)
        order = self._row_order(rows, [len(indices) for indices in rows])
        validation = EncodedSet("validation", list(shards.values()), order)
        if not len(validation):
            raise DataError(
                f"every row of fold {self.data.fold} is dropped: set fewer folds (data.num_folds)"
                if self.data.num_folds is not None
                else "every row that data.validation_fraction holds out is dropped: set a larger fraction"
            )
        self._report(validation, [~is_out for is_out in held_out]).fold = describe_fold(self.data)
        self._check_answers(validation)
        return validation

    def _row_order(self, rows: list[np.ndarray], counts: list[int]) -> np.ndarray:
        """Return (shard, row) of a set's rows in their order: shard after shard, or mixed."""
        return splits.interleave(rows, counts, self.config.seed) if self.data.mixture else splits.concatenate(rows)

    def _streamed(self, sources: dict[str, Source]) -> StreamedSet:
        weights = {name: source.weight or source.count or 1 for name, source in self.sources.items()}
        encodings = {name: self._encoding(one.data, is_train=True) for name, one in self.sources.items()}
        train = StreamedSet(
            "train",
            [
                StreamSource(sources[name], encodings[name], weights[name] / sum(weights.values()), one.count)
                for name, one in self.sources.items()
            ],
            self.data.preprocessing_num_workers,
            self.data.max_dropped_fraction,
            self.fader,
        )
        self._report(train.first).is_streamed = True
        return train

    def _report(self, rows: EncodedSet, excluded: Sequence[np.ndarray] = ()) -> SplitReport:
        """Report on a set; `excluded` are the records of each source that are in another set, [records] a source."""
        report = self.reports[rows.name] = SplitReport()
        for i, shard in enumerate(rows.shards):
            report.rows_read += shard.stats.num_records - (int(excluded[i].sum()) if excluded else 0)
            report.drop([row for row in shard.stats.dropped if not (excluded and excluded[i][row.ordinal])])
        report.count(rows, self.encoder, self.new_tokens)
        return report

    def _check_dropped(self, name: str, shard: Shard, source: Source) -> None:
        """Raise DataError for a source without rows, or of which more are dropped than is allowed."""
        dropped, read = shard.stats.dropped, shard.stats.num_records
        if not read:
            raise DataError(f"{name} has no rows: {source.name}")
        if len(dropped) <= self.data.max_dropped_fraction * read and len(shard):
            return
        reasons = Counter(row.reason.replace("_", " ") for row in dropped)
        lines = [row.place if len(reasons) == 1 else f"{row.place}  {row.reason.replace('_', ' ')}" for row in dropped]
        allowed = f"more than data.max_dropped_fraction = {self.data.max_dropped_fraction:g}"
        raise DataError(
            f"{name}: {len(dropped)} of {read} rows would be dropped "
            f"({', '.join(f'{count} {reason}' for reason, count in reasons.items())}), "
            f"{allowed if len(shard) else 'so nothing would be left'}.\n"
            f"{listed(lines)}\n{self._against_dropping({row.reason for row in dropped})}"
        )

    def _against_dropping(self, reasons: set[str]) -> str:
        """Return what helps against dropping rows for these reasons, in a sentence."""
        remedies = []
        if reasons - {MALFORMED_ROW}:
            remedies.append(f"raise data.max_seq_length (now {self.lengths.sequence}), choose another data.overflow")
        if MALFORMED_ROW in reasons:
            what_is_wrong = "data.malformed_thoughts=error says what is wrong with each"
            remedies.append(
                f"mend the thoughts ({what_is_wrong}), train on them as they are (data.malformed_thoughts=keep)"
            )
        text = f"{', '.join(remedies)}, or allow a larger fraction."
        return text[0].upper() + text[1:]

    def _check_answers(self, rows: EncodedSet) -> None:
        """Raise DataError for rows whose answer can't be found, where answers are compared."""
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


def held_out_records(
    data: DataConfig, seed: int, sizes: Sequence[int], groups: Sequence[Sequence[str]] | None
) -> list[np.ndarray]:
    """Return which records of each source of train are in the validation set instead, [records] a source.

    `sizes` are the numbers of records, `groups` those of data.group_column, None without it.
    """
    if data.num_folds is None:
        return [splits.hold_out(size, data.held_out_fraction, seed) for size in sizes]
    if groups is None:
        return [folds == data.fold for folds in splits.assign_folds(sizes, data.num_folds, seed)]
    return [folds == data.fold for folds in splits.assign_group_folds(groups, data.num_folds, seed)]


def _rows(shards: Mapping[str, Shard], chosen: list[np.ndarray]) -> list[np.ndarray]:
    """Return the indices of each shard's rows whose record is chosen, [records] a shard."""
    return [np.flatnonzero(chosen[i][shard.ordinals]) for i, shard in enumerate(shards.values())]


def _report_mixture(report: SplitReport, train: EncodedSet, names: list[str]) -> None:
    """Add to the report of a mixture how many rows of each source it has, repeats and leaves out."""
    report.sources = {name: int((train.indices[:, 0] == i).sum()) for i, name in enumerate(names)}
    distinct = len(np.unique(train.indices, axis=0))
    report.rows_repeated = report.rows_kept - distinct
    if left_out := report.rows_read - report.rows_dropped.total() - distinct:
        report.rows_dropped["not_in_mixture"] = left_out


def _lengths(config: RunConfig, *, to_predict: bool) -> Lengths:
    data, is_encoder_decoder = config.data, config.model.type is ModelType.encoder_decoder
    target, overflow = data.max_target_length, data.overflow
    if to_predict:  # a causal model's prompt and EOS: trained prompts left room for a token of the answer too
        target = sys.maxsize
        overflow = Overflow.truncate_prompt if overflow is Overflow.truncate else overflow
    return Lengths(data.max_seq_length, target if is_encoder_decoder else None, overflow)


def evaluated_sources(data: DataConfig, name: str) -> list[Source]:
    """Return where the rows of a validation or test set are read from: those of train where it is held out of it."""
    files = data.validation_sets() | data.test_sets()
    if name in files:
        return [file_source(files[name], data.limit)]
    if data.has_hub_validation:
        return [_hub_source(data, str(data.validation_split))]
    return [train_source(source.data) for source in data.train_sources().values()]


def train_source(data: DataConfig) -> Source:
    """Return where the records of a source of train are read from."""
    if data.train_files:
        return file_source(data.train_files, data.limit)
    return _hub_source(data, data.train_split or "train", streaming=data.streaming)


def _hub_source(data: DataConfig, split: str, *, streaming: bool = False) -> HubSource:
    return HubSource(str(data.dataset_name), data.dataset_config_name, split, data.revision, streaming, data.limit)
