"""What a run puts together before its first step: the runtime, the model with its new tokens, the initial weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.checkpoint.exported import base_digests, check_exported, init_from_folder, with_init_from_model
from src.checkpoint.locate import newest_weights
from src.checkpoint.store import read_snapshot
from src.config.frozen import PRECISION, PROVENANCE
from src.config.gate import parse_stored
from src.config.job import Job
from src.config.options import PROJECT_ROOT
from src.config.schema import RunConfig, Weights
from src.data.advice import Level, about_schedule, advice
from src.data.dataset import Data, Prompts, file_hashes
from src.data.tokenizer import load_tokenizer
from src.errors import CheckpointError, ModelError, TowlineError
from src.model.adapters import Adapter, add_adapter, load_adapter
from src.model.build import build_model, set_generation, with_zero_sizes
from src.model.embeddings import InitialisedRows, TokenMonitor, reread_rows, resize_and_initialise
from src.model.merging import merge, probe_ids
from src.model.untrained import untrained_tokens
from src.progress import Progress
from src.runtime.launch import num_processes
from src.runtime.precision import with_precision
from src.runtime.products import bf16_warnings
from src.runtime.session import Runtime, start_runtime
from src.runtime.sharding import deepspeed_settings
from src.runtime.signals import StopRequest
from src.tokens import ConfiguredTokens
from src.tracking.provenance import provenance
from src.tracking.tracker import Tracker
from src.training.optim import warmup_warnings
from src.training.resume import ResumePoint, tokenizer_hash
from src.training.state import TrainState


@contextmanager
def start_session(job: Job, found: ResumePoint, stop: StopRequest) -> Iterator[tuple[Runtime, Job, ResumePoint]]:
    """Start computing; yield the runtime, and the first process's job and resume point, which count in all of them.

    TowlineError says that the device or the precision is not available, or not the same on every process.
    """
    config = with_precision(job.config, {**job.chosen, **found.chosen}.get("training.mixed_precision"))
    precision = config.training.mixed_precision
    settings = deepspeed_settings(with_zero_sizes(config), num_processes())
    with start_runtime(config.runtime, precision, config.seed, stop, settings) as runtime:
        frozen, run_dir, found = runtime.from_main((job.frozen, job.run_dir, found))
        if len(found_here := set(runtime.gather(precision.value))) > 1:
            raise TowlineError(
                f"training.mixed_precision=auto is {' and '.join(sorted(found_here))} on different processes' devices: "
                "give training.mixed_precision=no or bf16"
            )
        config = config if frozen is job.frozen else with_precision(parse_stored(frozen), precision.value)
        config = with_init_from_model(config)
        with nullcontext() if config.data.cache_dir is not None else runtime.shared_folder() as folder:
            if folder is not None:
                config = replace(config, data=replace(config.data, cache_dir=str(folder)))
            yield runtime, replace(job, config=config, frozen=frozen, run_dir=run_dir), found


def record_provenance(tracker: Tracker, job: Job, runtime: Runtime) -> dict[str, Any]:
    """Write the run's provenance and DeepSpeed's settings into its folder; return the provenance."""
    content = provenance(job.frozen, file_hashes(job.config.data), runtime.description, PROJECT_ROOT)
    content[PRECISION] = job.config.training.mixed_precision.value
    tracker.write_file(PROVENANCE, content, once=True)
    if (settings := deepspeed_settings(with_zero_sizes(job.config), runtime.num_processes)) is not None:
        tracker.write_file("deepspeed.json", settings)
    return content


@dataclass(frozen=True)
class Assembled:
    """A model with its new tokens and its adapter, before it is wrapped for training."""

    model: Any
    tokenizer: Any
    new_tokens: ConfiguredTokens
    adapter: Adapter | None
    initialised: InitialisedRows  # the rows that new tokens start from
    base: Mapping[str, Any] | None  # size and checksum of each file of the local model that the adapter is trained on


def assemble_model(
    config: RunConfig,
    tokenizer: Any,
    new_tokens: ConfiguredTokens,
    data: Data | Prompts,
    runtime: Runtime,
    progress: Progress,
) -> Assembled:
    """Load the model, quantised where asked; resize and initialise its embeddings, and add the adapter.

    ModelError says why it can't be loaded or assembled as asked.
    """
    has_base = config.adapter.is_on and runtime.is_main
    base = base_digests(config.model.checkpoint) if has_base else None
    with progress.work("loading", config.model.checkpoint):
        model = build_model(config, runtime.device)
    set_generation(model, config.generation, tokenizer, data.stop_ids, data.encoder.target_prefix)
    untrained = untrained_tokens(model, tokenizer, new_tokens, config.model)
    initialised = resize_and_initialise(model, tokenizer, new_tokens, config.tokens, config.seed, untrained)
    adapter = add_adapter(model, config, list(initialised.ids.values()))
    if _load_initial_adapter(model, adapter, tokenizer, config):
        initialised = reread_rows(model, initialised)
    return Assembled(model, tokenizer, new_tokens, adapter, initialised, base)


def _load_initial_adapter(model: Any, adapter: Adapter | None, tokenizer: Any, config: RunConfig) -> bool:
    """Load the adapter of `init_from`, before the model is sharded; return False where it names none.

    Where the run trains no adapter, it is merged into the model, in place.
    """
    folder = init_from_folder(config)
    if folder is None or not (folder / "adapter_config.json").exists():
        return False
    saved, _ = load_tokenizer(config.model.pretrained_at(folder), config.tokens)
    if tokenizer_hash(saved) != tokenizer_hash(tokenizer):
        raise ModelError(f"init_from: the tokens of {folder} have other ids than here")
    if adapter is not None:
        adapter.load(folder)
        return True
    if config.model.weights is Weights.random or config.deepspeed.stage == 3:
        raise ModelError(
            f"init_from: {folder} is an adapter, and can't be merged into weights that are random or sharded by "
            "ZeRO-3: adapter=… as in that run trains it on, or a run with export.merge=true exports whole weights"
        )
    check_exported(Path(str(config.init_from)), config.model.checkpoint)  # an adapter is nothing on another base
    merged = merge(load_adapter(model, folder), folder, probe_ids(tokenizer, config.tokens.additional_special_tokens))
    assert merged is model
    merged.requires_grad_(True)  # PEFT froze it
    return True


def load_initial_weights(state: TrainState, tokenizer: Any, runtime: Runtime, config: RunConfig) -> list[str]:
    """Load the weights of the checkpoint that `init_from` names, if it names one; return warnings.

    A whole model or an adapter that it names is loaded earlier, where the model is built. CheckpointError says that the
    checkpoint does not fit the model.
    """
    if config.init_from is None or init_from_folder(config) is not None:
        return []
    checkpoint, warnings = newest_weights(Path(config.init_from))
    snapshot = read_snapshot(checkpoint)
    if snapshot.state["facts"]["tokenizer"] != tokenizer_hash(tokenizer):
        raise CheckpointError(f"init_from: the tokens of {checkpoint} have other ids than here")
    state.restore_weights(snapshot.weights, runtime)
    state.token_monitor = TokenMonitor(state.model, state.token_monitor.ids)
    return warnings


def run_warnings(config: RunConfig, data: Data, tokenizer: Any, state: TrainState, runtime: Runtime) -> list[str]:
    """Return what will likely make the training worse, or slower, than it could be: data, schedule, precision."""
    about = [*advice(config, data, tokenizer), *about_schedule(config, state.num_steps, state.steps_per_epoch)]
    found = [one.text for one in about if one.level is not Level.note]
    slow = bf16_warnings(config, state.model.dtype, runtime.device)
    return [*found, *warmup_warnings(config.scheduler, state.num_steps), *slow]
