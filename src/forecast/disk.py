"""What a run writes that is large: checkpoints, and the exported model."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from src.checkpoint.store import SMALL_BYTES
from src.config.schema import CheckpointConfig, OptimizerConfig, RunConfig
from src.forecast.parameters import MemoryItem, ModelParameters, optimizer_part, total
from src.util import human_bytes


@dataclass(frozen=True)
class DiskForecast:
    """What the run's folder gets, and what its disk has."""

    parts: tuple[MemoryItem, ...]
    free_bytes: int
    place: Path  # the nearest folder that exists, where free_bytes were read

    @property
    def total(self) -> MemoryItem:
        """The most at any one time: an upper bound, since a best checkpoint may be among the newest, which are counted
        separately, and the export is written when no checkpoint is.
        """
        return total(self.parts, "sum of all, the most at any one time")

    @property
    def fits(self) -> bool:
        return (self.total.bytes or 0) <= self.free_bytes


def most_saves(config: CheckpointConfig, num_steps: int, steps_per_epoch: int | None) -> int | None:
    """Count the saves of a run, the last step's and one that a signal asks for included; None where that is unknown, as
    in a streamed train set, which has no steps per epoch.
    """
    if config.checkpointing_steps is None:
        return 1
    every = steps_per_epoch if config.checkpointing_steps == "epoch" else int(config.checkpointing_steps)
    return None if every is None else math.ceil(num_steps / every) + 1


def _has_best(config: RunConfig) -> bool:
    """Return whether the metric that decides which checkpoint is best is one of a validation set."""
    metric = config.checkpoint.metric_for_best_model
    return any(metric.startswith(f"eval/{name}/") for name in config.data.validation_names())


def disk_forecast(
    parameters: ModelParameters,
    run_dir: Path,
    optimizer: OptimizerConfig,
    checkpoint: CheckpointConfig,
    *,
    has_metric: bool,
    num_saves: int | None = None,
    tokenizer_bytes: int = 0,
    merge: bool = False,
) -> DiskForecast:
    """Forecast what a run writes that is large: its checkpoints, and the exported model or adapter.

    A checkpoint is what is trained, and the optimizer's state of it. In the exported model a matrix that is tied is
    written once. An adapter is what is trained: its matrices and the rows of new tokens.

    Args:
        run_dir: the run's folder; need not exist.
        has_metric: whether an evaluation computes the metric that decides which checkpoint is best.
        num_saves: how many there can be at most, see most_saves; None: any number.
        tokenizer_bytes: files that are exported with the weights.
        merge: whether an adapter is also merged into the whole model.
    """
    state = optimizer_part(parameters, optimizer)
    if state.bytes is None:
        parts = [state._replace(name="checkpoints")]
    else:
        parts = _checkpoint_parts(parameters.trained_bytes, state.bytes, checkpoint, has_metric, num_saves)
    files = f" + {human_bytes(tokenizer_bytes)} of tokenizer" if tokenizer_bytes else ""
    if not parameters.num_of_adapter or merge:
        num, size = parameters.num - parameters.num_of_adapter, parameters.bytes_per_parameter
        parts.append(MemoryItem("model", num * size + tokenizer_bytes, f"{num:,} parameters x {size} B{files}"))
    if parameters.num_of_adapter:
        parts.append(MemoryItem("adapter", parameters.trained_bytes + tokenizer_bytes, parameters.how_trained + files))
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    return DiskForecast(tuple(parts), shutil.disk_usage(place).free, place)


def disk_forecast_of_run(
    config: RunConfig,
    parameters: ModelParameters,
    run_dir: Path,
    num_steps: int,
    steps_per_epoch: int | None,
    tokenizer_bytes: int = 0,
) -> DiskForecast:
    """Forecast the same from a run's configuration and its length in steps."""
    return disk_forecast(
        parameters,
        run_dir,
        config.optimizer,
        config.checkpoint,
        has_metric=_has_best(config),
        num_saves=most_saves(config.checkpoint, num_steps, steps_per_epoch),
        tokenizer_bytes=tokenizer_bytes,
        merge=config.export.merge,
    )


def _checkpoint_parts(
    weights_bytes: int, optimizer_bytes: int, config: CheckpointConfig, has_metric: bool, num_saves: int | None
) -> list[MemoryItem]:
    """Forecast the checkpoints at their maximum: one is being written, and the oldest is not deleted yet."""
    bare = weights_bytes + SMALL_BYTES
    resumable = bare + optimizer_bytes
    most = 1 if config.checkpointing_steps is None else num_saves
    num = config.keep_last + 1 if most is None else min(config.keep_last + 1, most)
    num_resumable = min(2, num) if config.newest_optimizer_only else num
    num_bare = num - num_resumable
    is_one_more = num > (1 if config.newest_optimizer_only else config.keep_last)
    how = f"{num_resumable - is_one_more} resumable of {human_bytes(resumable)}"
    if num_bare:
        how += f", {num_bare} with weights only, of {human_bytes(bare)}"
    if is_one_more:
        how += f", and one more{' resumable' if num_bare else ''} while it is written"
    if config.checkpointing_steps is None:
        how += ", at a signal"
    parts = [MemoryItem("checkpoints", num_resumable * resumable + num_bare * bare, how)]
    if has_metric and config.keep_best:
        how = f"{config.keep_best} with weights only, of {human_bytes(bare)}"
        parts.append(MemoryItem("best checkpoints", config.keep_best * bare, how))
    return parts
