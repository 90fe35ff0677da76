"""Check that the weights of a checkpoint are those of its model, and finite, before training."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import ModelError, visible
from src.util import plural

MOST_LAYERS = 10_000
"""More layers are a mistake: only naming their weights would take minutes."""
SIZES = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
    *("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("hidden_size", "vocab_size"),
)
"""Settings of a model that are positive numbers, by transformers' names."""
MOST_NAMED = 3  # weights in a message
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_sizes(checkpoint: str, architecture: Any) -> None:
    """Check that a configuration's sizes are possible; ModelError names the settings of config.json that are not."""
    text = architecture.get_text_config()
    sizes = {name: size for name in SIZES if isinstance(size := getattr(text, name, None), int)}
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size < 1]
    too_many = {name: size for name, size in sizes.items() if name.endswith("layers") and size > MOST_LAYERS}
    wrong += [f"{name} = {size} (at most {MOST_LAYERS:,})" for name, size in too_many.items()]
    if wrong:
        raise ModelError(f"{checkpoint}: its config.json describes no model: {', '.join(wrong)}")


def check_loaded(checkpoint: str, model: nn.Module, found: Mapping[str, Any]) -> list[str]:
    """Check that each weight of a model is in its checkpoint, and each of the checkpoint's in the model.

    Args:
        found: transformers' loading info: `missing_keys`, `unexpected_keys`, and `mismatched_keys`, each of these with
            the shapes in the checkpoint and in the model.
    Returns:
        warnings: of whole parts that only models of another kind have, such as the head of a reward model.
    Raises:
        ModelError: naming the weights that are missing, left over, of another shape, or not finite.
    """
    if mismatched := found["mismatched_keys"]:
        shapes = {name: f" {list(there)}, {list(wanted)} in config.json" for name, there, wanted in mismatched}
        raise ModelError(f"{checkpoint} has {_weights(shapes, shapes)} of other shapes than its config.json says")
    extra = {name for name in found["unexpected_keys"] if _is_of_another_part(model, name)}
    check_names(checkpoint, missing=found["missing_keys"], left_over=set(found["unexpected_keys"]) - extra)
    check_finite(checkpoint, numbers(model))
    if not extra:
        return []
    return [f"{checkpoint} has {_weights(extra)} of parts that this kind of model does not have; they are left out"]


def check_names(checkpoint: str, *, missing: Collection[str], left_over: Collection[str]) -> None:
    """Raise ModelError, naming the weights that a checkpoint lacks, and those that its model has no place for."""
    faults = []
    if missing:
        faults.append(f"{checkpoint} lacks {_weights(missing)} of its model, which would start at random")
    if left_over:
        faults.append(
            f"{checkpoint} has {_weights(left_over)} that its model has no place for: is its configuration another's?"
        )
    if faults:
        raise ModelError("\n".join(faults))


def check_finite(checkpoint: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that weights are finite, in one pass over them; ModelError names those that are not."""
    names, finite = [], []
    for name, values in weights:
        # of one byte are packed numbers, which have scales, and types that can't be compared
        if values.is_meta or not values.is_floating_point() or values.element_size() == 1 or not values.numel():
            continue
        names.append(name)
        finite.append(torch.stack(values.aminmax()).isfinite().all())  # both are nan where one value is
    spoilt = dict.fromkeys(name for name, is_finite in zip(names, finite, strict=True) if not is_finite)
    if spoilt:
        raise ModelError(
            f"{checkpoint} has {_weights(spoilt)} with values that are NaN or infinite; nothing learns there"
        )


def numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights by name, some twice: of sharded ones the shard here, of quantised ones the scales too."""
    for name, parameter in model.named_parameters():
        for values in (_shard(parameter), *_scales(parameter)):
            yield name, values


def _shard(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values in this process; under ZeRO-3 without the padding after the last shard's."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    begin = torch.distributed.get_rank() * shard.numel()
    return shard.detach().flatten()[: max(0, parameter.ds_numel - begin)]  # type: ignore[attr-defined]


def _scales(parameter: nn.Parameter) -> list[Tensor]:
    """Return bitsandbytes' scales of quantised values: not finite where a value was not."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    scales = [getattr(parameter, "SCB", None), getattr(state, "absmax", None)]
    scales += [getattr(nested, "absmax", None), getattr(state, "offset", None)]
    return [scale for scale in scales if isinstance(scale, Tensor)]


def _is_of_another_part(model: nn.Module, name: str) -> bool:
    """Return whether a weight belongs to a part that the model does not have, rather than inside one of its parts."""
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return all(_deepest(module, name) in (model, trunk) for module in (model, trunk))


def _deepest(module: nn.Module, name: str) -> nn.Module:
    for part in name.split(".")[:-1]:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return module


def _weights(names: Collection[str], notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the number of weights and the first names, one for all layers."""
    kinds: dict[str, str] = {}
    for name in sorted(names):
        kinds.setdefault(_NUMBER.sub("*", name), name)
    shown = [visible(name, is_line=True) + notes.get(name, "") for name in list(kinds.values())[:MOST_NAMED]]
    more = ", …" if len(names) > len(shown) else ""
    return f"{plural(len(names), 'weight')} ({', '.join(shown)}{more})"
