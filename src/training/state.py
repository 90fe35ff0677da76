"""The state of training, in one place: what changes while a run trains, and what checkpoints save and restore."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from src.checkpoint.locate import LEAST_SHARE
from src.checkpoint.store import AnySnapshot, Snapshot
from src.config.schema import Batching, RunConfig, TrainingConfig
from src.data.batching import BatchSampler, Position, RowBounds, steps_per_epoch
from src.data.batching_choice import choose_batching
from src.data.dataset import TrainSet
from src.data.encoding import PARTS
from src.data.sets import EncodedSet
from src.errors import CheckpointError, ModelError
from src.model.build import num_parameters, use_kernels
from src.model.embeddings import TokenMonitor, embedding_parameters
from src.runtime.session import Runtime, rng_as_json, rng_from_json
from src.runtime.sharding import ShardedTensor, compute_weight, full_shape
from src.training.head import ModelWithLoss
from src.training.loss import part_losses
from src.training.optim import build_optimizer, build_schedule, restore_schedule
from src.training.padding_free import attends_by_rows, find_row_bounds, plans_padding_free
from src.util import listed


@dataclass
class StepStats:
    """Sums over the steps since the last line of metrics, whose means the next line holds."""

    nll: float = 0.0
    part_nll: tuple[float, ...] = (0.0,) * len(PARTS)
    part_counts: tuple[float, ...] = (0.0,) * len(PARTS)
    objective: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def num_supervised(self) -> float:
        return sum(self.part_counts)

    @property
    def loss(self) -> float:
        """Mean nats per supervised token since the last line."""
        return self.nll / self.num_supervised if self.num_supervised else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def means(self, *, with_objective: bool) -> dict[str, float]:
        """Return the means as metrics; those of thoughts, answers and their parts where there are thoughts.

        There is no loss where no token was supervised, as in steps of rows of weight 0. The objective's mean is asked
        for where what is minimised is not the loss itself.
        """
        means = {"train/loss": self.loss} if self.num_supervised else {}
        means["perf/tokens_per_second"] = self.tokens_per_second
        parts = part_losses(self.part_nll, self.part_counts)
        means |= {f"train/{name}": loss for name, loss in parts.items()}
        if with_objective:
            means["train/objective"] = self.objective / max(self.num_steps, 1)
        return means

    def add(self, other: "StepStats") -> None:
        """Add the sums of another step."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            is_by_part = isinstance(value, tuple)
            setattr(self, name, tuple(map(sum, zip(mine, value, strict=True))) if is_by_part else mine + value)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Return sums from the JSON values that a checkpoint holds; an older one has no more than thoughts and others.

        Its thoughts count as what is between the tags, until the next line of metrics.
        """
        values = dict(saved)
        if "thought_nll" in values:
            thoughts = [values.pop(name) for name in ("thought_nll", "num_thought")]
            rest = [values["nll"] - thoughts[0], values.pop("num_supervised") - thoughts[1]]
            of_parts = zip(rest, thoughts, *[(0.0, 0.0)] * (len(PARTS) - 2), strict=True)
            values["part_nll"], values["part_counts"] = of_parts
        return cls(**values | {name: tuple(values[name]) for name in ("part_nll", "part_counts")})

    def reset(self) -> None:
        """Set all sums to zero, in place."""
        vars(self).update(vars(StepStats()))


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step, as checkpoints save it. `number` counts from 1."""

    number: int
    epoch: int
    ends_epoch: bool
    lr: float
    grad_norm: float

    def is_due(self, every: int | str | None) -> bool:
        """Return whether something that happens every N steps, or every epoch, or never (None), happens after it."""
        if every is None:
            return False
        return self.ends_epoch if every == "epoch" else self.number % int(every) == 0


