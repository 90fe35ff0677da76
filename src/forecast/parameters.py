"""The memory of a model's parameters, and which are trained, from shapes and types: no weight is needed."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from src.config.schema import QuantizationConfig
from src.config.schema.optimizer import TrainableTensor
from src.model.quantization import quantised_layers
from src.runtime.sharding import full_shape

FP32 = 4  # bytes
SCALE_BLOCK = 64  # values that share a scale in 4 bits
NESTED_BLOCK = 256  # scales that share a scale of their own, where they are quantised too


class ParameterStorage(NamedTuple):
    """Parameters that are held in one form, with all that belongs to it."""

    num: int
    bytes: int
    how: str


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model, each counted once."""

    stored: tuple[ParameterStorage, ...]
    trained: tuple[TrainableTensor, ...]
    bytes_per_parameter: int  # the bytes of each parameter that is not quantised
    num_quantised: int = 0
    num_of_adapter: int = 0
    has_adapter: bool = False

    @property
    def num(self) -> int:
        return sum(storage.num for storage in self.stored)

    @property
    def num_trained(self) -> int:
        return sum(tensor.num for tensor in self.trained)

    @property
    def bytes(self) -> int:
        return sum(storage.bytes for storage in self.stored)

    @property
    def how(self) -> str:
        """The formula of `bytes`."""
        return " + ".join(storage.how for storage in self.stored)

    @property
    def trained_bytes(self) -> int:
        return sum(tensor.num * tensor.bytes_per_value for tensor in self.trained)

    @property
    def how_trained(self) -> str:
        """The formula of `trained_bytes`."""
        sizes: Counter[int] = Counter()
        for tensor in self.trained:
            sizes[tensor.bytes_per_value] += tensor.num
        return " + ".join(f"{num:,} trained parameters x {size} B" for size, num in sizes.items())

    def in_bf16(self) -> Self:
        """Return them as they are when all but the quantised ones are cast to bfloat16."""
        whole = self.stored[1:] if self.num_quantised else self.stored
        halved = tuple(ParameterStorage(one.num, 2 * one.num, f"{one.num:,} parameters x 2 B") for one in whole)
        return replace(
            self,
            stored=(*self.stored[: len(self.stored) - len(whole)], *halved),
            trained=tuple(TrainableTensor(tensor.shape, 2) for tensor in self.trained),
            bytes_per_parameter=2,
        )


def parameters_of(model: Any, quantization: QuantizationConfig | None = None) -> ModelParameters:
    """Read the parameters of a transformers model without adapter: see with_adapter.

    Args:
        model: may live on the meta device.
        quantization: what its weights, not quantised here, will be loaded in.
    """
    stored, num_quantised = _stored(model, quantization)
    return ModelParameters(stored, trained_of(model), model.dtype.itemsize, num_quantised)


def with_adapter(parameters: ModelParameters, model: Any) -> ModelParameters:
    """Add what PEFT has put into a model, and what it has frozen.

    Args:
        parameters: of the same model before.
    """
    added = [p for name, p in model.named_parameters() if "lora_" in name or "trainable_tokens_" in name]
    stored = [
        ParameterStorage(num, num * size, f"{num:,} of the adapter x {size} B") for size, num in _by_size(added).items()
    ]
    return replace(
        parameters,
        stored=(*parameters.stored, *stored),
        trained=trained_of(model),
        num_of_adapter=_count(added),
        has_adapter=True,
    )


def trained_of(model: nn.Module) -> tuple[TrainableTensor, ...]:
    """Return the shapes of what is trained of a model, each parameter once."""
    return tuple(TrainableTensor(full_shape(p), p.itemsize) for p in model.parameters() if p.requires_grad)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _by_size(tensors: Iterable[Tensor]) -> Counter[int]:
    """Return bytes of a value -> number of values."""
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        sizes[tensor.itemsize] += tensor.numel()
    return sizes


def _stored(model: nn.Module, quantization: QuantizationConfig | None) -> tuple[tuple[ParameterStorage, ...], int]:
    """Return what the parameters will be held in, and how many of them quantised."""
    layers = quantised_layers(model) if quantization and quantization.is_on else {}
    quantised = {id(layer.weight): layer.weight for layer in layers.values()}
    stored = [_quantised(list(quantised.values()), quantization)] if quantization and quantised else []
    sizes = _by_size(p for p in model.parameters() if id(p) not in quantised)
    stored += [ParameterStorage(num, num * size, f"{num:,} parameters x {size} B") for size, num in sizes.items()]
    return tuple(stored), _count(quantised.values())


def _quantised(matrices: Sequence[Tensor], quantization: QuantizationConfig) -> ParameterStorage:
    """Return what bitsandbytes holds of matrices [out, in].

    In 8 bits a scale for each row; in 4 bits one for each block of values, and tables of what the codes mean, for each
    matrix its own.
    """
    num = _count(matrices)
    if quantization.load_in_8bit:
        rows = sum(matrix.shape[0] for matrix in matrices)
        return ParameterStorage(num, num + rows * FP32, f"{num:,} in 8 bits, {rows:,} scales x {FP32} B")
    packed = sum(math.ceil(matrix.numel() / 2) for matrix in matrices)
    blocks = [math.ceil(matrix.numel() / SCALE_BLOCK) for matrix in matrices]
    tables = len(matrices) * 16 * FP32
    how = f"{num:,} in 4 bits, {sum(blocks):,} scales x"
    if not quantization.bnb_4bit_use_double_quant:
        return ParameterStorage(num, packed + sum(blocks) * FP32 + tables, f"{how} {FP32} B")
    nested = sum(math.ceil(count / NESTED_BLOCK) for count in blocks)
    tables += len(matrices) * (256 + 1) * FP32  # and the scales' mean
    return ParameterStorage(num, packed + sum(blocks) + nested * FP32 + tables, f"{how} 1 B")
