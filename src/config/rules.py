"""Rules across sections and against the file system: checks of a typed config, each giving problems. No torch here.

A rule's parameters name the sections it reads; the gate calls it when these sections are good in themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from src.config.problems import Problem
from src.config.schema import (
    PLACEHOLDER,
    CheckpointConfig,
    DataConfig,
    Device,
    Dtype,
    EvaluationConfig,
    GenerationConfig,
    InitMethod,
    MixedPrecision,
    MlflowConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    Thoughts,
    TokensConfig,
    TrackingConfig,
    TrainingConfig,
    WarmupScheduleConfig,
    Weights,
)

ROLES = {"prompt_completion": ("prompt", "completion")}
"""What a format calls the parts of a row, in data.columns and in templates."""


def a_source_is_given(data: DataConfig) -> Iterator[Problem]:
    if not data.train_files and not data.dataset_name:
        yield Problem("data.train_files", "no training data: give data.train_files=[FILE] or data.dataset_name=HUB_ID")


def files_exist(data: DataConfig) -> Iterator[Problem]:
    for name, files in data.files().items():
        key = "train_files" if name == "train" else "test_files" if name in data.test_sets() else "validation_files"
        for file in files:
            if Path(file).is_dir():
                yield Problem(f"data.{key}", "a folder, not a file", file)
            elif not Path(file).is_file():
                yield Problem(f"data.{key}", f"no such file (looked in {Path.cwd()})", file)


def set_names_are_plain_and_differ(data: DataConfig) -> Iterator[Problem]:
    for key, names in (("validation_files", data.validation_sets()), ("test_files", data.test_sets())):
        for name in names:
            if not re.fullmatch(r"[\w.-]+", name):
                yield Problem(f"data.{key}", "a set's name may have letters, digits, '_', '-' and '.'", name)
            if name == "train":
                yield Problem(f"data.{key}", "a set can't be called train", name)
    for name in set(data.validation_names()) & set(data.test_sets()):
        yield Problem("data.test_files", "a validation set has this name already", name)


def columns_and_templates_fit_the_format(data: DataConfig) -> Iterator[Problem]:
    roles = ROLES[data.format.value]
    for role in data.columns.keys() - set(roles):
        yield Problem(f"data.columns.{role}", f"format {data.format.value} has {', '.join(roles)}", data.columns[role])
    for role in set(roles) - data.columns.keys():
        yield Problem("data.columns", f"format {data.format.value} needs a column for {role}", data.columns)
    for key in ("prompt_template", "completion_template"):
        template = getattr(data, key)
        for name in PLACEHOLDER.findall(template or ""):
            if name not in roles:
                allowed = ", ".join(f"{{{role}}}" for role in roles)
                yield Problem(f"data.{key}", f"unknown placeholder {{{name}}}; there are {allowed}", template)


def templates_hold_their_own_part(data: DataConfig) -> Iterator[Problem]:
    for key, own in (("prompt_template", "prompt"), ("completion_template", "completion")):
        template = getattr(data, key)
        if template is not None and own not in PLACEHOLDER.findall(template):
            yield Problem(f"data.{key}", f"without {{{own}}} every row would be the same", template)
    if "completion" in PLACEHOLDER.findall(data.prompt_template or ""):
        yield Problem(
            "data.prompt_template", "{completion} in the prompt would give the answer away", data.prompt_template
        )


def patterns_are_regular_expressions(data: DataConfig) -> Iterator[Problem]:
    for key in ("thought_pattern", "answer_pattern"):
        pattern = getattr(data, key)
        if pattern is None:
            continue
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            yield Problem(f"data.{key}", f"not a regular expression: {error}", pattern)
        else:
            if groups < 1:
                yield Problem(f"data.{key}", "needs a group: (…) around what it is looking for", pattern)


def kept_thoughts_have_tags(data: DataConfig, tokens: TokensConfig) -> Iterator[Problem]:
    if data.thoughts is Thoughts.keep:
        if tokens.thought_open is None:
            yield Problem("data.thoughts", "nothing to write thoughts with: tokens.thought_open is null", "keep")
        if data.thought_pattern is None:
            yield Problem("data.thoughts", "nothing to find thoughts with: data.thought_pattern is null", "keep")


def thought_tags_come_in_pairs(tokens: TokensConfig) -> Iterator[Problem]:
    if (tokens.thought_open is None) != (tokens.thought_close is None):
        yield Problem("tokens.thought_close", "thought_open and thought_close come together", tokens.thought_close)
    elif tokens.thought_open is not None and tokens.thought_open == tokens.thought_close:
        yield Problem(
            "tokens.thought_close", "the same as thought_open: no thought could be told", tokens.thought_close
        )


def tracker_can_be_reached_by_some_scheme(tracking: TrackingConfig) -> Iterator[Problem]:
    schemes = ("sqlite:", "postgresql", "mysql", "mssql", "http:", "https:", "databricks")
    if isinstance(tracking, MlflowConfig) and not tracking.uri.startswith(schemes):
        reason = f"not an address that MLflow knows; it begins with one of {' '.join(schemes)}"
        yield Problem("tracking.uri", reason, tracking.uri)


def new_tokens_are_distinct(tokens: TokensConfig) -> Iterator[Problem]:
    new = tokens.additional_special_tokens
    for token in sorted({t for t in new if new.count(t) > 1}):
        yield Problem("tokens.additional_special_tokens", "given twice", token)
    for token in new:
        if not token.strip() or token != token.strip():
            yield Problem("tokens.additional_special_tokens", "a token may not be empty or begin or end blank", token)


def new_tokens_can_be_initialised(tokens: TokensConfig) -> Iterator[Problem]:
    new, init = tokens.additional_special_tokens, tokens.init
    if init.method is InitMethod.text and new:
        if len(init.text) not in (1, len(new)):
            yield Problem("tokens.init.text", f"one text for all tokens, or one for each of the {len(new)}", init.text)
        if not all(init.text):
            yield Problem("tokens.init.text", "a text may not be empty", init.text)
    if init.method is InitMethod.description:
        for token in new:
            if not init.descriptions.get(token):
                yield Problem("tokens.init.descriptions", f"no description of {token}", init.descriptions)


def checkpoint_can_be_loaded(model: ModelConfig) -> Iterator[Problem]:
    folder = Path(model.checkpoint)
    if not folder.exists():
        if folder.is_absolute() or model.checkpoint.startswith((".", "~")) or Path(folder.parts[0]).is_dir():
            yield Problem("model.checkpoint", f"no such folder (looked in {Path.cwd()})", model.checkpoint)
        return
    if not folder.is_dir():
        yield Problem("model.checkpoint", "a file; a checkpoint is a folder or a hub id", model.checkpoint)
    elif not (folder / "config.json").is_file():
        yield Problem("model.checkpoint", "a folder without config.json: not a model", model.checkpoint)
    elif model.weights is Weights.pretrained and not any(
        (folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        reason = "a folder without weights (model.safetensors); model.weights=random starts without"
        yield Problem("model.checkpoint", reason, model.checkpoint)


def fp16_keeps_float32_weights(training: TrainingConfig, model: ModelConfig) -> Iterator[Problem]:
    if training.mixed_precision is MixedPrecision.fp16 and model.dtype in (Dtype.float16, Dtype.bfloat16):
        reason = "fp16 mixed precision scales gradients of float32 weights: model.dtype=float32"
        yield Problem("model.dtype", reason, model.dtype.value)


def precision_fits_the_device(training: TrainingConfig, runtime: RuntimeConfig) -> Iterator[Problem]:
    if training.mixed_precision is MixedPrecision.fp16 and runtime.device is Device.cpu:
        yield Problem("training.mixed_precision", "fp16 needs a GPU; on a CPU use no or bf16", "fp16")


def warmup_ends_before_the_run(scheduler: SchedulerConfig, training: TrainingConfig) -> Iterator[Problem]:
    warmup = scheduler.warmup_steps if isinstance(scheduler, WarmupScheduleConfig) else None
    if warmup and training.max_train_steps and warmup >= training.max_train_steps:
        reason = f"warm-up would never end: training.max_train_steps is {training.max_train_steps}"
        yield Problem("scheduler.warmup_steps", reason, warmup)


def generation_lengths_fit(generation: GenerationConfig) -> Iterator[Problem]:
    if generation.min_new_tokens > generation.max_new_tokens:
        reason = f"more than generation.max_new_tokens, {generation.max_new_tokens}"
        yield Problem("generation.min_new_tokens", reason, generation.min_new_tokens)


def best_model_can_be_told(
    checkpoint: CheckpointConfig, data: DataConfig, evaluation: EvaluationConfig
) -> Iterator[Problem]:
    if not checkpoint.load_best_model_at_end:
        return
    scores = ["loss", "perplexity"]
    scores += [m.value for m in (data.metrics if evaluation.metrics is None else evaluation.metrics)]
    sets = data.validation_names()
    allowed = [f"eval/{name}/{score}" for name in sets for score in scores]
    if checkpoint.metric_for_best_model not in allowed:
        reason = f"no evaluation gives this; {'one of ' + ', '.join(allowed) if allowed else 'no validation set'}"
        yield Problem("checkpoint.metric_for_best_model", reason, checkpoint.metric_for_best_model)


RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    a_source_is_given,
    files_exist,
    set_names_are_plain_and_differ,
    columns_and_templates_fit_the_format,
    templates_hold_their_own_part,
    patterns_are_regular_expressions,
    tracker_can_be_reached_by_some_scheme,
    kept_thoughts_have_tags,
    thought_tags_come_in_pairs,
    new_tokens_are_distinct,
    new_tokens_can_be_initialised,
    checkpoint_can_be_loaded,
    fp16_keeps_float32_weights,
    precision_fits_the_device,
    warmup_ends_before_the_run,
    generation_lengths_fit,
    best_model_can_be_told,
)
