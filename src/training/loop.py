"""The training loop: it yields each optimizer step when it is done; what follows a step is decided by src/run.py."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from src.config.schema import Reduction, RunConfig
from src.data.batching import Batch, Window, collate, windows
from src.data.dataset import TrainSet
from src.data.encoding import PARTS
from src.data.sets import EncodedSet
from src.errors import NonFiniteLossError
from src.runtime.profiling import region
from src.runtime.session import Runtime
from src.training.loss import objective_differs, step_objective, sum_of_weights
from src.training.prefetch import one_ahead
from src.training.state import StepResult, StepStats, TrainState
from src.util import listed


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch and the set that its row numbers refer to.

    A filler (not `is_real`) only keeps this process in step with the others.
    """

    rows: EncodedSet
    batch: Batch
    is_real: bool = True


@dataclass(frozen=True)
class Step(StepResult):
    """What `train` yields after each optimizer step: its result, and the sums since the last line of metrics."""

    is_last: bool
    stats: StepStats = field(repr=False)
    with_objective: bool = False  # whether the objective differs from the loss, so that its mean is a metric of its own
    is_save_asked: bool = False  # whether somebody asked for a checkpoint after it (StopRequest.is_save_asked)
    seconds: float = 0.0  # how long it took; 0 where an earlier start has computed it
    measure_memory: Callable[[], Mapping[str, float]] = field(default=dict, repr=False)

    def is_due(self, every: int | str | None, *, at_end: bool = True) -> bool:
        """Return whether what happens every N steps or every epoch is due; with `at_end` at the last step too."""
        return (at_end and self.is_last) or super().is_due(every)

    @property
    def loss(self) -> float:
        return self.stats.loss

    @property
    def tokens_per_second(self) -> float:
        return self.stats.tokens_per_second

    @property
    def warnings(self) -> list[str]:
        """Why the run can't learn, where the first step shows it."""
        if self.number > 1 or self.grad_norm != 0:
            return []
        return [
            "no trained parameter got a gradient in step 1, so nothing was learned: what is trained "
            "(adapter.target_modules) takes no part in the loss, or the loss weighs every token 0"
        ]

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics since the last line, and begin new sums: called once for each line, by every process."""
        means = self.stats.means(with_objective=self.with_objective)
        self.stats.reset()
        memory = {f"perf/{name}": value for name, value in self.measure_memory().items()}
        return means | {"train/lr": self.lr, "train/grad_norm": self.grad_norm, **memory}


def train(state: TrainState, rows: TrainSet, config: RunConfig, runtime: Runtime, pad_token_id: int) -> Iterator[Step]:
    """Train to the end; yield every step, with `state` as it is after the step.

    A run that resumes from a checkpoint yields the checkpoint's step first, where what follows it is not done yet.

    Raises:
        NonFiniteLossError: before the weights are touched by it.
        Interrupted: where something asked the run to stop; the step in progress is discarded, and `state` is as it was
            before.
    """
    state.rng = runtime.rng_state()
    if state.last_step is not None and not state.is_last_step_complete:
        yield _last_step(state, config, runtime)
    coming = windows(rows, state.batch_sampler, config.seed, state.position)
    collated = (
        (window, _collated(window, state, runtime, pad_token_id))
        for window in islice(coming, max(0, state.num_steps - state.step))
    )
    steps = one_ahead(collated)
    while state.step < state.num_steps:
        started = time.perf_counter()
        with region("data"):
            window, batches = next(steps)
        lr, grad_norm, is_save_asked = step_once(state, batches, config, runtime)
        seconds = time.perf_counter() - started
        state.stats.seconds += seconds
        state.train_seconds += seconds
        state.position, state.rng = window.after, runtime.rng_state()
        state.last_step = StepResult(state.step, window.epoch, window.ends_epoch, lr, grad_norm)
        yield replace(_last_step(state, config, runtime), is_save_asked=is_save_asked, seconds=seconds)


def _collated(window: Window, state: TrainState, runtime: Runtime, pad_token_id: int) -> list[MicroBatch]:
    """Collate this process's micro-batches of a step."""
    batches = []
    for (rows, sequences), is_real in runtime.split(window.micro_batches):
        batch = collate(rows, sequences, pad_token_id, state.row_bounds)
        batches.append(MicroBatch(rows, batch.pinned() if runtime.device.type == "cuda" else batch, is_real))
    return batches


def _last_step(state: TrainState, config: RunConfig, runtime: Runtime) -> Step:
    return Step(
        **vars(state.last_step),
        is_last=state.step >= state.num_steps,
        stats=state.stats,
        with_objective=config.data.has_weights or objective_differs(config.loss),
        measure_memory=runtime.memory,
    )


