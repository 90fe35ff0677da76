"""Rules across sections and against the file system: checks of a typed config, each giving problems. No torch here.

A rule's parameters name the sections it reads; the gate calls it when these sections are good in themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from src.config.deepspeed import GATHER
from src.config.files import problems_of
from src.config.formats import broken_format, declared_formats, roles
from src.config.places import CHECKPOINTS, steps_in
from src.config.problems import Problem
from src.config.schema import (
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULES,
    PLACEHOLDER,
    AdapterConfig,
    Attention,
    Batching,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    Device,
    Dtype,
    EvaluationConfig,
    ExportConfig,
    GenerationConfig,
    InitMethod,
    LoraConfig,
    LossConfig,
    MixedPrecision,
    MlflowConfig,
    ModelConfig,
    ModelType,
    NoAdapterConfig,
    OptimizerConfig,
    QuantizationConfig,
    RuntimeConfig,
    SchedulerConfig,
    SupervisedTurns,
    Thoughts,
    TokensConfig,
    TopLevelConfig,
    TrackingConfig,
    TrainingConfig,
    WarmupScheduleConfig,
    Weights,
    ZeroConfig,
    ZeroFileConfig,
)
from src.errors import CheckpointError, ConfigError
from src.patterns import Pattern

PLAIN_NAME = re.compile(r"[\w.-]{1,60}")
PLAIN = "letters, digits, '_', '-' and '.', at most 60 of them"
"""Names that files and metrics are called after; a letter has up to four bytes, and file systems take 255."""
DEFAULT_METRIC = "eval/validation/loss"
"""What conf/ gives for checkpoint.metric_for_best_model."""


def a_source_is_given(data: DataConfig) -> Iterator[Problem]:
    if not data.train_files and not data.dataset_name and not data.mixture:
        yield Problem("data.train_files", "no training data: give data.train_files=[FILE] or data.dataset_name=HUB_ID")
    if data.train_files and data.mixture:
        reason = "not together with data.train_files: name them as a source of the mixture"
        yield Problem("data.mixture", reason, has_value=False)


def files_can_be_found(data: DataConfig) -> Iterator[Problem]:
    sets = {"train_files": [data.train_files or []]}
    sets["validation_files"] = list(data.validation_sets().values())
    sets["test_files"] = list(data.test_sets().values())
    for key, lists in sets.items():
        for patterns in lists:
            for pattern, reason in problems_of(patterns):
                yield Problem(f"data.{key}", reason, pattern)


def mixture_is_whole(data: DataConfig) -> Iterator[Problem]:
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
        {n for n, given in sources.items() if given.get(key) is not None} for key in ("weight", "count")
    )
    if weighted and weighted != sources.keys():
        yield Problem("data.mixture", "a weight for each source, or for none", sorted(sources.keys() - weighted))
    if weighted and counted:
        yield Problem("data.mixture", "weights (proportions) or counts (rows), not both", data.mixture)


def set_names_are_plain(data: DataConfig) -> Iterator[Problem]:
    for key, names in (("validation_files", data.validation_sets()), ("test_files", data.test_sets())):
        for name in names:
            if not PLAIN_NAME.fullmatch(name):
                yield Problem(f"data.{key}", f"a set's name may have {PLAIN}", name)
            if name == "train":
                yield Problem(f"data.{key}", "a set can't be called train", name)


def validation_and_test_sets_differ(data: DataConfig) -> Iterator[Problem]:
    for name in set(data.validation_names()) & set(data.test_sets()):
        yield Problem("data.test_files", "a validation set has this name already", name)


def sources(data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """Give the key and the settings of everything that rows are read by: data itself, and each source of a mixture."""
    yield "data", data
    if data.mixture and not list(mixture_is_whole(data)):
        yield from ((f"data.mixture.{name}", source.data) for name, source in data.train_sources().items())


def formats_are_known(data: DataConfig) -> Iterator[Problem]:
    known = list(declared_formats())
    for key, source in sources(data):
        if broken := broken_format(source.format):
            yield Problem(f"{key}.format", f"the file that declares it can't be read: {broken}", source.format)
        elif source.format not in known:
            near = get_close_matches(source.format, known, n=1)
            reason = f"not one of {', '.join(known)}{f'; did you mean {near[0]}?' if near else ''}"
            yield Problem(f"{key}.format", reason, source.format)


def columns_and_templates_fit_the_format(data: DataConfig) -> Iterator[Problem]:
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


def _template_problems(
    key: str, template: str | None, name: str, parts: tuple[str, ...], format_name: str
) -> Iterator[Problem]:
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


def cleaning_is_for_dialogues(data: DataConfig) -> Iterator[Problem]:
    for key, source in sources(data):
        if source.clean_dialogue and source.format != "dialogue_summary":
            yield Problem(f"{key}.clean_dialogue", "only format dialogue_summary cleans its dialogue", True)


def text_is_no_chat(data: DataConfig) -> Iterator[Problem]:
    for key, source in sources(data):
        if source.format == "text" and source.system_prompt is not None:
            yield Problem(f"{key}.system_prompt", "format text is no chat", source.system_prompt)


def streaming_can_work(data: DataConfig, training: TrainingConfig) -> Iterator[Problem]:
    if not data.streaming:
        return
    if training.max_train_steps is None:
        reason = "needed with data.streaming: nobody knows how many rows there are"
        yield Problem("training.max_train_steps", reason, None)
    if data.held_out_fraction:
        reason = "can't hold out rows of a stream; give data.validation_files, or set this to 0"
        yield Problem("data.validation_fraction", reason, data.validation_fraction)
    for name, given in (data.mixture or {}).items():
        if given.get("weight") is None and given.get("count") is None:
            yield Problem(f"data.mixture.{name}", "a streamed source needs a weight or a count", given)


def folds_can_be_made(data: DataConfig) -> Iterator[Problem]:
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


def encoder_decoders_take_pairs(data: DataConfig, model: ModelConfig) -> Iterator[Problem]:
    if model.type is not ModelType.encoder_decoder:
        return
    if data.batching is Batching.packed:
        yield Problem("data.batching", "an encoder-decoder takes padded or length_grouped", "packed")
    for key, source in sources(data):
        if source.format == "text":
            yield Problem(f"{key}.format", "an encoder-decoder needs something to read: a format with a prompt", "text")
        if source.format == "messages" and source.supervised_turns is SupervisedTurns.all:
            reason = "an encoder-decoder writes one turn: data.supervised_turns=last"
            yield Problem(f"{key}.supervised_turns", reason, "all")


def patterns_are_regular_expressions(data: DataConfig) -> Iterator[Problem]:
    patterns = {f"{key}.thought_pattern": source.thought_pattern for key, source in sources(data)}
    for key, pattern in (patterns | {"data.answer_pattern": data.answer_pattern}).items():
        if pattern is None:
            continue
        if reason := _no_regular_expression(pattern):
            yield Problem(key, reason, pattern)
            continue
        if re.compile(pattern).groups < 1:
            yield Problem(key, "needs a group: (…) around what it is looking for", pattern)
        try:
            Pattern(key, pattern)
        except ConfigError as error:  # of the engine that applies it to rows
            yield Problem(key, str(error).partition(" is no ")[2] or str(error), pattern)


def adapter_patterns_are_regular_expressions(adapter: AdapterConfig) -> Iterator[Problem]:
    if isinstance(adapter, NoAdapterConfig):
        return
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(adapter, key), str) and (reason := _no_regular_expression(pattern)):
            yield Problem(f"adapter.{key}", reason, pattern)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(adapter, key).items():
            if reason := _no_regular_expression(pattern):
                yield Problem(f"adapter.{key}.{pattern}", reason, value)


def _no_regular_expression(pattern: str) -> str:
    """Return why a text is no regular expression; '' where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"not a regular expression: {error}"
    except OverflowError:
        return "not a regular expression: a repetition of more than 2**32 - 2 times"
    except RecursionError:
        return "not a regular expression: its groups are nested too deep"
    return ""


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
        if tracking.uri.startswith(("file:", "/", "./", "../")):
            reason += "; runs in a folder are kept in a file there: sqlite:///FOLDER/mlflow.db"
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
    if not os.path.exists(folder):
        if folder.is_absolute() or model.checkpoint.startswith((".", "~")) or os.path.isdir(folder.parts[0]):
            yield Problem("model.checkpoint", f"no such folder (looked in {Path.cwd()})", model.checkpoint)
        return
    if not folder.is_dir():
        yield Problem("model.checkpoint", "a file; a checkpoint is a folder or a hub id", model.checkpoint)
    elif not os.path.isfile(folder / "config.json"):
        yield Problem("model.checkpoint", "a folder without config.json: not a model", model.checkpoint)
    elif model.weights is Weights.pretrained:
        safe, pickled = (
            any(os.path.isfile(folder / f"{name}{end}") for end in ("", ".index.json"))
            for name in ("model.safetensors", "pytorch_model.bin")
        )
        if pickled and not safe and model.use_safetensors:
            reason = (
                "only pickled weights (pytorch_model.bin), which may run code; model.use_safetensors=false takes them"
            )
            yield Problem("model.checkpoint", reason, model.checkpoint)
        elif not pickled and not safe:
            reason = "a folder without weights (model.safetensors); model.weights=random starts without"
            yield Problem("model.checkpoint", reason, model.checkpoint)


