"""How a run begins: from the beginning, or from a checkpoint with what has changed since.

Nothing heavy is imported before a checkpoint is read, so that a refusal costs nothing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from src.checkpoint import compatibility
from src.checkpoint.compatibility import Change, Fingerprint, check_changes, compare_fingerprints
from src.checkpoint.locate import find_checkpoint
from src.checkpoint.manifest import read_state
from src.config.frozen import read_status
from src.config.job import Job
from src.config.schema import CheckpointConfig, RunConfig
from src.util import plural

BATCH_KEYS = tuple(
    f"training.{name}"
    for name in ("per_device_train_batch_size", "per_device_train_tokens", "gradient_accumulation_steps")
)
CHOSEN = ("data.batching", "training.mixed_precision")
"""Keys whose `auto` is chosen where a run begins, and holds from then on."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from; empty where it begins anew."""

    checkpoint: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)  # what the checkpoint says besides its tensors
    changes: Sequence[Change] = ()  # keys of the configuration that differ
    warnings: Sequence[str] = ()
    is_own: bool = False  # whether it is in the run's own folder
    num_steps: int | None = None  # how long the run was to be, or was where it stopped early, by its status.json
    repeats_epoch: bool = False
    """Whether the epoch that was under way begins again, because its rows come in another order now; see `checked`."""

    @property
    def step(self) -> int | None:
        """The last step that is done; None: the run begins anew."""
        return None if self.checkpoint is None else int(self.state["step"])

    @property
    def own_step(self) -> int | None:
        """The same, of a checkpoint in the run's own folder."""
        return self.step if self.is_own else None

    @property
    def own_state(self) -> Mapping[str, Any]:
        """The state of a checkpoint in the run's own folder; empty for another run's."""
        return self.state if self.is_own else {}

    @property
    def position(self) -> Mapping[str, Any] | None:
        """Where in its rows the run resumes, see src.data.batching.Position; None: at the first."""
        if self.checkpoint is None:
            return None
        position = self.state["position"]
        return {"epoch": position["epoch"], "num_sequences": 0, "block": None} if self.repeats_epoch else position

    @property
    def chosen(self) -> Mapping[str, str]:
        """What keys that may be `auto` were before, and are from then on; empty where the run begins anew."""
        return {} if self.checkpoint is None else _chosen_of(self.state)

    @property
    def start(self) -> tuple[int | None, Mapping[str, Any] | None, str | None]:
        """After which step, from which position and with which batching training begins."""
        return self.step, self.position, self.chosen.get("data.batching")

    @property
    def untrained(self) -> Sequence[str]:
        """The samples of the untrained model, as the run's first start drew them."""
        return self.state.get("untrained", ())

    @property
    def is_end(self) -> bool:
        """Whether the run's own checkpoint was its last: its line has what belongs to the end of a run."""
        step, num_steps = self.own_step, self.state.get("facts", {}).get("num_steps")
        return step is not None and (step >= num_steps or step == self.num_steps)

    def adjust(self, job: Job, num_processes: int, warn: Callable[[str], None]) -> Job:
        """Return the job whose steps take as many rows as before, where only the number of processes changed.

        Accumulation makes up for it. Where that does not divide, nothing is changed, and `restore` reports it.
        """
        if self.checkpoint is None:
            return job
        before, training = self.state["facts"], job.config.training
        size = _size(job) * num_processes
        batch_keys_unchanged = not any(change.key in BATCH_KEYS for change in self.changes)
        accumulation, remainder = divmod(before["step_sequences"], size)
        if not batch_keys_unchanged or remainder or accumulation == training.gradient_accumulation_steps:
            return job
        if num_processes != before["num_processes"]:  # else the start that changed it has warned
            count = plural(num_processes, "process", "processes")
            warn(
                f"{count} instead of {before['num_processes']}: gradient_accumulation_steps is {accumulation} "
                f"instead of {training.gradient_accumulation_steps}, so that a step takes the same rows"
            )
        training = replace(training, gradient_accumulation_steps=accumulation)
        return replace(job, config=replace(job.config, training=training))

    def checked(self, data: Any, tokenizer: Any, job: Job, num_processes: int) -> Self:
        """Compare the encoded rows, the tokens and a step's size with the checkpoint's, before the model is loaded.

        Return the same checkpoint, and whether the epoch has to begin again. ConfigError names what changed too much.
        """
        if self.checkpoint is None:
            return self
        before, size = Fingerprint.from_dict(self.state["facts"]), _size(job)
        now = replace(
            before,
            data=data.train.digest(),
            num_rows=data.num_train_rows,
            tokenizer=tokenizer_hash(tokenizer),
            step_sequences=size * job.config.training.gradient_accumulation_steps * num_processes,
        )
        named = ", ".join(change.key for change in self.changes if change.key.startswith("data."))
        changes = [
            replace(change, why=f"{change.why}; changed: {named}") if change.key == "data" and named else change
            for change in [*self.changes, *compare_fingerprints(before, now)]
        ]
        check_changes(changes, allow_changed=job.config.checkpoint.allow_changed, checkpoint=str(self.checkpoint))
        position = self.state["position"]
        was_begun = position["num_sequences"] > 0 or bool(position["block"] and position["block"]["num_blocks"])
        is_reordered = compatibility.is_reordered(changes, with_chosen(job.frozen, self.chosen))
        # before there was Batching.auto, micro-batches of similar length were shuffled, not steps of them
        is_regrouped = "chosen" not in self.state and self.chosen.get("data.batching") == "length_grouped"
        return replace(self, repeats_epoch=was_begun and (is_reordered or (is_regrouped and now.step_sequences > size)))

    def restore(self, state: Any, fingerprint: Fingerprint, runtime: Any, config: RunConfig) -> list[str]:
        """Restore weights, optimizer, counters and generators as they were at the checkpoint; return warnings.

        Where the run begins anew, processes only get random numbers that differ. `state` is the TrainState, at the
        checkpoint's position. ConfigError names what has changed too much, CheckpointError weights of another form.
        """
        if self.checkpoint is None:
            runtime.seed_apart()
            return []
        from src.checkpoint.store import read_snapshot

        changes = compare_fingerprints(Fingerprint.from_dict(self.state["facts"]), fingerprint)
        warnings = check_changes(
            changes, allow_changed=config.checkpoint.allow_changed, checkpoint=str(self.checkpoint)
        )
        state.restore(read_snapshot(self.checkpoint), runtime)
        if self.repeats_epoch:
            epoch = self.state["position"]["epoch"] + 1
            warnings.append(f"the rows of epoch {epoch} come in another order, so it begins again")
        return warnings

    def comparable_from(self, fingerprint: Fingerprint, step: int, *, is_complete: bool) -> int:
        """Return the first step whose evaluation is of the present rows: earlier ones don't count for the best.

        The run resumes after `step`, which is complete where it is evaluated and logged already.
        """
        if self.checkpoint is None:
            return 0
        if Fingerprint.from_dict(self.state["facts"]).validation not in (None, fingerprint.validation):
            return step + 1 if is_complete else step
        return int(self.state.get("comparable_from", 0))