def step_once(
    state: TrainState, batches: Sequence[MicroBatch], config: RunConfig, runtime: Runtime
) -> tuple[float, float, bool]:
    """Do one optimizer update over the micro-batches of a step.

    The batches are this process's; every process has as many.
    Returns: its learning rate, its gradient norm, and whether a checkpoint after it was asked for.
    """
    state.loss_model.train()
    real = [one.batch for one in batches if one.is_real]
    # one exchange of all processes, also of what one of them was asked for: so all stop, or save, at the same step
    num_tokens, num_rows, asked, asked_to_save, *of_parts = runtime.sum(
        [
            sum(batch.num_tokens for batch in real),
            sum(len(batch.rows) for batch in real),
            float(bool(runtime.stop.asked())),
            float(runtime.stop.is_save_asked()),
            *_sum_by_part([batch.part_counts for batch in real]),
            *_sum_by_part([batch.part_weights for batch in real]),
        ]
    )
    runtime.check_stop(asked)
    counts, weights_of_rows = of_parts[: len(PARTS)], of_parts[len(PARTS) :]
    weights = sum_of_weights(weights_of_rows, config.loss)
    objective, nll, *part_nll = _add_gradients(state, batches, weights, config, runtime)
    lr, grad_norm = _update(state, batches, config, runtime)
    state.step += 1
    mean_objective = objective if config.loss.reduction is Reduction.sum else objective / (weights or 1)
    state.stats.add(StepStats(nll, tuple(part_nll), tuple(counts), mean_objective, 1, int(num_tokens)))
    state.tokens_seen += int(num_tokens)
    state.examples_seen += int(num_rows)
    return lr, grad_norm, bool(asked_to_save)


def _sum_by_part(values: Sequence[np.ndarray]) -> list[float]:
    return np.sum([np.zeros(len(PARTS)), *values], axis=0).tolist()


def _add_gradients(
    state: TrainState, batches: Sequence[MicroBatch], weights: float, config: RunConfig, runtime: Runtime
) -> list[float]:
    """Compute the gradients of a step; return its objective, its nll and that of each part, over all processes.

    `weights` is the sum of the tokens' weights in the whole step. NonFiniteLossError names the rows of all processes
    whose loss is not finite.
    """
    sums = []
    for i, one in enumerate(batches):
        if i and runtime.num_processes == 1:
            runtime.stop.check()
        is_last = i == len(batches) - 1
        batch = one.batch.to(runtime.device)
        with runtime.strategy.accumulate(last=is_last):
            with region("forward"):
                losses = state.loss_model(**batch.inputs())
                contribution = step_objective(losses.objective, weights, config.loss.reduction) * one.is_real
            with region("backward"):  # processes average their gradients; the step sums them
                runtime.strategy.backward(contribution * runtime.num_processes, last=is_last)
        sums.append(losses.sums() * one.is_real)
    local = torch.stack(sums, dim=1).tolist()
    summed = runtime.sum([sum(values) for values in local])
    if not math.isfinite(summed[0]):
        bad = [one for value, one in zip(local[0], batches, strict=True) if not math.isfinite(value)]
        raise _not_finite(f"the loss became {summed[0]}", runtime.gather(_places(bad)), state.step + 1)
    return summed


@region("optimizer")
def _update(
    state: TrainState, batches: Sequence[MicroBatch], config: RunConfig, runtime: Runtime
) -> tuple[float, float]:
    """Clip the gradients, update the weights and advance the schedule; return learning rate and gradient norm.

    NonFiniteLossError says that the norm is not finite, before the weights are touched by it (but under ZeRO).
    """
    strategy, lr = runtime.strategy, float(state.schedule.get_last_lr()[0])
    grad_norm = strategy.clip_grad_norm(config.training.max_grad_norm)
    if not math.isfinite(grad_norm) and not runtime.scales_gradients:
        raise _not_finite(f"the gradient's norm became {grad_norm}", runtime.gather(_places(batches)), state.step + 1)
    state.token_monitor.record_gradients(are_whole=strategy.has_gradients)
    strategy.update(state.optimizer)
    if not runtime.step_was_skipped():
        state.schedule.step()
        state.num_schedule_steps += 1
    return lr, grad_norm


def _places(batches: Sequence[MicroBatch]) -> list[str]:
    return [one.rows.place(index) for one in batches for index in one.batch.rows]


def _not_finite(what: str, places: Sequence[Sequence[str]], step: int) -> NonFiniteLossError:
    """Return the error that names the rows of all processes that led to a number that is not finite."""
    return NonFiniteLossError(
        f"{what} in step {step}. Either these rows are extreme, or a learning rate that is too high has spoilt the "
        f"weights in the steps before:\n{listed([place for of_process in places for place in of_process])}"
    )
