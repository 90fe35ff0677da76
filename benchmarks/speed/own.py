"""Towline's loop, and a bare one with the same batches and the same head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from benchmarks.speed.measuring import StepSize, Stopwatch, draw_adapter
from benchmarks.speed.preparing import checkpoint_of, configure, encoded, epoch
from benchmarks.speed.workloads import Settings, Way, Workload
from src.config.schema import RunConfig
from src.data.batching import Window, collate
from src.data.dataset import build_data
from src.data.tokenizer import load_tokenizer
from src.model.adapters import add_adapter
from src.progress import NO_PROGRESS
from src.runtime.allocation import keep_freed_memory
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest
from src.training.assembly import assemble_model
from src.training.head import ModelWithLoss
from src.training.loop import train
from src.training.optim import parameter_groups
from src.training.padding_free import find_row_bounds
from src.training.state import build_batch_sampler, build_train_state


def towline(
    workload: Workload, way: Way, settings: Settings, folder: Path, batch_size: int, watch: Stopwatch
) -> list[StepSize]:
    """Train as src/run.py does, without what happens between the steps; return what each step has fed."""
    config = configure(workload, settings, folder, way.batching, batch_size, has_kernels=way.has_kernels)
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, StopRequest()) as runtime:
        tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
        data = build_data(config, tokenizer)
        built = assemble_model(config, tokenizer, new_tokens, data, runtime, NO_PROGRESS)
        assert not built.initialised.ids  # else the peers would have other weights
        draw_adapter(built.model, settings.seed)
        state = build_train_state(built.model, data.train, config, runtime, new_tokens.ids)
        sizes = step_sizes(data.train, config)
        watch.start()
        for step in train(state, data.train, config, runtime, tokenizer.pad_token_id):
            watch.step(step.pop_metrics()["train/loss"], is_last=step.is_last)
    return sizes


def bare(
    workload: Workload, way: Way, settings: Settings, folder: Path, batch_size: int, watch: Stopwatch
) -> list[StepSize]:
    """Train with as few lines as torch allows; return what each step has fed."""
    config = configure(workload, settings, folder, way.batching, batch_size)
    rows = encoded(config)
    pad_token_id = load_tokenizer(config.model, config.tokens)[0].pad_token_id
    auto: Any = AutoModelForSeq2SeqLM if workload.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint_of(workload, settings, folder), dtype=getattr(torch, workload.dtype))
    add_adapter(model, config)
    draw_adapter(model, settings.seed)
    keep_freed_memory()  # a setting of the process, not of a loop
    loss_model = ModelWithLoss(model.to(watch.device)).train()
    loss_model.probe_head()
    bounds = find_row_bounds(loss_model, build_batch_sampler(config, rows), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(trained, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=workload.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    autocast = torch.autocast(watch.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16")
    sizes = step_sizes(rows, config)
    watch.start()
    for number, window in enumerate(epoch(rows, config), start=1):
        [(block, sequences)] = window.micro_batches
        batch = collate(block, sequences, pad_token_id, bounds)
        with autocast:
            losses = loss_model(**batch.to(watch.device).inputs())
        loss = losses.objective / batch.num_supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.detach(), is_last=number == len(sizes))
    return sizes


def step_sizes(rows: Any, config: RunConfig) -> list[StepSize]:
    """Return the size of each step of the epoch."""
    is_padding_free = build_batch_sampler(config, rows).is_padding_free
    return [_size(rows, window, is_padding_free=is_padding_free) for window in epoch(rows, config)]


def _size(rows: Any, window: Window, *, is_padding_free: bool) -> StepSize:
    [(_, sequences)] = window.micro_batches
    lengths, targets, supervised = rows.lengths, rows.target_lengths, rows.supervised_lengths()

    def total(values: Any) -> int:
        return int(sum(values[row] for sequence in sequences for row in sequence))

    def padded(values: Any) -> int:
        return len(sequences) * _longest([[int(values[row]) for row in sequence] for sequence in sequences])

    num_tokens = total(lengths) + total(targets)
    num_positions = num_tokens if is_padding_free else padded(lengths) + padded(targets)
    return StepSize(num_tokens, total(supervised), num_positions)


def _longest(sequences: Sequence[Sequence[int]]) -> int:
    return max(sum(sequence) for sequence in sequences)
