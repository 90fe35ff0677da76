"""Everything that changes while a run trains, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config.schema import RunConfig, TrainingConfig
from src.data.batching import collate, steps_per_epoch
from src.data.dataset import EncodedSet
from src.errors import ModelError
from src.runtime.session import Runtime
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
    num_steps: int
    steps_per_epoch: int
    uses_full_logits: bool
    step: int = 0
    tokens_seen: int = 0
    examples_seen: int = 0
    train_seconds: float = 0.0

    def totals(self) -> dict[str, float]:
        """What was done in all; train_seconds are those spent in steps, without evaluation, samples and export."""
        return {
            "steps": self.step,
            "examples_seen": self.examples_seen,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "tokens_per_second": self.tokens_seen / self.train_seconds if self.train_seconds else 0.0,
        }


def num_train_steps(config: TrainingConfig, per_epoch: int) -> int:
    """Give the number of optimizer steps of the whole run."""
    return config.max_train_steps or max(1, math.ceil(config.num_train_epochs * per_epoch))


def prepare(model: Any, train: EncodedSet, config: RunConfig, runtime: Runtime) -> TrainState:
    """Place everything on the device and choose how the head is computed.

    Raises:
        ModelError: where the weights' type does not go with the precision.
    """
    training = config.training
    per_epoch = steps_per_epoch(len(train), training.per_device_train_batch_size, training.gradient_accumulation_steps)
    num_steps = num_train_steps(training, per_epoch)
    if runtime.scales_gradients and any(p.dtype != torch.float32 for p in model.parameters()):
        raise ModelError("fp16 mixed precision scales gradients of float32 weights only: model.dtype=float32")
    scored = ScoredModel(model).to(runtime.device)
    shortest = min(range(len(train)), key=lambda i: len(train[i][0]))
    row = collate(train, [shortest], pad_token_id=0).to(runtime.device)
    scored.choose_head(row.input_ids)
    optimizer = build_optimizer(config.optimizer, scored.parameters())
    schedule = build_schedule(config.scheduler, optimizer, num_steps)
    wrapped, optimizer = runtime.prepare(scored, optimizer)
    return TrainState(wrapped, model, optimizer, schedule, num_steps, per_epoch, scored.uses_full_logits)
