"""Load a checkpoint's model, and set how it generates."""

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, masking_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from src.config import schema
from src.config.schema import Attention, Dtype, ModelConfig, ModelType, RunConfig, Weights
from src.errors import ModelError, one_line, report
from src.model.adapters import check_adapter
from src.model.quantization import check_quantisable, disable_cpu_packing, quantization_settings
from src.model.weights import check_loaded, check_sizes
from src.runtime.sharding import full_shape, unsharded_models
from src.util import in_words


def build_model(config: RunConfig, device: torch.device) -> Any:
    """Load the model, or draw its weights at random; quantised weights are loaded onto the device.

    ModelError says that the checkpoint can't be loaded, is of another type, or is too short for the data; before any
    weight is read where that can be known.
    """
    architecture = load_architecture(config.model)
    check_lengths(config.model, architecture, config.data.max_seq_length, config.data.max_target_length)
    check_attention(config.model, device)
    check_kernels(config.model, device)
    check_stored_bits(config, architecture)
    if config.quantization.is_on:
        check_quantisable(empty_model(config.model), config.quantization, device)
    check_adapter_of(config)
    settings = quantization_settings(config.quantization, config.model, config.training.mixed_precision)
    quantised = {} if settings is None else {"quantization_config": settings, "device_map": {"": device}}
    model = load_weights(config.model, architecture, config.model.checkpoint, **quantised)
    disable_cpu_packing(model)
    return model


def with_zero_sizes(config: RunConfig) -> RunConfig:
    """Return the configuration with sizes by the model's width, if it has one (else ModelError), in place of `auto`."""
    zero = config.deepspeed
    if not isinstance(zero, schema.ZeroConfig):
        return config
    autos = [key for key in schema.WIDTH_SIZES if zero.zero_optimization.get(key) == "auto"]
    if not autos:
        return config
    architecture = load_architecture(config.model).get_text_config()
    width = getattr(architecture, "hidden_size", None) or max(getattr(architecture, "hidden_sizes", ()), default=0)
    if not width:
        named = ", ".join(f"deepspeed.zero_optimization.{key}" for key in autos)
        raise ModelError(f"{config.model.checkpoint} has no hidden_size to fill `auto` in: set numbers for {named}")
    sizes = zero.zero_optimization | {key: schema.WIDTH_SIZES[key](width) for key in autos}
    return replace(config, deepspeed=replace(zero, zero_optimization=sizes))


def check_adapter_of(config: RunConfig) -> None:
    """Raise ModelError where the adapter does not go into the model, or can't be merged as asked; no weight is read."""
    if config.adapter.is_on:
        with torch.random.fork_rng(devices=[]):  # PEFT draws; whether a run merges must not change what it trains
            check_adapter(empty_model(config.model), config)


