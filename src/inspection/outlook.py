"""What a run will take: steps, tokens, memory, disk and time, from its data and the shapes of its model."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from src.config.schema import Device, MixedPrecision, RunConfig, ZeroConfig
from src.data.batching import Plan, Sequences, collate, steps_per_epoch
from src.data.dataset import Data, first_block
from src.data.sets import EncodedSet
from src.forecast.counting import (
    ForwardCount,
    ModelCounter,
    TrainingCount,
    UncountableError,
    counted,
    measure_saved_bytes,
)
from src.forecast.disk import DiskForecast, disk_forecast, most_saves
from src.forecast.memory import MemoryForecast, Sharding, memory_forecast
from src.forecast.parameters import ModelParameters, parameters_of, with_adapter
from src.forecast.time import TimeForecast, counted_time, matmul_flops_per_second, measured_time
from src.inspection import workload
from src.inspection.findings import Finding, Level
from src.model.adapters import add_adapter
from src.model.build import build_model, with_zero_sizes
from src.model.embeddings import fit_embeddings
from src.model.quantization import put_quantised_layers, quantization_settings
from src.runtime.session import start_runtime
from src.runtime.signals import stop_on_signals
from src.tokens import num_token_ids
from src.training.loss import Scores
from src.training.state import batch_plan, num_train_steps, prepare
from src.util import human_bytes


@dataclass(frozen=True)
class Measured:
    """One micro-batch that was really computed, the widest of the first epoch, and one of the usual size."""

    widest_tokens: int
    activation_bytes: int
    peak_memory_bytes: int
    seconds: float
    """Of one of the usual size, forward and backward."""


@dataclass(frozen=True)
class Forecast:
    """What lies ahead; `num_steps_per_epoch` is None where the train set is streamed."""

    num_steps: int
    num_steps_per_epoch: int | None
    num_micro_batches: int
    tokens_fed: int
    tokens_computed: int
    """tokens_fed and padding."""
    memory: MemoryForecast
    disk: DiskForecast
    time: TimeForecast
    measured: Measured | None


@dataclass
class _Counts:
    """What was counted of the run's work; `reason` says why not, where the model can't be."""

    step: TrainingCount | None = None
    reason: str = ""
    instead: list[tuple[str, ForwardCount]] = field(default_factory=list)
    """Peaks of moments that are not training."""
    flops: dict[str, float] = field(default_factory=dict)
    """Operations of all that one process does, by part of the run."""


def outlook(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new_ids: Sequence[int],
    data: Data,
    run_dir: Path,
    libraries_bytes: int | None,
    *,
    measure: bool,
) -> Forecast:
    """Forecast a run from its first epoch's micro-batches, and from the sets that are evaluated.

    Args:
        model: as built by `empty_model`, resized to the tokenizer; gets quantised layers and the adapter.
        new_ids: tokens that have no learned row yet, which an adapter trains too.
        libraries_bytes: what the process holds before there is a model; None where nobody knows.
    """
    train = first_block(data.train)
    processes = config.runtime.world_size
    plan = batch_plan(config, processes)
    per_epoch = None if config.data.streaming else steps_per_epoch(train, plan, config.seed)
    num_steps = num_train_steps(config.training, per_epoch)
    micro_batches = plan.micro_batches(train.lengths, [config.seed, 0])
    work = workload.plan_work(config, data, train, micro_batches, num_steps, per_epoch)
    num_micro_batches = num_steps * plan.accumulation
    if per_epoch is not None:
        num_micro_batches = round(num_steps / per_epoch * len(micro_batches))
    device = device_of(config)
    parameters = planned_parameters(config, model, new_ids)
    counts = _count(config, model, work, num_micro_batches / processes, device)
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
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    disk = disk_forecast(
        parameters,
        run_dir,
        config.optimizer,
        config.checkpoint,
        has_metric=_is_metric_given(config),
        num_saves=most_saves(config.checkpoint, num_steps, per_epoch),
        tokenizer_bytes=tokenizer_bytes,
        merge=config.export.merge,
    )
    measured = _measure(config, tokenizer, new_ids, train, plan, micro_batches, work) if measure else None
    dtype = torch.float32 if config.training.mixed_precision is MixedPrecision.no else torch.bfloat16
    speed = matmul_flops_per_second(device, dtype)
    names = ["training", "evaluation", *(["generation"] if work.generation else [])]
    parts = [counted_time(name, counts.flops.get(name), speed, counts.reason) for name in names]
    if measured is not None:
        count = math.ceil(num_micro_batches / processes)
        parts[0] = measured_time("training", measured.seconds, count, "micro-batches")
    share = num_micro_batches / len(micro_batches)
    return Forecast(
        num_steps,
        per_epoch,
        num_micro_batches,
        tokens_fed=round(share * train.num_tokens),
        tokens_computed=round(share * sum(shape.num_tokens for shape in work.micro_batches)),
        memory=memory,
        disk=disk,
        time=TimeForecast(tuple(parts)),
        measured=measured,
    )


def _count(
    config: RunConfig, model: Any, work: workload.Workload, num_micro_batches: float, device: torch.device
) -> _Counts:
    """Count training, evaluation and generation on fake tensors.

    Args:
        num_micro_batches: that one process computes.
    """
    counts, processes = _Counts(), config.runtime.world_size
    if _starts_from_values(config):
        counts.reason = "DoRA on weights in 4 bits starts from their values"
        return counts
    types = {MixedPrecision.bf16: torch.bfloat16, MixedPrecision.fp16: torch.float16}
    autocast = types.get(config.training.mixed_precision)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if isinstance(config.deepspeed, ZeroConfig) and autocast is torch.bfloat16:
        model, autocast = model.to(torch.bfloat16), None
    try:
        with counted(model, config.loss, device, autocast) as counter:
            is_sharded = isinstance(config.deepspeed, ZeroConfig)
            accumulation = 2 if is_sharded else config.training.gradient_accumulation_steps
            counts.step = counter.count_training(work.widest, accumulation)
            usual = counter.count_training(workload.mean_shape(work.micro_batches)).flops
            counts.flops["training"] = num_micro_batches * usual
            _count_evaluation(counter, counts, work, processes)
            if work.generation is not None:
                texts, new = work.generation, config.generation.max_new_tokens
                counts.instead.append(("generation", counter.count_generation(texts.batch, texts.longest_prompt, new)))
                one = counter.count_generation(1, texts.mean_prompt, new).flops
                counts.flops["generation"] = one * texts.num_texts / processes
    except UncountableError as error:
        counts.reason = str(error)
    return counts


def _count_evaluation(counter: ModelCounter, counts: _Counts, work: workload.Workload, processes: int) -> None:
    """Count the losses of all evaluations, and the most that one of their batches holds."""
    flops, most = 0.0, ForwardCount(0, 0)
    for shapes, times in work.evaluations:
        most = max(most, counter.count_evaluation(max(shapes, key=lambda shape: shape.num_tokens)))
        flops += times * len(shapes) * counter.count_evaluation(workload.mean_shape(shapes)).flops
    counts.instead.append(("evaluation", most))
    counts.flops["evaluation"] = flops / processes


def sharding_of(config: RunConfig) -> Sharding | None:
    """Return how the configuration shares what one process would hold; None where it does not."""
    zero = config.deepspeed
    if not isinstance(zero, ZeroConfig):
        return None
    given = zero.zero_optimization
    overlaps = given.get("overlap_comm", False) and zero.stage < 3
    return Sharding(
        zero.stage,
        config.runtime.world_size,
        is_bf16=config.training.mixed_precision is MixedPrecision.bf16,
        optimizer_on_cpu=zero.offloads("optimizer"),
        weights_on_cpu=zero.offloads("param"),
        bucket=int(given.get("reduce_bucket_size", Sharding.bucket)),
        num_buckets=2 if overlaps else 1,
        max_live=int(given.get("stage3_max_live_parameters", Sharding.max_live)),
    )


def about_disk(disk: DiskForecast) -> list[Finding]:
    """Warn where the disk has no room for what is known of the run's folder."""
    if disk.fits:
        return []
    text = f"the run may write {human_bytes(disk.total.bytes or 0)}, and {human_bytes(disk.free_bytes)} are free in "
    text += f"{disk.place}: checkpoint.keep_last, keep_best and newest_optimizer_only decide what checkpoints take"
    return [Finding(Level.warning, text)]


