"""Adapters: small trained matrices added to a model's frozen weights, and rows for new tokens. The door to PEFT."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from src.config.schema import LoraConfig, RunConfig
from src.errors import ModelError, one_line
from src.model.embeddings import embedding_matrices, is_tied, true_tie_flag
from src.model.quantization import is_linear, is_transposed, quiet_bitsandbytes
from src.model.weights import check_finite, check_names
from src.runtime.sharding import gathered, unsharded_models
from src.util import in_words, nearest

WEIGHTS = "adapter_model.safetensors"  # what PEFT calls the file of an adapter's weights
NAME = "default"  # what PEFT calls the one adapter of a model
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide PEFT's warnings that say nothing to a user: PEFT 0.21 uses an old name of transformers 5.23, and it warns of
    adapters on tied matrices, whose merges are refused here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* a tied layer is part of the adapter", UserWarning)
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


@dataclass(frozen=True)
class Adapter:
    """An adapter that PEFT has put into a model; the model is changed in place and used as before."""

    peft_model: Any
    needs_merging: str = ""  # why plain PEFT can't load it by itself, so that only merged weights are a result

    def save(self, folder: Path) -> None:
        """Write the adapter and the rows of new tokens, nothing of the base."""
        self.peft_model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT writes both whole matrices

    def load(self, folder: Path) -> None:
        """Load what `save` wrote into this adapter; ModelError says that it can't be read, or is of another form."""
        from peft import set_peft_model_state_dict

        saved = _read_adapter(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self.state().items()}:
            raise ModelError(f"the adapter in {folder} is of another form than adapter=… and tokens=… make here")
        check_finite(f"the adapter in {folder}", saved.items())
        set_peft_model_state_dict(self.peft_model, saved)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `save` writes, by name."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)

    def shapes_on(self, empty: Any, folder: Path) -> dict[str, tuple[int, ...]]:
        """Load what was saved onto an empty base; return the shapes of its tensors, by the names of `state`.

        ValueError, RuntimeError or KeyError say that it does not fit.
        """
        from peft import PeftModel, get_peft_model_state_dict

        with quiet():
            loaded = PeftModel.from_pretrained(empty, folder, low_cpu_mem_usage=True)
        if _trained_ids(loaded) != _trained_ids(self.peft_model):
            raise ValueError("other tokens have rows of their own")
        state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def on_float32(self, folder: Path) -> tuple[Any, torch.dtype]:
        """Return this adapter, saved in a folder, on its dequantised base, to be made float32; and the base's type.

        Weights of fewer bits than float32 are moved to the CPU: where they were they may have no room.
        """
        from peft import PeftModel

        model = self.peft_model.get_base_model()
        if getattr(model, "quantization_method", None) is None:
            dtype = model.dtype
            if dtype != torch.float32:
                model.to("cpu")
            return self.peft_model, dtype
        base = self.peft_model.unload()
        dtype = base.dtype
        base = base.to("cpu").dequantize(dtype=torch.float32)
        with quiet(), true_tie_flag(base):
            whole = PeftModel.from_pretrained(base, folder)
        use_row_lookup(whole)
        return whole, dtype