def quantised_weights_are_frozen(
    quantization: QuantizationConfig, adapter: AdapterConfig, model: ModelConfig
) -> Iterator[Problem]:
    if not quantization.is_on:
        return
    if quantization.load_in_8bit and quantization.load_in_4bit:
        yield Problem("quantization.load_in_4bit", "8 bits or 4, not both", True)
    key = "quantization.load_in_8bit" if quantization.load_in_8bit else "quantization.load_in_4bit"
    if isinstance(adapter, NoAdapterConfig):
        yield Problem(key, "quantised weights can't be trained; train an adapter on them: adapter=lora", True)
    if model.weights is Weights.random:
        yield Problem(key, "only a checkpoint's weights are quantised; model.weights is random", True)


def adapters_can_be_made(adapter: AdapterConfig, quantization: QuantizationConfig) -> Iterator[Problem]:
    if isinstance(adapter, NoAdapterConfig):
        return
    if adapter.use_dora and quantization.load_in_8bit:
        yield Problem("adapter.use_dora", "PEFT can't put DoRA on weights in 8 bits; quantization=nf4, or LoRA", True)
    if adapter.layers_to_transform is not None and isinstance(adapter.target_modules, str):
        reason = "PEFT chooses layers only where adapter.target_modules is a list of names"
        yield Problem("adapter.layers_to_transform", reason, adapter.layers_to_transform)
    if adapter.init_lora_weights not in (True, False, "gaussian", "orthogonal") and quantization.is_on:
        reason = "changes the base weights, which a quantised base can't have"
        yield Problem("adapter.init_lora_weights", reason, adapter.init_lora_weights)


