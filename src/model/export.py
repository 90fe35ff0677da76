"""The result of a run: a folder that plain transformers (and PEFT) load. What was written is read and compared."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from src.config.places import remove_tree, set_aside
from src.config.schema import Dtype, ModelConfig, RunConfig, Weights
from src.errors import ExportError, ModelError, NonFiniteLossError, is_disk_full, one_line
from src.model.adapters import WEIGHTS, Adapter, load_adapter
from src.model.build import build_model, check_lengths, empty_model, load_architecture, load_weights
from src.model.embeddings import is_tied, resize_embeddings
from src.model.merging import merge, probe_ids
from src.tokens import num_token_ids
from src.util import listed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Form:
    """How whole weights are written where not as they were trained.

    `dtype` is the type of every weight; without padding the matrices of tokens end with the last token. Where whole
    weights are `required`, an adapter that can't be merged is an error.
    """

    dtype: Dtype = Dtype.auto
    has_padding: bool = True
    is_required: bool = False


AS_TRAINED = Form()


def export(
    model: Any,
    adapter: Adapter | None,
    tokenizer: Any,
    folder: Path,
    config: RunConfig,
    card: str,
    adapter_card: str = "",
    form: Form = AS_TRAINED,
    complete: Callable[[Path], None] = lambda folder: None,
) -> list[str]:
    """Write the result of a run, check it, and only then put it into its place; return warnings.

    Weights (safetensors), configuration, tokenizer and generation settings. Of an adapter run it is the adapter with
    the rows of new tokens; with `export.merge` whole weights, and the adapter in a folder of its own inside. Where
    merging would change the model, the result is the adapter, and a warning says so.

    Args:
        model: whole and on one device; merging an adapter takes it apart.
        card: README.md of the folder.
        adapter_card: README.md of the adapter, inside the folder of merged weights or in their place.
        form: of whole weights; the model is changed to it.
        complete: adds what else belongs into the folder, before that takes its place.
    Raises:
        NonFiniteLossError: where the weights are not all finite, which no evaluation may have seen.
        ExportError: where what was written is not what was trained.
    """
    spoilt = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if spoilt:
        raise NonFiniteLossError(f"training has spoilt the weights, they are not finite:\n{listed(spoilt)}")
    part = folder.with_name(f".{folder.name}.part")
    remove_tree(part)
    try:
        if adapter is None:
            _write_model(model, tokenizer, part, config, form)
            warning = ""
        else:
            warning = _write_adapter(model, adapter, tokenizer, part, config, adapter_card, form)
        tokenizer.save_pretrained(part)
        _check_tokenizer(part, tokenizer, trust=config.model.trust_remote_code)
        (part / "README.md").write_text(adapter_card if warning else card, encoding="utf-8")
        complete(part)
    except SafetensorError as error:
        shutil.rmtree(part, ignore_errors=True)
        number = errno.ENOSPC if is_disk_full(error) else errno.EIO
        raise OSError(number, f"the model can't be written: {error}") from error
    return [text for text in (warning, _put_into_place(part, folder)) if text]


def _put_into_place(part: Path, folder: Path) -> str:
    """Rename the folder that was written, readable as other files are; return a warning where an older one stays."""
    umask = os.umask(0)
    os.umask(umask)
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)  # safetensors makes its file readable by one user only
    former = set_aside(folder)  # of a run that got longer, or was killed before status.json said that it was finished
    os.replace(part, folder)
    try:
        if former is not None:
            remove_tree(former)
    except OSError as error:  # it only takes room
        return f"{former}, the former model, can't be removed: {error.strerror}"
    return ""


def _write_adapter(
    model: Any, adapter: Adapter, tokenizer: Any, folder: Path, config: RunConfig, card: str, form: Form
) -> str:
    """Write an adapter; with `export.merge` into a folder of its own, and merged weights around it.

    Return a warning where it was not merged.
    """
    place = folder / "adapter" if config.export.merge else folder
    generation = model.generation_config
    adapter.save(place)
    _check_adapter(place, adapter)
    if not adapter.needs_merging:
        _check_fit(place, adapter, num_token_ids(tokenizer), config.model)
    generation.save_pretrained(place)
    if not config.export.merge:
        return ""
    (place / "README.md").write_text(card, encoding="utf-8")
    tokenizer.save_pretrained(place)
    try:
        merged = merge(adapter, place, probe_ids(tokenizer, config.tokens.additional_special_tokens))
    except ModelError as error:
        return _kept(str(error), place, adapter, config, form)
    except Exception as error:  # the libraries raise many kinds; the adapter is saved already
        return _kept(f"the adapter can't be merged: {one_line(error)}", place, adapter, config, form)
    merged.generation_config = generation
    _write_model(merged, tokenizer, folder, config, form)
    return ""


def _kept(problem: str, place: Path, adapter: Adapter, config: RunConfig, form: Form) -> str:
    """Move an adapter to where merged weights would have been; return a warning, or raise that it is no result."""
    if form.is_required:
        raise ExportError(f"export.merge: {problem}. export.merge=false writes the adapter alone")
    lost = adapter.needs_merging
    if config.model.weights is Weights.random:
        lost = "its base, random weights, is nowhere else"
    if lost:
        raise ExportError(f"export.merge: {problem}. The adapter alone is no result: {lost}")
    for file in place.iterdir():
        file.rename(place.parent / file.name)
    place.rmdir()
    return f"export.merge: {problem}. So model/ holds the adapter, as with export.merge=false; its README.md loads it"


def _without_deepspeed() -> AbstractContextManager[Any]:
    """Return a context that saves without importing DeepSpeed, where the run does not use it.

    Accelerate 1.15 would import it, and MLflow with it, a second in all, to see that the model is not DeepSpeed's.
    """
    other = sys.modules.get("accelerate.utils.other")
    if other is None or "deepspeed" in sys.modules:
        return nullcontext()
    return patch.object(other, "is_deepspeed_available", lambda: False)


def reshape(model: Any, tokenizer: Any, form: Form) -> None:
    """Change a plain model to the form in which it is to be written.

    ExportError says that its type can't hold a weight.
    """
    if not form.has_padding:
        resize_embeddings(model, num_token_ids(tokenizer), cuts=True)
    if form.dtype is Dtype.auto:
        return
    dtype = getattr(torch, form.dtype.value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
            if not tensor.isfinite().all():
                raise ExportError(f"export.dtype: {name} has values that are too large for {form.dtype.value}")


def _write_model(model: Any, tokenizer: Any, folder: Path, config: RunConfig, form: Form) -> None:
    """Write a plain model, and check that plain transformers loads each weight and each tie.

    That takes no second model in memory: loading onto the meta device checks every name, shape and tie, and the values
    are compared tensor by tensor. Only where transformers stores other tensors than the model has (a mixture's experts
    one by one) is the whole model loaded.
    """
    reshape(model, tokenizer, form)
    with _without_deepspeed():
        model.save_pretrained(folder)
    written = config.model.pretrained_at(folder)
    architecture = load_architecture(written)
    loaded = load_weights(written, architecture, str(folder), device_map={"": "meta"})
    if is_tied(loaded) != is_tied(model):
        raise ExportError(f"{folder} does not load as it was trained: input and output matrix changed their tie")
    trained = model.state_dict()
    if any(isinstance(conversion, WeightConverter) for conversion in loaded._weight_conversions):
        wrong = _differing(load_weights(written, architecture, str(folder)).state_dict().items(), trained)
    else:
        wrong = _differing(_stored_tensors(folder), revert_weight_conversion(model, trained))
    if wrong:
        raise ExportError(f"{folder} does not load as it was trained; these weights differ:\n{listed(wrong)}")


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a folder's safetensors files by name; they are read, as mapped ones would stay in memory."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def _differing(written: Iterable[tuple[str, Tensor]], trained: Mapping[str, Tensor]) -> list[str]:
    """Return the names of written tensors that the trained model does not have, or has with other values."""
    return [
        name
        for name, tensor in written
        if name not in trained or not torch.equal(tensor, trained[name].to("cpu", tensor.dtype))
    ]


def _check_adapter(folder: Path, adapter: Adapter) -> None:
    """Check that an adapter's file holds each tensor bit for bit, rows of new tokens included."""
    written, trained = load_file(folder / WEIGHTS), adapter.state()
    wrong = [*(trained.keys() - written.keys()), *_differing(written.items(), trained)]
    if wrong:
        raise ExportError(f"{folder} does not hold what was trained:\n{listed(wrong)}")


