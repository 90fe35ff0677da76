"""Rules of `deepspeed`, most of them with the sections whose subject DeepSpeed's keys are too."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from src.config import schema
from src.config.deepspeed import GATHER
from src.config.problems import Problem
from src.config.rules.rule import Problems, applies_to
from src.config.schema import ZeroConfig, ZeroFileConfig
from src.config.schema.deepspeed import DEEPSPEED_OPTIMIZERS, DEEPSPEED_SCHEDULES
from src.util import in_words


@applies_to("run")
def zero_weights_can_be_exported(deepspeed: schema.DeepSpeedConfig) -> Problems:
    if not isinstance(deepspeed, ZeroConfig):
        return
    if deepspeed.stage == 3 and deepspeed.zero_optimization.get(GATHER) is not True:
        yield Problem(f"deepspeed.zero_optimization.{GATHER}", "must be true, or nothing could be exported", False)


@applies_to("run")
def zero_agrees_with_the_rest(
    deepspeed: schema.DeepSpeedConfig, training: schema.TrainingConfig, runtime: schema.RuntimeConfig
) -> Problems:
    """What another section owns may be `auto`, or the same."""
    if not isinstance(deepspeed, ZeroConfig):
        return
    size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    processes = processes_of(runtime)
    product = f"{size} rows x {accumulation} micro-batches x {processes} processes"
    owned: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (size, "training.per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "training.gradient_accumulation_steps"),
        "gradient_clipping": (training.max_grad_norm or 0, "training.max_grad_norm"),
        "train_batch_size": (size * accumulation * processes, product),
    }
    for key, (value, owner) in owned.items():
        if getattr(deepspeed, key) not in ("auto", value):
            yield Problem(f"deepspeed.{key}", f"{owner} says {value}: auto, or the same", getattr(deepspeed, key))
    for name in ("bf16", "fp16"):
        is_on = training.mixed_precision.value == name
        if (given := getattr(deepspeed, name).get("enabled", "auto")) not in ("auto", is_on):
            reason = f"training.mixed_precision = {training.mixed_precision.value}: auto, or {str(is_on).lower()}"
            yield Problem(f"deepspeed.{name}.enabled", reason, given)


def processes_of(runtime: schema.RuntimeConfig) -> int:
    """Count the processes of all machines, also where another launcher starts them."""
    started = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return int(started) if started.isdecimal() else runtime.world_size


@applies_to("run")
def a_deepspeed_file_agrees_with_the_optimizer(
    deepspeed: schema.DeepSpeedConfig, optimizer: schema.OptimizerConfig
) -> Problems:
    if not isinstance(deepspeed, ZeroFileConfig):
        return
    kind, params = deepspeed.optimizer.get("type"), deepspeed.optimizer.get("params") or {}
    if kind is not None and DEEPSPEED_OPTIMIZERS[kind.lower()] != optimizer.type:
        yield _unlike("optimizer.type", kind, "optimizer.type", optimizer.type)
    for key, value in params.items():
        owned = getattr(optimizer, key, None)
        if key in ("lr", "betas", "eps", "weight_decay", "momentum") and value not in ("auto", owned):
            yield _unlike(f"optimizer.params.{key}", value, f"optimizer.{key}", owned)


@applies_to("run")
def a_deepspeed_file_agrees_with_the_schedule(
    deepspeed: schema.DeepSpeedConfig,
    optimizer: schema.OptimizerConfig,
    scheduler: schema.SchedulerConfig,
    training: schema.TrainingConfig,
) -> Problems:
    if not isinstance(deepspeed, ZeroFileConfig):
        return
    kind, params = deepspeed.scheduler.get("type"), deepspeed.scheduler.get("params") or {}
    if kind is not None and (ours := DEEPSPEED_SCHEDULES[kind]) != scheduler.type:
        reason = f"scheduler.type = {scheduler.type}, and that is {ours} here: scheduler={ours}"
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


@applies_to("run")
def zero_can_shard(
    deepspeed: schema.DeepSpeedConfig,
    optimizer: schema.OptimizerConfig,
    quantization: schema.QuantizationConfig,
    adapter: schema.AdapterConfig,
    training: schema.TrainingConfig,
) -> Problems:
    if not isinstance(deepspeed, ZeroConfig):
        return
    stage = f"deepspeed.zero_optimization.stage = {deepspeed.stage}"
    smaller = "deepspeed=zero2"
    if isinstance(deepspeed, ZeroFileConfig):
        stage, smaller = f"{stage} in {deepspeed.config_file}", "stage 2 there"
    if training.mixed_precision is schema.MixedPrecision.fp16:
        reason = "deepspeed's scaling of fp16 losses is not kept in checkpoints: bf16, or deepspeed=none"
        yield Problem("training.mixed_precision", reason, training.mixed_precision.value)
    if deepspeed.stage == 3 and isinstance(adapter, schema.LoraConfig):
        reason = f"needs whole matrices, which are sharded ({stage}): {smaller}"
        if adapter.use_dora:
            yield Problem("adapter.use_dora", reason, adapter.use_dora)
        if adapter.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            yield Problem("adapter.init_lora_weights", reason, adapter.init_lora_weights)
    if optimizer.type not in ("adamw", "sgd"):
        yield Problem("optimizer.type", f"deepspeed shards the state of adamw and sgd ({stage})", optimizer.type)
    if deepspeed.stage == 3 and quantization.is_on:
        reason = f"weights in 4 or 8 bits can't be sharded ({stage}): {smaller}"
        yield Problem("quantization", reason, has_value=False)
    if deepspeed.offloads("optimizer"):
        if optimizer.type != "adamw":
            yield Problem("optimizer.type", "offloaded updates are AdamW's: deepspeed without offload", optimizer.type)
        places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
        if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool, path=places) is None]:
            reason = f"DeepSpeed compiles its update on the CPU, and {in_words(missing)} can't be found here"
            yield Problem("deepspeed.zero_optimization.offload_optimizer", reason, has_value=False)
