"""A run's checkpoints while it trains: its state with what a resume needs to know, and the best weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from src.checkpoint.compatibility import Fingerprint
from src.checkpoint.locate import written_weights
from src.checkpoint.store import Checkpoints, open_checkpoints
from src.config.job import Job
from src.config.schema import RunConfig
from src.errors import Interrupted, Pruned
from src.runtime.session import Runtime
from src.tracking.tracker import Tracker
from src.training.resume import ResumePoint
from src.training.state import TrainState


@dataclass
class Saver:
    """Saves a run, its state and what else a resume needs. Built by `open_saver`.

    Args:
        _extra: what stays the same for the whole run.
        lines: the lines of metrics that the run resumes after.
    """

    _checkpoints: Checkpoints
    _state: TrainState
    _config: RunConfig
    _fingerprint: Fingerprint
    _extra: Mapping[str, Any]
    _runtime: Runtime
    _tracker: Tracker
    lines: Sequence[Mapping[str, Any]]

    def save(self) -> None:
        """Save the present step, so that a run can resume from it; one that is saved already is left as it is."""
        state = self._state
        self._checkpoints.save(state.step, lambda: state.snapshot(self._runtime, self._extra_state()))

    def save_at_stop(self) -> None:
        """Save the last step that is done, and wait until it is whole on the disk."""
        self.save()
        self._checkpoints.wait()
        self._runtime.wait()  # a launcher may end all processes once the first has left

    def keep_if_best(self, metrics: Mapping[str, Any]) -> None:
        """Keep the weights of the present step, if its evaluation is among the best so far."""
        state = self._state
        self._checkpoints.keep_if_best(
            state.step, metrics, lambda: state.only_weights(self._runtime, self._extra_state())
        )

    def load_best_if_asked(self) -> None:
        """Put the best weights into the model, with checkpoint.load_best_model_at_end."""
        takes_best = self._config.checkpoint.load_best_model_at_end
        if takes_best and self._checkpoints.best not in (None, self._state.step):
            self._checkpoints.wait()
            self._runtime.wait()
            self._state.restore_weights(self._checkpoints.best_weights(), self._runtime)

    def finish(self) -> None:
        """Leave the last checkpoint and the best ones, at the end of the run."""
        last = self._state.last_step
        self._checkpoints.finish(was_due=last is not None and last.is_due(self._config.evaluation.eval_steps))

    def _extra_state(self) -> dict[str, Any]:
        return {
            **self._extra,
            "facts": asdict(replace(self._fingerprint, step=self._state.step)),
            "best": self._checkpoints.best_evaluations,
            "journal": self._tracker.journal_before(self._state.step),
            "tracker_run_id": self._tracker.tracker_run_id,
        }


def comparable_evaluations(
    best: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    repeated: Mapping[str, Any] | None,
    first_step: int,
) -> list[Mapping[str, Any]]:
    """Return the evaluations so far that count for the best, one of each step. Pure.

    Args:
        best: the best ones, as the checkpoint has them.
        lines: the lines of metrics that the run resumes after.
        repeated: the line of the step that is evaluated once more, as it was; None where none is.
        first_step: evaluations of earlier steps are of other rows.
    """
    evaluations = [*best, *lines, *([] if repeated is None else [repeated])]
    return list({line["step"]: line for line in evaluations if line["step"] >= first_step}.values())


@contextmanager
def open_saver(
    job: Job,
    resume: ResumePoint,
    state: TrainState,
    fingerprint: Fingerprint,
    untrained: Sequence[str],
    runtime: Runtime,
    tracker: Tracker,
) -> Iterator[Saver]:
    """Open a run's checkpoints at the step that it resumes after; later ones and their metrics are removed.

    A run that is asked to stop within the block is saved.

    Args:
        fingerprint: of the run, before its state was restored.
        untrained: samples of the untrained model.
    """
    config = job.config
    with open_checkpoints(config.checkpoint, job.run_dir, tracker.sync, writes=runtime.is_main) as checkpoints:
        tracker.warn(*checkpoints.warnings)
        if resume.own_step is not None:
            tracker.warn(*checkpoints.discard_after(resume.own_step))
        tracker.set_length(state.num_steps, state.steps_per_epoch)
        is_end = state.step >= state.num_steps or resume.is_end
        lines, again = runtime.from_main(tracker.rewind_to(state.step, is_end=is_end))
        state.set_complete(is_complete=any(line["step"] == state.step for line in lines))
        comparable_from = resume.comparable_from(fingerprint, state.step, is_complete=state.is_last_step_complete)
        repeated = again if state.evaluates_again(config.evaluation.eval_steps) else None
        evaluations = comparable_evaluations(resume.own_state.get("best", ()), lines, repeated, comparable_from)
        written = written_weights(resume.own_state)
        tracker.warn(*checkpoints.load_index(evaluations, resume.own_step, written))
        extra = {"config": job.frozen, "comparable_from": comparable_from, "untrained": list(untrained)}
        saver = Saver(checkpoints, state, config, fingerprint, extra, runtime, tracker, lines)
        runtime.wait()
        try:
            yield saver
        except (Interrupted, Pruned):
            saver.save_at_stop()
            raise
