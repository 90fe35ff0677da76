"""The memory of a model's parameters and of their optimizer's state, from shapes and types: no weight is needed."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from src.config.schema import OptimizerConfig, QuantizationConfig
from src.config.schema.optimizer import TrainableTensor
from src.model.quantization import quantised_layers
from src.runtime.sharding import full_shape

FP32 = 4  # bytes
SCALE_BLOCK = 64  # values that share a scale in 4 bits
NESTED_BLOCK = 256  # scales that share a scale of their own, where they are quantised too


class MemoryItem(NamedTuple):
    """An item of a forecast: its name, its bytes (None: unknown), and the formula with its numbers."""

    name: str
    bytes: int | None
    how: str


def total(parts: Sequence[MemoryItem], how: str) -> MemoryItem:
    """Sum what is known of items; where one is unknown, the sum is a lower bound and says so."""
    unknown = [part.name for part in parts if part.bytes is None]
    least = f"at least: {', '.join(unknown)} unknown; " if unknown else ""
    return MemoryItem("total", sum(part.bytes or 0 for part in parts), least + how)


class ParameterStorage(NamedTuple):
    """Parameters that are held in one form, with all that belongs to it."""

    num: int
    bytes: int
    how: str


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model, each counted once."""

    stored: tuple[ParameterStorage, ...]  # those that are not quantised, the adapter's last
    trained: tuple[TrainableTensor, ...]
    bytes_per_parameter: int  # the bytes of each parameter that is not quantised
    quantised: tuple[ParameterStorage, ...] = ()
    num_of_adapter: int = 0

    @property
    def num(self) -> int:
        return sum(storage.num for storage in (*self.quantised, *self.stored))

    @property
    def num_trained(self) -> int:
        return sum(tensor.num for tensor in self.trained)

    @property
    def bytes(self) -> int:
        return sum(storage.bytes for storage in (*self.quantised, *self.stored))

    @property
    def how(self) -> str:
        """The formula of `bytes`."""
        return " + ".join(storage.how for storage in (*self.quantised, *self.stored))

    @property
    def trained_bytes(self) -> int:
        return sum(tensor.num * tensor.bytes_per_value for tensor in self.trained)

    @property
    def how_trained(self) -> str:
        """The formula of `trained_bytes`."""
        return " + ".join(storage.how for storage in _by_size(self.trained, "trained parameters"))

    def in_bf16(self) -> Self:
        """Return them as they are when all but the quantised ones are cast to bfloat16."""
        stored = tuple(ParameterStorage(one.num, 2 * one.num, f"{one.num:,} parameters x 2 B") for one in self.stored)
        trained = tuple(tensor._replace(bytes_per_value=2) for tensor in self.trained)
        return replace(self, stored=stored, trained=trained, bytes_per_parameter=2)


def parameters_of(model: Any, quantization: QuantizationConfig | None = None) -> ModelParameters:
    """Read the parameters of a transformers model, without those of an adapter: see with_adapter.

    Args:
        model: may live on the meta device, or be sharded; of weights that are in 4 bits here only the number is right.
        quantization: what its weights, not quantised here, will be loaded in.
    """
    layers = quantised_layers(model).values() if quantization and quantization.is_on else ()
    quantised = {id(layer.weight): layer.weight for layer in layers}
    others = (p for name, p in model.named_parameters() if id(p) not in quantised and not _is_of_adapter(name))
    return ModelParameters(
        _by_size(map(_tensor, others), "parameters"),
        _trained(model),
        model.dtype.itemsize,
        (_quantised(list(quantised.values()), quantization),) if quantization and quantised else (),
    )


def with_adapter(parameters: ModelParameters, model: Any) -> ModelParameters:
    """Add what PEFT has put into the same model, and what it has frozen."""
    added = [_tensor(p) for name, p in model.named_parameters() if _is_of_adapter(name)]
    return replace(
        parameters,
        stored=(*parameters.stored, *_by_size(added, "of the adapter")),
        trained=_trained(model),
        num_of_adapter=sum(tensor.num for tensor in added),
    )


def _is_of_adapter(name: str) -> bool:
    return "lora_" in name or "trainable_tokens_" in name


def _trained(model: nn.Module) -> tuple[TrainableTensor, ...]:
    return tuple(_tensor(p) for p in model.parameters() if p.requires_grad)


def _tensor(parameter: nn.Parameter) -> TrainableTensor:
    packed = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two values into a byte
    return TrainableTensor(full_shape(parameter) if packed is None else tuple(packed.shape), parameter.itemsize)


def _by_size(tensors: Iterable[TrainableTensor], what: str) -> tuple[ParameterStorage, ...]:
    """Return what tensors are held in, those of as many bytes a value together."""
    sizes = Counter[int]()
    for tensor in tensors:
        sizes[tensor.bytes_per_value] += tensor.num
    return tuple(ParameterStorage(num, num * size, f"{num:,} {what} x {size} B") for size, num in sizes.items())


def _quantised(matrices: Sequence[Tensor], quantization: QuantizationConfig) -> ParameterStorage:
    """Return what bitsandbytes holds of matrices [out, in].

    In 8 bits a scale for each row; in 4 bits one for each block of values, and tables of what the codes mean, for each
    matrix its own.
    """
    num = sum(matrix.numel() for matrix in matrices)
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


def optimizer_part(parameters: ModelParameters, optimizer: OptimizerConfig, device_type: str = "cpu") -> MemoryItem:
    """Forecast the optimizer's state, tensor by tensor, as it is in memory and in a checkpoint."""
    counts = Counter[tuple[str, int]]()  # number of values, by name and by bytes of a value
    for tensor in parameters.trained:
        if (kept := optimizer.state_of(tensor)) is None:
            return MemoryItem(
                "optimizer state", None, f"unknown: {optimizer.type} does not declare the size of its state"
            )
        for name, num, size in kept:
            counts[name, size] += num
    if not counts:
        return MemoryItem("optimizer state", 0, f"{optimizer.type} keeps nothing with these settings")
    alike: dict[tuple[int, int], list[str]] = {}
    for (name, size), num in counts.items():
        alike.setdefault((num, size), []).append(name)
    how = " + ".join(
        f"{len(names)} x {num:,} {'trained parameters' if num == parameters.num_trained else 'values'} x {size} B: "
        + ", ".join(names)
        for (num, size), names in alike.items()
    )
    if optimizer.type.startswith("paged") and device_type == "cuda":
        how += "; moved to the CPU's memory where the GPU's is full"
    return MemoryItem("optimizer state", sum(num * size for (_, size), num in counts.items()), how)
