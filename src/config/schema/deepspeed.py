"""conf/deepspeed: DeepSpeed's own JSON keys, by option or in a file of the user's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from src.config.schema import checks
from src.config.schema.checks import Check, Keys
from src.config.schema.fields import DottedConfig, Impact, Verdict, key, type_key

AUTO_OR_COUNT = Check("a whole number of at least 1, or auto", lambda v: v == "auto" or checks.AT_LEAST_ONE.holds(v))
AUTO_OR_NUMBER = Check("a number of at least 0, or auto", lambda v: v == "auto" or checks.NOT_NEGATIVE.holds(v))
MAPPING = Check("a mapping of DeepSpeed's keys", lambda v: isinstance(v, dict))
SWITCH = Check("true or false", lambda v: isinstance(v, bool))
SIZE = Check(
    "a whole number of at least 0",
    lambda v: checks.COUNT.holds(int(v) if isinstance(v, float) and v.is_integer() else v) and v is not None,
)
"""A whole number, which may also be written as 5e8."""


OTHER_ORDER = "sums in another order"


def _impact_of_sharding(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Return the impact of sharding or not: an option and a user's file that say the same are the same."""
    if {before[key], now[key]} <= {"zero", "file"}:
        return Impact.harmless, ""
    return Impact.rounding, OTHER_ORDER


@dataclass
class NoDeepSpeedConfig:
    """conf/deepspeed/none.yaml: every process holds the whole model."""

    type: str = type_key("deepspeed", ["none"], resume=_impact_of_sharding)

    stage = 0


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
    "nvme_path": checks.PathCheck("a folder, or null", lambda v: v is None or isinstance(v, str)),
    "buffer_count": SIZE,
    "pin_memory": SWITCH,
}
ZERO_KEYS: Keys = {
    "stage": Check("1, 2 or 3 (deepspeed=none shards nothing)", lambda v: checks.is_int(v) and v in (1, 2, 3)),
    **dict.fromkeys(_SIZES.split(), SIZE),
    **dict.fromkeys(WIDTH_SIZES, AUTO_OR_SIZE),
    **dict.fromkeys(_SWITCHES.split(), SWITCH),
    "overlap_comm": Check("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "offload_param": {**_OFFLOAD, "buffer_size": SIZE, "max_in_cpu": SIZE},
    "offload_optimizer": {
        **_OFFLOAD,
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), SWITCH),
        **dict.fromkeys(("ratio", "cpuadam_cores_perc"), checks.FRACTION),
    },
    "zenflow": Check("a mapping, or null", lambda v: v is None or isinstance(v, dict)),
    "leaf_module": MAPPING,
}
"""The keys of `zero_optimization` in DeepSpeed 0.19."""
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
    "loss_scale": checks.NOT_NEGATIVE,
}


@dataclass
class ZeroConfig:
    """conf/deepspeed/zero1.yaml and its like: DeepSpeed's own JSON; what another section owns is `auto`."""

    type: str = type_key("deepspeed", ["zero"], resume=_impact_of_sharding)
    train_batch_size: Any = key(AUTO_OR_COUNT, resume=Impact.harmless)
    train_micro_batch_size_per_gpu: Any = key(AUTO_OR_COUNT, resume=Impact.harmless)
    gradient_accumulation_steps: Any = key(AUTO_OR_COUNT, resume=Impact.harmless)
    gradient_clipping: Any = key(AUTO_OR_NUMBER, resume=Impact.harmless)
    bf16: Any = key(MAPPING, resume=Impact.rounding, why=OTHER_ORDER, inner=BF16_KEYS)
    fp16: Any = key(MAPPING, resume=Impact.rounding, why=OTHER_ORDER, inner=FP16_KEYS)
    communication_data_type: str | None = key(
        Check("fp32, fp16, bf16 or null", lambda v: v in (None, "fp32", "fp16", "bf16")),
        resume=Impact.rounding,
        why=OTHER_ORDER,
    )
    wall_clock_breakdown: bool = key(resume=Impact.harmless)
    zero_optimization: Any = key(
        Check("a mapping of DeepSpeed's keys, with a stage", lambda v: isinstance(v, dict) and "stage" in v),
        resume=Impact.rounding,
        why=OTHER_ORDER,
        inner=ZERO_KEYS,
    )

    @property
    def stage(self) -> int:
        """What is sharded: optimizer state from 1 on, gradients from 2 on, weights with 3."""
        return int(self.zero_optimization["stage"])

    def offloads(self, what: str) -> bool:
        """Return whether the state of `optimizer` or `param` is kept on another device than it is used on."""
        return (self.zero_optimization.get(f"offload_{what}") or {}).get("device", "none") != "none"


_AUTO_OR_BETAS = Check(f"{checks.BETAS.allowed}, or auto", lambda v: v == "auto" or checks.BETAS.holds(v))
DEEPSPEED_OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "sgd": "sgd"}
"""DeepSpeed's optimizer, in lower case -> optimizer.type; its Adam is AdamW unless adam_w_mode is false."""
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
        "dampening": Check("0", lambda v: checks.is_number(v) and v == 0),
    },
    "legacy_fusion": SWITCH,
}
DEEPSPEED_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedule -> scheduler.type, as transformers maps them."""
DEEPSPEED_SCHEDULER_KEYS: Keys = {
    "type": Check(
        f"one of {', '.join(f'{theirs} (scheduler={ours})' for theirs, ours in DEEPSPEED_SCHEDULES.items())}",
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

    type: str = type_key("deepspeed", ["file"], resume=_impact_of_sharding)
    config_file: str | None = key(checks.PATH, resume=Impact.harmless)
    sha256: str | None = key(resume=Impact.harmless)
    optimizer: Any = key(MAPPING, resume=Impact.harmless, inner=DEEPSPEED_OPTIMIZER_KEYS)
    scheduler: Any = key(MAPPING, resume=Impact.harmless, inner=DEEPSPEED_SCHEDULER_KEYS)
    aio: Any = key(MAPPING, resume=Impact.harmless, inner=AIO_KEYS)


DeepSpeedConfig = NoDeepSpeedConfig | ZeroConfig  # of which ZeroFileConfig is one
