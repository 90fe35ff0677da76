"""Which checkpoint a run resumes from, and whether it is whole. No torch here, so that a refusal costs nothing."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.checkpoint.manifest import (
    WEIGHTS,
    check_undamaged,
    is_later,
    is_resumable,
    problems_of,
    read_manifest,
    refusal_of,
    weights_checksum,
)
from src.config.places import CHECKPOINTS, MANIFEST, folder_of, steps_in
from src.config.quoting import shell_override
from src.config.schema import CheckpointConfig
from src.errors import CheckpointError
from src.util import listed

WEIGHTS_KEY = "weights"
"""The key, in the best evaluations of a checkpoint's state, of the checksum of their weights."""


class Found(NamedTuple):
    """A checkpoint that a run can resume from, if there is one.

    Args:
        is_own: whether it is in the run's own folder.
        warnings: what was passed over.
    """

    checkpoint: Path | None
    is_own: bool
    warnings: list[str]


def find_checkpoint(config: CheckpointConfig, run_dir: Path) -> Found:
    """Find the newest whole checkpoint that a run can resume from.

    The run's own folder comes first: a run that resumed from another's checkpoint, and was stopped in its turn, resumes
    from its own. Only a checkpoint of its own that is named is taken before a newer one. Every byte of it is read.

    Raises:
        CheckpointError: where there are checkpoints, but none is whole, or what is there can't be read.
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

    Args:
        state: what the run's own checkpoint says besides its tensors.
        line: what was measured after the checkpoint's step, which it does not know; its weights are the checkpoint's.
    Raises:
        CheckpointError: naming the checkpoint and what is wrong with it.
    """
    if not config.load_best_model_at_end or config.allow_changed:
        return
    metric, sign = config.metric_for_best_model, -1 if config.is_greater_better else 1
    lines = [*state.get("best", ()), *([] if line is None else [line])]
    values = [(sign * value, one["step"]) for one in lines if (value := one.get(metric)) is not None]
    if values and (best := min(values)[1]) != state["step"]:
        place = folder_of(run_dir / CHECKPOINTS, best)
        if problem := problem_of_best(place, written_weights(state).get(best)):
            raise CheckpointError(lost_best(place, problem))


def written_weights(state: Mapping[str, Any]) -> dict[int, str]:
    """Return the checksums of a run's best weights, by step, as a checkpoint's state has them."""
    return {one["step"]: one[WEIGHTS_KEY] for one in state.get("best", ()) if WEIGHTS_KEY in one}


def problem_of_best(checkpoint: Path, written: str | None) -> str | None:
    """Return what is wrong with the checkpoint of one of the best evaluations; None where nothing is.

    Args:
        written: the checksum of the weights that the run wrote there; None: not known.
    Raises:
        CheckpointError: where it can't be read, so that it is unknown whether it is whole.
    """
    if refusal := refusal_of(checkpoint):
        raise CheckpointError(unreadable(checkpoint, refusal, "It has some of the best weights so far"))
    if problem := next(problems_of(checkpoint), None):
        return problem
    if written is not None and weights_checksum(checkpoint) != written:
        return f"{WEIGHTS} is whole, but not what this run wrote there: it is another run's"
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

    It may hold weights only.

    Raises:
        CheckpointError: where there is none, or what is there can't be looked into.
    """
    if (folder / MANIFEST).exists():
        check_undamaged(folder)
        return folder, []
    places = [folder_of(folder / CHECKPOINTS, step) for step in reversed(steps_in(folder / CHECKPOINTS))]
    damaged: list[str] = []
    for place in places:
        problems = list(problems_of(place))
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
    check_undamaged(checkpoint)
    if not is_resumable(checkpoint):
        raise CheckpointError(
            f"{checkpoint} holds weights only, so no run can resume from it; "
            f"{shell_override('init_from', str(checkpoint))} starts a new run with them"
        )
    return checkpoint


def _newest(folder: Path, advice: str) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in a folder, and warnings that name damaged ones after it.

    Args:
        advice: what to do where there is none.
    Raises:
        CheckpointError: where all that there are are damaged, or a newer one was written by a later version or can't be
            read.
    """
    damaged: list[str] = []
    for step in reversed(steps_in(folder)):
        place = folder_of(folder, step)
        if refusal := refusal_of(place):
            raise CheckpointError(unreadable(place, refusal, "A run can't skip what may be its newest checkpoint"))
        if is_later(place):
            raise CheckpointError(
                f"{place} was written by a later version of Towline, which can resume from it; {advice}"
            )
        problems = list(problems_of(place))
        if not problems and read_manifest(place).is_resumable:
            return place, [f"{reason}; passed over" for reason in damaged]
        if problems:
            damaged.append(f"{place} is damaged ({'; '.join(problems)})")
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {folder.parent} that a run could resume from is whole:\n{listed(damaged)}\n{advice}"
        )
    return None, []