def find_resume_point(
    config: CheckpointConfig, frozen: Mapping[str, Any], run_dir: Path, *, force: bool
) -> ResumePoint:
    """Find the checkpoint that a run resumes from, see `find_checkpoint`, and compare whole configurations.

    With `force` it begins anew, whatever is there. ConfigError names what in the configuration has changed too much;
    CheckpointError is as of `find_checkpoint`.
    """
    if force or config.resume == "never":
        return ResumePoint()
    checkpoint, is_own, skipped = find_checkpoint(config, run_dir)
    if checkpoint is None:
        return ResumePoint()
    state = read_state(checkpoint)
    before, now = (with_chosen(one, _chosen_of(state)) for one in (state["config"], frozen))
    changes = compatibility.compare_configs(before, now)
    warnings = check_changes(changes, allow_changed=config.allow_changed, checkpoint=str(checkpoint))
    num_steps = read_status(run_dir).get("num_steps") if is_own else None
    return ResumePoint(checkpoint, state, changes, [*skipped, *warnings], is_own, num_steps)


def _size(job: Job) -> int:
    """Return how many rows, or packs of rows, or positions, a micro-batch of a job has."""
    return job.config.training.per_device_train_tokens or job.config.training.per_device_train_batch_size


def _chosen_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Return what CHOSEN mean in a checkpoint; one of a version without `auto` says so in its configuration."""
    before = {key: _value(state["config"], key) for key in CHOSEN} | dict(state.get("chosen", {}))
    return {key: value for key, value in before.items() if value is not None}


def _value(frozen: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return frozen.get(section, {}).get(name)


def with_chosen(frozen: Mapping[str, Any], chosen: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a frozen configuration in which keys that are `auto` are what was chosen."""
    settled = dict(frozen)
    for key, value in chosen.items():
        section, name = key.split(".")
        if _value(settled, key) == "auto":
            settled[section] = {**settled[section], name: value}
    return settled


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of which id each token has, 32 hex digits."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]
