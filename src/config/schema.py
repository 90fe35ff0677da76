"""What a configuration may hold: a dataclass a group or section, with types, defaults and ranges.

Defaults live in conf/; a field without one here must come from there. Ranges and allowed forms stand in the field's
metadata as a `Check` and are applied by `src.config.gate`. No torch here, so that a refused config costs nothing.
Groups with options of different keys (optimizer, scheduler, tracking) have one dataclass an option, chosen by `type`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from src.config.files import unusable


@dataclass(frozen=True)
class Check:
    """A condition on one value, with the words that an error uses for what is allowed."""

    allowed: str
    holds: Callable[[Any], bool]

    def reason(self, value: Any) -> str:
        """Return why a value is refused; '' where it is not."""
        return "" if self.holds(value) else f"not {self.allowed}"


class PathCheck(Check):
    """A condition on a path: that there can be one, whether it is there now or not."""

    def reason(self, value: Any) -> str:
        return "" if value is None else unusable(value) or super().reason(value)


Keys = Mapping[str, "Check | Keys"]
"""What a mapping of another library's may hold: a condition on each key's value, or the keys of a mapping in it."""


TYPE_TEXT = "set by the option; choose with {group}=…"


def _key(
    check: Check | None = None,
    default: Any = MISSING,
    each: str | None = None,
    inner: Keys | None = None,
    text: str = "",
) -> Any:
    """Declare a key.

    Args:
        each: the dataclass of the values of a mapping.
        inner: the keys of another library's mapping.
        text: what the key means, where no line of conf/ has it and says so.
    """
    return field(default=default, metadata={"check": check, "each": each, "inner": inner, "text": text})


def _type(group: str, *kinds: str) -> Any:
    """Declare the key that says which of a group's dataclasses an option is of; each option sets it."""
    listed = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
    check = Check(f"{listed} (choose another with {group}=…)", lambda v: v in kinds)
    return _key(check, text=TYPE_TEXT.format(group=group))


MOST_INT = 2**63 - 1
"""What torch, numpy, Arrow and SQLite count with."""
MOST_FLOAT32 = 3.4e38
"""What weights, losses and gradients are computed in."""


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_INT


def _is_mapping(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, dict) for k, v in value.items())
    )


