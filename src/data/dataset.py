"""Sources, formats and encoding in one go: from a configuration to sets of encoded rows and the account of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.config.schema import DataConfig, Metric, Overflow, RunConfig
from src.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from src.data.formats import FORMATS, BadRow, Example, thought_form
from src.data.report import CHECK_ROWS, SplitReport
from src.data.sources import Record, file_hash, read_files, read_hub
from src.errors import DataError, listed

ENCODE_ROWS = 2000  # rows encoded at once: enough to fill the tokenizer's threads, little memory


class EncodedSet:
    """The encoded rows of one set, flat in memory, with the examples they came from.

    Row i is `set[i]`: input_ids and labels, [length] each.
    """

    def __init__(self, name: str, rows: Sequence[EncodedRow], examples: Sequence[Example], places: Sequence[str]):
        self.name = name
        self.examples = list(examples)
        self.places = list(places)
        lengths = [len(row.input_ids) for row in rows]
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        empty = np.zeros(0, dtype=np.int32)
        self._input_ids = np.concatenate([row.input_ids for row in rows]) if rows else empty
        self._labels = np.concatenate([row.labels for row in rows]) if rows else empty
        self._prompt_lengths = [row.prompt_length for row in rows]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self._offsets[index], self._offsets[index + 1]
        return self._input_ids[start:stop], self._labels[start:stop]

    def prompt_ids(self, index: int) -> list[int]:
        """Give the ids that generation is fed for a row: exactly those before its completion in training."""
        return self[index][0][: self._prompt_lengths[index]].tolist()

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_supervised(self) -> int:
        return int((self._labels != IGNORE_INDEX).sum())

    def count(self, token_id: int) -> tuple[int, int]:
        """Count how often a token is fed and how often it is supervised."""
        return int((self._input_ids == token_id).sum()), int((self._labels == token_id).sum())

    def digest(self) -> str:
        """Give a hash of all ids and labels, 32 hex digits."""
        hashed = hashlib.sha256()
        for array in (self._offsets, self._input_ids, self._labels):
            hashed.update(array.tobytes())
        return hashed.hexdigest()[:32]


@dataclass
class Data:
    """All sets of a run. `encoder` is the one that made them, for generation to use."""

    train: EncodedSet
    validation: dict[str, EncodedSet]
    test: dict[str, EncodedSet]
    reports: dict[str, SplitReport]
    encoder: Encoder

    @property
    def for_samples(self) -> EncodedSet:
        """The set whose first rows are generated as samples: one that is not trained on, where there is one."""
        return next(iter([*self.validation.values(), *self.test.values(), self.train]))


def file_hashes(data: DataConfig) -> dict[str, str]:
    """Give the SHA-256 of every data file that the configuration names."""
    return {file: file_hash(file) for files in data.files().values() for file in files}


def build_data(config: RunConfig, tokenizer: Any) -> Data:
    """Read, format and encode every set.

    Raises:
        DataError: where rows can't be read or are malformed, or too few are left.
        TokenError: where the tokenizer can't be used.
    """
    encoder = Encoder(tokenizer)
    builder = _Builder(config, encoder, tokenizer)
    train, validation, test = read_splits(config.data, config.seed)
    return Data(
        train=builder.build("train", train),
        validation={name: builder.build(name, records) for name, records in validation.items()},
        test={name: builder.build(name, records) for name, records in test.items()},
        reports=builder.reports,
        encoder=encoder,
    )


def read_splits(data: DataConfig, seed: int) -> tuple[list[Record], dict[str, list[Record]], dict[str, list[Record]]]:
    """Read train, validation and test rows; without a validation set, hold out `validation_fraction` of train."""
    validation = {name: read_files(files, data.limit) for name, files in data.validation_sets().items()}
    test = {name: read_files(files, data.limit) for name, files in data.test_sets().items()}
    if data.train_files:
        train = read_files(data.train_files)
    else:
        hub = (str(data.dataset_name), data.dataset_config_name)
        train = read_hub(*hub, data.train_split or "train", data.revision)
        if not validation and data.validation_split:
            validation = {"validation": read_hub(*hub, data.validation_split, data.revision, data.limit)}
    if not validation and data.validation_fraction > 0:
        train, held_out = hold_out(train, data.validation_fraction, seed)
        validation = {"validation": held_out[: data.limit]}
    return train[: data.limit], validation, test


def hold_out(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split off a share of the rows by seed, at least one where there are two; both keep the file's order."""
    num_held_out = min(max(1, round(len(records) * fraction)), len(records) - 1) if len(records) > 1 else 0
    chosen = set(np.random.default_rng([seed, 0x5EED]).permutation(len(records))[:num_held_out].tolist())
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )


