"""The result of a run: a folder that plain transformers (and PEFT) load. What was written is loaded again."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from src.config.places import clear, set_aside
from src.config.schema import ModelConfig, RunConfig, Weights
from src.errors import ExportError, ModelError, NonFiniteLossError, is_disk_full, one_line
from src.model.adapters import WEIGHTS, Adapter, with_adapter
from src.model.build import build_model, check_lengths, empty_model, load_architecture, load_weights
from src.model.embeddings import fit_embeddings
from src.model.merging import merge, probe_ids
from src.tokens import num_token_ids
from src.util import listed

CPU = torch.device("cpu")


def export(
    model: Any,
    adapter: Adapter | None,
    tokenizer: Any,
    folder: Path,
    config: RunConfig,
    card: str,
    adapter_card: str = "",
) -> list[str]:
    """Write the result beside, load it again, and put it into place.

    Weights (safetensors), configuration, tokenizer and generation settings. Of an adapter run it is the adapter with
    the rows of new tokens; with `export.merge` whole weights, and the adapter in a folder of its own inside. Where
    merging would give another model than was trained, the result is the adapter, and the warnings say so.

    Args:
        card: README.md of the folder.
        adapter_card: the same of the adapter beside merged weights, or in their place.
    Returns:
        warnings.
    Raises:
        NonFiniteLossError: where the weights are not all finite, which no evaluation may have seen.
        ExportError: where what is loaded again is not what was trained.
    """
    spoilt = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if spoilt:
        raise NonFiniteLossError(f"training has spoilt the weights, they are not finite:\n{listed(spoilt)}")
    warnings: list[str] = []
    beside = folder.with_name(f".{folder.name}.part")
    clear(beside)
    try:
        if adapter is None:
            _write_whole(model, beside, config)
        else:
            place = beside / "adapter" if config.export.merge else beside
            adapter.save(place)
            _check_adapter(place, adapter)
            if not adapter.needs_merging:
                _check_fit(place, adapter, num_token_ids(tokenizer), config.model)
            model.generation_config.save_pretrained(place)
            if config.export.merge:
                (place / "README.md").write_text(adapter_card, encoding="utf-8")
                tokenizer.save_pretrained(place)
                generation = model.generation_config
                probe = probe_ids(tokenizer, config.tokens.additional_special_tokens)
                merged, problem = merge(adapter, place, probe)
                if problem:
                    warnings.append(_kept(problem, place, adapter, config))
                    card = adapter_card
                else:
                    merged.generation_config = generation
                    _write_whole(merged, beside, config)
        tokenizer.save_pretrained(beside)
        _check_tokenizer(beside, tokenizer, trust=config.model.trust_remote_code)
        (beside / "README.md").write_text(card, encoding="utf-8")
    except SafetensorError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            errno.ENOSPC if is_disk_full(error) else errno.EIO, f"the model can't be written: {error}"
        ) from error
    umask = os.umask(0)
    os.umask(umask)
    for file in beside.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)  # safetensors would keep its file to one user
    former = set_aside(folder)  # of a run that got longer, or was killed before status.json said that it was finished
    os.replace(beside, folder)
    try:
        if former is not None:
            clear(former)
    except OSError as error:  # it takes room, and is in nobody's way
        warnings.append(f"{former}, the model of before, can't be removed: {error.strerror}")
    return warnings


def _kept(problem: str, place: Path, adapter: Adapter, config: RunConfig) -> str:
    """Move an adapter to where merged weights would have been; return a warning.

    Raises:
        ExportError: where the adapter alone is no result.
    """
    lost = adapter.needs_merging
    if config.model.weights is Weights.random:
        lost = "its base, random weights, is nowhere else"
    if lost:
        raise ExportError(f"export.merge: {problem}. The adapter alone is no result: {lost}")
    for file in place.iterdir():
        file.rename(place.parent / file.name)
    place.rmdir()
    return f"export.merge: {problem}. So model/ holds the adapter, as with export.merge=false; its README.md loads it"


@contextmanager
def _without_deepspeed() -> Iterator[None]:
    """Save without importing DeepSpeed, where the run does not use it.

    Accelerate 1.15 would, and MLflow with it, a second in all, to see that the model is none of DeepSpeed's.
    """
    other: Any = sys.modules.get("accelerate.utils.other")
    if other is None or "deepspeed" in sys.modules:
        yield
        return
    asked, other.is_deepspeed_available = other.is_deepspeed_available, lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = asked


def _write_whole(model: Any, folder: Path, config: RunConfig) -> None:
    """Write a plain model, and see that plain transformers gives back each weight and each tie."""
    with _without_deepspeed():
        model.save_pretrained(folder)
    where = replace(config.model, checkpoint=str(folder), revision=None, weights=Weights.pretrained)
    loaded = load_weights(where, load_architecture(where), str(folder))
    there = loaded.state_dict()
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if name not in there or not torch.equal(there[name], tensor.to("cpu", there[name].dtype))
    ]
    if wrong:
        raise ExportError(f"{folder} does not load as it was trained; these weights differ:\n{listed(wrong)}")
    if _is_tied(loaded) != _is_tied(model):
        raise ExportError(f"{folder} does not load as it was trained: input and output matrix changed their tie")


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_adapter(folder: Path, adapter: Adapter) -> None:
    """See that an adapter's file holds each tensor bit for bit, rows of new tokens included."""
    there, trained = load_file(folder / WEIGHTS), adapter.state()
    wrong = [n for n, tensor in trained.items() if n not in there or not torch.equal(there[n], tensor.detach().cpu())]
    if wrong or there.keys() - trained.keys():
        raise ExportError(f"{folder} does not hold what was trained:\n{listed([*wrong, *(there.keys() - trained)])}")


def _check_fit(folder: Path, adapter: Adapter, num_tokens: int, config: ModelConfig) -> None:
    """See that PEFT loads an adapter onto its base, resized as its card says: every name, shape and token id."""
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
    """See that the tokenizer that was written gives every token its id."""
    there = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust).get_vocab()
    wrong = [token for token, token_id in tokenizer.get_vocab().items() if there.get(token) != token_id]
    if wrong:
        raise ExportError(f"the tokenizer in {folder} gives other ids to:\n{listed(wrong)}")


def exported(run_dir: Path, config: ModelConfig) -> ModelConfig:
    """Return the settings that load what a run exported, model and tokenizer, rather than what it began with."""
    return replace(config, checkpoint=str(run_dir / "model"), revision=None, weights=Weights.pretrained)


def load_exported(run_dir: Path, config: RunConfig, device: torch.device = CPU) -> Any:
    """Load the model that a run exported, in the precision and with the attention of this configuration.

    An adapter is put on its base, quantised as it was trained.

    Raises:
        ModelError: where it can't be loaded, or is too short for the data.
    """
    folder = run_dir / "model"
    if not (folder / "adapter_config.json").exists():
        model = exported(run_dir, config.model)
        architecture = load_architecture(model)
        check_lengths(model, architecture, config.data.max_seq_length, config.data.max_target_length)
        return load_weights(model, architecture, model.checkpoint)
    try:
        base = build_model(config, device)
    except ModelError as error:
        raise ModelError(f"the adapter in {folder} needs its base, {config.model.checkpoint}: {error}") from error
    trust = config.model.trust_remote_code
    fit_embeddings(base, num_token_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)), None)
    return with_adapter(base, folder)