def _trained_ids(model: nn.Module) -> dict[str, list[int]]:
    """Return the tokens whose rows the adapter trains, by module."""
    found = {name: getattr(module, "token_indices", None) for name, module in model.named_modules()}
    return {name: list(of_adapter[NAME]) for name, of_adapter in found.items() if of_adapter}


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter, by the names that PEFT writes."""
    file = folder / WEIGHTS
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError(f"{WEIGHTS} is no plain file")
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the adapter in {folder} can't be read: {one_line(error)} ({WEIGHTS})") from error


def load_adapter(base: Any, folder: Path) -> Adapter:
    """Load a saved adapter onto its base, which is changed in place and has room for the new tokens.

    ModelError says that it does not fit, lacks a weight or has one too many, or one that is not finite.
    """
    quiet_bitsandbytes()  # PEFT imports it
    from peft import PeftModel, get_peft_model_state_dict

    what, saved = f"the adapter in {folder}", _read_adapter(folder)
    try:
        with quiet(), true_tie_flag(base), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # check_names names them
            loaded = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{what} can't be loaded onto its base: {one_line(error)}") from error
    names = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
    check_names(what, missing=names - saved.keys(), left_over=saved.keys() - names)
    check_finite(what, saved.items())
    return Adapter(loaded)


def add_adapter(model: Any, config: RunConfig, new_ids: Sequence[int] = ()) -> Adapter | None:
    """Freeze a model and put an adapter into it, in place; return None where the configuration has none.

    The rows of `new_ids` are trained too, in each matrix of tokens. ModelError says that `target_modules` is not found
    in the model, that there is nothing to train, or that the adapter alone could not be loaded again.
    """
    if not config.adapter.is_on:
        return None
    quiet_bitsandbytes()  # PEFT imports it
    import peft

    lora = config.lora
    if lora is not None:
        check_targets(model, lora)
    matrices = [matrix.module for matrix in embedding_matrices(model)] if new_ids else []
    needs_merging = _lost_when_loaded(model, matrices) if new_ids else ""
    if needs_merging and not config.export.merge:
        raise ModelError(f"{needs_merging}: export.merge=true writes whole weights, which load as they are")
    names = [name for name, module in model.named_modules() if any(module is one for one in matrices)]
    if lora is None:
        _check_rows_alone(model, config, names, new_ids)
    elif new_ids:
        _check_rows_have_no_adapter(model, names, lora)
    # PEFT 0.21 would gather the rows that it starts from on CUDA devices only
    full = gathered(parameter for module in matrices for parameter in module.parameters())
    try:
        settings = _peft_config(model, config, {name: list(new_ids) for name in names} or None)
        with quiet(), unsharded_models(), true_tie_flag(model), full:
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        raise ModelError(f"this adapter can't be put into a {type(model).__name__}: {one_line(error)}") from error
    if lora is not None and lora.use_dora:
        _check_norms(model)
    base = Path(config.model.checkpoint)  # by its whole path it is found from another folder too
    settings.base_model_name_or_path = str(base.resolve()) if base.is_dir() else config.model.checkpoint
    use_row_lookup(model)
    return Adapter(adapted, needs_merging)


def _peft_config(model: Any, config: RunConfig, new_rows: dict[str, list[int]] | None) -> Any:
    """Return PEFT's settings.

    `new_rows` has the tokens whose rows are trained, by the name of the matrix; PEFT ties the other matrices to these.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    values: dict[str, Any] = {"target_modules": DUMMY_TARGET_MODULES}  # PEFT's name for none
    if (lora := config.lora) is not None:
        values = {key: value.value if isinstance(value, Enum) else value for key, value in vars(lora).items()}
        del values["type"]
    return peft.LoraConfig(
        **values,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        trainable_token_indices=new_rows,
        fan_in_fan_out=any(map(is_transposed, model.modules())),
        revision=config.model.revision,
    )


def _check_rows_alone(model: Any, config: RunConfig, matrices: Sequence[str], new_ids: Sequence[int]) -> None:
    """Raise ModelError where there are no rows to train, or they would not be looked up everywhere."""
    if not new_ids:
        tokens = ", ".join(config.tokens.additional_special_tokens)
        raise ModelError(
            f"adapter=tokens_only trains the rows of new tokens alone, and {config.model.checkpoint} has trained those "
            f"of {tokens} already: name other tokens, or adapter=lora"
        )
    owners = _owners(model)
    shared = {name for one in matrices for name in owners[id(model.get_submodule(one).weight)]} - set(matrices)
    if shared and not is_tied(model):
        raise ModelError(
            f"adapter=tokens_only: {in_words(sorted(shared))} of this {type(model).__name__} would not get the rows "
            "that are trained, as PEFT 0.21 ties rows only where the head is tied too: adapter=none"
        )


def _check_rows_have_no_adapter(model: Any, matrices: Sequence[str], lora: LoraConfig) -> None:
    """Raise ModelError where one of these matrices of tokens, or the head, is a target: rows of it are trained."""
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    for name in (*matrices, *head):
        if is_target(name, lora.target_modules) and not is_target(name, lora.exclude_modules or []):
            raise ModelError(
                f"adapter.target_modules: {name} can't have an adapter where rows of new tokens are trained in it: "
                "leave it out, or use tokens=none"
            )


def _check_norms(model: nn.Module) -> None:
    """Check that DoRA, which divides by the norm of each of a matrix's outputs, has no 0 to divide by."""
    for name, module in model.named_modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            with gathered([layer.weight]):
                zeros = [] if layer.weight.is_meta else (layer.weight == 0).nonzero().flatten().tolist()
            if zeros:
                raise ModelError(
                    f"adapter.use_dora: DoRA divides by norms, and {name} has rows of zeros (the first is {zeros[0]}; "
                    f"a padding token's, as a rule): leave {name.rpartition('.')[2]} out of adapter.target_modules, or "
                    "adapter=lora"
                )


