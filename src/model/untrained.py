"""Tokens that a checkpoint has a row for but never trained, such as reserved ones (docs/decisions/0017)."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from src.config.schema import Dtype, ModelConfig, Weights
from src.model.embeddings import embedding_matrices
from src.runtime.sharding import gathered
from src.tokens import ConfiguredTokens
from src.util import load_json

SMALL = 0.01  # a row with a norm below this share of its matrix's median norm was never trained
CHUNK_ROWS = 8192  # rows whose norms are computed at once


def untrained_tokens(model: Any, tokenizer: Any, new: ConfiguredTokens, config: ModelConfig) -> frozenset[str]:
    """Return the added tokens whose rows no matrix of the model, as loaded, has trained; none where it is random."""
    if config.weights is Weights.random or not (new.ids or new.tags):
        return frozenset()
    added = _known(tokenizer, new)
    found = set(added)
    for matrix in embedding_matrices(model):
        with gathered([matrix.weight]):
            found &= never_trained(matrix.weight.detach(), added)
    return frozenset(found)


def stored_untrained_tokens(
    empty: Any, tokenizer: Any, new: ConfiguredTokens, config: ModelConfig
) -> frozenset[str] | None:
    """Return the same, reading only the matrices from the checkpoint's files; None where they are not on this machine.

    The model is on the meta device, before it is resized.
    """
    if config.weights is Weights.random or not (new.ids or new.tags):
        return frozenset()
    added = _known(tokenizer, new)
    found = set(added)
    for matrix in embedding_matrices(empty):
        modules = empty.named_modules(remove_duplicate=False)  # a tied matrix has several names
        names = [f"{name}.weight" for name, module in modules if getattr(module, "weight", None) is matrix.weight]
        weights = _read(config, names, tuple(matrix.weight.shape))
        if not weights:
            return None
        for weight in weights:
            if config.dtype is not Dtype.auto:  # rounded to the run's type rows may become equal
                weight = weight.to(getattr(torch, config.dtype.value))
            found &= never_trained(weight, added)
    return frozenset(found)


def _known(tokenizer: Any, new: ConfiguredTokens) -> dict[str, int]:
    """Return the added tokens that the checkpoint had, token -> id: those of new ones may be padding rows."""
    return {token: i for token, i in tokenizer.get_added_vocab().items() if token not in new.added}


def never_trained(weight: Tensor, added: dict[str, int]) -> set[str]:
    """Return the tokens whose row equals another one's bit for bit, or is almost zero. Pure.

    The weight is [rows, width]; added tokens (token -> id) that have no row in it are left out.
    """
    norms = torch.cat(
        [torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float32) for chunk in weight.split(CHUNK_ROWS)]
    )
    least = SMALL * norms[norms > 0].median()  # rows of zeros are padding, of which there may be many
    ids = {token: i for token, i in added.items() if i < len(weight)}
    bits = weight[list(ids.values())].contiguous().cpu().view(torch.uint8).numpy()
    rows = {token: row.tobytes() for token, row in zip(ids, bits, strict=True)}
    counts = Counter(rows.values())
    is_small = dict(zip(ids, (norms[list(ids.values())] < least).tolist(), strict=True))
    return {token for token, row in rows.items() if counts[row] > 1 or is_small[token]}


def _read(config: ModelConfig, names: list[str], shape: tuple[int, ...]) -> list[Tensor]:
    """Read the tensors of a checkpoint on this machine that have one of these names and this shape.

    A file's names may lack a module's prefix, or have one more.
    """
    found: list[Tensor] = []
    index = _file(config, SAFE_WEIGHTS_INDEX_NAME)
    try:
        if index is not None:
            places: dict[str, str] = load_json(Path(index))["weight_map"]
        elif (single := _file(config, SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(single, framework="pt") as file:
                places = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        else:
            return []
        for key, place in places.items():
            if not any(key == name or name.endswith(f".{key}") or key.endswith(f".{name}") for name in names):
                continue
            path = _file(config, place)
            if path is None:
                return []
            with safe_open(path, framework="pt") as file:
                if tuple(file.get_slice(key).get_shape()) == shape:
                    found.append(file.get_tensor(key))
    except (SafetensorError, OSError, KeyError, ValueError):  # the run reports what is wrong with its files
        return []
    return found


def _file(config: ModelConfig, name: str) -> str | None:
    """Return the path of a checkpoint's file on this machine; nothing is downloaded."""
    return cached_file(
        config.checkpoint,
        name,
        revision=config.revision,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
