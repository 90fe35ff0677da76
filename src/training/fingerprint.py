"""What a checkpoint must have in common with the run that resumes from it, of a run that is assembled."""

import hashlib
import json
from importlib import metadata
from typing import Any

from src.checkpoint.compatibility import Fingerprint
from src.checkpoint.tensors import tensors_digest
from src.config import plugins
from src.config.schema import RunConfig
from src.data.dataset import Data
from src.runtime.session import Runtime
from src.training.resume import tokenizer_hash
from src.training.state import TrainState

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy")
"""Libraries whose versions may change how numbers are rounded."""

NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
"""Settings of a model that say nothing, or that another entry of the fingerprint or a key says."""


def architecture_hash(model: Any) -> str:
    """Return a hash of a model's own settings, without where they came from, 32 hex digits."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in NOT_COMPUTED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint_of(state: TrainState, data: Data, tokenizer: Any, runtime: Runtime, config: RunConfig) -> Fingerprint:
    """Return the fingerprint of a run, before its state is restored."""
    frozen = state.frozen_weights()
    return Fingerprint(
        step=state.step,
        num_steps=state.num_steps,
        data=data.train.digest(),
        num_rows=data.num_train_rows,
        tokenizer=tokenizer_hash(tokenizer),
        frozen_weights=tensors_digest(frozen) if frozen else None,
        device=runtime.device.type,
        num_processes=runtime.num_processes,
        step_sequences=state.batch_sampler.batch_size * state.batch_sampler.micro_batches_per_step,
        versions={name: metadata.version(name) for name in PACKAGES} | plugins.versions(config.plugins),
        architecture=architecture_hash(state.model),
        validation=data.validation_digest(config.evaluation.max_samples),
    )