def _is_params(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _up_to(most: int, because: str, least: int = 1) -> Check:
    """Return the condition of a whole number beyond whose bound only a fault of the program waits."""
    allowed = f"a whole number of at least {least} and at most {most:,}: {because}"
    return Check(allowed, lambda v: v is None or (_is_int(v) and least <= v <= most))


def _in_float32(least: float, least_in_words: str) -> Check:
    """Return the condition of a number that is computed with in 32 bits, where others become 0 or infinite."""
    allowed = f"a number {least_in_words} and at most 3.4e38, the largest in 32 bits"
    return Check(allowed, lambda v: v is None or (_is_number(v) and least <= v <= MOST_FLOAT32))


POSITIVE = Check("a number above 0", lambda v: v is None or (_is_number(v) and v > 0))
NOT_NEGATIVE = Check("a number of at least 0", lambda v: v is None or (_is_number(v) and v >= 0))
WEIGHT = Check(
    "a number above 0 and at most 3.4e38, the largest in 32 bits",
    lambda v: POSITIVE.holds(v) and (v is None or v <= MOST_FLOAT32),
)
WEIGHT_OR_ZERO = _in_float32(0, "of at least 0")
EPS = _in_float32(1.2e-38, "of at least 1.2e-38")
"""What a sum is divided by: below, it is 0 in 32 bits."""
SCALE = _in_float32(1e-30, "of at least 1e-30")
"""What scores are divided by, which may be in the hundreds: below, they are infinite in 32 bits."""
AT_LEAST_ONE = Check("a whole number of at least 1", lambda v: v is None or (_is_int(v) and v >= 1))
AT_LEAST_TWO = Check("a whole number of at least 2", lambda v: v is None or (_is_int(v) and v >= 2))
COUNT = Check("a whole number of at least 0", lambda v: v is None or (_is_int(v) and v >= 0))
PORT = Check("a port's number, from 1 to 65535", lambda v: v is None or (_is_int(v) and 1 <= v <= 65535))
FRACTION = Check("a number from 0 to 1", lambda v: v is None or (_is_number(v) and 0 <= v <= 1))
BELOW_ONE = Check("a number from 0 to below 1", lambda v: v is None or (_is_number(v) and 0 <= v < 1))
RANK = _up_to(65_536, "wider than any layer")
ROWS_MULTIPLE = _up_to(65_536, "more rows than most vocabularies have, for padding alone")
BEAMS = _up_to(1_000, "each beam holds every row of a batch once more")
PROCESSES = _up_to(1_024, "more processes than one machine has cores for")
MACHINES = _up_to(65_536, "more machines than any cluster has")
RANKS = Check(
    "a mapping from a module's name or pattern to its r, from 1 to 65,536",
    lambda v: isinstance(v, dict) and all(one is not None and RANK.holds(one) for one in v.values()),
)
ALPHAS = Check(
    "a mapping from a module's name or pattern to its lora_alpha, above 0 and at most 3.4e38",
    lambda v: isinstance(v, dict) and all(one is not None and WEIGHT.holds(one) for one in v.values()),
)
BETAS = Check(
    "two numbers from 0 to below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
)
STEPS_OR_EPOCH = Check(
    "a whole number of steps of at least 1, 'epoch', or null for never",
    lambda v: v is None or v == "epoch" or (_is_int(v) and v >= 1),
)
STRINGS = Check("a list of texts", lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v))
FILES_OR_SETS = Check(
    "a file, a glob or a folder, a list of them, or a mapping from a set's name to such",
    lambda v: (
        v is None
        or STRINGS.holds(v)
        or (isinstance(v, dict) and bool(v) and all(isinstance(k, str) and STRINGS.holds(s) for k, s in v.items()))
    ),
)
SEED = Check("a whole number from 0 to 2**32 - 1", lambda v: _is_int(v) and 0 <= v < 2**32)
AUTO_OR_COUNT = Check("a whole number of at least 1, or auto", lambda v: v == "auto" or AT_LEAST_ONE.holds(v))
AUTO_OR_NUMBER = Check("a number of at least 0, or auto", lambda v: v == "auto" or NOT_NEGATIVE.holds(v))
MAPPING = Check("a mapping of DeepSpeed's keys", lambda v: isinstance(v, dict))
SWITCH = Check("true or false", lambda v: isinstance(v, bool))
SIZE = Check(
    "a whole number of at least 0",
    lambda v: COUNT.holds(int(v) if isinstance(v, float) and v.is_integer() else v) and v is not None,
)
"""Also written as 5e8, as DeepSpeed's users do."""
TEXT_OR_TEXTS = Check(
    "a text, or a list of texts",
    lambda v: (isinstance(v, str) and bool(v)) or (STRINGS.holds(v) and bool(v)),
)
TEXT_OR_TEXTS_OR_NULL = Check("a text, a list of texts, or null", lambda v: v is None or TEXT_OR_TEXTS.holds(v))
LORA_INITS = ("gaussian", "olora", "orthogonal", "pissa")
LORA_INIT = Check(
    f"true, false, {', '.join(LORA_INITS)}",  # pissa_niter_N draws its start anew when the adapter is loaded
    lambda v: isinstance(v, bool) or v in LORA_INITS,
)
LAYERS = Check(
    "a layer's number, a list of them, or null",
    lambda v: v is None or COUNT.holds(v) or (isinstance(v, list) and bool(v) and all(map(_is_int, v))),
)
NAME = PathCheck(
    "a name without '/' that does not start with '.'",
    lambda v: bool(v) and "/" not in v and not v.startswith("."),
)
PATH = PathCheck("a path that there can be", lambda v: True)
CHECKPOINT = PathCheck("a folder with a checkpoint, or the name of one on a hub", bool)


class ModelType(Enum):
    causal_lm = "causal_lm"
    encoder_decoder = "encoder_decoder"


class Weights(Enum):
    pretrained = "pretrained"
    random = "random"


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class InitMethod(Enum):
    text = "text"
    mean = "mean"
    description = "description"
    random = "random"


class SupervisedTurns(Enum):
    all = "all"
    last = "last"


class Thoughts(Enum):
    keep = "keep"
    drop = "drop"


class Overflow(Enum):
    truncate = "truncate"
    truncate_prompt = "truncate_prompt"
    drop = "drop"
    error = "error"


class Batching(Enum):
    padded = "padded"
    length_grouped = "length_grouped"
    packed = "packed"


class Metric(Enum):
    exact_match = "exact_match"
    rouge1 = "rouge1"
    rouge2 = "rouge2"
    rougeL = "rougeL"  # noqa: N815  (the field's own name)
    chrf = "chrf"
    bleu = "bleu"


class QuantType(Enum):
    nf4 = "nf4"
    fp4 = "fp4"


class LoraBias(Enum):
    none = "none"
    all = "all"
    lora_only = "lora_only"


