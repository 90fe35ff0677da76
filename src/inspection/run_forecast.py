"""What a run will take: steps, tokens, memory, disk and time, from its data and the shapes of its model."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from src.config.schema import MixedPrecision, RunConfig, ZeroConfig
from src.data.dataset import Data
from src.forecast.counting import ForwardCount, ModelCounter, TrainingCount, UncountableError, counted
from src.forecast.disk import DiskForecast, disk_forecast_of_run
from src.forecast.memory import MemoryForecast, Sharding, memory_forecast
from src.forecast.parameters import ModelParameters, parameters_of, with_adapter
from src.forecast.time import TimeItem, counted_time
from src.inspection.findings import Finding, Level
from src.inspection.measurement import Measured, measure_work, measured_times
from src.inspection.workload import Workload, mean_shape, plan_work, widest_of
from src.model.adapters import add_adapter
from src.model.build import with_zero_sizes
from src.model.quantization import put_quantised_layers, quantization_settings
from src.progress import Progress
from src.runtime.precision import device_of
from src.runtime.products import matmul_flops_per_second
from src.util import human_bytes

AUTOCAST = {MixedPrecision.bf16: torch.bfloat16, MixedPrecision.fp16: torch.float16}


@dataclass(frozen=True)
class Forecast:
    """What a run will need of steps, memory, disk and time."""

    work: Workload
    memory: MemoryForecast
    disk: DiskForecast
    time: tuple[TimeItem, ...]
    measured: Measured | None


def forecast_run(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new_ids: Sequence[int],
    data: Data,
    run_dir: Path,
    libraries_bytes: int | None,
    progress: Progress,
    *,
    measure: bool,
) -> Forecast:
    """Forecast what a run will need.

    Args:
        model: as built by `empty_model`, resized to the tokenizer; gets quantised layers and the adapter.
        new_ids: tokens without a pretrained row, which an adapter trains too.
        libraries_bytes: what the process holds before there is a model; None where that is unknown.
    """
    work, device = plan_work(config, data), device_of(config)
    parameters = planned_parameters(config, model, new_ids)
    with progress.work("counting", "memory and operations"):
        counts = count_work(config, model, work, device)
    memory = memory_forecast(
        parameters,
        config.optimizer,
        work.widest,
        counts.step,
        counts.instead,
        uncounted=counts.reason,
        device_type=device.type,
        sharding=sharding_of(with_zero_sizes(config)),
        libraries_bytes=libraries_bytes if device.type == "cpu" else None,
    )
    steps = work.num_steps, work.num_steps_per_epoch
    disk = disk_forecast_of_run(config, parameters, run_dir, *steps, _saved_bytes(tokenizer))
    measured = measure_work(config, tokenizer, new_ids, data, work, progress) if measure else None
    if measured is not None:
        return Forecast(work, memory, disk, measured_times(measured, work, config), measured)
    dtype = torch.float32 if config.training.mixed_precision is MixedPrecision.no else torch.bfloat16
    speed = matmul_flops_per_second(device, dtype)
    names = ("training", "evaluation", "generation") if work.generation else ("training", "evaluation")
    times = tuple(counted_time(name, counts.flops.get(name), speed, counts.reason) for name in names)
    return Forecast(work, memory, disk, times, None)


@dataclass
class Counts:
    """What was counted of a run's work; `reason` says why not, where the model can't be."""

    step: TrainingCount | None = None
    reason: str = ""
    instead: list[tuple[str, ForwardCount]] = field(default_factory=list)  # peaks of moments that are not training
    flops: dict[str, float] = field(default_factory=dict)  # operations of all that one process does, by part of the run


def count_work(config: RunConfig, model: Any, work: Workload, device: torch.device) -> Counts:
    """Count training, evaluation and generation of a model on the meta device, as planned_parameters leaves it."""
    if starts_from_values(config):
        return Counts(reason="DoRA on weights in 4 bits starts from their values")
    counts, autocast = Counts(), AUTOCAST.get(config.training.mixed_precision)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    is_sharded = isinstance(config.deepspeed, ZeroConfig)
    if is_sharded and autocast is torch.bfloat16:
        model, autocast = model.to(torch.bfloat16), None
    try:
        with counted(model, config.loss, device, autocast) as counter:
            accumulation = 2 if is_sharded else config.training.gradient_accumulation_steps
            counts.step = usual = counter.count_training(work.widest, accumulation)
            if (mean := mean_shape(work.shapes)) != work.widest:
                usual = counter.count_training(mean)
            counts.flops["training"] = work.num_micro_batches * usual.flops
            _count_evaluation(counter, counts, work)
            _count_generation(counter, counts, work, config)
    except UncountableError as error:
        counts.reason = str(error)
    counts.flops = {part: flops / config.runtime.world_size for part, flops in counts.flops.items()}
    return counts


def starts_from_values(config: RunConfig) -> bool:
    """Return whether PEFT needs the values of quantised weights to put the adapter in."""
    return config.quantization.load_in_4bit and config.lora is not None and config.lora.use_dora


def _count_evaluation(counter: ModelCounter, counts: Counts, work: Workload) -> None:
    """Count the losses of all evaluations, and the most that one of their batches holds."""
    count, most = cache(counter.count_evaluation), ForwardCount(0, 0)
    if work.evaluations:
        most = count(widest_of(shape for one in work.evaluations for shape in one.shapes))
    flops = sum(one.times * len(one.shapes) * count(mean_shape(one.shapes)).flops for one in work.evaluations)
    counts.instead.append(("evaluation", most))
    counts.flops["evaluation"] = flops


def _count_generation(counter: ModelCounter, counts: Counts, work: Workload, config: RunConfig) -> None:
    """Count all texts as of a mean prompt, and what a batch of the longest prompts holds."""
    if (texts := work.generation) is None:
        return
    new, batch = config.generation.max_new_tokens, texts.batch * (config.generation.num_beams or 1)
    most = counter.count_generation(batch, texts.longest_prompt, new)
    each = most.flops / batch
    if texts.mean_prompt != texts.longest_prompt:
        each = counter.count_generation(1, texts.mean_prompt, new).flops
    counts.instead.append(("generation", most))
    counts.flops["generation"] = each * texts.num_texts


def _saved_bytes(tokenizer: Any) -> int:
    """Return the size of a tokenizer's files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def sharding_of(config: RunConfig) -> Sharding | None:
    """Return how the configuration shards what one process would hold; None where it does not."""
    zero = config.deepspeed
    if not isinstance(zero, ZeroConfig):
        return None
    settings = zero.zero_optimization
    overlaps = settings.get("overlap_comm", False) and zero.stage < 3
    return Sharding(
        zero.stage,
        config.runtime.world_size,
        is_bf16=config.training.mixed_precision is MixedPrecision.bf16,
        optimizer_on_cpu=zero.offloads("optimizer"),
        weights_on_cpu=zero.offloads("param"),
        bucket=int(settings.get("reduce_bucket_size", Sharding.bucket)),
        num_buckets=2 if overlaps else 1,
        max_live=int(settings.get("stage3_max_live_parameters", Sharding.max_live)),
    )


def about_disk(disk: DiskForecast) -> list[Finding]:
    """Return a warning where the disk has no room for the known part of the run's folder."""
    if disk.fits:
        return []
    text = f"the run may write {human_bytes(disk.total.bytes or 0)}, and {human_bytes(disk.free_bytes)} are free in "
    text += f"{disk.place}: checkpoint.keep_last, keep_best and newest_optimizer_only decide what checkpoints take"
    return [Finding(Level.warning, text)]


def planned_parameters(config: RunConfig, model: Any, new_ids: Sequence[int]) -> ModelParameters:
    """Read the parameters of the model that will be trained, and add quantised layers and the adapter to it, in place;
    ModelError where the adapter can't be put into this model.
    """
    parameters = parameters_of(model, config.quantization)
    if config.quantization.is_on and not starts_from_values(config):
        settings = quantization_settings(config.quantization, config.model, config.training.mixed_precision)
        put_quantised_layers(model, settings)
    if not config.adapter.is_on:
        return parameters
    if config.lora is not None:  # other ways to start compute with the weights
        config = replace(config, adapter=replace(config.lora, init_lora_weights=True))
    add_adapter(model, config, new_ids)
    return with_adapter(parameters, model)
