"""What a run assembled, in a few lines for a person."""

from pathlib import Path

from src.config.job import Job
from src.config.schema import Batching, InitMethod, RunConfig, TokensConfig, Weights
from src.data.batching_choice import about_choice
from src.data.dataset import Data
from src.forecast.disk import disk_forecast_of_run
from src.forecast.parameters import optimizer_part, parameters_of, with_adapter
from src.model.build import num_parameters
from src.model.embeddings import num_embedding_rows
from src.runtime.session import Runtime
from src.training.assembly import Assembled
from src.training.state import TrainState
from src.util import human_bytes


def overview(job: Job, state: TrainState, built: Assembled, data: Data, runtime: Runtime) -> dict[str, str]:
    """Return label -> text; a text may have several lines."""
    config = job.config
    return {
        "model": _model(config, state),
        "tokens": _tokens(config, state, built),
        "data": "\n".join(f"{name}: {report.summary}" for name, report in data.reports.items()),
        "steps": _steps(config, state),
        "disk": _disk(config, state, job.run_dir),
        "device": runtime.description,
    }


def _model(config: RunConfig, state: TrainState) -> str:
    total, trained = num_parameters(state.model)
    source = "random weights" if config.model.weights is Weights.random else "pretrained weights"
    dtype = str(state.model.dtype).removeprefix("torch.")
    quantization = config.quantization
    bits = ", frozen in 8 bits" if quantization.load_in_8bit else ""
    if quantization.load_in_4bit:
        bits = f", frozen in 4 bits ({quantization.bnb_4bit_quant_type.value})"
    text = f"{type(state.model).__name__} of {config.model.checkpoint}, {source}, {dtype}{bits}"
    if (lora := config.lora) is not None:
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
        text += f"\n{kind}, r {lora.r}, on {targets}"
    elif config.adapter.is_on:
        text += "\nonly the rows of new tokens are trained"
    text += f"\n{total:,} parameters, {'all' if trained == total else f'{trained:,} ({trained / total:.2%})'} trained"
    if state.uses_full_logits:
        text += "\nthe model computes its logits by itself, at every position (slower, more memory)"
    return text


def _tokens(config: RunConfig, state: TrainState, built: Assembled) -> str:
    tokenizer, new, initialised = built.tokenizer, built.new_tokens, built.initialised
    text = f"{len(tokenizer):,} in the vocabulary, {num_embedding_rows(state.model):,} rows"
    if named := [token for token in initialised.ids if token in new.ids]:
        text += f"; {', '.join(named)} initialised {_initialised_from(config.tokens)}"
    if rest := len(initialised.ids) - len(named):
        text += f"; {rest:,} without a row in the checkpoint initialised from the mean"
    if untrained := [token for token in new.existing if token in initialised.ids]:
        text += f"; untrained in the checkpoint: {', '.join(untrained)}"
    if kept := [token for token in new.existing if token not in initialised.ids]:
        text += f"; in the vocabulary, rows kept: {', '.join(kept)}"
    return text


def _initialised_from(config: TokensConfig) -> str:
    """Return what the rows of new tokens start as, in words."""
    return {
        InitMethod.text: f"from the mean of {', '.join(map(repr, config.init.text))}",
        InitMethod.description: "from the mean of their descriptions",
        InitMethod.random: "at random",
        InitMethod.mean: "from the mean of all rows",
    }[config.init.method]


def _disk(config: RunConfig, state: TrainState, run_dir: Path) -> str:
    """Return what checkpoints and the exported model take at most, and whether there is room."""
    parameters = with_adapter(parameters_of(state.model), state.model)
    weights, optimizer = parameters.trained_bytes, optimizer_part(parameters, config.optimizer).bytes
    if optimizer is None:
        return f"more than {human_bytes(weights)} a checkpoint: the size of {config.optimizer.type}'s state is unknown"
    forecast = disk_forecast_of_run(config, parameters, run_dir, state.num_steps, state.steps_per_epoch)
    need, free = forecast.total.bytes or 0, forecast.free_bytes
    existing = sum(file.lstat().st_size for file in (run_dir / "checkpoints").glob("step-*/*"))
    text = f"up to {human_bytes(need)} for checkpoints ({human_bytes(weights + optimizer)} each) and the model"
    if need - existing <= free:
        return f"{text}, {human_bytes(free)} free"
    return (
        f"{text}, but only {human_bytes(free)} are free: the run will stop when the disk is full.\n"
        "Make room, or keep fewer (checkpoint.keep_last, keep_best, newest_optimizer_only)"
    )


def _steps(config: RunConfig, state: TrainState) -> str:
    sampler = state.batch_sampler
    rows = "sequences of packed rows" if sampler.batching is Batching.packed else "rows"
    sequences = f"{sampler.size * sampler.micro_batches_per_step:,} {rows}"
    if sampler.counts_tokens:
        sequences = f"as many rows as fit in {sampler.micro_batches_per_step} x {sampler.token_budget:,} positions"
    sequences += "" if state.row_bounds is None else ", without padding"
    grouped = f"\n{about_choice(sampler)}" if sampler.saved_share is not None else ""
    if state.steps_per_epoch is None:
        why = "" if sampler.counts_tokens else ", epochs are of different length, as thoughts fade"
        return f"{state.num_steps:,}, each of {sequences}{', streamed' if config.data.streaming else why}{grouped}"
    epochs = state.num_steps / state.steps_per_epoch
    return f"{state.num_steps:,}, each of {sequences}: {epochs:.3g} epoch{'s' if epochs > 1 else ''}{grouped}"
