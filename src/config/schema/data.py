"""conf/data: where rows come from, how they become prompt and completion, how long they may be."""

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from src.config.schema import checks
from src.config.schema.checks import AT_LEAST_ONE, AT_LEAST_TWO, NOT_EMPTY, PATH, STRINGS, Check
from src.config.schema.fields import BY_OUTCOME, READING_ROWS, DottedConfig, key, key_info

SupervisedTurns = StrEnum("SupervisedTurns", "all last")
Thoughts = StrEnum("Thoughts", "keep drop")
Malformed = StrEnum("Malformed", "error drop keep")
Overflow = StrEnum("Overflow", "truncate truncate_prompt drop error")
Batching = StrEnum("Batching", "auto padded length_grouped packed")
Side = StrEnum("Side", "left right")


def _is_named(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Return whether a value is a mapping from at least one name to values that pass a test."""
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and holds(v) for k, v in value.items())


FILES = Check("a file, a glob or a folder, or a list of them", lambda v: v is None or STRINGS.holds(v))
FILES_OR_SETS = Check(
    "a file, a glob or a folder, a list of them, or a mapping from a set's name to such",
    lambda v: FILES.holds(v) or _is_named(v, STRINGS.holds),
)
SOURCES = Check(
    "a mapping from a source's name to its keys",
    lambda v: v is None or _is_named(v, lambda source: isinstance(source, dict)),
)
SCHEDULE = Check("a mapping of tokens_per_epoch, side and smoothing", lambda v: v is None or isinstance(v, dict))
OTHER_ORDER = "the rows come in another order"
_selection_key = partial(key, resume=BY_OUTCOME, shapes_rows=False)
"""Declares a key that decides which rows there are or how they are used, but not how a row is encoded."""


def is_packed(config: DottedConfig) -> bool:
    return config.get("data.batching") == Batching.packed.name


def is_grouped_by_length(config: DottedConfig) -> bool:
    return config.get("data.batching") == Batching.length_grouped.name


@dataclass
class ThoughtSchedule:
    """How thoughts shrink: in epoch e, from 0, each lacks its first (or last) e x tokens_per_epoch tokens, and more at
    random: `smoothing` is the chance of each further one.
    """

    tokens_per_epoch: int = key(AT_LEAST_ONE)
    side: Side = key(default=Side.left)
    smoothing: float = key(checks.BELOW_ONE, 0.0)


@dataclass
class DataConfig:
    """conf/data: where rows come from, how they become prompt and completion, how long they may be."""

    format: str = key(resume=BY_OUTCOME, per_source=True)
    train_files: Any = _selection_key(FILES, per_source=True)
    validation_files: Any = _selection_key(FILES_OR_SETS, read_by=("evaluate", "ensemble"))
    test_files: Any = _selection_key(FILES_OR_SETS, read_by=READING_ROWS)
    dataset_name: str | None = _selection_key(NOT_EMPTY, per_source=True)
    dataset_config_name: str | None = _selection_key(NOT_EMPTY, per_source=True)
    train_split: str | None = _selection_key(NOT_EMPTY, per_source=True)
    validation_split: str | None = _selection_key(NOT_EMPTY)
    revision: str | None = _selection_key(NOT_EMPTY, per_source=True)
    mixture: Any = _selection_key(SOURCES, each="SourceConfig")
    columns: dict[str, str] = key(resume=BY_OUTCOME, per_source=True)
    prompt_template: str | None = key(resume=BY_OUTCOME, per_source=True)
    completion_template: str | None = key(resume=BY_OUTCOME, per_source=True)
    system_prompt: str | None = key(resume=BY_OUTCOME, per_source=True)
    supervised_turns: SupervisedTurns = key(resume=BY_OUTCOME, per_source=True)
    clean_dialogue: bool = key(resume=BY_OUTCOME, per_source=True)
    thoughts: Thoughts | None = key(resume=BY_OUTCOME)
    thought_pattern: str | None = key(resume=BY_OUTCOME, per_source=True)
    answer_pattern: str | None = _selection_key(read_by=READING_ROWS)
    metrics: list[str] = _selection_key(checks.METRIC_NAMES, read_by=READING_ROWS)
    max_seq_length: int = key(
        AT_LEAST_TWO,
        why="packed sequences of another length",
        counts_where=is_packed,  # elsewhere the rows are compared
        reorders=is_packed,
        cache_key_field="lengths",
    )
    max_target_length: int = key(AT_LEAST_TWO, resume=BY_OUTCOME, cache_key_field="lengths")
    overflow: Overflow = key(resume=BY_OUTCOME, cache_key_field="lengths")
    max_dropped_fraction: float = _selection_key(checks.FRACTION, read_by=READING_ROWS)
    batching: Batching = key(why=OTHER_ORDER, reorders=True, shapes_rows=False)
    preprocessing_num_workers: int = _selection_key(checks.PROCESSES, read_by=READING_ROWS)
    streaming: bool = key(why=OTHER_ORDER, reorders=True, shapes_rows=False)
    cache_dir: str | None = _selection_key(PATH, read_by=READING_ROWS)
    limit: int | None = _selection_key(AT_LEAST_ONE, read_by=READING_ROWS)
    validation_fraction: float = _selection_key(checks.BELOW_ONE)
    num_folds: int | None = _selection_key(AT_LEAST_TWO)
    fold: int | None = _selection_key(checks.COUNT)
    group_column: str | None = _selection_key(NOT_EMPTY)
    weight_column: str | None = key(NOT_EMPTY, None, resume=BY_OUTCOME, per_source=True)
    thought_dropout: float = _selection_key(checks.FRACTION, 0.0)
    thought_schedule: Any = _selection_key(SCHEDULE, None, form="ThoughtSchedule")
    malformed_thoughts: Malformed = key(default=Malformed.keep, resume=BY_OUTCOME, per_source=True)

    def train_sources(self) -> dict[str, "TrainSource"]:
        """Return the sources of the train set by name: those of the mixture, or a single one called train."""
        if self.mixture:
            return {name: _mixed_source(self, given) for name, given in self.mixture.items()}
        return {"train": TrainSource(self, None, None)}

    def files(self) -> dict[str, list[str]]:
        """Return the files of every set that has some, as they were named: set name -> files, globs, folders.

        Sets that a fold of train replaces are left out: nothing reads them.
        """
        sources = [source.data.train_files or [] for source in self.train_sources().values()]
        train = [file for files in sources for file in files]
        return ({"train": train} if train else {}) | self.validation_sets() | self.test_sets()

    def validation_sets(self) -> dict[str, list[str]]:
        """Return the files of each validation set that is read from files."""
        return {} if self.num_folds is not None else named_sets(self.validation_files, "validation")

    def test_sets(self) -> dict[str, list[str]]:
        """Return the files of each test set that is read from files."""
        return named_sets(self.test_files, "test")

    def validation_names(self) -> list[str]:
        """Return the names of all validation sets, also of one from the hub or held out of train."""
        has_another = self.has_hub_validation or self.num_folds is not None or self.held_out_fraction
        return list(self.validation_sets()) or (["validation"] if has_another else [])

    @property
    def has_hub_validation(self) -> bool:
        """Whether the validation set is another split of the hub data set that train is from."""
        from_hub = bool(self.dataset_name) and not self.train_files and not self.mixture
        has_another = self.num_folds is not None or bool(self.validation_sets())
        return from_hub and bool(self.validation_split) and not has_another

    @property
    def held_out_fraction(self) -> float:
        """The share of train that is held out for validation: 0 where there is another validation set."""
        has_another = self.num_folds is not None or bool(self.validation_sets()) or self.has_hub_validation
        return 0.0 if has_another else self.validation_fraction

    @property
    def has_weights(self) -> bool:
        """Whether rows that are trained on have weights of their own."""
        return any(source.data.weight_column is not None for source in self.train_sources().values())

    @property
    def has_train(self) -> bool:
        """Whether there are rows to train on."""
        return bool(self.train_files or self.dataset_name or self.mixture)

    @property
    def is_held_out(self) -> bool:
        """Whether the validation set is a part of train: a fold, or a share of its rows."""
        return self.num_folds is not None or bool(self.held_out_fraction)


@dataclass(frozen=True)
class TrainSource:
    """One source of the train set: its own settings, and its share of a mixture.

    `weight` is its proportion, `count` how many rows of it are taken; neither means all of its rows.
    """

    data: DataConfig
    weight: float | None
    count: int | None


_PER_SOURCE = {one.name: key_info(one) for one in dataclasses.fields(DataConfig) if key_info(one).per_source}
_TYPES = typing.get_type_hints(DataConfig)
NEVER_NULL = [n for n in _PER_SOURCE if _TYPES[n] is not Any and type(None) not in typing.get_args(_TYPES[n])]
"""Keys that may not be null in data; in a source null stands for the value of data."""
_WEIGHT = key(checks.POSITIVE, None, text="its proportion of the mixture, in which no row comes twice")
_COUNT = key(AT_LEAST_ONE, None, text="how many of its rows are taken; above what it has, some twice")
SourceConfig = dataclasses.make_dataclass(
    "SourceConfig",
    [
        *(
            (name, _TYPES[name] | None if name in NEVER_NULL else _TYPES[name], key(info.check, None))
            for name, info in _PER_SOURCE.items()
        ),
        ("weight", float | None, _WEIGHT),
        ("count", int | None, _COUNT),
    ],
)
"""A source of a mixture: keys of data that it may have for itself (null: data's own), and its share."""


def _mixed_source(data: DataConfig, given: dict[str, Any]) -> TrainSource:
    """Return a source of a mixture: data's own settings with the source's on top.

    A null of the source's means none where data may have none, and data's own value elsewhere.
    """
    own = {key: value for key, value in given.items() if value is not None or key not in NEVER_NULL}
    weight, count = own.pop("weight", None), own.pop("count", None)
    alone = {"mixture": None, "train_files": None, "dataset_name": None}
    return TrainSource(dataclasses.replace(data, **(alone | own)), weight, count)


PLACEHOLDER = re.compile(r"\{(\w+)\}")
"""Matches the place of a part of the row in a template: {prompt}."""


def named_sets(files: Any, unnamed: str) -> dict[str, list[str]]:
    """Return validation_files or test_files as set name -> files; a bare list is one set called `unnamed`."""
    if not files:
        return {}
    return dict(files) if isinstance(files, dict) else {unnamed: list(files)}