def check_stored_bits(config: RunConfig, architecture: Any) -> None:
    """Raise ModelError where weights that are stored quantised would be trained, merged or quantised again."""
    if getattr(architecture, "quantization_config", None) is None:
        return
    stored = f"{config.model.checkpoint} is stored quantised"
    if not config.adapter.is_on:
        raise ModelError(f"{stored}, and such weights can't be trained: adapter=lora, or the whole checkpoint")
    if config.quantization.is_on:
        raise ModelError(f"{stored} already: quantization=none")
    if config.export.merge:
        raise ModelError(f"{stored}: nothing can be merged into it; export.merge=false")


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Check that the chosen attention is available here; ModelError says what is lacking."""
    if config.attn_implementation is not Attention.flash_attention_2:
        return
    needs = {
        "a GPU": device.type == "cuda",
        "the package flash-attn": importlib.util.find_spec("flash_attn") is not None,
        "model.dtype=bfloat16 or float16": config.dtype in (Dtype.bfloat16, Dtype.float16),
    }
    if missing := [what for what, is_there in needs.items() if not is_there]:
        reason = f"flash_attention_2 needs {in_words(missing)}"
        raise ModelError(f"model.attn_implementation: {reason}; sdpa is nearly as fast, and always there")


def check_kernels(config: ModelConfig, device: torch.device) -> None:
    """Check that kernels of the hub can be used here; ModelError says what is lacking."""
    needs = {
        "a GPU": device.type == "cuda",
        f"the package kernels (>= {KERNELS_MIN_VERSION}, < {KERNELS_MAX_VERSION})": is_kernels_available(),
    }
    if config.kernels and (missing := [what for what, is_there in needs.items() if not is_there]):
        raise ModelError(f"model.kernels needs {in_words(missing)}; model.kernels=false computes the same")


def use_kernels(model: Any) -> None:
    """Have a model on its device computed by kernels of the hub while it is trained, as far as there are some for it.

    ModelError says that they can't be had. Not tested: it needs a GPU and the hub.
    """
    model.train()
    try:
        model.set_use_kernels(True)
    except Exception as error:  # of the hub, and of the kernels themselves
        raise ModelError(f"model.kernels: {one_line(error)}; model.kernels=false computes the same") from error


def check_lengths(config: ModelConfig, architecture: Any, max_seq_length: int, max_target_length: int) -> None:
    """Check that the model has positions for the longest row; ModelError names the key that asks for more."""
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    is_pair = config.type is ModelType.encoder_decoder
    lengths = {"max_seq_length": max_seq_length, "max_target_length": max_target_length if is_pair else 0}
    for key, length in lengths.items():
        if positions is not None and length > positions:
            raise ModelError(f"{config.checkpoint} has room for {positions} positions; data.{key} = {length} is more")


def load_architecture(config: ModelConfig) -> Any:
    """Load a checkpoint's configuration, without weights.

    ModelError says that there is none, or that it describes no model, or one of another type than `model.type`.
    """
    try:
        architecture = AutoConfig.from_pretrained(
            config.checkpoint, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # the libraries raise many kinds
        if "custom code" in str(error):
            reason = "brings Python code of its own; model.trust_remote_code=true runs it"
            raise ModelError(f"{config.checkpoint} {reason}") from error
        raise ModelError(f"{config.checkpoint}: no model configuration there: {one_line(error)}") from error
    check_sizes(config.checkpoint, architecture)
    found = ModelType.encoder_decoder if architecture.is_encoder_decoder else ModelType.causal_lm
    if found is not config.type:
        raise ModelError(f"{config.checkpoint} is of the type {found.value}; model.type is {config.type.value}")
    return architecture


def empty_model(config: ModelConfig) -> Any:
    """Build the model without weights: its modules and shapes, no memory."""
    if config.attn_implementation is Attention.flash_attention_2:  # its package refuses where there is no GPU
        config = replace(config, attn_implementation=Attention.sdpa)
    architecture = load_architecture(config)
    try:
        with unsharded_models(), torch.device("meta"):
            return _auto(config).from_config(architecture, **_settings(config))
    except Exception as error:  # as many as there are models
        raise ModelError(f"{config.checkpoint} can't be built as asked: {one_line(error)}") from error


def no_packing_detection() -> AbstractContextManager[Any]:
    """Return a context in which transformers takes every sequence for a single row, which needs no mask.

    transformers 5 compares positions to see whether rows are packed; without values it assumes that they are.
    """
    return patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Return what transformers takes to build a model, with weights or without."""
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        settings["attn_implementation"] = config.attn_implementation.value
    if config.dtype is not Dtype.auto:
        settings["dtype"] = getattr(torch, config.dtype.value)
    return settings


def _auto(config: ModelConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.type is ModelType.encoder_decoder else AutoModelForCausalLM


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and of trained ones; weights in 4 bits count as what they stand for."""
    return sum(map(_count, model.parameters())), sum(_count(p) for p in model.parameters() if p.requires_grad)


def _count(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two values into a byte
    return math.prod(full_shape(parameter)) if state is None else state.shape.numel()


def load_weights(config: ModelConfig, architecture: Any, checkpoint: str, **settings: Any) -> Any:
    """Load the weights of a checkpoint, or draw them at random.

    All of the model's must be there, and be finite (else ModelError); a warning names parts that it has no use for. The
    checkpoint is a hub id or a folder; `settings` are more for from_pretrained.
    """
    try:
        if config.weights is Weights.random:
            return _auto(config).from_config(architecture, **_settings(config))
        with _without_report():
            model, loaded = _auto(config).from_pretrained(
                checkpoint,
                revision=config.revision,
                use_safetensors=config.use_safetensors or None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loaded names them
                **({"dtype": "auto"} | _settings(config)),
                **settings,
            )
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"{checkpoint} can't be loaded as {config.type.value}: {one_line(error)}") from error
    for warning in check_loaded(checkpoint, model, loaded):
        report(f"warning: {warning}")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' own table of weights that do not fit: it prints names with their control characters."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def preload_weight_names() -> None:
    """Have transformers build its table of weight names ahead of time: it takes a quarter of a second, once."""
    get_checkpoint_conversion_mapping("llama")


def set_generation(
    model: Any,
    config: schema.GenerationConfig,
    tokenizer: Any,
    stop_ids: Sequence[int],
    target_prefix: Sequence[int] = (),
) -> None:
    """Set the model's generation config, for here and after export, in place of its checkpoint's.

    Settings of sampling are set only where sampling is on. A tokenizer without a pad token pads with EOS: labels and
    masks never look at the pad id.

    Args:
        stop_ids: each of them ends what is generated.
        target_prefix: ids before an encoder-decoder's targets, which are never supervised, so they must be forced.
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
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else list(stop_ids),
        "pad_token_id": pad,
        "use_cache": True,
    }
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        if start is None:
            raise ModelError("this encoder-decoder's config.json has no decoder_start_token_id")
        settings["decoder_start_token_id"] = start
        if len(target_prefix) == 1:  # for those who generate with the exported model; Generator feeds it itself
            settings["forced_bos_token_id"] = target_prefix[0]
    if config.do_sample:
        settings |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    model.generation_config = transformers.GenerationConfig(**settings)
