"""Whether a finished run is asked for more steps, and whether it can be continued."""

import math
import os
from pathlib import Path

from src.checkpoint.manifest import newest_resumable, read_manifest
from src.config.frozen import SWEEP, read_config, read_status
from src.config.places import CHECKPOINTS, folder_of, steps_in
from src.config.quoting import shell_override
from src.config.schema import CheckpointConfig, TrainingConfig
from src.errors import CheckpointError, RunFolderError

LEAST_SHARE = 1e-6
"""The rounding error, in steps, that a number of epochs may have."""


def asks_for_more_steps(training: TrainingConfig, run_dir: Path) -> bool:
    """Return whether a configuration asks for more steps than the finished run of a folder has done.

    Raises:
        DamagedFileError: where the folder's own files can't be read.
    """
    status = read_status(run_dir)
    if training.max_train_steps is not None:
        return training.max_train_steps > status["step"]
    if (per_epoch := status.get("steps_per_epoch")) is not None:
        return math.ceil(training.num_train_epochs * per_epoch - LEAST_SHARE) > status["step"]
    first = read_config(run_dir).get("training", {})  # of an earlier version, or a stream
    return first.get("max_train_steps") is None and training.num_train_epochs > first.get("num_train_epochs", math.inf)


def how_to_extend(training: TrainingConfig, run_dir: Path) -> str:
    """Return in words how to continue a finished run."""
    status = read_status(run_dir)
    if training.max_train_steps is not None:
        return f"a training.max_train_steps above {status['step']:,} continues it (null: num_train_epochs counts)"
    per_epoch = status.get("steps_per_epoch")
    above = f" above {status['step'] / per_epoch:g}" if per_epoch else ", larger than it was,"
    return f"a training.num_train_epochs{above} continues it"


def check_extendable(config: CheckpointConfig, run_dir: Path) -> None:
    """Check that a finished run can be continued in its folder, before anything is changed.

    Raises:
        RunFolderError: where it can't be continued in this folder.
        CheckpointError: where it has no checkpoint to resume from.
    """
    step = read_status(run_dir)["step"]
    finished = f"{run_dir} is finished at step {step:,}"
    if (run_dir.parent / SWEEP).is_file():
        raise RunFolderError(
            f"{finished}, as a trial of the sweep in {run_dir.parent}, which compares it as it is.\n"
            f"To continue it in a folder of its own: {shell_override('rerun', str(run_dir))} "
            f"{shell_override('checkpoint.resume', str(run_dir))} hydra.run.dir=ANOTHER, with the same keys"
        )
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise RunFolderError(f"{finished}, and can't be continued there: no permission to write. {_new_run(run_dir)}")
    if config.resume == "never":
        raise RunFolderError(
            f"{finished}, and checkpoint.resume=never: without it the same command continues it; or choose "
            "another hydra.run.dir."
        )
    if newest_resumable(run_dir / CHECKPOINTS) is None:
        raise CheckpointError(f"{finished}, and {_why_none(run_dir / CHECKPOINTS)}. {_new_run(run_dir)}")


def _why_none(folder: Path) -> str:
    """Return why a folder has no checkpoint to resume from."""
    damaged = []
    for step in reversed(steps_in(folder)):
        try:
            read_manifest(folder_of(folder, step))
        except ValueError as error:
            damaged.append(f"{folder_of(folder, step)}: {error}")
    if damaged:
        return f"no checkpoint there can be resumed from: {'; '.join(damaged)}; restore one from a copy"
    if steps_in(folder):
        return "keeps no checkpoint to resume from, only weights of evaluations"
    return "keeps no checkpoint to resume from (checkpoint.checkpointing_steps=null saves none)"


def _new_run(run_dir: Path) -> str:
    begin = shell_override("init_from", str(run_dir))
    return f"It is left as it is; a new run in another hydra.run.dir starts with its weights: {begin}"