class MixedPrecision(Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Reduction(Enum):
    mean = "mean"
    sum = "sum"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class ModelConfig:
    """conf/model: which network, from where, in which precision."""

    type: ModelType = _key(text=TYPE_TEXT.format(group="model"))
    checkpoint: str = _key(CHECKPOINT)
    revision: str | None = MISSING
    weights: Weights = MISSING
    dtype: Dtype = MISSING
    attn_implementation: Attention | None = MISSING
    gradient_checkpointing: bool = MISSING
    use_safetensors: bool = MISSING
    trust_remote_code: bool = MISSING


@dataclass
class QuantizationConfig:
    """conf/quantization: bitsandbytes' own keys; both `load_in_…` false means none."""

    load_in_8bit: bool = MISSING
    load_in_4bit: bool = MISSING
    bnb_4bit_quant_type: QuantType = MISSING
    bnb_4bit_compute_dtype: Dtype = MISSING
    bnb_4bit_use_double_quant: bool = MISSING

    @property
    def is_on(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit


@dataclass
class NoAdapterConfig:
    """conf/adapter/none.yaml: every weight is trained."""

    type: str = _type("adapter", "none")


@dataclass
class LoraConfig:
    """conf/adapter/lora.yaml and those built on it: the keys of PEFT's LoraConfig."""

    type: str = _type("adapter", "lora")
    r: int = _key(RANK)
    lora_alpha: float = _key(WEIGHT)
    lora_dropout: float = _key(BELOW_ONE)
    bias: LoraBias = MISSING
    target_modules: Any = _key(TEXT_OR_TEXTS)
    exclude_modules: Any = _key(TEXT_OR_TEXTS_OR_NULL)
    use_dora: bool = MISSING
    use_rslora: bool = MISSING
    init_lora_weights: Any = _key(LORA_INIT)
    layers_to_transform: Any = _key(LAYERS)
    rank_pattern: dict[str, int] = _key(RANKS)
    alpha_pattern: dict[str, float] = _key(ALPHAS)


@dataclass
class TokenInitConfig:
    """How the rows of new tokens start: see src.tokens.initial_rows."""

    method: InitMethod = MISSING
    text: list[str] = _key(STRINGS)
    descriptions: dict[str, str] = MISSING


@dataclass
class TokensConfig:
    """conf/tokens: tokens that the vocabulary gets, and which of them open and close a thought."""

    additional_special_tokens: list[str] = _key(STRINGS)
    thought_open: str | None = MISSING
    thought_close: str | None = MISSING
    init: TokenInitConfig = field(default_factory=TokenInitConfig)
    pad_to_multiple_of: int | None = _key(ROWS_MULTIPLE)


@dataclass
class DataConfig:
    """conf/data: where rows come from, how they become prompt and completion, how long they may be."""

    format: str = MISSING
    train_files: Any = _key(
        Check("a file, a glob or a folder, or a list of them", lambda v: v is None or STRINGS.holds(v))
    )
    validation_files: Any = _key(FILES_OR_SETS)
    test_files: Any = _key(FILES_OR_SETS)
    dataset_name: str | None = MISSING
    dataset_config_name: str | None = MISSING
    train_split: str | None = MISSING
    validation_split: str | None = MISSING
    revision: str | None = MISSING
    mixture: Any = _key(
        Check("a mapping from a source's name to its keys", lambda v: v is None or _is_mapping(v)), each="SourceConfig"
    )
    columns: dict[str, str] = MISSING
    prompt_template: str | None = MISSING
    completion_template: str | None = MISSING
    system_prompt: str | None = MISSING
    supervised_turns: SupervisedTurns = MISSING
    clean_dialogue: bool = MISSING
    thoughts: Thoughts | None = MISSING
    thought_pattern: str | None = MISSING
    answer_pattern: str | None = MISSING
    metrics: list[Metric] = MISSING
    max_seq_length: int = _key(AT_LEAST_TWO)
    max_target_length: int = _key(AT_LEAST_TWO)
    overflow: Overflow = MISSING
    max_dropped_fraction: float = _key(FRACTION)
    batching: Batching = MISSING
    preprocessing_num_workers: int = _key(PROCESSES)
    streaming: bool = MISSING
    cache_dir: str | None = _key(PATH)
    limit: int | None = _key(AT_LEAST_ONE)
    validation_fraction: float = _key(BELOW_ONE)
    num_folds: int | None = _key(AT_LEAST_TWO)
    fold: int | None = _key(COUNT)
    group_column: str | None = MISSING

    def train_sources(self) -> dict[str, TrainSource]:
        """Give the sources of the train set by name: those of the mixture, or the one there is, called train."""
        if self.mixture:
            return {name: _mixed_source(self, given) for name, given in self.mixture.items()}
        return {"train": TrainSource(self, None, None)}

    def files(self) -> dict[str, list[str]]:
        """Give the files of every set that has some, as they were named: set name -> files, globs and folders.

        Those that a fold of train takes the place of are not among them: nobody reads them.
        """
        sources = [source.data.train_files or [] for source in self.train_sources().values()]
        train = [file for files in sources for file in files]
        return ({"train": train} if train else {}) | self.validation_sets() | self.test_sets()

    def validation_sets(self) -> dict[str, list[str]]:
        """Give the files of each validation set that is read from files."""
        return {} if self.num_folds is not None else named_sets(self.validation_files, "validation")

    def test_sets(self) -> dict[str, list[str]]:
        return named_sets(self.test_files, "test")

    def validation_names(self) -> list[str]:
        """Give the names of the validation sets there will be, also of one from the hub or held out from train."""
        has_another = self.has_hub_validation or self.num_folds is not None or self.held_out_fraction
        return list(self.validation_sets()) or (["validation"] if has_another else [])

    @property
    def has_hub_validation(self) -> bool:
        """Whether the validation set is a split of the hub's data set that train comes from."""
        from_hub = bool(self.dataset_name) and not self.train_files and not self.mixture
        has_another = self.num_folds is not None or bool(self.validation_sets())
        return from_hub and bool(self.validation_split) and not has_another

    @property
    def held_out_fraction(self) -> float:
        """The share of train that is the validation set: validation_fraction, or 0 where another takes its place."""
        has_another = self.num_folds is not None or bool(self.validation_sets()) or self.has_hub_validation
        return 0.0 if has_another else self.validation_fraction


@dataclass(frozen=True)
class TrainSource:
    """One source of the train set: its own settings, and its share of a mixture.

    `weight` is its proportion, `count` how many rows of it are taken; neither means all of its rows.
    """

    data: DataConfig
    weight: float | None
    count: int | None


@dataclass
class SourceConfig:
    """A source of a mixture: keys of data that it may have for itself (null: data's own), and its share."""

    train_files: Any = _key(
        Check("a file, a glob or a folder, or a list of them", lambda v: v is None or STRINGS.holds(v)), None
    )
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str | None = None
    revision: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    prompt_template: str | None = None
    completion_template: str | None = None
    system_prompt: str | None = None
    supervised_turns: SupervisedTurns | None = None
    clean_dialogue: bool | None = None
    thought_pattern: str | None = None
    weight: float | None = _key(POSITIVE, None, text="its proportion of the mixture, in which no row comes twice")
    count: int | None = _key(AT_LEAST_ONE, None, text="how many of its rows are taken; above what it has, some twice")


NEVER_NULL = ("format", "columns", "supervised_turns", "clean_dialogue")
"""Keys of a source that data can't be without."""


def _mixed_source(data: DataConfig, given: dict[str, Any]) -> TrainSource:
    """Return a source of a mixture: data's own settings with the source's on top.

    A null of the source's means none where data may have none, and data's own value elsewhere.
    """
    own = {
        key: value
        for key, value in given.items()
        if key not in ("weight", "count") and (value is not None or key not in NEVER_NULL)
    }
    alone = {"mixture": None, "train_files": None, "dataset_name": None}
    return TrainSource(dataclasses.replace(data, **(alone | own)), given.get("weight"), given.get("count"))


@dataclass
class AdamWConfig:
    """conf/optimizer/adamw.yaml: torch.optim.AdamW; adamw_8bit and paged_adamw_32bit: bitsandbytes'."""

    type: str = _type("optimizer", "adamw", "adamw_8bit", "paged_adamw_32bit")
    lr: float = _key(WEIGHT)
    embedding_lr: float | None = _key(WEIGHT)
    weight_decay: float = _key(WEIGHT_OR_ZERO)
    betas: list[float] = _key(BETAS)
    eps: float = _key(EPS)


@dataclass
class AdafactorConfig:
    """conf/optimizer/adafactor.yaml: torch.optim.Adafactor."""

    type: str = _type("optimizer", "adafactor")
    lr: float = _key(WEIGHT)
    embedding_lr: float | None = _key(WEIGHT)
    weight_decay: float = _key(WEIGHT_OR_ZERO)


@dataclass
class SGDConfig:
    """conf/optimizer/sgd.yaml: torch.optim.SGD."""

    type: str = _type("optimizer", "sgd")
    lr: float = _key(WEIGHT)
    embedding_lr: float | None = _key(WEIGHT)
    weight_decay: float = _key(WEIGHT_OR_ZERO)
    momentum: float = _key(BELOW_ONE)


class ScheduleType(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"


@dataclass
class ConstantScheduleConfig:
    """conf/scheduler/constant.yaml: the learning rate never changes."""

    type: ScheduleType = _key(text=TYPE_TEXT.format(group="scheduler"))


@dataclass
class WarmupScheduleConfig:
    """conf/scheduler/constant_with_warmup.yaml: linear warm-up, then constant."""

    type: ScheduleType = _key(text=TYPE_TEXT.format(group="scheduler"))
    warmup_ratio: float = _key(BELOW_ONE)
    warmup_steps: int | None = _key(COUNT)


@dataclass
class DecayScheduleConfig(WarmupScheduleConfig):
    """conf/scheduler/linear.yaml and cosine.yaml: linear warm-up, then decay to min_lr_ratio of the peak."""

    min_lr_ratio: float = _key(FRACTION)


@dataclass
class GenerationConfig:
    """conf/generation: Hugging Face's generation settings, by their own names."""

    max_new_tokens: int = _key(AT_LEAST_ONE)
    min_new_tokens: int = _key(COUNT)
    num_beams: int = _key(BEAMS)
    do_sample: bool = MISSING
    temperature: float = _key(SCALE)
    top_k: int = _key(COUNT)
    top_p: float = _key(Check("a number above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1))
    repetition_penalty: float = _key(SCALE)
    no_repeat_ngram_size: int = _key(COUNT)


@dataclass
class NoDeepSpeedConfig:
    """conf/deepspeed/none.yaml: every process holds the whole model."""

    type: str = _type("deepspeed", "none")

    @property
    def stage(self) -> int:
        return 0


_SIZES = """reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size
    stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size"""
_SWITCHES = """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
    compute_grad_norm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save
    stage3_allgather_sequential
    stage3_use_all_reduce_for_fetch_params ignore_unused_parameters round_robin_gradients parameter_alignment
    zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    override_module_apply log_trace_cache_warnings enable_sanity_checks"""
AUTO_OR_SIZE = Check(
    "a whole number of at least 0, or auto: by the model's width", lambda v: v == "auto" or SIZE.holds(v)
)
WIDTH_SIZES: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
"""What `auto` is there, by the model's hidden size; as transformers and accelerate fill it in."""
_OFFLOAD: Keys = {
    "device": Check("none, cpu or nvme", lambda v: v in ("none", "cpu", "nvme")),
    "nvme_path": PathCheck("a folder, or null", lambda v: v is None or isinstance(v, str)),
    "buffer_count": SIZE,
    "pin_memory": SWITCH,
}
ZERO_KEYS: Keys = {
    "stage": Check("1, 2 or 3 (deepspeed=none shares nothing out)", lambda v: _is_int(v) and v in (1, 2, 3)),
    **dict.fromkeys(_SIZES.split(), SIZE),
    **dict.fromkeys(WIDTH_SIZES, AUTO_OR_SIZE),
    **dict.fromkeys(_SWITCHES.split(), SWITCH),
    "overlap_comm": Check("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "offload_param": {**_OFFLOAD, "buffer_size": SIZE, "max_in_cpu": SIZE},
    "offload_optimizer": {
        **_OFFLOAD,
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), SWITCH),
        **dict.fromkeys(("ratio", "cpuadam_cores_perc"), FRACTION),
    },
    "zenflow": Check("a mapping, or null", lambda v: v is None or isinstance(v, dict)),
    "leaf_module": MAPPING,
}
"""Of `zero_optimization` in DeepSpeed 0.19."""
AUTO_OR_SWITCH = Check("true, false or auto", lambda v: v == "auto" or isinstance(v, bool))
BF16_KEYS: Keys = {
    "enabled": AUTO_OR_SWITCH,
    **dict.fromkeys(
        ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
        SWITCH,
    ),
}
FP16_KEYS: Keys = {
    "enabled": AUTO_OR_SWITCH,
    **dict.fromkeys(("auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads"), SWITCH),
    **dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"), SIZE),
    "loss_scale": NOT_NEGATIVE,
}


@dataclass
class ZeroConfig:
    """conf/deepspeed/zero1.yaml and its like: DeepSpeed's own JSON; what another section owns is `auto`."""

    type: str = _type("deepspeed", "zero")
    train_batch_size: Any = _key(AUTO_OR_COUNT)
    train_micro_batch_size_per_gpu: Any = _key(AUTO_OR_COUNT)
    gradient_accumulation_steps: Any = _key(AUTO_OR_COUNT)
    gradient_clipping: Any = _key(AUTO_OR_NUMBER)
    bf16: Any = _key(MAPPING, inner=BF16_KEYS)
    fp16: Any = _key(MAPPING, inner=FP16_KEYS)
    communication_data_type: str | None = _key(
        Check("fp32, fp16, bf16 or null", lambda v: v in (None, "fp32", "fp16", "bf16"))
    )
    wall_clock_breakdown: bool = MISSING
    zero_optimization: Any = _key(
        Check("a mapping of DeepSpeed's keys, with a stage", lambda v: isinstance(v, dict) and "stage" in v),
        inner=ZERO_KEYS,
    )

    @property
    def stage(self) -> int:
        """What is shared out: optimizer state from 1 on, gradients from 2 on, weights with 3."""
        return int(self.zero_optimization["stage"])

    def offloads(self, what: str) -> bool:
        """Whether `optimizer` or `param` lies elsewhere than where it is computed with."""
        return (self.zero_optimization.get(f"offload_{what}") or {}).get("device", "none") != "none"


_AUTO_OR_BETAS = Check(f"{BETAS.allowed}, or auto", lambda v: v == "auto" or BETAS.holds(v))
DEEPSPEED_OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "sgd": "sgd"}
"""The optimizer of DeepSpeed's, in lower case -> optimizer.type; its Adam is AdamW unless adam_w_mode is false."""
DEEPSPEED_OPTIMIZER_KEYS: Keys = {
    "type": Check(
        "AdamW, Adam or SGD, which optimizer=adamw and sgd are here",
        lambda v: isinstance(v, str) and v.lower() in DEEPSPEED_OPTIMIZERS,
    ),
    "params": {
        **dict.fromkeys(("lr", "eps", "weight_decay", "momentum"), AUTO_OR_NUMBER),
        "betas": _AUTO_OR_BETAS,
        "torch_adam": SWITCH,
        **dict.fromkeys(("adam_w_mode", "bias_correction"), Check("true", lambda v: v is True)),
        **dict.fromkeys(("amsgrad", "nesterov"), Check("false", lambda v: v is False)),
        "dampening": Check("0", lambda v: _is_number(v) and v == 0),
    },
    "legacy_fusion": SWITCH,
}
DEEPSPEED_SCHEDULES = {
    "WarmupLR": ScheduleType.constant_with_warmup,
    "WarmupDecayLR": ScheduleType.linear,
    "WarmupCosineLR": ScheduleType.cosine,
}
"""The schedule of DeepSpeed's -> scheduler.type, as transformers maps them."""
DEEPSPEED_SCHEDULER_KEYS: Keys = {
    "type": Check(
        f"one of {', '.join(f'{theirs} (scheduler={ours.value})' for theirs, ours in DEEPSPEED_SCHEDULES.items())}",
        lambda v: v in DEEPSPEED_SCHEDULES,
    ),
    "params": {
        **dict.fromkeys(
            ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_min_ratio"),
            AUTO_OR_NUMBER,
        ),
        "cos_min_ratio": AUTO_OR_NUMBER,
        "warmup_type": Check("linear, as warm-ups are here", lambda v: v in ("linear", "auto")),
        "last_batch_iteration": Check("-1", lambda v: v == -1),
    },
}


AIO_KEYS: Keys = {
    **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism", "thread_count"), SIZE),
    **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), SWITCH),
}


@dataclass
class ZeroFileConfig(ZeroConfig):
    """conf/deepspeed/file.yaml: a DeepSpeed JSON of the user's, with what it said; see src.config.deepspeed.

    `sha256` is of the file that was read; null: it is still to be read. `optimizer` and `scheduler` are compared with
    the sections that own them, and not handed on.
    """

    type: str = _type("deepspeed", "file")
    config_file: str | None = _key(PATH)
    sha256: str | None = MISSING
    optimizer: Any = _key(MAPPING, inner=DEEPSPEED_OPTIMIZER_KEYS)
    scheduler: Any = _key(MAPPING, inner=DEEPSPEED_SCHEDULER_KEYS)
    aio: Any = _key(MAPPING, inner=AIO_KEYS)


@dataclass
class MlflowConfig:
    """conf/tracking/mlflow.yaml: an MLflow server or store that mirrors the run's folder."""

    type: str = _type("tracking", "mlflow")
    uri: str = MISSING
    experiment_name: str = MISSING
    run_name: str = MISSING
    tags: dict[str, str] = MISSING
    log_model: bool = MISSING


@dataclass
class NoTrackingConfig:
    """conf/tracking/none.yaml: the run's folder only."""

    type: str = _type("tracking", "none")


@dataclass
class TrainingConfig:
    """How long, in which batches and in which precision. One step is one optimizer update."""

    num_train_epochs: float = _key(POSITIVE)
    max_train_steps: int | None = _key(AT_LEAST_ONE)
    max_seconds: float | None = _key(POSITIVE)
    per_device_train_batch_size: int = _key(AT_LEAST_ONE)
    per_device_eval_batch_size: int = _key(AT_LEAST_ONE)
    gradient_accumulation_steps: int = _key(AT_LEAST_ONE)
    max_grad_norm: float | None = _key(WEIGHT)
    mixed_precision: MixedPrecision = MISSING
    logging_steps: int = _key(AT_LEAST_ONE)


@dataclass
class LossConfig:
    """What is minimised: see src.training.loss."""

    reduction: Reduction = MISSING
    thought_weight: float = _key(WEIGHT_OR_ZERO)
    label_smoothing: float = _key(BELOW_ONE)


@dataclass
class EvaluationConfig:
    """When and on how much the run is evaluated and samples are written."""

    eval_steps: Any = _key(STEPS_OR_EPOCH)
    metrics: list[Metric] | None = MISSING
    max_samples: int | None = _key(AT_LEAST_ONE)
    sample_steps: Any = _key(STEPS_OR_EPOCH)
    sample_prompts: int = _key(COUNT)


@dataclass
class CheckpointConfig:
    """When the run is saved, which saves are kept, and how a run that was stopped goes on."""

    checkpointing_steps: Any = _key(STEPS_OR_EPOCH)
    keep_last: int = _key(AT_LEAST_ONE)
    keep_best: int = _key(COUNT)
    newest_optimizer_only: bool = MISSING
    metric_for_best_model: str = MISSING
    greater_is_better: bool | None = MISSING
    load_best_model_at_end: bool = MISSING
    resume: str = _key(PathCheck("auto, never, or a folder: a run's or a checkpoint", bool))
    allow_changed: bool = MISSING

    @property
    def is_greater_better(self) -> bool:
        """Whether a higher value of metric_for_best_model is the better one."""
        known = greater_is_better(self.metric_for_best_model)
        return known if self.greater_is_better is None else self.greater_is_better

    @property
    def resume_from(self) -> Path | None:
        """The folder that resume names; None for auto and never."""
        return None if self.resume in ("auto", "never") else Path(self.resume)


@dataclass
class ExportConfig:
    """What the exported model/ holds."""

    merge: bool = MISSING


@dataclass
class RuntimeConfig:
    """On what the run computes."""

    device: Device = MISSING
    num_processes: int = _key(PROCESSES)
    num_machines: int = _key(MACHINES)
    machine_rank: int = _key(COUNT)
    main_process_ip: str | None = MISSING
    main_process_port: int | None = _key(PORT)
    deterministic: bool = MISSING

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines


@dataclass
class TopLevelConfig:
    """The keys that stand outside any section."""

    name: str = _key(NAME)
    seed: int = _key(SEED)
    force: bool = MISSING
    rerun: str | None = _key(PATH)
    init_from: str | None = _key(PATH)


class Sampler(Enum):
    grid = "grid"
    random = "random"
    tpe = "tpe"


class Pruner(Enum):
    none = "none"
    median = "median"
    asha = "asha"


class Replicate(Enum):
    none = "none"
    seeds = "seeds"
    folds = "folds"


class Direction(Enum):
    minimize = "minimize"
    maximize = "maximize"


@dataclass
class SweepConfig:
    """conf/sweep: what `-m` makes of several values. A sweep has it; none of its runs does."""

    name: str = _key(NAME)
    params: Any = _key(
        Check("a mapping from a key to its values: a list, or a text as it stands behind KEY=", lambda v: _is_params(v))
    )
    metric: str = MISSING
    direction: Direction = MISSING
    sampler: Sampler = MISSING
    pruner: Pruner = MISSING
    replicate: Replicate = MISSING
    num_seeds: int = _key(AT_LEAST_ONE)
    n_trials: int | None = _key(AT_LEAST_ONE)
    max_points: int = _key(AT_LEAST_ONE)
    n_jobs: int = _key(PROCESSES)
    seed: int = _key(SEED)
    min_resource: int = _key(AT_LEAST_ONE)
    reduction_factor: int = _key(AT_LEAST_TWO)
    max_seconds: float | None = _key(POSITIVE)
    dry_run: bool = MISSING
    fail_fast: bool = MISSING
    max_retries: int = _key(COUNT)
    storage: str | None = MISSING


@dataclass
class PreflightConfig:
    """What `python -m src.preflight` shows and writes beside what it always does."""

    rows: int = _key(COUNT, default=4, text="rows of train that are shown, each part in the colour of what is learned")
    dump: str | None = _key(PATH, default=None, text="a file that gets every encoded row of train as JSON lines")
    measure: bool = _key(
        default=False, text="true: one micro-batch is computed, so that memory and time are measured; loads the weights"
    )


@dataclass
class PredictConfig:
    """In which batches `python -m src.predict` generates, and where it writes."""

    batch_size: int | None = _key(
        AT_LEAST_ONE, default=None, text="prompts at a time; null: training.per_device_eval_batch_size"
    )
    output: str | None = _key(
        PATH, default=None, text="the folder of the predictions; null: predictions/ in the run's folder"
    )

    def folder(self, run_dir: Path) -> Path:
        """Give the folder of the predictions: the one that was asked for, or one in the run's folder."""
        return run_dir / "predictions" if self.output is None else Path(self.output)


ENTRY_SECTIONS: dict[str, type] = {"preflight": PreflightConfig, "predict": PredictConfig}
"""Sections that one entry reads, `python -m src.<name>`, and no other takes; they have their defaults here."""

DeepSpeedConfig = NoDeepSpeedConfig | ZeroConfig  # of which ZeroFileConfig is one
AdapterConfig = NoAdapterConfig | LoraConfig
OptimizerConfig = AdamWConfig | AdafactorConfig | SGDConfig
SchedulerConfig = ConstantScheduleConfig | WarmupScheduleConfig | DecayScheduleConfig
TrackingConfig = MlflowConfig | NoTrackingConfig

SECTIONS: dict[str, type | dict[str, type]] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "adapter": {"none": NoAdapterConfig, "lora": LoraConfig},
    "tokens": TokensConfig,
    "data": DataConfig,
    "optimizer": {
        "adamw": AdamWConfig,
        "adamw_8bit": AdamWConfig,
        "paged_adamw_32bit": AdamWConfig,
        "adafactor": AdafactorConfig,
        "sgd": SGDConfig,
    },
    "scheduler": {
        "linear": DecayScheduleConfig,
        "cosine": DecayScheduleConfig,
        "constant": ConstantScheduleConfig,
        "constant_with_warmup": WarmupScheduleConfig,
    },
    "generation": GenerationConfig,
    "deepspeed": {"none": NoDeepSpeedConfig, "zero": ZeroConfig, "file": ZeroFileConfig},
    "tracking": {"mlflow": MlflowConfig, "none": NoTrackingConfig},
    "training": TrainingConfig,
    "loss": LossConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "export": ExportConfig,
    "runtime": RuntimeConfig,
}
"""Section name -> its dataclass, or its dataclasses by the section's `type`."""


