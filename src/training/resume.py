"""Going on from a checkpoint, and beginning with old weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from src.checkpoint.compatibility import Fingerprint, check, compare_fingerprints, is_reordered
from src.checkpoint.exported import exported_start
from src.checkpoint.locate import Origin, newest_weights
from src.checkpoint.store import read_snapshot
from src.checkpoint.tensors import tensors_digest
from src.config.schema import RunConfig
from src.data.batching import Position
from src.data.dataset import Data
from src.data.tokenizer import load_tokenizer
from src.errors import CheckpointError, ModelError
from src.model.adapters import Adapter
from src.model.embeddings import TokenMonitor
from src.runtime.session import Runtime
from src.training.state import Beginning, TrainState
from src.util import plural

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy")
"""Whose versions may change how numbers are rounded."""

BATCH_KEYS = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")

NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
"""Settings of a model that say nothing, or that other facts and keys say."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of which id each token has, 32 hex digits."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def architecture_hash(model: Any) -> str:
    """Return a hash of a model's own settings, without where they came from, 32 hex digits."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in NOT_COMPUTED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint_of(state: TrainState, data: Data, tokenizer: Any, runtime: Runtime, config: RunConfig) -> Fingerprint:
    """Return what a checkpoint must have in common with the run that goes on from it."""
    frozen = state.frozen_weights()
    return Fingerprint(
        step=state.step,
        num_steps=state.num_steps,
        data=data.train_digest(),
        num_rows=data.num_train_rows,
        tokenizer=tokenizer_hash(tokenizer),
        frozen_weights=tensors_digest(frozen) if frozen else None,
        device=runtime.device.type,
        num_processes=runtime.num_processes,
        step_sequences=state.plan.batch_size * state.plan.accumulation,
        versions={name: metadata.version(name) for name in PACKAGES},
        architecture=architecture_hash(state.model),
        validation=data.validation_digest(config.evaluation.max_samples),
    )


def beginning(origin: Origin, data: Data, tokenizer: Any, config: RunConfig, frozen: Mapping[str, Any]) -> Beginning:
    """Say where a run begins in its rows; before the model is loaded, so that other rows or tokens cost nothing.

    Raises:
        ConfigError: where these have changed too much since the checkpoint.
    """
    if origin.checkpoint is None:
        return Beginning()
    before = Fingerprint.from_dict(origin.state["facts"])
    now = replace(before, data=data.train_digest(), num_rows=data.num_train_rows, tokenizer=tokenizer_hash(tokenizer))
    named = ", ".join(change.key for change in origin.changes if change.key.startswith("data."))
    changes = [
        replace(change, why=f"{change.why}; changed: {named}") if change.key == "data" and named else change
        for change in [*origin.changes, *compare_fingerprints(before, now)]
    ]
    check(changes, allow_changed=config.checkpoint.allow_changed, where=str(origin.checkpoint))
    position = Position.from_dict(origin.state["position"])
    was_begun = position.num_sequences > 0 or bool(position.block and position.block["num_blocks"])
    repeats = was_begun and is_reordered(changes, frozen)
    if repeats:
        position = Position(position.epoch)
    return Beginning(int(origin.state["step"]), position, origin.state["untrained"], repeats)


def resume(
    state: TrainState, origin: Origin, begin: Beginning, facts: Fingerprint, runtime: Runtime, config: RunConfig
) -> list[str]:
    """Put everything back as it was at a checkpoint; gives warnings. Where the run begins anew, only the processes get
    random numbers that differ.

    Raises:
        ConfigError: where data, tokenizer or model have changed too much.
        CheckpointError: where the model is of another form.
    """
    if origin.checkpoint is None:
        runtime.seed_apart()
        return []
    changes = compare_fingerprints(Fingerprint.from_dict(origin.state["facts"]), facts)
    warnings = check(changes, allow_changed=config.checkpoint.allow_changed, where=str(origin.checkpoint))
    state.restore(read_snapshot(origin.checkpoint), runtime)
    if begin.repeats_epoch:
        warnings.append(f"the rows of epoch {begin.position.epoch + 1} come in another order, so it begins again")
    return warnings


def ended_there(origin: Origin) -> bool:
    """Return whether a run's own checkpoint was its last: what belongs to the end of a run came of its step."""
    return origin.is_own and origin.own_step is not None and origin.own_step >= origin.state["facts"]["num_steps"]


def first_comparable(origin: Origin, facts: Fingerprint, state: TrainState) -> int:
    """Return the first step whose evaluation is of the rows of now: those before say nothing of which is the best."""
    if origin.checkpoint is None:
        return 0
    before = Fingerprint.from_dict(origin.state["facts"]).validation
    if before not in (None, facts.validation):
        return state.step + 1 if state.is_over else state.step
    return int(origin.state.get("comparable_from", 0))


def same_step(config: RunConfig, origin: Origin, num_processes: int) -> tuple[RunConfig, list[str]]:
    """Have a step take as many rows as before, where only the number of processes changed; gives warnings.

    Accumulation makes up for it. Where that does not divide, nothing is changed, and the contract tells.
    """
    if origin.checkpoint is None:
        return config, []
    before, training = origin.state["facts"], config.training
    size = training.per_device_train_batch_size * num_processes
    is_asked_alike = not any(change.key in BATCH_KEYS for change in origin.changes)
    accumulation, rest = divmod(before["step_sequences"], size)
    if not is_asked_alike or rest or accumulation == training.gradient_accumulation_steps:
        return config, []
    count = plural(num_processes, "process", "processes")
    told = (
        f"{count} instead of {before['num_processes']}: gradient_accumulation_steps is "
        f"{accumulation} instead of {training.gradient_accumulation_steps}, so that a step takes the same rows"
    )
    warnings = [] if num_processes == before["num_processes"] else [told]  # else told by the start that changed it
    return replace(config, training=replace(training, gradient_accumulation_steps=accumulation)), warnings


def start_from_adapter(adapter: Adapter | None, tokenizer: Any, config: RunConfig) -> bool:
    """Put the adapter of `init_from` into the model, before it is shared out; False where it names none.

    Raises:
        ModelError: where it does not fit the model.
    """
    folder = exported_start(config)
    if folder is None or not (folder / "adapter_config.json").exists():
        return False
    if adapter is None:
        raise ModelError(
            f"init_from: {folder} is an adapter, so it needs one here too (adapter=lora); "
            "a run with export.merge=true gives whole weights"
        )
    saved, _ = load_tokenizer(replace(config.model, checkpoint=str(folder), revision=None), config.tokens)
    if tokenizer_hash(saved) != tokenizer_hash(tokenizer):
        raise ModelError(f"init_from: the tokens of {folder} have other ids than here")
    adapter.load(folder)
    return True


def start_from_checkpoint(state: TrainState, tokenizer: Any, runtime: Runtime, config: RunConfig) -> list[str]:
    """Put the checkpoint of `init_from` into the model, where it names one; gives warnings.

    Raises:
        CheckpointError: where it does not fit the model.
    """
    if config.init_from is None or exported_start(config) is not None:
        return []
    checkpoint, warnings = newest_weights(Path(config.init_from))
    kept = read_snapshot(checkpoint)
    if kept.state["facts"]["tokenizer"] != tokenizer_hash(tokenizer):
        raise CheckpointError(f"init_from: the tokens of {checkpoint} have other ids than here")
    state.restore_weights(kept.weights, runtime)
    state.new_rows = TokenMonitor(state.model, state.new_rows.ids)
    return warnings
