"""Everything that changes while a run trains, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import Attention, Batching, RunConfig, TrainingConfig
from src.data.batching import Plan, steps_per_epoch
from src.data.dataset import TrainSet
from src.data.sets import EncodedSet
from src.errors import ModelError
from src.model.build import num_parameters
from src.runtime.session import Runtime
from src.tokens import WatchedRows, embedding_parameters
from src.training.head import ScoredModel
from src.training.optim import build_optimizer, build_schedule


@dataclass
class TrainState:
    """The model as it is trained, its optimizer and schedule, and how far they are."""

    scored: nn.Module
    """The ScoredModel as Accelerate wrapped it: called for losses."""
    model: Any
    """The transformers model inside: for generation and export."""
    optimizer: Any
    schedule: LambdaLR
    plan: Plan
    is_flat: bool
    """Whether packed rows go into one sequence without padding, as FlashAttention takes them."""
    num_steps: int
    steps_per_epoch: int | None
    """None where the train set is streamed: nobody knows its end before."""
    uses_full_logits: bool
    new_rows: WatchedRows
    """The rows of the configuration's tokens."""
    step: int = 0
    tokens_seen: int = 0
    examples_seen: int = 0
    train_seconds: float = 0.0

    def totals(self) -> dict[str, float]:
        """What was done in all, and to how many parameters.

        train_seconds are those spent in steps, without evaluation, samples and export.
        """
        total, trained = num_parameters(self.model)
        return {
            "num_parameters": total,
            "num_trained_parameters": trained,
            "steps": self.step,
            "examples_seen": self.examples_seen,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "tokens_per_second": self.tokens_seen / self.train_seconds if self.train_seconds else 0.0,
        }


def batch_plan(config: RunConfig) -> Plan:
    """Take from the configuration how rows become micro-batches."""
    training = config.training
    return Plan(
        config.data.batching,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        config.data.max_seq_length,
    )


def num_train_steps(config: TrainingConfig, per_epoch: int | None) -> int:
    """Give the number of optimizer steps of the whole run."""
    if config.max_train_steps:
        return config.max_train_steps
    assert per_epoch is not None  # the gate asks for max_train_steps where the train set is streamed
    return max(1, math.ceil(config.num_train_epochs * per_epoch))


def prepare(
    model: Any,
    train: TrainSet,
    config: RunConfig,
    runtime: Runtime,
    new_tokens: Mapping[str, int] = MappingProxyType({}),
) -> TrainState:
    """Place everything on the device and choose how the head is computed.

    Args:
        new_tokens: the configuration's tokens and their ids, to be watched.

    Raises:
        ModelError: where the weights' type does not go with the precision, or rows can't be packed for this model.
    """
    plan = batch_plan(config)
    per_epoch = steps_per_epoch(train, plan, config.seed) if isinstance(train, EncodedSet) else None
    num_steps = num_train_steps(config.training, per_epoch)
    if runtime.scales_gradients and any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad):
        raise ModelError("fp16 mixed precision scales gradients of float32 weights only: model.dtype=float32")
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    scored = ScoredModel(model, config.loss).to(runtime.device)
    is_packed = config.data.batching is Batching.packed
    is_flat = is_packed and config.model.attn_implementation is Attention.flash_attention_2
    with runtime.autocast():
        scored.choose_head()
        if is_packed:
            scored.check_packing(flat=is_flat)
    optimizer = build_optimizer(config.optimizer, scored.parameters(), embedding_parameters(model))
    schedule = build_schedule(config.scheduler, optimizer, num_steps)
    wrapped, optimizer = runtime.prepare(scored, optimizer)
    return TrainState(
        wrapped,
        model,
        optimizer,
        schedule,
        plan,
        is_flat,
        num_steps,
        per_epoch,
        scored.uses_full_logits,
        WatchedRows(model, new_tokens),
    )