def _is_metric_given(config: RunConfig) -> bool:
    """Whether an evaluation gives the metric that tells the best checkpoint: its set is one of validation."""
    metric = config.checkpoint.metric_for_best_model
    return any(metric.startswith(f"eval/{name}/") for name in config.data.validation_names())


def planned_parameters(config: RunConfig, model: Any, new_ids: Sequence[int]) -> ModelParameters:
    """Read the parameters of the model that will be trained, and give it quantised layers and the adapter, in place.

    Raises:
        ModelError: where the adapter can't be put into this model.
    """
    parameters = parameters_of(model, config.quantization)
    if config.quantization.is_on and not _starts_from_values(config):
        settings = quantization_settings(config.quantization, config.model, config.training.mixed_precision)
        put_quantised_layers(model, settings)
    if config.lora is None:
        return parameters
    adapter = replace(config.lora, init_lora_weights=True)  # other ways to start compute with the weights
    add_adapter(model, replace(config, adapter=adapter), new_ids)
    return with_adapter(parameters, model)


def _starts_from_values(config: RunConfig) -> bool:
    """Return whether PEFT needs the values of quantised weights to put the adapter in."""
    return config.quantization.load_in_4bit and config.lora is not None and config.lora.use_dora


def resident_bytes() -> int:
    """Return how much memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def device_of(config: RunConfig) -> torch.device:
    """Return the device that a run would take here."""
    use_cuda = config.runtime.device is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def _measure(
    config: RunConfig,
    tokenizer: Any,
    new_ids: Sequence[int],
    train: EncodedSet,
    plan: Plan,
    micro_batches: list[Sequences],
    work: workload.Workload,
) -> Measured:
    """Compute the widest micro-batch, forward and backward, then time one of the usual size."""
    with (
        stop_on_signals() as stop,
        start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime,
    ):
        model = build_model(config, runtime.device)
        fit_embeddings(model, num_token_ids(tokenizer), config.tokens.pad_to_multiple_of)
        add_adapter(model, config, new_ids)
        state = prepare(model, train, config, runtime)
        state.scored.train()
        pad = tokenizer.pad_token_id or 0
        batch = collate(train, micro_batches[work.widest_index], pad, flat=state.is_flat).to(runtime.device)
        widest_tokens = batch.input_ids.numel()
        scores: list[Scores] = []
        saved = measure_saved_bytes(lambda: scores.append(state.scored(**batch.inputs())), state.model.parameters())
        runtime.backward(scores[0].objective)
        by_size = sorted(range(len(micro_batches)), key=lambda i: work.micro_batches[i].num_tokens)
        batch = collate(train, micro_batches[by_size[len(by_size) // 2]], pad, flat=state.is_flat).to(runtime.device)
        seconds = []
        for _ in range(3):
            runtime.synchronize()
            started = time.perf_counter()
            runtime.backward(state.scored(**batch.inputs()).objective)
            runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        return Measured(widest_tokens, saved, runtime.peak_memory_bytes(), min(seconds))
