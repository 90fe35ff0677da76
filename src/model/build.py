"""From a checkpoint to a model, and the settings it generates by."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from src.config.schema import GenerationConfig, ModelConfig, Weights
from src.errors import ModelError, listed, one_line


def build_model(config: ModelConfig, max_seq_length: int) -> Any:
    """Load the model, or draw its weights at random.

    Args:
        max_seq_length: tokens of the longest row, which the model must have room for.
    Raises:
        ModelError: where the checkpoint can't be loaded, is of another type, or is too short for the data.
    """
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        architecture = AutoConfig.from_pretrained(config.checkpoint, **where)
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"{config.checkpoint}: no model configuration there: {one_line(error)}") from error
    if architecture.is_encoder_decoder:
        raise ModelError(f"{config.checkpoint} is an encoder-decoder model; model.type is {config.type.value}")
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_seq_length > positions:
        raise ModelError(
            f"{config.checkpoint} has room for {positions} positions; data.max_seq_length = {max_seq_length} is more"
        )
    return _load(config, architecture, where)


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Count all parameters and those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _load(config: ModelConfig, architecture: Any, where: dict[str, Any]) -> Any:
    dtype = "auto" if config.dtype.value == "auto" else getattr(torch, config.dtype.value)
    attention = {"attn_implementation": config.attn_implementation.value} if config.attn_implementation else {}
    try:
        if config.weights is Weights.random:
            chosen = {} if dtype == "auto" else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.trust_remote_code, **chosen, **attention
            )
        model, loaded = AutoModelForCausalLM.from_pretrained(
            config.checkpoint, dtype=dtype, use_safetensors=True, output_loading_info=True, **attention, **where
        )
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"{config.checkpoint} can't be loaded as {config.type.value}: {one_line(error)}") from error
    lacking = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in loaded[kind]]
    if lacking:
        raise ModelError(
            f"{config.checkpoint} lacks weights of its model, they would start at random:\n{listed(lacking)}"
        )
    return model


def set_generation(model: Any, config: GenerationConfig, tokenizer: Any) -> None:
    """Make these the settings that the model generates by, here and after export; its checkpoint's own are let go.

    Settings of sampling are given only where sampling is on.

    A tokenizer without a pad token pads with EOS: labels and masks never look at the pad id.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens or None,
        "num_beams": config.num_beams,
        "do_sample": config.do_sample,
        "repetition_penalty": config.repetition_penalty,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if config.do_sample:
        settings |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    model.generation_config = transformers.GenerationConfig(**settings)