def _check_fit(folder: Path, adapter: Adapter, num_tokens: int, config: ModelConfig) -> None:
    """Check that PEFT loads an adapter onto its base, resized as its card says: every name, shape and token id."""
    empty = empty_model(config)
    if empty.get_input_embeddings().weight.shape[0] < num_tokens:
        empty.resize_token_embeddings(num_tokens, mean_resizing=False)
    try:
        there = adapter.shapes_on(empty, folder)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{folder} can't be loaded onto {config.checkpoint}: {one_line(error)}") from error
    trained = {name: tuple(tensor.shape) for name, tensor in adapter.state().items()}
    wrong = sorted(name for name in there.keys() | trained.keys() if there.get(name) != trained.get(name))
    if wrong:
        raise ExportError(f"{folder} does not fit {config.checkpoint} as it was trained:\n{listed(wrong)}")


def _check_tokenizer(folder: Path, tokenizer: Any, *, trust: bool) -> None:
    """Check that the tokenizer that was written has the same id for every token."""
    there = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust).get_vocab()
    wrong = [token for token, token_id in tokenizer.get_vocab().items() if there.get(token) != token_id]
    if wrong:
        raise ExportError(f"the tokenizer in {folder} has other ids for:\n{listed(wrong)}")


def load_exported(run_dir: Path, config: RunConfig, device: torch.device = CPU) -> Any:
    """Load the model that a run exported, in the precision and with the attention of this configuration.

    An adapter is loaded onto its base, quantised as it was trained. ModelError says that it can't be loaded, or is too
    short for the data.
    """
    folder = run_dir / "model"
    if not (folder / "adapter_config.json").exists():
        model = config.model.pretrained_at(folder)
        architecture = load_architecture(model)
        check_lengths(model, architecture, config.data.max_seq_length, config.data.max_target_length)
        return load_weights(model, architecture, model.checkpoint)
    return load_exported_adapter(folder, config, device).peft_model.get_base_model()


def load_exported_adapter(folder: Path, config: RunConfig, device: torch.device = CPU) -> Adapter:
    """Load an adapter that a run exported onto its base, quantised as it was trained; raises as load_exported."""
    try:
        base = build_model(config, device)
    except ModelError as error:
        raise ModelError(f"the adapter in {folder} needs its base, {config.model.checkpoint}: {error}") from error
    trust = config.model.trust_remote_code
    resize_embeddings(base, num_token_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)))
    base.generation_config = GenerationConfig.from_pretrained(folder)
    return load_adapter(base, folder)
