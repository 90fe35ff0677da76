"""Rules of `checkpoint` and of where a run starts from."""

import os
from pathlib import Path

from src.config.places import CHECKPOINTS, MANIFEST, steps_in
from src.config.problems import Problem
from src.config.rules.rule import Problems, applies_to
from src.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    TokensConfig,
    TopLevelConfig,
    TrainingConfig,
    thought_tags,
)
from src.errors import CheckpointError
from src.metrics import THOUGHT_LOSSES

DEFAULT_METRIC = "eval/validation/loss"
"""The value of checkpoint.metric_for_best_model in conf/."""


@applies_to("run")
def best_model_can_be_chosen(
    checkpoint: CheckpointConfig,
    training: TrainingConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    tokens: TokensConfig,
) -> Problems:
    needs_best = checkpoint.load_best_model_at_end or training.early_stopping_patience is not None
    if not needs_best and checkpoint.metric_for_best_model == DEFAULT_METRIC:
        return  # without a validation set no best is kept
    scores = scores_of(data, evaluation, tokens)
    allowed = [f"eval/{name}/{score}" for name in data.validation_names() for score in scores]
    if checkpoint.metric_for_best_model not in allowed:
        reason = f"no evaluation computes this; {'one of ' + ', '.join(allowed) if allowed else 'no validation set'}"
        yield Problem("checkpoint.metric_for_best_model", reason, checkpoint.metric_for_best_model)


def scores_of(data: DataConfig, evaluation: EvaluationConfig, tokens: TokensConfig) -> list[str]:
    """Return what is measured of each evaluated set, as in eval/<set>/<score>."""
    scores = ["loss", "perplexity"]
    if thought_tags(data, tokens) is not None:
        scores += THOUGHT_LOSSES
    return scores + (data.metrics if evaluation.metrics is None else evaluation.metrics)


@applies_to("run")
def the_best_is_kept(checkpoint: CheckpointConfig) -> Problems:
    if checkpoint.load_best_model_at_end and not checkpoint.keep_best:
        yield Problem("checkpoint.keep_best", "checkpoint.load_best_model_at_end needs at least 1", 0)


@applies_to("run")
def early_stopping_sees_evaluations(training: TrainingConfig, evaluation: EvaluationConfig) -> Problems:
    patience, threshold = training.early_stopping_patience, training.early_stopping_threshold
    if patience is not None and evaluation.eval_steps is None:
        reason = "counts evaluations while training, and there are none: evaluation.eval_steps=N, or epoch"
        yield Problem("training.early_stopping_patience", reason, patience)
    if patience is None and threshold:
        reason = "read only with training.early_stopping_patience=N"
        yield Problem("training.early_stopping_threshold", reason, threshold)


@applies_to("run")
def folders_to_start_from_are_there(top: TopLevelConfig, checkpoint: CheckpointConfig) -> Problems:
    folder = checkpoint.resume_from
    if folder is not None and not _holds_checkpoints(folder):
        reason = "neither auto, never, nor a folder with a checkpoint: give a run's folder or one of checkpoints/step-…"
        yield Problem("checkpoint.resume", reason, checkpoint.resume)
    if top.init_from is None:
        return
    start = Path(top.init_from)
    has_model = any(
        os.path.isfile(place / name) and (any(place.glob("*.safetensors")) or any(place.glob("*.bin")))
        for place in (start, start / "model")
        for name in ("config.json", "adapter_config.json")
    )
    if not has_model and not _holds_checkpoints(start):
        reason = "no weights there: give the folder of a run, of a model or of a checkpoint"
        yield Problem("init_from", reason, top.init_from)
    if folder is not None:
        reason = "starts a new run, but checkpoint.resume names one to resume: choose one of them"
        yield Problem("init_from", reason, top.init_from)


def _holds_checkpoints(folder: Path) -> bool:
    """Return whether there are checkpoints, or a folder that can't be read, which is reported where they are read."""
    try:
        return os.path.isfile(folder / MANIFEST) or bool(steps_in(folder / CHECKPOINTS))
    except CheckpointError:
        return True
