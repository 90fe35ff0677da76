"""Where a run resumes: from which checkpoint, whether that is whole, and whether a finished run can be continued.

No torch here, so that a refusal costs nothing.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.checkpoint import manifest
from src.config.frozen import SWEEP, read_config, read_status
from src.config.places import CHECKPOINTS, MANIFEST, folder_of, steps_in
from src.config.quoting import shell_override
from src.config.schema import CheckpointConfig, TrainingConfig
from src.errors import CheckpointError, RunFolderError
from src.util import in_words, listed

LEAST_SHARE = 1e-6  # the rounding error, in steps, that a number of epochs may have
WEIGHTS_KEY = "weights"
"""The key, in the best evaluations of a checkpoint's state, of the checksum of their weights."""


class Found(NamedTuple):
    """A checkpoint that a run can resume from, if there is one."""

    checkpoint: Path | None
    is_own: bool  # whether it is in the run's own folder
    warnings: list[str]  # what was passed over


def find_checkpoint(config: CheckpointConfig, run_dir: Path) -> Found:
    """Find the newest whole checkpoint that a run can resume from.

    The run's own folder comes first: a run that resumed from another's checkpoint, and was stopped in its turn, resumes
    from its own. Only a checkpoint of its own that is named is taken before a newer one. Every byte of it is read.
    CheckpointError says that there are checkpoints, but none is whole, or that what is there can't be read.
    """
    own, requested = run_dir / CHECKPOINTS, config.resume_from
    if requested is not None and requested.resolve().parent == own.resolve():
        return Found(_named(requested), True, [])
    advice = "Restore one from a copy, or choose another hydra.run.dir; force=true removes all and begins again"
    newest, warnings = _newest(own, advice)
    if newest is None and requested is not None:
        checkpoint, warnings = _of_folder(requested)
        return Found(checkpoint, False, warnings)
    if newest is not None and requested is not None and requested.resolve() != run_dir.resolve():
        warnings.append(f"the run resumes from its own {newest}, not from checkpoint.resume = {requested}")
    return Found(newest, True, warnings)


def check_best(
    config: CheckpointConfig, run_dir: Path, state: Mapping[str, Any], line: Mapping[str, Any] | None = None
) -> None:
    """Check that the best weights so far are whole where they are to be exported, before anything is changed.

    CheckpointError names the checkpoint and what is wrong with it.

    Args:
        state: what the run's own checkpoint says besides its tensors.
        line: what was measured after the checkpoint's step, which it does not know; its weights are the checkpoint's.
    """
    if not config.load_best_model_at_end or config.allow_changed:
        return
    best = best_step(config, [*state.get("best", ()), *([] if line is None else [line])])
    if best is not None and best != state["step"]:
        place = folder_of(run_dir / CHECKPOINTS, best)
        if problem := problem_of_best(place, written_weights(state).get(best)):
            raise CheckpointError(lost_best(place, problem))