def merging_needs_an_adapter(export: ExportConfig, adapter: AdapterConfig) -> Iterator[Problem]:
    if export.merge and isinstance(adapter, NoAdapterConfig):
        yield Problem("export.merge", "there is no adapter to merge: adapter is none", True)


def adapters_have_a_base_that_lasts(
    export: ExportConfig, adapter: AdapterConfig, model: ModelConfig
) -> Iterator[Problem]:
    is_adapter = not isinstance(adapter, NoAdapterConfig)
    if is_adapter and model.weights is Weights.random and not export.merge:
        reason = "an adapter on random weights fits no other model: export.merge=true, or a checkpoint with weights"
        yield Problem("model.weights", reason, "random")


def embedding_lr_has_rows_to_train(
    optimizer: OptimizerConfig, adapter: AdapterConfig, tokens: TokensConfig
) -> Iterator[Problem]:
    is_adapter = not isinstance(adapter, NoAdapterConfig)
    if optimizer.embedding_lr is not None and is_adapter and not tokens.additional_special_tokens:
        reason = "with an adapter only rows of new tokens are trained, and tokens has none"
        yield Problem("optimizer.embedding_lr", reason, optimizer.embedding_lr)


def thought_weight_has_thoughts(loss: LossConfig, tokens: TokensConfig, data: DataConfig) -> Iterator[Problem]:
    if loss.thought_weight != 1 and (tokens.thought_open is None or data.thoughts is Thoughts.drop):
        yield Problem(
            "loss.thought_weight", "no thoughts are written: see tokens and data.thoughts", loss.thought_weight
        )


