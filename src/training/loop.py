"""The loop: one optimizer step after the other, each yielded when it is done; what happens in between is run.py's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from src.config.schema import RunConfig
from src.data.batching import Batch, collate, windows
from src.data.dataset import TrainSet
from src.data.sets import EncodedSet
from src.errors import NonFiniteLossError, listed
from src.runtime.session import Runtime
from src.training.loss import step_objective
from src.training.state import TrainState


@dataclass
class Meter:
    """Sums since the last line of metrics, so that a line holds means over all that happened since the one before."""

    nll: float = 0.0
    num_supervised: float = 0.0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean nats per supervised token since the last line."""
        return self.nll / self.num_supervised if self.num_supervised else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def read(self) -> dict[str, float]:
        """Give the means since the last line, and start anew."""
        means = {"train/loss": self.loss, "perf/tokens_per_second": self.tokens_per_second}
        self.nll, self.num_supervised, self.num_tokens, self.seconds = 0.0, 0.0, 0, 0.0
        return means


@dataclass
class Step:
    """One optimizer update that is over. `number` counts from 1."""

    number: int
    epoch: int
    is_last: bool
    ends_epoch: bool
    lr: float
    grad_norm: float
    meter: Meter = field(repr=False)

    @property
    def loss(self) -> float:
        return self.meter.loss

    @property
    def tokens_per_second(self) -> float:
        return self.meter.tokens_per_second

    def is_due(self, every: int | str | None) -> bool:
        """Whether something that happens every N steps, or every epoch, or never (None), happens after this step."""
        if every is None:
            return False
        return self.ends_epoch if every == "epoch" else self.number % int(every) == 0

    def collect(self) -> dict[str, float]:
        """Give the metrics since they were last collected, and start to sum anew."""
        return self.meter.read() | {"train/lr": self.lr, "train/grad_norm": self.grad_norm}


def train(state: TrainState, rows: TrainSet, config: RunConfig, runtime: Runtime, pad_token_id: int) -> Iterator[Step]:
    """Train to the end, yielding every step; `state` is up to date whenever a step is yielded.

    Raises:
        NonFiniteLossError: before the weights are touched by it.
        Interrupted: where a signal asked for it; the step that was under way is given up.
    """
    meter = Meter()
    coming = windows(rows, state.plan, config.seed)
    while state.step < state.num_steps:
        window = next(coming)
        started = time.perf_counter()
        batches = [
            (block, collate(block, sequences, pad_token_id, flat=state.is_flat))
            for block, sequences in window.micro_batches
        ]
        lr, grad_norm = step_once(state, batches, config, runtime, meter)
        seconds = time.perf_counter() - started
        meter.seconds += seconds
        state.train_seconds += seconds
        yield Step(
            number=state.step,
            epoch=window.epoch,
            is_last=state.step >= state.num_steps,
            ends_epoch=window.ends_epoch,
            lr=lr,
            grad_norm=grad_norm,
            meter=meter,
        )


def step_once(
    state: TrainState,
    batches: list[tuple[EncodedSet, Batch]],
    config: RunConfig,
    runtime: Runtime,
    meter: Meter,
) -> tuple[float, float]:
    """Do one optimizer update over a window of micro-batches, and give its learning rate and gradient norm.

    Args:
        batches: each with the set that its row numbers are of.
    """
    state.scored.train()
    (num_supervised,) = runtime.sum([sum(batch.num_supervised for _, batch in batches)])
    sums = []
    for i, (_, batch) in enumerate(batches):
        runtime.stop.check()
        batch = batch.to(runtime.device)
        with runtime.accumulate(state.scored, last=i == len(batches) - 1):
            nll = state.scored(**batch.inputs())
            share = step_objective(nll, num_supervised, config.loss.reduction)
            runtime.backward(share * runtime.num_processes)  # processes average their gradients; the step sums them
        sums.append(nll.detach())
    nlls = torch.stack(sums).tolist()
    if bad := [one for nll, one in zip(nlls, batches, strict=True) if not math.isfinite(nll)]:
        value = next(nll for nll in nlls if not math.isfinite(nll))
        raise _not_finite(f"the loss became {value}", bad, state.step + 1)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    grad_norm = float(runtime.clip_grad_norm(parameters, config.training.max_grad_norm))
    if not math.isfinite(grad_norm) and not runtime.scales_gradients:
        raise _not_finite(f"the gradient's norm became {grad_norm}", batches, state.step + 1)
    lr = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if not runtime.step_was_skipped():
        state.schedule.step()
    state.step += 1
    nll_sum, num_tokens, num_rows = runtime.sum(
        [sum(nlls), sum(batch.num_tokens for _, batch in batches), sum(len(batch.rows) for _, batch in batches)]
    )
    meter.nll += nll_sum
    meter.num_supervised += num_supervised
    meter.num_tokens += int(num_tokens)
    state.tokens_seen += int(num_tokens)
    state.examples_seen += int(num_rows)
    return lr, grad_norm


def _not_finite(what: str, batches: list[tuple[EncodedSet, Batch]], step: int) -> NonFiniteLossError:
    places = [rows.place(index) for rows, batch in batches for index in batch.rows]
    return NonFiniteLossError(
        f"{what} in step {step}. Either these rows are extreme, or a learning rate that is too high has spoilt the "
        f"weights in the steps before:\n{listed(places)}"
    )
