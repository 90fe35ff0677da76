"""The loop: one optimizer step after the other, each yielded when it is done; what happens in between is run.py's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from src.config.schema import Reduction, RunConfig
from src.data.batching import Batch, collate, windows
from src.data.dataset import TrainSet
from src.data.sets import EncodedSet
from src.errors import NonFiniteLossError
from src.runtime.session import Runtime
from src.training.loss import step_objective, sum_of_weights
from src.training.state import StepResult, StepStats, TrainState
from src.util import listed


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with the set that its row numbers are of, and whether it counts: one that does not only keeps this
    process in step with the others."""

    rows: EncodedSet
    batch: Batch
    counts: bool = True


@dataclass
class Step:
    """One optimizer update that is over. `number` counts from 1."""

    update: StepResult
    is_last: bool
    meter: StepStats = field(repr=False)
    with_objective: bool = False

    @property
    def number(self) -> int:
        return self.update.number

    @property
    def epoch(self) -> int:
        return self.update.epoch

    @property
    def lr(self) -> float:
        return self.update.lr

    @property
    def loss(self) -> float:
        return self.meter.loss

    @property
    def tokens_per_second(self) -> float:
        return self.meter.tokens_per_second

    @property
    def warnings(self) -> list[str]:
        """What the first step shows of a run that can't learn."""
        if self.number > 1 or self.update.grad_norm != 0:
            return []
        return [
            "no trained parameter got a gradient in step 1, so nothing was learned: what is trained "
            "(adapter.target_modules) takes no part in the loss, or the loss weighs every token 0"
        ]

    def is_due(self, every: int | str | None) -> bool:
        """Return whether something that happens every N steps, or every epoch, or never (None), happens after it."""
        return self.update.is_due(every)

    def collect(self) -> dict[str, float]:
        """Give the metrics since they were last collected, and start to sum anew."""
        means = self.meter.read(with_objective=self.with_objective)
        return means | {"train/lr": self.update.lr, "train/grad_norm": self.update.grad_norm}


def train(state: TrainState, rows: TrainSet, config: RunConfig, runtime: Runtime, pad_token_id: int) -> Iterator[Step]:
    """Train to the end, yielding every step; `state` is that after the step whenever one is yielded.

    A run that goes on from a checkpoint yields that one's step first, where it was not over yet.

    Raises:
        NonFiniteLossError: before the weights are touched by it.
        Interrupted: where something asked for it; the step that was under way is given up, and `state` is as if it had
            not begun.
    """
    loss = config.loss
    is_another = loss.reduction is Reduction.sum or loss.thought_weight != 1 or loss.label_smoothing > 0
    state.rng = runtime.rng_state()
    if state.last is not None and not state.is_over:
        yield Step(state.last, state.step >= state.num_steps, state.meter, is_another)
    coming = windows(rows, state.plan, config.seed, state.position)
    while state.step < state.num_steps:
        window = next(coming)
        started = time.perf_counter()
        batches = [
            MicroBatch(block, collate(block, sequences, pad_token_id, flat=state.is_flat), counts)
            for (block, sequences), counts in runtime.share(window.micro_batches)
        ]
        lr, grad_norm = step_once(state, batches, config, runtime)
        seconds = time.perf_counter() - started
        state.meter.seconds += seconds
        state.train_seconds += seconds
        state.position, state.rng = window.after, runtime.rng_state()
        state.last = StepResult(state.step, window.epoch, window.ends_epoch, lr, grad_norm)
        yield Step(state.last, state.step >= state.num_steps, state.meter, is_another)


def step_once(
    state: TrainState, batches: Sequence[MicroBatch], config: RunConfig, runtime: Runtime
) -> tuple[float, float]:
    """Do one optimizer update over a window of micro-batches, and give its learning rate and gradient norm.

    Args:
        batches: this process's; every process has as many.
    """
    state.scored.train()
    counted = [fed.batch for fed in batches if fed.counts]
    num_supervised, num_thought, num_tokens, num_rows, asked = runtime.sum(
        [
            sum(batch.num_supervised for batch in counted),
            sum(batch.num_thought for batch in counted),
            sum(batch.num_tokens for batch in counted),
            sum(len(batch.rows) for batch in counted),
            float(bool(runtime.stop.asked())),
        ]
    )
    runtime.check_stop(asked)
    weights = sum_of_weights(num_supervised, num_thought, config.loss)
    sums = []
    for i, fed in enumerate(batches):
        if i and runtime.num_processes == 1:
            runtime.stop.check()
        batch = fed.batch.to(runtime.device)
        with runtime.accumulate(state.scored, last=i == len(batches) - 1):
            scores = state.scored(**batch.inputs())
            share = step_objective(scores.objective, weights, config.loss.reduction) * fed.counts
            # processes average their gradients; the step sums them
            runtime.backward(share * runtime.num_processes, last=i == len(batches) - 1)
        sums.append(scores.sums() * fed.counts)
    own = torch.stack(sums, dim=1).tolist()
    objective, nll, thought_nll = runtime.sum([sum(values) for values in own])
    if not math.isfinite(objective):
        bad = [fed for value, fed in zip(own[0], batches, strict=True) if not math.isfinite(value)]
        raise _not_finite(f"the loss became {objective}", runtime.gather(_places(bad)), state.step + 1)
    lr = float(state.schedule.get_last_lr()[0])
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    grad_norm = runtime.clip_grad_norm(parameters, config.training.max_grad_norm)
    if not math.isfinite(grad_norm) and not runtime.scales_gradients:
        raise _not_finite(f"the gradient's norm became {grad_norm}", runtime.gather(_places(batches)), state.step + 1)
    if runtime.sharded is not None:
        state.new_rows.forget_gradients()
    else:
        state.new_rows.see_gradients()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    if not runtime.step_was_skipped():
        state.schedule.step()
        state.num_schedule_steps += 1
    state.step += 1
    meter = state.meter
    meter.nll += nll
    meter.num_supervised += num_supervised
    meter.thought_nll += thought_nll
    meter.num_thought += num_thought
    meter.objective += objective if config.loss.reduction is Reduction.sum else objective / (weights or 1)
    meter.num_steps += 1
    meter.num_tokens += int(num_tokens)
    state.tokens_seen += int(num_tokens)
    state.examples_seen += int(num_rows)
    return lr, grad_norm


def _places(batches: Sequence[MicroBatch]) -> list[str]:
    return [fed.rows.place(index) for fed in batches for index in fed.batch.rows]


def _not_finite(what: str, places: Sequence[Sequence[str]], step: int) -> NonFiniteLossError:
    """Name the rows of all processes that a number that is not finite came of."""
    return NonFiniteLossError(
        f"{what} in step {step}. Either these rows are extreme, or a learning rate that is too high has spoilt the "
        f"weights in the steps before:\n{listed([place for some in places for place in some])}"
    )