def fp16_keeps_float32_weights(
    training: TrainingConfig, model: ModelConfig, adapter: AdapterConfig
) -> Iterator[Problem]:
    if not isinstance(adapter, NoAdapterConfig):
        return  # what an adapter trains is float32
    if model.dtype is Dtype.float16 and training.mixed_precision is not MixedPrecision.fp16:
        yield Problem("model.dtype", "float16 weights can't be trained: bfloat16 or float32", "float16")
    if training.mixed_precision is MixedPrecision.fp16 and model.dtype in (Dtype.float16, Dtype.bfloat16):
        reason = "fp16 mixed precision scales gradients of float32 weights: model.dtype=float32"
        yield Problem("model.dtype", reason, model.dtype.value)


def precision_fits_the_device(training: TrainingConfig, runtime: RuntimeConfig) -> Iterator[Problem]:
    if training.mixed_precision is MixedPrecision.fp16 and runtime.device is Device.cpu:
        yield Problem("training.mixed_precision", "fp16 needs a GPU; on a CPU use no or bf16", "fp16")


def flash_attention_needs_a_gpu(model: ModelConfig, runtime: RuntimeConfig) -> Iterator[Problem]:
    if model.attn_implementation is Attention.flash_attention_2 and runtime.device is Device.cpu:
        yield Problem("model.attn_implementation", "needs a GPU; sdpa on a CPU", "flash_attention_2")


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
    checkpoint: CheckpointConfig, data: DataConfig, evaluation: EvaluationConfig, tokens: TokensConfig
) -> Iterator[Problem]:
    if not checkpoint.load_best_model_at_end and checkpoint.metric_for_best_model == DEFAULT_METRIC:
        return  # where no evaluation gives it, no best is kept
    scores = scores_of(data, evaluation, tokens)
    allowed = [f"eval/{name}/{score}" for name in data.validation_names() for score in scores]
    if checkpoint.metric_for_best_model not in allowed:
        reason = f"no evaluation gives this; {'one of ' + ', '.join(allowed) if allowed else 'no validation set'}"
        yield Problem("checkpoint.metric_for_best_model", reason, checkpoint.metric_for_best_model)


def scores_of(data: DataConfig, evaluation: EvaluationConfig, tokens: TokensConfig) -> list[str]:
    """Name what an evaluation gives of each set: eval/<set>/<score>."""
    scores = ["loss", "perplexity"]
    if tokens.thought_open is not None and data.thoughts is not Thoughts.drop:
        scores += ["thought_loss", "answer_loss"]
    return scores + [m.value for m in (data.metrics if evaluation.metrics is None else evaluation.metrics)]