@dataclass
class RunConfig:
    """A whole configuration, checked. What follows from several keys is a property, never written back."""

    name: str
    seed: int
    force: bool
    rerun: str | None
    init_from: str | None
    model: ModelConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig
    tokens: TokensConfig
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    generation: GenerationConfig
    deepspeed: DeepSpeedConfig
    tracking: TrackingConfig
    training: TrainingConfig
    loss: LossConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    runtime: RuntimeConfig

    @property
    def keep_thoughts(self) -> bool:
        """Whether thoughts stay in the completions; without a choice, where tokens has a thought_open."""
        if self.data.thoughts is None:
            return self.tokens.thought_open is not None
        return self.data.thoughts is Thoughts.keep

    @property
    def thought_tags(self) -> tuple[str, str] | None:
        """What opens and closes a thought in the text that the model writes; None where it writes none."""
        opened, closed = self.tokens.thought_open, self.tokens.thought_close
        return (opened, closed) if self.keep_thoughts and opened is not None and closed is not None else None

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that need generated text: evaluation's own, or what the data says."""
        return self.data.metrics if self.evaluation.metrics is None else self.evaluation.metrics


PLACEHOLDER = re.compile(r"\{(\w+)\}")
"""Where a template takes a part of the row: {prompt}."""


def greater_is_better(metric: str) -> bool:
    """Say in which direction a metric of metrics.jsonl improves: losses and perplexities fall, scores rise."""
    return not metric.endswith(("loss", "perplexity"))


def named_sets(files: Any, unnamed: str) -> dict[str, list[str]]:
    """Give validation_files or test_files as set name -> files; a bare list is one set called `unnamed`."""
    if not files:
        return {}
    return dict(files) if isinstance(files, dict) else {unnamed: list(files)}
