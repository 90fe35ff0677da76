"""What a run keeps: its checkpoints while it trains, with what a resume has to know of it, and model/ at the end."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from src.checkpoint.compatibility import Fingerprint
from src.checkpoint.exported import exported_digests
from src.checkpoint.locate import written_weights
from src.checkpoint.store import Checkpoints, Snapshot, open_checkpoints
from src.checkpoint.tensors import tensors_digest
from src.config import plugins
from src.config.job import Job
from src.config.schema import RunConfig
from src.data.dataset import Data
from src.errors import Interrupted, Pruned
from src.model.card import model_card
from src.model.export import export
from src.runtime.profiling import region
from src.runtime.session import Runtime
from src.runtime.sharding import gather_on_cpu, unsharded_models
from src.tracking.tracker import Tracker
from src.training.assembly import Assembled
from src.training.early_stopping import EarlyStopping
from src.training.loop import Step
from src.training.resume import CHOSEN, ResumePoint, tokenizer_hash, with_chosen
from src.training.state import TrainState

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy")
"""Libraries whose versions may change how numbers are rounded."""
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
"""Settings of a model that say nothing, or that another entry of the fingerprint or a key says."""


def fingerprint_of(state: TrainState, data: Data, tokenizer: Any, runtime: Runtime, config: RunConfig) -> Fingerprint:
    """Return what a checkpoint must have in common with the run that resumes from it, before state is restored."""
    frozen = state.frozen_weights()
    architecture = {key: value for key, value in state.model.config.to_dict().items() if key not in NOT_COMPUTED}
    return Fingerprint(
        step=state.step,
        num_steps=state.num_steps,
        data=data.train.digest(),
        num_rows=data.num_train_rows,
        tokenizer=tokenizer_hash(tokenizer),
        frozen_weights=tensors_digest(frozen) if frozen else None,
        device=runtime.device.type,
        num_processes=runtime.num_processes,
        step_sequences=state.batch_sampler.step_size,
        versions={name: metadata.version(name) for name in PACKAGES} | plugins.versions(config.plugins),
        architecture=hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode()).hexdigest()[:32],
        validation=data.validation_digest(config.evaluation.max_samples),
    )


def _chosen(config: RunConfig, state: TrainState) -> dict[str, str]:
    """Return what CHOSEN mean in this run, whether they are `auto` or not."""
    values = (state.batch_sampler.batching, config.training.mixed_precision)
    return {key: value.value for key, value in zip(CHOSEN, values, strict=True)}


@dataclass
class Saver:
    """Saves a run, its state and what else a resume needs. Built by `open_saver`."""

    _checkpoints: Checkpoints
    _state: TrainState
    _config: RunConfig
    _fingerprint: Fingerprint
    _extra: Mapping[str, Any]  # what stays the same for the whole run
    _runtime: Runtime
    _tracker: Tracker
    lines: Sequence[Mapping[str, Any]]  # of metrics that the run resumes after
    _stopping: EarlyStopping

    def is_due(self, step: Step) -> bool:
        """Return whether a step is saved: by checkpoint.checkpointing_steps, or because somebody asked for it."""
        config = self._config.checkpoint
        return step.is_save_asked or step.is_due(config.checkpointing_steps, at_end=config.saves_at_end)

    @region("checkpoint")
    def save(self) -> None:
        """Save the present step, so that a run can resume from it; one that is saved already is left as it is."""
        state = self._state
        with self._tracker.console.work("saving", f"step {state.step}"):
            self._checkpoints.save(state.step, lambda: state.snapshot(self._runtime, self._extra_state()))
        self._runtime.stop.note_saved()

    def keep_if_best(self, metrics: Mapping[str, Any]) -> None:
        """Keep the weights of the present step, if its evaluation is among the best so far."""
        state = self._state
        self._checkpoints.keep_if_best(
            state.step,
            metrics,
            lambda: Snapshot(state.weights(self._runtime), None, {"step": state.step, **self._extra_state()}),
        )

    def stop_early(self, step: Step, metrics: Mapping[str, Any]) -> Step:
        """Make this step the run's last where its evaluation is the last that early stopping waits for; return it.

        It is saved first: what is due at the end, such as loading the best weights, is due after it.
        """
        is_reached = self._runtime.from_main(self._stopping.add(step.number, metrics))
        if step.is_last or not is_reached:
            return step
        self._state.num_steps = self._state.step
        self._tracker.end_early(self._stopping.cause)
        if self._config.checkpoint.saves_at_end:
            self.save()
        return replace(step, is_last=True)

    def load_best_if_asked(self) -> None:
        """Put the best weights into the model, with checkpoint.load_best_model_at_end."""
        takes_best = self._config.checkpoint.load_best_model_at_end
        if takes_best and self._checkpoints.best not in (None, self._state.step):
            self._checkpoints.wait()
            self._runtime.wait()
            self._state.restore_weights(self._checkpoints.best_weights(), self._runtime)
            self._tracker.console.label(
                "weights", f"of step {self._checkpoints.best}, the best, for the test and model/"
            )

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

    A run that is asked to stop within the block is saved. `untrained` are samples of the untrained model.
    """
    config = job.config
    with open_checkpoints(config.checkpoint, job.run_dir, tracker.sync, writes=runtime.is_main) as checkpoints:
        tracker.warn(*checkpoints.warnings)
        if resume.own_step is not None:
            tracker.warn(*checkpoints.discard_after(resume.own_step))
        is_end = state.step >= state.num_steps or resume.is_end
        lines, again = runtime.from_main(tracker.rewind_to(state.step, is_end=is_end))
        tracker.set_length(state.num_steps, state.steps_per_epoch)
        state.is_last_step_complete = any(line["step"] == state.step for line in lines)
        if state.is_last_step_complete:
            state.stats.reset()
        comparable_from = resume.comparable_from(fingerprint, state.step, is_complete=state.is_last_step_complete)
        evaluations = [*resume.own_state.get("best", ()), *lines]
        if again is not None and state.evaluates_again(config.evaluation.eval_steps):
            evaluations.append(again)
        comparable = {line["step"]: line for line in evaluations if line["step"] >= comparable_from}
        written = written_weights(resume.own_state)
        tracker.warn(*checkpoints.load_index(comparable.values(), resume.own_step, written))
        extra = {"config": job.frozen, "comparable_from": comparable_from, "untrained": list(untrained)}
        extra["chosen"] = _chosen(job.config, state)
        stopping = EarlyStopping(config, (line for line in lines if line["step"] >= comparable_from))
        saver = Saver(checkpoints, state, config, fingerprint, extra, runtime, tracker, lines, stopping)
        runtime.wait()
        try:
            yield saver
        except (Interrupted, Pruned):
            saver.save()
            checkpoints.wait()
            runtime.wait()  # a launcher may end all processes once the first has left
            raise


def export_trained(
    job: Job,
    state: TrainState,
    built: Assembled,
    data: Data,
    provenance: Mapping[str, Any],
    runtime: Runtime,
    tracker: Tracker,
) -> dict[str, Any] | None:
    """Write model/, and return size and checksum of each of its files; None where another process writes it.

    ExportError says that what was written does not load as what was trained.
    """
    if job.config.data.streaming:
        tracker.write_file("data_report.json", data.report())  # what was read is known only now
    of_run = (data.report(), tracker.latest, provenance, built.new_tokens.ids)
    frozen = dict(with_chosen(job.frozen, _chosen(job.config, state)))
    card = model_card(frozen, *of_run)
    adapter_card = model_card(frozen | {"export": {"merge": False}}, *of_run)
    gather_on_cpu(state.model, keeps=runtime.is_main)
    if not runtime.is_main:
        return None
    folder = job.run_dir / "model"
    with unsharded_models(), tracker.console.work("exporting", "the model"):
        tracker.warn(*export(state.model, built.adapter, built.tokenizer, folder, job.config, card, adapter_card))
    return exported_digests(folder)