def the_best_is_kept(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    if checkpoint.load_best_model_at_end and not checkpoint.keep_best:
        yield Problem("checkpoint.keep_best", "checkpoint.load_best_model_at_end needs at least 1", 0)


def folders_to_start_from_are_there(top: TopLevelConfig, checkpoint: CheckpointConfig) -> Iterator[Problem]:
    folder = checkpoint.resume_from
    if folder is not None and not _holds_checkpoints(folder):
        reason = (
            "neither auto, never, nor a folder with a checkpoint: give a run's folder or one of its checkpoints/step-…"
        )
        yield Problem("checkpoint.resume", reason, checkpoint.resume)
    if top.init_from is None:
        return
    start = Path(top.init_from)
    has_model = any(
        os.path.isfile(place / name) and (any(place.glob("*.safetensors")) or any(place.glob("*.bin")))
        for place in (start, start / "model")
        for name in ("config.json", "adapter_config.json")
    )
    if not has_model and not _holds_checkpoints(start):
        reason = "no weights there: give the folder of a run, of a model or of a checkpoint"
        yield Problem("init_from", reason, top.init_from)
    if folder is not None:
        yield Problem(
            "init_from", "starts a new run, checkpoint.resume goes on with one: give one of them", top.init_from
        )


def machines_can_meet(runtime: RuntimeConfig) -> Iterator[Problem]:
    if runtime.machine_rank >= runtime.num_machines:
        reason = f"counts from 0 to runtime.num_machines - 1, which is {runtime.num_machines - 1}"
        yield Problem("runtime.machine_rank", reason, runtime.machine_rank)
    if runtime.num_machines > 1 and runtime.main_process_ip is None:
        yield Problem("runtime.main_process_ip", "several machines need the address of the one with rank 0", None)


def zero_weights_can_be_exported(deepspeed: DeepSpeedConfig) -> Iterator[Problem]:
    if not isinstance(deepspeed, ZeroConfig):
        return
    if deepspeed.stage == 3 and deepspeed.zero_optimization.get(GATHER) is not True:
        yield Problem(f"deepspeed.zero_optimization.{GATHER}", "must be true, or nothing could be exported", False)


def zero_agrees_with_the_rest(
    deepspeed: DeepSpeedConfig, training: TrainingConfig, runtime: RuntimeConfig
) -> Iterator[Problem]:
    """What another section owns may be `auto`, or the same."""
    if not isinstance(deepspeed, ZeroConfig):
        return
    size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    processes = processes_of(runtime)
    owned: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (size, "training.per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "training.gradient_accumulation_steps"),
        "gradient_clipping": (training.max_grad_norm or 0, "training.max_grad_norm"),
        "train_batch_size": (
            size * accumulation * processes,
            f"{size} rows x {accumulation} micro-batches x {processes} processes",
        ),
    }
    for key, (value, owner) in owned.items():
        if getattr(deepspeed, key) not in ("auto", value):
            yield Problem(f"deepspeed.{key}", f"{owner} says {value}: auto, or the same", getattr(deepspeed, key))
    for name in ("bf16", "fp16"):
        is_on = training.mixed_precision.value == name
        if (given := getattr(deepspeed, name).get("enabled", "auto")) not in ("auto", is_on):
            reason = f"training.mixed_precision = {training.mixed_precision.value}: auto, or {str(is_on).lower()}"
            yield Problem(f"deepspeed.{name}.enabled", reason, given)


def processes_of(runtime: RuntimeConfig) -> int:
    """Count the processes of all machines, also where another launcher starts them."""
    started = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return int(started) if started.isdecimal() else runtime.world_size


def a_deepspeed_file_agrees_with_the_optimizer(
    deepspeed: DeepSpeedConfig, optimizer: OptimizerConfig
) -> Iterator[Problem]:
    if not isinstance(deepspeed, ZeroFileConfig):
        return
    kind, params = deepspeed.optimizer.get("type"), deepspeed.optimizer.get("params") or {}
    if kind is not None and DEEPSPEED_OPTIMIZERS[kind.lower()] != optimizer.type:
        yield _unlike("optimizer.type", kind, "optimizer.type", optimizer.type)
    for key, value in params.items():
        if key in ("lr", "betas", "eps", "weight_decay", "momentum"):
            owned = getattr(optimizer, key, None)
            if value not in ("auto", owned):
                yield _unlike(f"optimizer.params.{key}", value, f"optimizer.{key}", owned)


def a_deepspeed_file_agrees_with_the_schedule(
    deepspeed: DeepSpeedConfig, optimizer: OptimizerConfig, scheduler: SchedulerConfig, training: TrainingConfig
) -> Iterator[Problem]:
    if not isinstance(deepspeed, ZeroFileConfig):
        return
    kind, params = deepspeed.scheduler.get("type"), deepspeed.scheduler.get("params") or {}
    if kind is not None and (ours := DEEPSPEED_SCHEDULES[kind]) is not scheduler.type:
        reason = f"scheduler.type = {scheduler.type.value}, and that is {ours.value} here: scheduler={ours.value}"
        yield Problem("deepspeed.scheduler.type", reason, kind)
    least = getattr(scheduler, "min_lr_ratio", 0)
    owned: dict[str, tuple[str, Any]] = {
        "warmup_min_lr": ("a warm-up's first learning rate", 0),
        "warmup_min_ratio": ("a warm-up's first learning rate", 0),
        "warmup_max_lr": ("optimizer.lr", optimizer.lr),
        "warmup_num_steps": ("scheduler.warmup_steps", getattr(scheduler, "warmup_steps", None)),
        "total_num_steps": ("training.max_train_steps", training.max_train_steps),
        "cos_min_ratio": ("scheduler.min_lr_ratio", least),
    }
    for key, (owner, value) in owned.items():
        if params.get(key, "auto") not in ("auto", value):
            yield _unlike(f"scheduler.params.{key}", params[key], owner, value)


def _unlike(key: str, value: Any, owner: str, owned: Any) -> Problem:
    """Return the problem of a key of the file that says something else than the section that owns its subject."""
    shown = "null" if owned is None else owned
    return Problem(f"deepspeed.{key}", f"{owner} = {shown}: auto, or the same", value)


def zero_can_share_out(
    deepspeed: DeepSpeedConfig,
    optimizer: OptimizerConfig,
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
) -> Iterator[Problem]:
    if not isinstance(deepspeed, ZeroConfig):
        return
    stage = f"deepspeed.zero_optimization.stage = {deepspeed.stage}"
    smaller = "deepspeed=zero2"
    if isinstance(deepspeed, ZeroFileConfig):
        stage, smaller = f"{stage} in {deepspeed.config_file}", "stage 2 there"
    if training.mixed_precision is MixedPrecision.fp16:
        reason = "deepspeed's scaling of fp16 losses is not kept in checkpoints: bf16, or deepspeed=none"
        yield Problem("training.mixed_precision", reason, training.mixed_precision.value)
    if deepspeed.stage == 3 and isinstance(adapter, LoraConfig):
        reason = f"computes with whole matrices, which are shared out ({stage}): {smaller}"
        if adapter.use_dora:
            yield Problem("adapter.use_dora", reason, adapter.use_dora)
        if adapter.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            yield Problem("adapter.init_lora_weights", reason, adapter.init_lora_weights)
    if optimizer.type not in ("adamw", "sgd"):
        yield Problem("optimizer.type", f"deepspeed shares out the state of adamw and sgd ({stage})", optimizer.type)
    if deepspeed.stage == 3 and quantization.is_on:
        reason = f"weights in 4 or 8 bits can't be shared out ({stage}): {smaller}"
        yield Problem("quantization", reason, has_value=False)
    if deepspeed.offloads("optimizer"):
        if optimizer.type != "adamw":
            yield Problem("optimizer.type", "offloaded updates are AdamW's: deepspeed without offload", optimizer.type)
        places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
        if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool, path=places) is None]:
            reason = f"DeepSpeed compiles its update on the CPU, and {' and '.join(missing)} can't be found here"
            yield Problem("deepspeed.zero_optimization.offload_optimizer", reason, has_value=False)


