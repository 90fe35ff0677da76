"""What a run will take: steps, tokens, memory, disk and time, from its data and the shapes of its model."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.config.schema import Batching, Device, LoraConfig, MixedPrecision, RunConfig, ZeroConfig
from src.data.batching import Plan, Sequences, collate, steps_per_epoch
from src.data.sets import EncodedSet
from src.errors import human_bytes
from src.forecast import (
    Architecture,
    DiskForecast,
    MemoryForecast,
    Sharing,
    TimeForecast,
    architecture_of,
    disk_forecast,
    matmul_flops_per_second,
    measure_saved_bytes,
    measured_time_forecast,
    memory_forecast,
    most_saves,
    time_forecast,
    with_adapter,
)
from src.inspection.findings import Finding, Level
from src.model.adapters import add_adapter
from src.model.build import build_model, with_zero_sizes
from src.model.embeddings import embedding_matrices, fit_embeddings
from src.runtime.session import start_runtime
from src.runtime.signals import stop_on_signals
from src.tokens import num_token_ids
from src.training.loss import Scores
from src.training.state import batch_plan, num_train_steps, prepare


@dataclass(frozen=True)
class Measured:
    """One micro-batch that was really computed, the widest of the first epoch, and one of the usual size."""

    widest_tokens: int
    activation_bytes: int
    peak_memory_bytes: int
    seconds: float
    """Of one of the usual size, forward and backward."""


@dataclass(frozen=True)
class Outlook:
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


def outlook(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new_ids: Sequence[int],
    train: EncodedSet,
    run_dir: Path,
    *,
    measure: bool,
) -> Outlook:
    """Reckon with the first epoch's micro-batches.

    Args:
        model: as built by `empty_model`, resized to the tokenizer; gets the adapter.
        new_ids: tokens that have no learned row yet, which an adapter trains too.
        train: the train set, or the first block of one that is streamed.
    """
    processes = config.runtime.world_size
    plan = batch_plan(config, processes)
    per_epoch = None if config.data.streaming else steps_per_epoch(train, plan, config.seed)
    num_steps = num_train_steps(config.training, per_epoch)
    micro_batches = plan.micro_batches(train.lengths, [config.seed, 0])
    shapes = np.array([_shape(train, sequences) for sequences in micro_batches])
    computed = shapes[:, 0] * shapes[:, 1]
    num_micro_batches = num_steps * plan.accumulation
    if per_epoch is not None:
        num_micro_batches = round(num_steps / per_epoch * len(micro_batches))
    widest = int(computed.argmax())
    batch, seq = (int(number) for number in shapes[widest])
    supervised = train.supervised_lengths()
    architecture = planned_architecture(config, model, new_ids)
    device = device_of(config)
    gradient_checkpointing = config.model.gradient_checkpointing
    memory = memory_forecast(
        architecture,
        config.optimizer,
        config.training.mixed_precision,
        batch=batch,
        seq=seq,
        num_supervised=int(max(supervised[_rows(sequences)].sum() for sequences in micro_batches)),
        is_packed=config.data.batching is Batching.packed,
        device_type=device.type,
        uses_full_logits=_changes_logits(model.config),
        gradient_checkpointing=gradient_checkpointing,
        sharing=sharing_of(with_zero_sizes(config)),
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    disk = disk_forecast(
        architecture,
        run_dir,
        config.optimizer,
        config.checkpoint,
        has_metric=_is_metric_given(config),
        num_saves=most_saves(config.checkpoint, num_steps, per_epoch),
        tokenizer_bytes=tokenizer_bytes,
        merge=config.export.merge,
    )
    measured = _measure(config, tokenizer, new_ids, train, plan, micro_batches, widest) if measure else None
    share = num_micro_batches / len(micro_batches) / processes
    if measured is None:
        dtype = torch.float32 if config.training.mixed_precision is MixedPrecision.no else torch.bfloat16
        ahead = time_forecast(
            architecture,
            num_tokens=round(share * int(computed.sum())),
            num_supervised=round(share * int(supervised.sum())),
            seq=int(shapes[:, 1].mean()),
            flops_per_second=matmul_flops_per_second(device, dtype),
            gradient_checkpointing=gradient_checkpointing,
        )
    else:
        ahead = measured_time_forecast(measured.seconds, math.ceil(num_micro_batches / processes))
    return Outlook(
        num_steps,
        per_epoch,
        num_micro_batches,
        tokens_fed=round(share * processes * train.num_tokens),
        tokens_computed=round(share * processes * int(computed.sum())),
        memory=memory,
        disk=disk,
        time=ahead,
        measured=measured,
    )


def sharing_of(config: RunConfig) -> Sharing | None:
    """Say how the configuration shares out what one process would hold."""
    zero = config.deepspeed
    if not isinstance(zero, ZeroConfig):
        return None
    given = zero.zero_optimization
    overlaps = given.get("overlap_comm", False) and zero.stage < 3
    return Sharing(
        zero.stage,
        config.runtime.world_size,
        is_bf16=config.training.mixed_precision is MixedPrecision.bf16,
        optimizer_on_cpu=zero.offloads("optimizer"),
        weights_on_cpu=zero.offloads("param"),
        bucket=int(given.get("reduce_bucket_size", Sharing.bucket)),
        num_buckets=2 if overlaps else 1,
        max_live=int(given.get("stage3_max_live_parameters", Sharing.max_live)),
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


def planned_architecture(config: RunConfig, model: Any, new_ids: Sequence[int]) -> Architecture:
    """Read the sizes of the model that will be trained: its weights as they are loaded, and the adapter, put in here.

    Raises:
        ModelError: where the adapter can't be put into this model.
    """
    architecture = architecture_of(model, model.config, config.quantization)
    if not isinstance(config.adapter, LoraConfig):
        return architecture
    adapter = replace(config.adapter, init_lora_weights=True)  # other ways to start compute with the weights
    matrices = [matrix.module for matrix in embedding_matrices(model)]
    add_adapter(model, adapter, config.model, new_ids, matrices, is_merged=config.export.merge)
    return with_adapter(architecture, model)


def _changes_logits(config: Any) -> bool:
    """Whether a model is known to put something between head and logits, so that all of them are computed."""
    text = config.get_text_config()
    changes = any(getattr(text, key, None) for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    return bool(config.is_encoder_decoder) or changes


def _rows(sequences: Sequences) -> list[int]:
    return [row for sequence in sequences for row in sequence]


def _shape(rows: EncodedSet, sequences: Sequences) -> tuple[int, int]:
    """Return how many sequences a micro-batch has, and how long its longest is, targets included."""
    lengths = rows.lengths + rows.target_lengths
    return len(sequences), max(int(lengths[sequence].sum()) for sequence in sequences)


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
    widest: int,
) -> Measured:
    """Compute the widest micro-batch, forward and backward, then time one of the usual size."""
    with (
        stop_on_signals() as stop,
        start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime,
    ):
        model = build_model(config, runtime.device)
        fit_embeddings(model, num_token_ids(tokenizer), config.tokens.pad_to_multiple_of)
        matrices = [matrix.module for matrix in embedding_matrices(model)]
        add_adapter(model, config.adapter, config.model, new_ids, matrices, is_merged=config.export.merge)
        state = prepare(model, train, config, runtime)
        state.scored.train()
        pad = tokenizer.pad_token_id or 0
        batch = collate(train, micro_batches[widest], pad, flat=state.is_flat).to(runtime.device)
        widest_tokens = batch.input_ids.numel()
        scores: list[Scores] = []
        saved = measure_saved_bytes(lambda: scores.append(state.scored(**batch.inputs())), state.model.parameters())
        runtime.backward(scores[0].objective)
        usual = sorted(micro_batches, key=lambda sequences: int(np.prod(_shape(train, sequences))))
        batch = collate(train, usual[len(usual) // 2], pad, flat=state.is_flat).to(runtime.device)
        seconds = []
        for _ in range(3):
            runtime.synchronize()
            started = time.perf_counter()
            runtime.backward(state.scored(**batch.inputs()).objective)
            runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        return Measured(widest_tokens, saved, runtime.peak_memory_bytes(), min(seconds))
