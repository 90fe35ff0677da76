"""A run's trained weights, from its model/ or from one of its checkpoints, as they are exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.checkpoint.exported import ADAPTER, with_base_model, with_init_from_model
from src.checkpoint.store import read_snapshot
from src.checkpoint.tensors import tensors_digest
from src.config.job import Job
from src.data.dataset import build_encoder
from src.data.tokenizer import load_tokenizer
from src.errors import CheckpointError
from src.model.adapters import Adapter
from src.model.export import load_exported, load_exported_adapter
from src.progress import NO_PROGRESS
from src.runtime.session import Runtime
from src.training.assembly import assemble_model
from src.training.resume import tokenizer_hash
from src.training.state import frozen_weights, restore_weights


@dataclass(frozen=True)
class TrainedWeights:
    """A model as it was trained; `step` is that of its checkpoint, None for the result of the run."""

    model: Any
    adapter: Adapter | None
    tokenizer: Any
    token_ids: Mapping[str, int]
    step: int | None


def load_weights(job: Job, place: Path, runtime: Runtime) -> TrainedWeights:
    """Load the weights at `place`; ModelError or CheckpointError says that they do not fit the run's model."""
    if job.entry_section.checkpoint is not None:
        return _of_checkpoint(job, place, runtime)
    config = with_base_model(job.run_dir, job.config)
    tokenizer, tokens = load_tokenizer(config.model.pretrained_at(place), config.tokens)
    if not (place / ADAPTER).exists():
        return TrainedWeights(load_exported(job.run_dir, config), None, tokenizer, tokens.ids, None)
    adapter = load_exported_adapter(place, config, runtime.device)
    return TrainedWeights(adapter.peft_model.get_base_model(), adapter, tokenizer, tokens.ids, None)


def _of_checkpoint(job: Job, checkpoint: Path, runtime: Runtime) -> TrainedWeights:
    """Assemble the model as the run did, and put a checkpoint's weights into it."""
    config = with_init_from_model(job.config)
    tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
    snapshot = read_snapshot(checkpoint)
    facts = snapshot.state["facts"]
    if facts["tokenizer"] != tokenizer_hash(tokenizer):
        raise CheckpointError(f"{config.model.checkpoint} has changed: its tokens have other ids than in {checkpoint}")
    built = assemble_model(config, tokenizer, new_tokens, build_encoder(config, tokenizer), runtime, NO_PROGRESS)
    frozen = frozen_weights(built.model)
    if frozen and tensors_digest(frozen) != facts["frozen_weights"]:
        raise CheckpointError(f"{config.model.checkpoint} has changed: {checkpoint} was trained on other weights")
    restore_weights(built.model, snapshot.weights, lambda parameter, value: parameter.copy_(value))
    return TrainedWeights(built.model, built.adapter, tokenizer, new_tokens.ids, int(snapshot.state["step"]))