def _holds_checkpoints(folder: Path) -> bool:
    """Return whether there are checkpoints, or what can't be looked into: told where they are looked for."""
    try:
        return os.path.isfile(folder / "manifest.json") or bool(steps_in(folder / CHECKPOINTS))
    except CheckpointError:
        return True


def something_is_predicted(data: DataConfig) -> Iterator[Problem]:
    if not data.test_sets():
        yield Problem("data.test_files", "nothing to predict: give data.test_files=[FILE]", data.test_files)
    if "metrics" in data.test_sets():
        yield Problem("data.test_files", "metrics.json is written beside the sets; choose another name", "metrics")


def rows_have_prompts(data: DataConfig) -> Iterator[Problem]:
    if data.format == "text":
        reason = (
            "plain text has no prompt; to let the model go on behind it: data.format=prompt_completion "
            "'data.columns={prompt: text, completion: answer}'"
        )
        yield Problem("data.format", reason, data.format)


RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    a_source_is_given,
    files_can_be_found,
    mixture_is_whole,
    set_names_are_plain,
    validation_and_test_sets_differ,
    formats_are_known,
    columns_and_templates_fit_the_format,
    cleaning_is_for_dialogues,
    text_is_no_chat,
    streaming_can_work,
    folds_can_be_made,
    encoder_decoders_take_pairs,
    patterns_are_regular_expressions,
    adapter_patterns_are_regular_expressions,
    tracker_can_be_reached_by_some_scheme,
    kept_thoughts_have_tags,
    thought_tags_come_in_pairs,
    new_tokens_are_distinct,
    new_tokens_can_be_initialised,
    checkpoint_can_be_loaded,
    quantised_weights_are_frozen,
    adapters_can_be_made,
    merging_needs_an_adapter,
    adapters_have_a_base_that_lasts,
    embedding_lr_has_rows_to_train,
    thought_weight_has_thoughts,
    fp16_keeps_float32_weights,
    precision_fits_the_device,
    flash_attention_needs_a_gpu,
    warmup_ends_before_the_run,
    generation_lengths_fit,
    best_model_can_be_told,
    the_best_is_kept,
    folders_to_start_from_are_there,
    machines_can_meet,
    zero_weights_can_be_exported,
    zero_agrees_with_the_rest,
    a_deepspeed_file_agrees_with_the_optimizer,
    a_deepspeed_file_agrees_with_the_schedule,
    zero_can_share_out,
)