def best_step(config: CheckpointConfig, lines: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step of the best evaluation among lines of metrics, of equal ones the first; None where is none."""
    metric, sign = config.metric_for_best_model, -1 if config.is_greater_better else 1
    values = [(sign * value, int(one["step"])) for one in lines if (value := one.get(metric)) is not None]
    return min(values)[1] if values else None


def find_weights(run_dir: Path, which: str, config: CheckpointConfig, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Return a run's whole checkpoint, `best`, `last` or `step-N`; the best by its `lines` of metrics.

    CheckpointError says that there is none, or that it is damaged.
    """
    saved = run_dir / CHECKPOINTS
    if which == "last":
        return newest_weights(run_dir)[0]
    if which == "best":
        newest = manifest.newest_resumable(saved)
        first = 0 if newest is None else manifest.read_state(folder_of(saved, newest)).get("comparable_from", 0)
        step = best_step(config, (line for line in lines if line["step"] >= first))
        if step is None:
            raise CheckpointError(f"{run_dir} has no evaluation with {config.metric_for_best_model}: choose a step")
    else:
        step = int(which.removeprefix("step-"))
    place = folder_of(saved, step)
    if not place.exists():
        there = in_words(f"step-{one}" for one in steps_in(saved)) or "none"
        raise CheckpointError(f"{run_dir} keeps no weights of step {step:,}; it keeps {there}")
    manifest.check_undamaged(place)
    return place


def written_weights(state: Mapping[str, Any]) -> dict[int, str]:
    """Return the checksums of a run's best weights, by step, as a checkpoint's state has them."""
    return {one["step"]: one[WEIGHTS_KEY] for one in state.get("best", ()) if WEIGHTS_KEY in one}


def problem_of_best(checkpoint: Path, written: str | None) -> str | None:
    """Return what is wrong with the checkpoint of one of the best evaluations; None where nothing is.

    `written` is the checksum of the weights that the run wrote there, None: unknown. CheckpointError says that
    the checkpoint can't be read, so that it is unknown whether it is whole.
    """
    if refusal := manifest.refusal_of(checkpoint):
        raise CheckpointError(unreadable(checkpoint, refusal, "It has some of the best weights so far"))
    if problem := next(manifest.problems_of(checkpoint), None):
        return problem
    if written is not None and manifest.weights_checksum(checkpoint) != written:
        return f"{manifest.WEIGHTS} is whole, but not what this run wrote there: it is another run's"
    return None


def unreadable(checkpoint: Path, refusal: str, why: str) -> str:
    """Return the message for a checkpoint that can't be read, so that it is unknown whether it is whole."""
    return f"{checkpoint}: {refusal}. {why}. Nothing was changed: make it readable, or move it away to do without it"


def lost_best(checkpoint: Path, problem: str) -> str:
    """Return the message for damaged weights that are to be exported."""
    return (
        f"{checkpoint} is damaged: {problem}. It has the best weights so far, which load_best_model_at_end is to "
        "export. Restore it; or checkpoint.allow_changed=true resumes without them"
    )


def newest_weights(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint of a run's folder, or the one that the folder is, and warnings.

    It may hold weights only. CheckpointError says that there is none, or that what is there can't be looked into.
    """
    if (folder / MANIFEST).exists():
        manifest.check_undamaged(folder)
        return folder, []
    damaged: list[str] = []
    for step in reversed(steps_in(folder / CHECKPOINTS)):
        place = folder_of(folder / CHECKPOINTS, step)
        problems = list(manifest.problems_of(place))
        if not problems:
            return place, [f"init_from: {one}; {place} is taken" for one in damaged]
        damaged.append(f"{place} is damaged ({'; '.join(problems)})")
    raise CheckpointError(f"{folder} has no whole checkpoint{':' if damaged else ''}\n{listed(damaged)}".strip())


def _of_folder(folder: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint that a folder is, or the newest whole one of the run whose folder it is, and warnings."""
    if not os.path.lexists(folder / CHECKPOINTS):
        return _named(folder), []
    newest, warnings = _newest(folder / CHECKPOINTS, "checkpoint.resume=auto starts at the beginning")
    if newest is None:
        raise CheckpointError(f"{folder} has no checkpoint that a run could resume from")
    return newest, warnings


def _named(checkpoint: Path) -> Path:
    manifest.check_undamaged(checkpoint)
    if not manifest.is_resumable(checkpoint):
        raise CheckpointError(
            f"{checkpoint} holds weights only, so no run can resume from it; "
            f"{shell_override('init_from', str(checkpoint))} starts a new run with them"
        )
    return checkpoint


def _newest(folder: Path, advice: str) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in a folder, and warnings that name damaged ones after it.

    CheckpointError, with `advice` on what to do, says that all that there are are damaged, or that a newer one was
    written by a later version or can't be read.
    """
    damaged: list[str] = []
    for step in reversed(steps_in(folder)):
        place = folder_of(folder, step)
        if refusal := manifest.refusal_of(place):
            raise CheckpointError(unreadable(place, refusal, "A run can't skip what may be its newest checkpoint"))
        if manifest.is_later(place):
            raise CheckpointError(
                f"{place} was written by a later version of Towline, which can resume from it; {advice}"
            )
        if problems := list(manifest.problems_of(place)):
            damaged.append(f"{place} is damaged ({'; '.join(problems)})")
        elif manifest.is_resumable(place):
            return place, [f"{reason}; passed over" for reason in damaged]
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {folder.parent} that a run could resume from is whole:\n{listed(damaged)}\n{advice}"
        )
    return None, []


def asks_for_more_steps(training: TrainingConfig, run_dir: Path) -> bool:
    """Return whether a configuration asks for more steps than the finished run of a folder has done.

    DamagedFileError says that the folder's own files can't be read.
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
    if status.get("cause"):
        return f"it {status['cause']}; a larger training.early_stopping_patience continues it (null: to its end)"
    if training.max_train_steps is not None:
        return f"a training.max_train_steps above {status['step']:,} continues it (null: num_train_epochs counts)"
    per_epoch = status.get("steps_per_epoch")
    above = f" above {status['step'] / per_epoch:g}" if per_epoch else ", larger than it was,"
    return f"a training.num_train_epochs{above} continues it"


def check_extendable(config: CheckpointConfig, run_dir: Path) -> None:
    """Check that a finished run can be continued in its folder, before anything is changed.

    RunFolderError says that it can't be in this folder, CheckpointError that it has no checkpoint to resume from.
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
    if manifest.newest_resumable(run_dir / CHECKPOINTS) is None:
        raise CheckpointError(f"{finished}, and {_why_none(run_dir / CHECKPOINTS)}. {_new_run(run_dir)}")


def _why_none(folder: Path) -> str:
    damaged = []
    for step in reversed(steps_in(folder)):
        try:
            manifest.read_manifest(folder_of(folder, step))
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