@dataclass
class TrainState:
    """The wrapped model, its optimizer and schedule, the position in the data, and counters."""

    loss_model: nn.Module  # the ModelWithLoss as Accelerate wrapped it: its forward computes losses
    model: Any  # the transformers model inside: for generation and export
    optimizer: Any
    schedule: LambdaLR
    batch_sampler: BatchSampler
    row_bounds: RowBounds | None  # how the model is told of rows in one sequence without padding; None: they are padded
    num_steps: int
    steps_per_epoch: int | None  # none where epochs differ, or the train set is streamed, whose length is not known
    uses_full_logits: bool
    token_monitor: TokenMonitor  # of the configuration's tokens
    step: int = 0
    tokens_seen: int = 0
    examples_seen: int = 0
    train_seconds: float = 0.0
    num_schedule_steps: int = 0  # fewer than `step` where fp16 gradients overflowed
    position: Position = Position()  # where in the data the next step begins
    stats: StepStats = field(default_factory=StepStats)
    last_step: StepResult | None = None
    is_last_step_complete: bool = True  # whether the last step is complete: evaluated, sampled and logged
    rng: dict[str, Any] = field(default_factory=dict)
    """The state of every global generator at the beginning of the next step."""

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name, a shared one once."""
        return trained_parameters(self.model)

    @property
    def parameter_names(self) -> dict[int, str]:
        """The name of every trained parameter: id(parameter) -> name."""
        return {id(p): name for name, p in self.trained_parameters.items()}

    def weights(self, runtime: Runtime) -> dict[str, Tensor | ShardedTensor]:
        """Return trained weights and persistent buffers (which a forward may change) by name; no copies."""
        trained = {name: runtime.strategy.master_weight(p) for name, p in self.trained_parameters.items()}
        return trained | _buffers(self.model)

    def frozen_weights(self) -> dict[str, Tensor | ShardedTensor]:
        """Return the frozen weights, which no checkpoint holds; no copies."""
        return frozen_weights(self.model)

    def snapshot(self, runtime: Runtime, extra_state: Mapping[str, Any]) -> AnySnapshot:
        """Return all that a run needs to resume here exactly, with more JSON values that are to be saved."""
        tensors, values = runtime.strategy.optimizer_state(self.parameter_names)
        state = {
            "step": self.step,
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "position": asdict(self.position),
            "meter": asdict(self.stats),
            "last": None if self.last_step is None else asdict(self.last_step),
            "rng": runtime.gather(rng_as_json(self.rng)),
            "scaler": runtime.scaler_state(),
            "optimizer": values,
            "new_rows": self.token_monitor.state(),
        }
        return Snapshot(self.weights(runtime), tensors, state | dict(extra_state))

    def restore(self, kept: Snapshot[Tensor], runtime: Runtime) -> None:
        """Restore a snapshot, but for the position in the data, which `build_train_state` takes.

        CheckpointError names weights whose names or shapes differ; nothing is changed then.
        """
        state = kept.state
        self.restore_weights(kept.weights, runtime)
        runtime.strategy.restore_optimizer(self.parameter_names, kept.optimizer or {}, state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.step = state["step"]
        restore_schedule(self.schedule, self.num_schedule_steps)
        self.stats = StepStats.from_dict(state["meter"])
        self.last_step = None if state["last"] is None else StepResult(**state["last"])
        self.token_monitor.restore(state["new_rows"])
        runtime.restore_scaler(state["scaler"])
        if runtime.rank < len(state["rng"]):
            runtime.restore_rng(rng_from_json(state["rng"][runtime.rank]))
        else:  # there were fewer processes
            runtime.seed_apart(self.step)

    def evaluates_again(self, eval_steps: int | str | None) -> bool:
        """Return whether the last step is evaluated once more when the run resumes after it."""
        return self.last_step is not None and (self.step >= self.num_steps or self.last_step.is_due(eval_steps))

    def restore_weights(self, weights: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Load weights by name; CheckpointError says which names or shapes differ, and nothing is changed then."""
        restore_weights(self.model, weights, runtime.strategy.set_weight)

    def totals(self) -> dict[str, float]:
        """Return the counters of the whole run and numbers of parameters; train_seconds are those spent in steps."""
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


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's trained parameters by name, a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_weights(model: nn.Module) -> dict[str, Tensor | ShardedTensor]:
    """Return a model's frozen weights, which no checkpoint holds; no copies."""
    return {name: compute_weight(p) for name, p in model.named_parameters() if not p.requires_grad}


