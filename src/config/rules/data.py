"""Rules of `data`, also against the file system."""

import re
from collections.abc import Iterator

from src.config.files import problems_of
from src.config.formats import broken_format, declared_formats, roles
from src.config.problems import Problem
from src.config.rules.rule import Problems, applies_to
from src.config.schema import PLACEHOLDER, DataConfig
from src.config.schema.fields import READING_ROWS
from src.util import did_you_mean

PLAIN_NAME = re.compile(r"(?!\.+$)[\w.-]{1,60}")
PLAIN = "letters, digits, '_', '-' and '.' (not '.' alone), at most 60 of them"
"""Names that files and metrics are called after; a letter has up to four bytes, and file systems take 255."""


@applies_to("training")
def training_rows_are_given(data: DataConfig) -> Problems:
    if not data.has_train:
        yield Problem("data.train_files", "no training data: give data.train_files=[FILE] or data.dataset_name=HUB_ID")


@applies_to("run")
def a_source_is_given_once(data: DataConfig) -> Problems:
    if data.train_files and data.mixture:
        reason = "not together with data.train_files: name them as a source of the mixture"
        yield Problem("data.mixture", reason, has_value=False)


@applies_to("run", *READING_ROWS)
def files_can_be_found(data: DataConfig) -> Problems:
    sets = {"train_files": {"train": data.train_files or []}, "validation_files": data.validation_sets()}
    for key, lists in (sets | {"test_files": data.test_sets()}).items():
        for patterns in lists.values():
            for pattern, reason in problems_of(patterns):
                yield Problem(f"data.{key}", reason, pattern)


@applies_to("run")
def mixture_is_whole(data: DataConfig) -> Problems:
    sources = data.mixture or {}
    for name, given in sources.items():
        key = f"data.mixture.{name}"
        if not PLAIN_NAME.fullmatch(name):
            yield Problem("data.mixture", f"a source's name may have {PLAIN}", name)
        if not given.get("train_files") and not given.get("dataset_name"):
            yield Problem(key, "no rows: give it train_files or dataset_name", given)
        for pattern, reason in problems_of(given.get("train_files") or []):
            yield Problem(f"{key}.train_files", reason, pattern)
    weighted, counted = (
        {name for name, given in sources.items() if given.get(key) is not None} for key in ("weight", "count")
    )
    if weighted and weighted != sources.keys():
        yield Problem("data.mixture", "a weight for each source, or for none", sorted(sources.keys() - weighted))
    if weighted and counted:
        yield Problem("data.mixture", "weights (proportions) or counts (rows), not both", data.mixture)


@applies_to("run", *READING_ROWS)
def set_names_are_plain(data: DataConfig) -> Problems:
    for key, names in (("validation_files", data.validation_sets()), ("test_files", data.test_sets())):
        for name in names:
            if not PLAIN_NAME.fullmatch(name):
                yield Problem(f"data.{key}", f"a set's name may have {PLAIN}", name)
            if name == "train":
                yield Problem(f"data.{key}", "a set can't be called train", name)


@applies_to("run")
def validation_and_test_sets_differ(data: DataConfig) -> Problems:
    for name in set(data.validation_names()) & set(data.test_sets()):
        yield Problem("data.test_files", "a validation set has this name already", name)


def sources(data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """Yield the key and settings of everything that rows are read by: data itself, and each source of a mixture."""
    yield "data", data
    if data.mixture and not list(mixture_is_whole(data)):
        yield from ((f"data.mixture.{name}", source.data) for name, source in data.train_sources().items())


@applies_to("run", *READING_ROWS)
def formats_are_known(data: DataConfig) -> Problems:
    known = list(declared_formats())
    for key, source in sources(data):
        if broken := broken_format(source.format):
            yield Problem(f"{key}.format", f"the file that declares it can't be read: {broken}", source.format)
        elif source.format not in known:
            reason = f"not one of {', '.join(known)}{did_you_mean(source.format, known)}"
            yield Problem(f"{key}.format", reason, source.format)


@applies_to("run", *READING_ROWS)
def columns_and_templates_fit_the_format(data: DataConfig) -> Problems:
    for key, source in sources(data):
        if source.format not in declared_formats():
            continue
        parts = roles(source.format)
        for role in source.columns.keys() - set(parts):
            reason = f"format {source.format} has {', '.join(parts)}"
            yield Problem(f"{key}.columns.{role}", reason, source.columns[role])
        for role in set(parts) - source.columns.keys():
            yield Problem(f"{key}.columns", f"format {source.format} needs a column for {role}", source.columns)
        for name in ("prompt_template", "completion_template"):
            yield from _template_problems(f"{key}.{name}", getattr(source, name), name, parts, source.format)


def _template_problems(key: str, template: str | None, name: str, parts: tuple[str, ...], format_name: str) -> Problems:
    if template is None:
        return
    if len(parts) == 1:
        yield Problem(key, f"format {format_name} takes no template", template)
        return
    named = PLACEHOLDER.findall(template)
    own = parts[0] if name == "prompt_template" else parts[-1]
    for part in named:
        if part not in parts:
            allowed = ", ".join(f"{{{role}}}" for role in parts)
            yield Problem(key, f"unknown placeholder {{{part}}}; there are {allowed}", template)
    if own not in named:
        yield Problem(key, f"without {{{own}}} every row would be the same", template)
    if name == "prompt_template" and parts[-1] in named:
        yield Problem(key, f"{{{parts[-1]}}} in the prompt would give the answer away", template)


@applies_to("run", *READING_ROWS)
def cleaning_is_for_dialogues(data: DataConfig) -> Problems:
    for key, source in sources(data):
        if source.clean_dialogue and source.format != "dialogue_summary":
            yield Problem(f"{key}.clean_dialogue", "only format dialogue_summary cleans its dialogue", True)


@applies_to("run", *READING_ROWS)
def text_is_no_chat(data: DataConfig) -> Problems:
    for key, source in sources(data):
        if source.format == "text" and source.system_prompt is not None:
            yield Problem(f"{key}.system_prompt", "format text is no chat", source.system_prompt)


@applies_to("run")
def folds_can_be_made(data: DataConfig) -> Problems:
    if data.num_folds is None:
        for key in ("fold", "group_column"):
            if (given := getattr(data, key)) is not None:
                yield Problem(f"data.{key}", "is for cross-validation: needs data.num_folds", given)
        return
    last = data.num_folds - 1
    if data.fold is None:
        reason = f"which one is the validation set? data.fold=0 … {last}, or all of them with -m sweep=kfold"
        yield Problem("data.num_folds", reason, data.num_folds)
    elif data.fold > last:
        yield Problem("data.fold", f"counts from 0 to data.num_folds - 1, which is {last}", data.fold)
    if data.streaming:
        yield Problem("data.num_folds", "can't divide the rows of a stream: data.streaming=false", data.num_folds)


@applies_to("predict")
def something_is_predicted(data: DataConfig) -> Problems:
    if not data.test_sets():
        yield Problem("data.test_files", "nothing to predict: give data.test_files=[FILE]", data.test_files)
    if "metrics" in data.test_sets():
        yield Problem("data.test_files", "metrics.json is written next to the sets; choose another name", "metrics")


@applies_to("predict")
def rows_have_prompts(data: DataConfig) -> Problems:
    if data.format == "text":
        how = "data.format=prompt_completion 'data.columns={prompt: text, completion: answer}'"
        yield Problem("data.format", f"plain text has no prompt; to let the model continue it: {how}", data.format)