class _Builder:
    """What formatting and encoding need for every set alike."""

    def __init__(self, config: RunConfig, encoder: Encoder, tokenizer: Any) -> None:
        self.data = config.data
        self.thoughts = thought_form(config)
        self.encoder = encoder
        self.new_tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in config.tokens.additional_special_tokens}
        answers = config.data.answer_pattern if Metric.exact_match in config.metrics else None
        self.answer_pattern = re.compile(answers, re.DOTALL) if answers else None
        self.reports: dict[str, SplitReport] = {}

    def build(self, name: str, records: list[Record]) -> EncodedSet:
        report = self.reports[name] = SplitReport(rows_read=len(records))
        if not records:
            raise DataError(
                f"{name} has no rows: {', '.join(self.data.files().get(name, [str(self.data.dataset_name)]))}"
            )
        examples = self._format(records, with_answers=name != "train")
        rows: list[EncodedRow] = []
        kept: list[int] = []
        control_before = self.encoder.num_control_tokens_as_text
        for index, row in enumerate(self._encode(examples)):
            reason = _reason_to_drop(row)
            if reason or row is None:
                report.rows_dropped[reason] += 1
                continue
            rows.append(row)
            kept.append(index)
        self._check_dropped(name, records, report, set(kept))
        report.rows_changed_by_tokenizer = self._count_changed(rows, [examples[i] for i in kept])
        encoded = EncodedSet(name, rows, [examples[i] for i in kept], [records[i].place for i in kept])
        report.rows_kept = len(rows)
        report.rows_truncated = sum(row.truncated for row in rows)
        report.tokens, report.supervised_tokens = encoded.num_tokens, encoded.num_supervised
        report.control_tokens_as_text = self.encoder.num_control_tokens_as_text - control_before
        report.new_tokens = {
            token: dict(zip(("fed", "supervised"), encoded.count(token_id), strict=True))
            for token, token_id in self.new_tokens.items()
        }
        report.digest = encoded.digest()
        return encoded

    def _format(self, records: list[Record], *, with_answers: bool) -> list[Example]:
        to_example = FORMATS[self.data.format.value]
        examples, bad = [], []
        for record in records:
            try:
                example = to_example(record.fields, self.data, self.thoughts)
                if with_answers and self.answer_pattern and not self.answer_pattern.search(example.reference):
                    raise BadRow(f"no answer in it: data.answer_pattern {self.answer_pattern.pattern!r} finds nothing")
                examples.append(example)
            except BadRow as problem:
                bad.append(f"{record.place}  {problem}")
        if bad:
            raise DataError(f"{len(bad)} row{'s' if len(bad) > 1 else ''} can't be used:\n{listed(bad)}")
        return examples

    def _encode(self, examples: list[Example]) -> list[EncodedRow | None]:
        rows: list[EncodedRow | None] = []
        for start in range(0, len(examples), ENCODE_ROWS):
            some = examples[start : start + ENCODE_ROWS]
            rows += self.encoder.encode_rows(
                [example.prompt for example in some],
                [example.completion for example in some],
                self.data.max_seq_length,
                self.data.overflow,
            )
        return rows

    def _count_changed(self, rows: list[EncodedRow], examples: list[Example]) -> int:
        """Count, among the first rows that were not cut, those whose ids do not decode to their text."""
        pairs = [(row, one) for row, one in zip(rows, examples, strict=True) if not row.truncated][:CHECK_ROWS]
        return sum(self.encoder.decode(row.input_ids.tolist()) != one.prompt + one.completion for row, one in pairs)

    def _check_dropped(self, name: str, records: list[Record], report: SplitReport, kept: set[int]) -> None:
        dropped = [record.place for i, record in enumerate(records) if i not in kept]
        if not dropped:
            return
        limit = self.data.max_seq_length
        if self.data.overflow is Overflow.error:
            raise DataError(
                f"{name}: {len(dropped)} rows are longer than data.max_seq_length = {limit} "
                f"and data.overflow = error:\n{listed(dropped)}"
            )
        if len(dropped) > self.data.max_dropped_fraction * len(records) or not kept:
            reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.rows_dropped.items())
            raise DataError(
                f"{name}: {len(dropped)} of {len(records)} rows would be dropped ({reasons}), more than "
                f"data.max_dropped_fraction = {self.data.max_dropped_fraction:g}.\n{listed(dropped)}\n"
                f"Raise data.max_seq_length (now {limit}), choose another data.overflow, or allow a larger fraction."
            )


def _reason_to_drop(row: EncodedRow | None) -> str:
    if row is None:
        return "too_long"
    return "" if (row.labels != IGNORE_INDEX).any() else "no_supervised_token"