def _lost_when_loaded(model: Any, matrices: Sequence[nn.Module]) -> str:
    """Return why an adapter with rows of new tokens would be another model when plain PEFT loads it; mostly nothing."""
    kind = type(model).__name__
    if len(matrices) > 2:
        return (
            f"encoder and decoder of this {kind} have token matrices of their own. When others resize it for the new "
            "tokens, transformers puts one in the place of all, and the adapter would not fit"
        )
    if len(matrices) > 1 and model.config.tie_word_embeddings:
        return (
            f"input and output matrix of this {kind} are two, but its configuration calls them tied, and plain PEFT "
            "would put the same rows into both"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return f"the head of this {kind} has a bias, which PEFT 0.21 leaves out where a head has rows of new tokens"
    return ""


def check_adapter(empty: Any, config: RunConfig) -> None:
    """Check that an adapter goes into a model, and changes nothing else where it is written into the weights.

    The model, on the meta device, gets the adapter. ModelError says what does not go together.
    """
    if config.lora is None:
        return  # rows of tokens alone are written into their own matrices
    check_targets(empty, config.lora)
    start = config.lora.init_lora_weights
    if config.export.merge:
        why, remedy = "export.merge=true writes the adapter into it", "export.merge=false keeps the adapter apart"
    elif start not in PLAIN_STARTS:
        why, remedy = f"adapter.init_lora_weights={start} changes it", "adapter.init_lora_weights=true leaves it alone"
    else:
        return
    owners = _owners(empty)
    add_adapter(empty, replace(config, adapter=replace(config.lora, init_lora_weights=True)))
    _check_shared(empty, owners, why, remedy)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return the modules that have each parameter: id(parameter) -> names, several where it is tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _check_shared(model: nn.Module, owners: Mapping[int, Sequence[str]], why: str, remedy: str) -> None:
    """Check that no matrix with an adapter is another module's too, which would change with it.

    The owners are those of the parameters before the model got the adapter; `why` says what writes into the matrix.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        matrices = module.get_base_layer().parameters(recurse=False)
        name = name.replace(".base_layer", "")  # several adapters in one module, of experts
        others = sorted({one for matrix in matrices for one in owners.get(id(matrix), [])} - {name})
        if others:
            both = in_words(others)
            raise ModelError(
                f"adapter.target_modules: {name} has its matrix in common with {both} (tied weights), and {why}: "
                f"{both} would change too, and the result would not be the model that is trained. Leave "
                f"{name.rpartition('.')[2]} out of adapter.target_modules (all-linear does), or {remedy}"
            )


def check_targets(model: Any, config: LoraConfig) -> None:
    """Check that the model has every name of the targets; ModelError says which are nearest to one that it lacks."""
    for key, targets in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if targets is not None and targets != "all-linear":
            _check_names(model, key, [targets] if isinstance(targets, str) else targets, isinstance(targets, str))


def is_target(name: str, targets: Any) -> bool:
    """Return whether a module of this name is one of PEFT's targets: a pattern, or the ends of names."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_names(model: Any, key: str, targets: Sequence[str], is_pattern: bool) -> None:
    names = [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]
    try:
        missing = [t for t in targets if not any(is_target(name, t if is_pattern else [t]) for name in names)]
    except re.error as error:
        raise ModelError(f"adapter.{key} = {targets[0]!r} is no regular expression: {error}") from error
    if not missing:
        return
    if is_pattern and any(is_target(name, missing) for name in names):
        raise ModelError(
            f"adapter.{key}: a text is a pattern for whole names; a list of names is written [{targets[0]}]"
        )
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})
    near = {t: nearest(t.rpartition(".")[2], linear) for t in missing}
    listed_names = ", ".join(f"{t}{f' (did you mean {near[t]}?)' if near[t] else ''}" for t in missing)
    raise ModelError(
        f"adapter.{key}: {listed_names} not found in {type(model).__name__}; its linear layers are "
        f"{', '.join(linear)}, or all-linear"
    )


def use_row_lookup(model: nn.Module) -> None:
    """Have PEFT's trained rows looked up without the matrix.

    PEFT 0.21 writes them into a copy of the whole matrix in every forward, and gets a whole matrix of gradients.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    class LeanTokens(TrainableTokensLayer):
        def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged or len(active_adapters) != 1:
                return super().forward_adapters(x, active_adapters, *args, **kwargs)
            (name,) = active_adapters
            ids = torch.tensor(self.token_indices[name], device=x.device)
            return with_rows(self.base_layer, x, ids, self.trainable_tokens_delta[name], *args, **kwargs)

    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = LeanTokens


def with_rows(base: nn.Module, x: Tensor, ids: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a lookup or a head as if the matrix had these rows [n, width] in the place of its own of `ids` [n].

    The base is an embedding, for ids x [...], or a linear layer, for states x [..., width].
    """
    result = base(x, *args, **kwargs)
    if isinstance(base, nn.Embedding):
        at = (x[..., None] == ids).long()  # [..., n]
        looked_up = functional.embedding(at.argmax(-1), rows).to(result.dtype)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            looked_up = looked_up * (scale.to(result.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(at.any(-1, keepdim=True), looked_up, result)
    bias = getattr(base, "bias", None)
    own = functional.linear(x, rows.to(x.dtype), None if bias is None else bias[ids])
    return result.index_copy_(-1, ids, own.to(result.dtype))