@torch.no_grad()
def restore_weights(
    model: nn.Module, weights: Mapping[str, Tensor], set_weight: Callable[[nn.Parameter, Tensor], Any]
) -> None:
    """Load a checkpoint's weights by name; CheckpointError says which names or shapes differ, nothing is changed then.

    `set_weight` writes a trained parameter, which may be sharded.
    """
    trained, buffers = trained_parameters(model), _buffers(model)
    shapes = {name: full_shape(p) for name, p in trained.items()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    wrong = [f"{name} is missing there" for name in shapes.keys() - weights.keys()]
    wrong += [f"{name} is not trained here" for name in weights.keys() - shapes.keys()]
    wrong += [
        f"{name}: {list(weights[name].shape)} there, {list(shape)} here"
        for name, shape in shapes.items()
        if name in weights and shape != tuple(weights[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"the weights of the checkpoint are not those of this model:\n{listed(sorted(wrong))}")
    for name, parameter in trained.items():
        set_weight(parameter, weights[name])
    for name, buffer in buffers.items():
        buffer.copy_(weights[name])


COUNTERS = ("tokens_seen", "examples_seen", "train_seconds", "num_schedule_steps")
"""Counters of the whole run, saved with a checkpoint."""


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's persistent buffers by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach()
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def build_batch_sampler(
    config: RunConfig, train: TrainSet, num_processes: int = 1, chosen: str | None = None
) -> BatchSampler:
    """Return how rows become micro-batches, by the configuration; a step takes those of all processes.

    `chosen` is what data.batching=auto was before, where the run resumes; else it is chosen by the rows, of a stream by
    its first block.
    """
    training, batching = config.training, config.data.batching
    if batching is Batching.auto and chosen is not None:
        batching = Batching(chosen)
    sampler = BatchSampler(
        batching,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps * num_processes,
        config.data.max_seq_length,
        training.per_device_train_tokens,
    )
    if batching is Batching.auto and attends_by_rows(config, train.first):
        sampler = replace(sampler, batching=Batching.padded)  # grouping would save nothing
    elif batching is Batching.auto:
        sampler = choose_batching(train.first, sampler, config.seed)
    return replace(sampler, is_padding_free=plans_padding_free(config, train.first, sampler))


def plan_steps(
    config: RunConfig, train: TrainSet, sampler: BatchSampler, step: int = 0, begin: Position | None = None
) -> tuple[int, int | None]:
    """Return the number of steps of the whole run, which resumes after a step, and that of an epoch, if all are alike.

    Epochs differ where rows that are packed do, and where micro-batches hold as many rows as fit.
    """
    begin = begin or Position()
    if not isinstance(train, EncodedSet):
        return num_train_steps(config.training, None), None
    if sampler.counts_tokens or (train.varies and sampler.batching is Batching.packed):
        if config.training.max_train_steps:
            return config.training.max_train_steps, None
        return _steps_of_epochs(config, train, sampler, step, begin), None
    per_epoch = steps_per_epoch(train, sampler, config.seed)
    left = steps_per_epoch(train, sampler, config.seed, begin.num_sequences)
    return num_train_steps(config.training, per_epoch, step, begin.epoch, left), per_epoch


def _steps_of_epochs(config: RunConfig, train: EncodedSet, sampler: BatchSampler, step: int, begin: Position) -> int:
    """Return the number of steps of the whole run, where each epoch has its own."""
    epochs = config.training.num_train_epochs
    for epoch in range(begin.epoch, math.ceil(epochs)):
        num_taken = begin.num_sequences if epoch == begin.epoch else 0
        left = steps_per_epoch(train, sampler, config.seed, num_taken, epoch)
        if (beyond := epochs - epoch - 1) < 0:
            whole = steps_per_epoch(train, sampler, config.seed, epoch=epoch) if num_taken else left
            left += _steps_of(beyond, whole)
        step += max(0, left)
    return max(1, step)


def num_train_steps(
    config: TrainingConfig, per_epoch: int | None, step: int = 0, epoch: int = 0, left_of_epoch: int | None = None
) -> int:
    """Return the number of optimizer steps of the whole run, which resumes after a step of an epoch.

    Args:
        per_epoch: None where the train set is streamed.
        left_of_epoch: steps from there to the end of its epoch; None: all of them.
    """
    if config.max_train_steps:
        return config.max_train_steps
    assert per_epoch is not None  # the gate asks for max_train_steps where the train set is streamed
    left = per_epoch if left_of_epoch is None else left_of_epoch
    later = _steps_of(config.num_train_epochs - epoch - 1, per_epoch)  # those of the epochs after this one
    return max(1, step, step + left + later)


def _steps_of(epochs: float, per_epoch: int) -> int:
    """Return the steps of a number of epochs, which is less than 0 where the epoch in progress is not trained whole.

    The last step may be short, but a rounding error is none: 2.1 - 2 is more than a tenth.
    """
    return math.ceil(epochs * per_epoch - LEAST_SHARE)


def build_train_state(
    model: Any,
    train: TrainSet,
    config: RunConfig,
    runtime: Runtime,
    new_tokens: Mapping[str, int] = MappingProxyType({}),
    step: int | None = None,
    position: Mapping[str, Any] | None = None,
    batching: str | None = None,
) -> TrainState:
    """Move everything to the device, wrap it, and choose how the head is computed.

    ModelError says that the weights' type does not go with the precision, or that rows can't be packed for this model.

    Args:
        new_tokens: the configuration's tokens and their ids, to be watched.
        step, position, batching: after which step the run resumes, where in its rows, and how they became batches; all
            else is restored later.
    """
    batch_sampler = build_batch_sampler(config, train, runtime.num_processes, batching)
    begin = Position() if position is None else Position(**position)
    num_steps, per_epoch = plan_steps(config, train, batch_sampler, step or 0, begin)
    if runtime.scales_gradients and any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad):
        raise ModelError("fp16 mixed precision scales gradients of float32 weights only: model.dtype=float32")
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss_model = ModelWithLoss(model, config.loss).to(runtime.device)
    if config.model.kernels:
        use_kernels(model)
    if config.runtime.compile:
        loss_model.compile_training()
    optimizer = build_optimizer(config.optimizer, loss_model.parameters(), embedding_parameters(model))
    schedule = build_schedule(config.scheduler, optimizer, num_steps)
    wrapped, wrapped_optimizer = runtime.prepare(loss_model, optimizer)
    with runtime.autocast():  # after Runtime.prepare: only then are sharded weights gathered for a forward
        loss_model.probe_head()
        row_bounds = find_row_bounds(loss_model, batch_sampler, config)
    return TrainState(
        wrapped,
        model,
        wrapped_optimizer,
        schedule,
        batch_sampler,
        row_bounds,
        num_steps,
        per_epoch,
        loss_model.uses_full_logits,
        TokenMonitor(model, new_tokens),
        position=begin,
    )