PREDICT_RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    something_is_predicted,
    rows_have_prompts,
    files_can_be_found,
    set_names_are_plain,
    formats_are_known,
    columns_and_templates_fit_the_format,
    cleaning_is_for_dialogues,
    text_is_no_chat,
    encoder_decoders_take_pairs,
    patterns_are_regular_expressions,
    kept_thoughts_have_tags,
    precision_fits_the_device,
    flash_attention_needs_a_gpu,
    generation_lengths_fit,
)
"""The rules for src.predict: nothing about how a run is trained, which its frozen config has behind it."""

READ_BY_PREDICT = (
    "seed",
    "force",
    "run",
    "predict",
    "data",
    "generation",
    "runtime",
    "evaluation.metrics",
    "training.mixed_precision",
    "training.per_device_eval_batch_size",
    "model.dtype",
    "model.attn_implementation",
    "model.trust_remote_code",
)
"""Sections and keys that src.predict reads; another on its command line would change nothing."""

NOT_READ_BY_PREDICT = tuple(
    f"data.{key}"
    for key in (
        "train_files",
        "validation_files",
        "dataset_name",
        "dataset_config_name",
        "train_split",
        "validation_split",
        "revision",
        "mixture",
        "batching",
        "streaming",
        "validation_fraction",
        "num_folds",
        "fold",
        "group_column",
    )
)
"""Keys of these sections that it does not read after all."""


def is_read_by_predict(key: str) -> bool:
    def is_in(names: tuple[str, ...]) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in names)

    return is_in(READ_BY_PREDICT) and not is_in(NOT_READ_BY_PREDICT)
