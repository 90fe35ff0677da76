"""What a run will need, before it is spent: memory, disk and time, each with how it was reckoned.

Numbers in, numbers out. An `Architecture` is read from a model that may live on the meta device: no weight is needed.
What can't be known is None and said to be unknown; it is never filled with a guess.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional

from src.checkpoint.store import SMALL_BYTES
from src.config.schema import CheckpointConfig, MixedPrecision, OptimizerConfig, QuantizationConfig
from src.errors import human_bytes
from src.model.quantization import quantised_layers
from src.runtime.sharding import whole_shape
from src.training.loss import MAX_LOGITS

FP32 = 4  # bytes
LLAMA_TOLERANCE, OTHER_TOLERANCE = 2, 20
"""Percent by which the forecast of activations may miss what autograd saves on CPU, held by tests/test_forecast.py: for
blocks that compute as Llama's do (Mistral, Qwen), and for all others that are recognised."""
ADAPTER_TOLERANCE = 5
"""At least, with an adapter: in the lowest block a little less is kept than is reckoned here."""
CHECKPOINTING_TOLERANCE = 15
"""More, where blocks are computed again: against the most that is held while one of them is."""

SCALE_BLOCK = 64  # values that share a scale in 4 bits
NESTED_BLOCK = 256  # scales that share a scale of their own, where they are quantised too
STATE_BLOCK = 256  # values of an 8-bit optimizer's state that share a scale
MIN_8BIT_SIZE = 4096  # values below which a tensor's state keeps 32 bits


class Norm(Enum):
    rms = "RMSNorm"
    layer = "LayerNorm"


class Source(Enum):
    """What a matrix of a block reads."""

    attention_norm = "normalised states, for attention"
    attention = "what attention gives"
    ffn_norm = "normalised states, for the MLP"
    ffn = "the MLP's inner units"


@dataclass(frozen=True)
class Block:
    """How one block of the model computes, as far as it decides what is kept for backward."""

    ffn_width: int
    is_gated: bool
    """Whether the MLP is act(gate) * up, as in Llama, or act(up), as in GPT-2."""
    num_ffn_kept: int
    """Values kept for each of the MLP's inner units: gate, act(gate), up and their product make 4 with SiLU."""
    num_frozen_ffn_kept: int
    """The same where the last matrix is frozen, so that its input is not kept for it: 3 with SiLU."""
    is_ffn_fused: bool
    """Whether gate and up are one matrix."""
    is_qkv_fused: bool
    """Whether q, k and v are one matrix."""
    norm: Norm
    num_norms: int
    """Norms over the whole width."""
    has_qk_norm: bool
    """Whether q and k are normalised too, as in Qwen3."""
    sources: dict[str, Source]
    """Each matrix by its name in the block, and what it reads."""

    @property
    def tolerance(self) -> int:
        """Percent by which the forecast of activations may be wrong, without adapter and checkpointing."""
        fused = self.is_ffn_fused or self.is_qkv_fused
        as_llama = self.norm is Norm.rms and self.num_norms == 2 and self.is_gated and not fused
        return LLAMA_TOLERANCE if as_llama else OTHER_TOLERANCE


class Held(NamedTuple):
    """Parameters that are held in one form, with all that belongs to it."""

    num: int
    bytes: int
    how: str


class Trained(NamedTuple):
    """A tensor that is trained."""

    shape: tuple[int, ...]
    bytes_per_value: int

    @property
    def num(self) -> int:
        return math.prod(self.shape)


class Target(NamedTuple):
    """A matrix with LoRA beside it."""

    source: Source
    num_in: int
    num_out: int
    rank: int
    has_bias: bool


@dataclass(frozen=True)
class AdapterShape:
    """What LoRA adds to a model whose own weights are frozen."""

    num_parameters: int
    targets: tuple[tuple[Target, ...], ...]
    """Of each block."""
    trains_rows: bool
    """Whether rows of new tokens are trained too, so that gradients go all the way down."""
    has_dropout: bool
    has_dora: bool

    @property
    def reached(self) -> tuple[tuple[Target, ...], ...]:
        """The targets of the blocks that gradients go through: all from the lowest one on that is adapted."""
        if self.trains_rows:
            return self.targets
        lowest = next((i for i, targets in enumerate(self.targets) if targets), len(self.targets))
        return self.targets[lowest:]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that decide what it costs. None where the model does not say."""

    held: tuple[Held, ...]
    trained: tuple[Trained, ...]
    num_looked_up: int
    """Parameters of embedding tables, which cost no multiplication; a tied head is among them."""
    embedding_rows: int
    head_rows: int | None
    """Columns of the logits."""
    is_tied: bool
    """Whether the head's matrix is the embedding's."""
    is_mixture: bool
    """Whether a token passes through some experts only."""
    bytes_per_parameter: int
    width: int | None
    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    is_rotary: bool
    attention: str | None
    """eager, sdpa or another that never keeps its [seq, seq] matrix."""
    has_dropout: bool
    has_attention_dropout: bool
    block: Block | None
    unknown: str
    """Why block is None; empty where it is not."""
    quantised_bits: int | None = None
    num_quantised: int = 0
    adapter: AdapterShape | None = None

    @property
    def num_parameters(self) -> int:
        return sum(held.num for held in self.held)

    @property
    def num_trainable(self) -> int:
        return sum(tensor.num for tensor in self.trained)

    @property
    def trained_bytes(self) -> int:
        return sum(tensor.num * tensor.bytes_per_value for tensor in self.trained)

    @property
    def how_trained(self) -> str:
        """What trained_bytes is the sum of."""
        sizes: Counter[int] = Counter()
        for tensor in self.trained:
            sizes[tensor.bytes_per_value] += tensor.num
        return " + ".join(f"{num:,} trained parameters x {size} B" for size, num in sizes.items())

    @property
    def num_head_parameters(self) -> int:
        return (self.head_rows or 0) * (self.width or 0)

    @property
    def num_multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but looked-up tables and the head."""
        return self.num_parameters - self.num_looked_up - (0 if self.is_tied else self.num_head_parameters)

    @property
    def num_of_adapter(self) -> int:
        return 0 if self.adapter is None else self.adapter.num_parameters

    @property
    def num_cast(self) -> int:
        """Float32 parameters of products, which autocast makes 16-bit copies of."""
        if self.bytes_per_parameter != FP32:
            return self.num_of_adapter
        return self.num_multiplied + self.num_head_parameters - self.num_quantised


class Item(NamedTuple):
    """One item of a forecast: its name, its size (None: unknown) and the formula with its numbers."""

    name: str
    bytes: int | None
    how: str


@dataclass(frozen=True)
class MemoryForecast:
    """What the device holds in training, in the order in which it comes.

    Left out: the libraries themselves, what an allocator wastes, and buffers of a single operation.
    """

    parts: tuple[Item, ...]
    on_cpu: tuple[Item, ...] = ()
    """What is offloaded: held by the CPU instead, by each process."""

    @property
    def total(self) -> Item:
        """The sum: the most that can be held at once, since gradients grow while activations go."""
        return _total(self.parts, "sum of all, as in the second micro-batch of a step; libraries come on top")


@dataclass(frozen=True)
class Sharing:
    """How processes share out what one would hold, by DeepSpeed's ZeRO; sizes in elements."""

    stage: int
    num_processes: int
    is_bf16: bool = False
    """Whether the weights themselves are cast to bfloat16, and float32 ones are kept to be updated."""
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False
    bucket: int = 500_000_000
    """Gradients that are exchanged together."""
    num_buckets: int = 1
    max_live: int = 1_000_000_000
    """The most weights that are together at once, with stage 3."""


@dataclass(frozen=True)
class DiskForecast:
    """What the run's folder gets, and what its disk has."""

    parts: tuple[Item, ...]
    free_bytes: int
    place: Path
    """The nearest folder that exists, where free_bytes were read."""

    @property
    def total(self) -> Item:
        """The sum, as disk_need gives it."""
        return _total(self.parts, "sum of all, the most that can lie there at once")

    @property
    def fits(self) -> bool:
        return (self.total.bytes or 0) <= self.free_bytes


@dataclass(frozen=True)
class TimeForecast:
    """How long training will take, in seconds (None: unknown), without evaluation, samples and loading."""

    seconds: float | None
    is_lower_bound: bool
    how: str


def architecture_of(model: Any, config: Any, quantization: QuantizationConfig | None = None) -> Architecture:
    """Read the sizes of a transformers model; only shapes and types are looked at.

    Args:
        model: may live on the meta device: `with torch.device("meta"): AutoModelForCausalLM.from_config(config)`,
            resized to the vocabulary that it will have. Without an adapter: see with_adapter.
        config: the model's transformers config.
        quantization: what its weights, not quantised here, will be loaded in.
    """
    text = config.get_text_config()
    held, num_quantised = _held(model, quantization)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    width, layers = (getattr(text, key, None) for key in ("hidden_size", "num_hidden_layers"))
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or (width // heads if width and heads else None)
    if getattr(text, "attn_logit_softcapping", None):
        block, unknown = None, f"a {text.model_type} caps its attention"
    elif config.is_encoder_decoder:
        block, unknown = None, "it has an encoder and a decoder"
    elif width and layers and heads and kv_heads and head_dim:
        block, unknown = _block_of(model, layers, width, heads * head_dim, kv_heads * head_dim)
    else:
        block, unknown = None, f"the config of a {text.model_type} does not name its width, layers and heads"
    return Architecture(
        held=held,
        trained=trained_of(model),
        num_looked_up=sum(looked_up.values()),
        embedding_rows=embedding.weight.shape[0],
        head_rows=None if head is None else head.weight.shape[0],
        is_tied=head is not None and head.weight is embedding.weight,
        is_mixture=any("expert" in f"{name} {type(m).__name__}".lower() for name, m in model.named_modules()),
        bytes_per_parameter=model.dtype.itemsize,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        is_rotary=any("Rotary" in type(module).__name__ for module in model.modules()),
        attention=getattr(config, "_attn_implementation", None),
        has_dropout=_any_above_0(text, "resid_pdrop", "hidden_dropout", "dropout"),
        has_attention_dropout=_any_above_0(text, "attn_pdrop", "attention_dropout"),
        block=block,
        unknown=unknown,
        quantised_bits=(8 if quantization.load_in_8bit else 4) if quantization and quantization.is_on else None,
        num_quantised=num_quantised,
    )


def with_adapter(architecture: Architecture, model: Any) -> Architecture:
    """Add what PEFT has put into a model, and what it has frozen.

    Args:
        architecture: of the same model before.
    """
    added = [p for name, p in model.named_parameters() if "lora_" in name or "trainable_tokens_" in name]
    sources = architecture.block.sources if architecture.block else {}
    blocks: Iterable[nn.Module] = _block_lists(model, architecture.num_layers)[0] if sources else ()
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    targets = [
        tuple(_target(module, sources[name]) for name, module in block.named_modules() if hasattr(module, "lora_A"))
        for block in blocks
    ]
    held = [Held(num, num * size, f"{num:,} of the adapter x {size} B") for size, num in _by_size(added).items()]
    return replace(
        architecture,
        held=(*architecture.held, *held),
        trained=trained_of(model),
        adapter=AdapterShape(
            num_parameters=_count(added),
            targets=tuple(targets),
            trains_rows=any(p.requires_grad for p in model.get_input_embeddings().parameters()),
            has_dropout=any(isinstance(m, nn.Dropout) for layer in layers for m in layer.lora_dropout.values()),
            has_dora=any(len(layer.lora_magnitude_vector) for layer in layers),
        ),
    )


def _target(layer: Any, source: Source) -> Target:
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    return Target(source, a.in_features, b.out_features, a.out_features, layer.get_base_layer().bias is not None)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _by_size(tensors: Iterable[Tensor]) -> Counter[int]:
    """Give bytes of a value -> number of values."""
    sizes: Counter[int] = Counter()
    for tensor in tensors:
        sizes[tensor.itemsize] += tensor.numel()
    return sizes


def trained_of(model: nn.Module) -> tuple[Trained, ...]:
    """Give the shapes of what is trained of a model, each parameter once."""
    return tuple(Trained(whole_shape(p), p.itemsize) for p in model.parameters() if p.requires_grad)


def _held(model: nn.Module, quantization: QuantizationConfig | None) -> tuple[tuple[Held, ...], int]:
    """Give what the parameters will be held in, and how many of them quantised."""
    layers = quantised_layers(model) if quantization and quantization.is_on else {}
    quantised = {id(layer.weight): layer.weight for layer in layers.values()}
    held = [_quantised(list(quantised.values()), quantization)] if quantization and quantised else []
    sizes = _by_size(p for p in model.parameters() if id(p) not in quantised)
    held += [Held(num, num * size, f"{num:,} parameters x {size} B") for size, num in sizes.items()]
    return tuple(held), _count(quantised.values())


def _quantised(matrices: Sequence[Tensor], quantization: QuantizationConfig) -> Held:
    """Give what bitsandbytes holds of matrices [out, in]: in 8 bits a scale for each row, in 4 bits one for each block
    of values, and tables of what the codes mean, for each matrix its own."""
    num = _count(matrices)
    if quantization.load_in_8bit:
        rows = sum(matrix.shape[0] for matrix in matrices)
        return Held(num, num + rows * FP32, f"{num:,} in 8 bits, {rows:,} scales x {FP32} B")
    packed = sum(math.ceil(matrix.numel() / 2) for matrix in matrices)
    blocks = [math.ceil(matrix.numel() / SCALE_BLOCK) for matrix in matrices]
    tables = len(matrices) * 16 * FP32
    how = f"{num:,} in 4 bits, {sum(blocks):,} scales x"
    if not quantization.bnb_4bit_use_double_quant:
        return Held(num, packed + sum(blocks) * FP32 + tables, f"{how} {FP32} B")
    nested = sum(math.ceil(count / NESTED_BLOCK) for count in blocks)
    tables += len(matrices) * (256 + 1) * FP32  # and the scales' mean
    return Held(num, packed + sum(blocks) + nested * FP32 + tables, f"{how} 1 B")


def _any_above_0(config: Any, *keys: str) -> bool:
    return any(getattr(config, key, None) for key in keys)


def _block_of(model: Any, num_layers: int, width: int, q_width: int, kv_width: int) -> tuple[Block | None, str]:
    """Recognise the model's blocks, or say why not: every parameter must be of a matrix or a norm that is known."""
    lists = _block_lists(model, num_layers)
    if len(lists) != 1:
        return None, f"{len(lists)} lists of {num_layers} blocks were found in it"
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in lists[0]]
    if any(shape != shapes[0] for shape in shapes):
        return None, "its blocks are not all alike"
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    understood = {id(p) for module in (lists[0], model.get_output_embeddings(), *tables) for p in module.parameters()}
    if others := [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in understood]:
        return None, f"{others[0]} is in neither blocks, embeddings nor head"
    name = type(lists[0][0]).__name__
    leaves = [module for module in lists[0][0].modules() if not list(module.children())]
    matrices = Counter(shape for module in leaves if (shape := _in_and_out(module)))
    norms = [(norm, module) for module in leaves if (norm := _norm_of(module))]
    num_wide = sum(int(dict(norm.named_parameters())["weight"].numel() == width) for _, norm in norms)
    known = sum(p.numel() for m in leaves if _in_and_out(m) or _norm_of(m) for p in m.parameters())
    if known != sum(shape.numel() for shape in shapes[0].values()) or len({norm for norm, _ in norms}) != 1:
        return None, f"its {name} holds more than linear layers and norms of one kind"
    activations = {
        type(m): m
        for m in leaves
        if not list(m.parameters()) and not isinstance(m, nn.Dropout | nn.Identity) and "Rotary" not in type(m).__name__
    }
    if len(activations) != 1:
        return None, f"its {name} has {len(activations)} kinds of activation function"
    separate = Counter([(width, q_width), (width, kv_width), (width, kv_width), (q_width, width)])
    fused = Counter([(width, q_width + 2 * kv_width), (q_width, width)])
    for attention in (separate, fused):
        if attention <= matrices and (ffn := _ffn_of(list((matrices - attention).elements()), width)):
            ffn_width, is_gated, is_ffn_fused = ffn
            break
    else:
        return None, f"the matrices of its {name} are not q, k, v, o and an MLP"
    activation = next(iter(activations.values()))
    try:
        num_ffn_kept, num_frozen_ffn_kept = (_num_ffn_kept(activation, is_gated, reads) for reads in (True, False))
    except Exception:  # a module of any kind may stand there
        return None, f"the {type(activation).__name__} of its {name} is no activation function"
    return Block(
        ffn_width=ffn_width,
        is_gated=is_gated,
        num_ffn_kept=num_ffn_kept,
        num_frozen_ffn_kept=num_frozen_ffn_kept,
        is_ffn_fused=is_ffn_fused,
        is_qkv_fused=attention is fused,
        norm=norms[0][0],
        num_norms=num_wide,
        has_qk_norm=num_wide < len(norms),
        sources=_sources(lists[0][0], attention, (q_width, width), (ffn_width, width)),
    ), ""


def _block_lists(model: nn.Module, num_layers: int | None) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]


def _sources(
    block: nn.Module, attention: Counter[tuple[int, int]], o_shape: tuple[int, int], down_shape: tuple[int, int]
) -> dict[str, Source]:
    """Say what each matrix of a block reads. Those of attention lie in one module; of two of a shape o is the last.

    Args:
        attention: the shapes of attention's matrices, (in, out) as the other ones.
    """
    by_parent: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in block.named_modules():
        if shape := _in_and_out(module):
            by_parent.setdefault(name.rpartition(".")[0], {})[name] = shape
    sources: dict[str, Source] = {}
    for matrices in by_parent.values():
        is_attention = Counter(matrices.values()) == attention
        norm, inner = (Source.attention_norm, Source.attention) if is_attention else (Source.ffn_norm, Source.ffn)
        last = [name for name, shape in matrices.items() if shape == (o_shape if is_attention else down_shape)][-1:]
        sources |= {name: inner if name in last else norm for name in matrices}
    return sources


def _in_and_out(module: nn.Module) -> tuple[int, int] | None:
    """Give the widths that a linear layer turns into each other; GPT-2's Conv1D is one, stored the other way round."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _norm_of(module: nn.Module) -> Norm | None:
    if not isinstance(getattr(module, "weight", None), Tensor):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm.layer
    return Norm.rms if type(module).__name__.endswith("RMSNorm") else None


def _ffn_of(matrices: Sequence[tuple[int, int]], width: int) -> tuple[int, bool, bool] | None:
    """Give inner width, is gated and is fused of an MLP made of these matrices, (in, out); None where it is not one."""
    for down in {(inner, out) for inner, out in matrices if out == width}:
        inner = down[0]
        match list((Counter(matrices) - Counter([down])).elements()):
            case [up] if up == (width, inner):
                return inner, False, False
            case [up] if up == (width, 2 * inner):
                return inner, True, True
            case [gate, up] if gate == up == (width, inner):
                return inner, True, False
    return None


def _num_ffn_kept(activation: nn.Module, is_gated: bool, is_trained: bool) -> int:
    """Count what autograd keeps for each inner unit of an MLP, by doing it once: an activation written in several
    operations keeps more than one kernel (GPT-2's GELU 5 with what the last matrix reads, a fused one 2, ReLU 1).

    Args:
        is_trained: whether the last matrix is, which then keeps what it reads.
    """
    tokens, inner = 8, 16
    gate, up = (torch.zeros(tokens, inner, device="cpu", requires_grad=True) for _ in range(2))
    down = torch.zeros(1, inner, device="cpu", requires_grad=is_trained)
    kept = measure_saved_bytes(
        lambda: functional.linear(activation(gate) * up if is_gated else activation(gate), down), exclude=[down]
    )
    return round(kept / (tokens * inner * FP32))


class StateTensor(NamedTuple):
    """What an optimizer keeps for one trained tensor."""

    name: str
    num: int
    bytes_per_value: int


def _as_the_weights(*names: str) -> Callable[[Trained], list[StateTensor]]:
    return lambda tensor: [StateTensor(name, tensor.num, tensor.bytes_per_value) for name in names]


def _in_32_bits(tensor: Trained) -> list[StateTensor]:
    return [StateTensor(name, tensor.num, FP32) for name in ("state1", "state2")]


def _in_8_bits(tensor: Trained) -> list[StateTensor]:
    if tensor.num < MIN_8BIT_SIZE:
        return _in_32_bits(tensor)
    scales = math.ceil(tensor.num / STATE_BLOCK)
    states = [StateTensor(name, tensor.num, 1) for name in ("state1", "state2")]
    return states + [StateTensor(name, scales, FP32) for name in ("absmax1", "absmax2")]


def _rows_and_columns(tensor: Trained) -> list[StateTensor]:
    size = tensor.bytes_per_value
    if len(tensor.shape) < 2:
        return [StateTensor("variance", tensor.num, size)]
    names = {"row_var": tensor.shape[-1], "col_var": tensor.shape[-2]}
    return [StateTensor(name, tensor.num // gone, size) for name, gone in names.items()]


OPTIMIZER_STATE: dict[str, Callable[[Any], Callable[[Trained], list[StateTensor]]]] = {
    "adamw": lambda config: _as_the_weights("exp_avg", "exp_avg_sq"),
    "adamw_8bit": lambda config: _in_8_bits,
    "paged_adamw_32bit": lambda config: _in_32_bits,
    "adafactor": lambda config: _rows_and_columns,
    "sgd": lambda config: _as_the_weights("momentum_buffer") if config.momentum else _as_the_weights(),
}
"""The optimizer's type -> what it keeps for a tensor that is trained, but for counters and tables of a few values."""


def memory_forecast(
    architecture: Architecture,
    optimizer: OptimizerConfig,
    mixed_precision: MixedPrecision,
    *,
    batch: int,
    seq: int,
    num_supervised: int | None = None,
    is_packed: bool = False,
    device_type: str = "cpu",
    uses_full_logits: bool = False,
    gradient_checkpointing: bool = False,
    sharing: Sharing | None = None,
) -> MemoryForecast:
    """Forecast what training holds on its device, in each process.

    Args:
        batch: rows of a micro-batch.
        seq: tokens of its longest row, to which the others are padded.
        num_supervised: positions of the micro-batch that are scored; None: all that can be, batch * (seq - 1).
        is_packed: whether several rows share a sequence, so that attention needs a mask.
        device_type: cpu or cuda.
        uses_full_logits: see ScoredModel.
        gradient_checkpointing: whether each block is computed again in backward.
        sharing: None where each process holds everything.
    """
    if sharing is not None and sharing.is_bf16:
        architecture = _in_bf16(architecture)
    scored = batch * (seq - 1) if num_supervised is None else num_supervised
    parameters = Item(
        "parameters",
        sum(held.bytes for held in architecture.held),
        " + ".join(held.how for held in architecture.held),
    )
    computed = [
        activation_part(
            architecture, mixed_precision, batch, seq, scored, is_packed, device_type, gradient_checkpointing
        ),
        logits_part(architecture, mixed_precision, batch * seq, scored, uses_full_logits),
    ]
    if sharing is not None:
        parts, on_cpu = _shared_out(architecture, parameters, optimizer, sharing)
        return MemoryForecast((*parts, *computed), tuple(on_cpu))
    parts = [
        parameters,
        Item("gradients", architecture.trained_bytes, architecture.how_trained),
        optimizer_part(architecture, optimizer, device_type),
        *computed,
    ]
    num_cast = architecture.num_cast if mixed_precision is not MixedPrecision.no else 0
    if num_cast:
        how = f"{num_cast:,} parameters of products x 2 B: autocast's {mixed_precision.value} copies, until backward"
        if gradient_checkpointing and architecture.adapter is not None and architecture.num_layers:
            of_head = architecture.num_head_parameters if architecture.bytes_per_parameter == FP32 else 0
            num_cast = of_head + (num_cast - of_head) // architecture.num_layers
            how = f"{num_cast:,} parameters of the head and one block x 2 B: autocast's {mixed_precision.value} copies"
        parts.insert(1, Item("cast weights", 2 * num_cast, how))
    return MemoryForecast(tuple(parts))


def _in_bf16(architecture: Architecture) -> Architecture:
    """Give the sizes of a model whose weights are cast to bfloat16, but for those that are quantised."""
    held = tuple(
        held if architecture.quantised_bits and held is architecture.held[0] else Held(held.num, 2 * held.num, how)
        for held in architecture.held
        for how in [f"{held.num:,} parameters x 2 B"]
    )
    trained = tuple(Trained(tensor.shape, 2) for tensor in architecture.trained)
    return replace(architecture, held=held, trained=trained, bytes_per_parameter=2)


def _shared_out(
    architecture: Architecture, parameters: Item, optimizer: OptimizerConfig, sharing: Sharing
) -> tuple[list[Item], list[Item]]:
    """Forecast weights, gradients and optimizer state of one process, and what of them lies on the CPU.

    Source: deepspeed 0.19.8, stage_1_and_2.py and stage3.py; counted in tests/test_processes.py. It keeps a second copy
    of what it updates, in float32, also of weights that are float32 themselves.
    """
    n, num, size = sharing.num_processes, architecture.num_trainable, architecture.bytes_per_parameter

    def share(item: Item) -> Item:
        how = item.how if n == 1 else f"({item.how}) / {n}"
        return Item(item.name, None if item.bytes is None else math.ceil(item.bytes / n), how)

    in_32_bits = replace(architecture, trained=tuple(Trained(tensor.shape, FP32) for tensor in architecture.trained))
    gradients = Item("gradients", architecture.trained_bytes, architecture.how_trained)
    updated = share(Item("updated weights", num * FP32, f"{num:,} trained parameters x {FP32} B"))
    state = share(optimizer_part(in_32_bits, optimizer))
    buckets = sharing.num_buckets * sharing.bucket * size
    how = f"{sharing.num_buckets} x {sharing.bucket:,} gradients x {size} B"
    on_device, on_cpu = [Item("gradient buckets", buckets, how)], list[Item]()
    if sharing.stage == 3:
        num_live = min(architecture.num_parameters, sharing.max_live)
        on_device.append(Item("gathered weights", num_live * size, f"up to {num_live:,} at once x {size} B"))
    weights = share(parameters) if sharing.stage == 3 else parameters
    (on_cpu if sharing.weights_on_cpu else on_device).insert(0, weights)
    if sharing.optimizer_on_cpu:
        return on_device, [*on_cpu, share(Item("gradients", num * FP32, in_32_bits.how_trained)), updated, state]
    # stage 1 keeps them whole from one micro-batch to the next
    return [*on_device, gradients if sharing.stage == 1 else share(gradients), updated, state], on_cpu


def optimizer_part(architecture: Architecture, optimizer: OptimizerConfig, device_type: str = "cpu") -> Item:
    """Forecast the optimizer's state, tensor by tensor."""
    if optimizer.type not in OPTIMIZER_STATE:
        return Item("optimizer state", None, f"unknown: nothing is known of what {optimizer.type} keeps")
    counts = _state_counts(architecture.trained, optimizer)
    if not counts:
        return Item("optimizer state", 0, f"{optimizer.type} keeps nothing with these settings")
    alike: dict[tuple[int, int], list[str]] = {}
    for (name, size), num in counts.items():
        alike.setdefault((num, size), []).append(name)
    how = " + ".join(
        f"{len(names)} x {num:,} {'trained parameters' if num == architecture.num_trainable else 'values'} x {size} B: "
        + ", ".join(names)
        for (num, size), names in alike.items()
    )
    if optimizer.type.startswith("paged") and device_type == "cuda":
        how += "; moved to the CPU's memory where the GPU's is full"
    return Item("optimizer state", sum(num * size for (_, size), num in counts.items()), how)


def _state_counts(trained: Iterable[Trained], optimizer: OptimizerConfig) -> Counter[tuple[str, int]]:
    """Give name and bytes of a value -> number of values, of an optimizer that is in OPTIMIZER_STATE."""
    keeps = OPTIMIZER_STATE[optimizer.type](optimizer)
    counts: Counter[tuple[str, int]] = Counter()
    for tensor in trained:
        for name, num, size in keeps(tensor):
            counts[name, size] += num
    return counts


def activation_part(
    architecture: Architecture,
    mixed_precision: MixedPrecision,
    batch: int,
    seq: int,
    num_supervised: int,
    is_packed: bool = False,
    device_type: str = "cpu",
    gradient_checkpointing: bool = False,
) -> Item:
    """Forecast the forward values that autograd keeps for the backward of one micro-batch, without logits.

    In the manner of Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1: s·b·h·(34 + 5as/h) bytes a block, for GPT in fp16
    with dropout and its attention matrix), but from what the blocks of transformers really save. Bytes for each token
    and block, where h is the width, q and kv the widths of all heads, f the MLP's inner width; w bytes a value of the
    residual stream, c bytes a value that products compute with (2 under autocast and in 16-bit weights):

        norms       RMSNorm (4 + w)·h + 4: its input in fp32, and normalised; LayerNorm w·h + 8: its input
                    where q and k are normalised too: (4 + c)·(q + kv) and 4 a head
        inputs      c·h for the MLP and for q, k, v; autocast casts them anew for every matrix: up to 5·c·h
        attention   c·(2q + 2kv): q, k, v and what comes out, and 4 a head (log-sum-exp); no [seq, seq] matrix.
                    Packed rows need a mask: c·4q, since k and v are repeated for all heads, and c·seq for the mask
                    A rotary embedding behind one fused matrix keeps that matrix's q and k too: + c·(q + kv)
                    eager: c·4q, and heads·seq·4 for softmax, cast to c
                    dropout in attention: its mask and result more, on CPU by sdpa too (its kernel does without)
        dropout     two masks of h: a byte a value on CUDA, c on CPU
        MLP         c·f for all that is kept of it, 4 with a gated SiLU
    Outside the blocks: ids, cosines and sines, the last norm, masks, and the states that are scored.

    With an adapter the weights are frozen, and keep less: see _inputs; norms keep their input only, and blocks below
    the lowest one that is trained keep nothing. With gradient checkpointing each block keeps its input, and one block
    at a time is computed again, beside the first gradients of its backward.

    Against what autograd saves on CPU: ±2 % for blocks like Llama's (fp32, autocast and 16-bit weights, sdpa and eager;
    ±5 % with an adapter, also on quantised weights) and ±20 % for the other ones (GPT-2 in fp32 and autocast: 6 %);
    with checkpointing 15 more, against the most that is held in backward. GPT-2 with 16-bit weights and eager attention
    keeps less: its softmax is not in fp32. On CUDA quantised layers keep other types than on CPU: as their code says,
    not measured.
    """
    block, width, layers = architecture.block, architecture.width, architecture.num_layers
    heads, kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    if block is None or not (width and layers and heads and kv_heads and head_dim):
        return Item("activations", None, f"unknown for this architecture: {architecture.unknown}")
    q, kv, residual = heads * head_dim, kv_heads * head_dim, architecture.bytes_per_parameter
    adapter, tokens = architecture.adapter, batch * seq
    types = _types(architecture, mixed_precision, device_type)
    mask = 1 if device_type == "cuda" else types.compute
    norm = _norm_bytes(block.norm, width, residual, is_trained=adapter is None)
    norms = block.num_norms * norm
    if block.has_qk_norm:
        norms += (FP32 + (types.compute if adapter is None else 0)) * (q + kv) + FP32 * (heads + kv_heads)
    needs_mask = is_packed and architecture.attention == "sdpa"
    attention, output = _attention_bytes(architecture, types.compute, q, kv, heads, seq, needs_mask, device_type)

    def of_block(targets: Sequence[Target]) -> dict[str, int]:
        if adapter is None:
            copies = (1 if block.is_qkv_fused else 3) + (2 if block.is_gated and not block.is_ffn_fused else 1)
            is_cast = _casts(architecture, mixed_precision)
            inputs, read = types.compute * width * (copies if is_cast else 2), set(Source)
        else:
            inputs, read = _inputs(architecture, adapter, targets, types, device_type)
            inputs += residual * width * len(read & {Source.attention_norm, Source.ffn_norm})
        num_ffn = block.num_ffn_kept if Source.ffn in read else block.num_frozen_ffn_kept
        return {
            "norms": norms,
            "inputs": inputs,
            "attention": attention + (output if Source.attention in read else 0),
            "dropout": 2 * mask * width if architecture.has_dropout else 0,
            "MLP": types.inner * num_ffn * block.ffn_width,
        }

    blocks = [of_block(targets) for targets in (((),) * layers if adapter is None else adapter.reached)]
    trains_rows = adapter is None or adapter.trains_rows
    first_mask = (1 if device_type == "cuda" else residual) * width if architecture.has_dropout else 0
    # where nothing is trained below the lowest block's first norm, that one keeps nothing: it makes up for the last
    last_norm = norm if trains_rows else 0
    outside = tokens * (8 * trains_rows + last_norm + first_mask + (seq if needs_mask else 0))
    outside += 2 * seq * head_dim * residual if architecture.is_rotary else 0
    outside += num_supervised * (types.compute * width * trains_rows + 8)
    if adapter is not None and adapter.has_dora and adapter.has_dropout:
        outside += _dora_weights(architecture, adapter, types)
    mean = {name: round(sum(one[name] for one in blocks) / len(blocks)) for name in blocks[0]} if blocks else {}
    inside = ", ".join(f"{name} {size:,}" for name, size in mean.items() if size or name != "dropout")
    how = f"{sum(mean.values()):,} B ({inside})"
    tolerance = block.tolerance if adapter is None else max(block.tolerance, ADAPTER_TOLERANCE)
    if gradient_checkpointing:
        gradients = block.ffn_width * _inner_gradient_bytes(architecture, types)
        held = len(blocks) * residual * width + max((sum(one.values()) for one in blocks), default=0) + gradients
        how = f"{tokens:,} tokens x ({len(blocks)} blocks' inputs x {residual * width:,} B + one block's {how}"
        how += f" and gradients {gradients:,} B)"
        tolerance += CHECKPOINTING_TOLERANCE
    else:
        held = sum(sum(one.values()) for one in blocks)
        how = f"{tokens:,} tokens x {len(blocks)} blocks x {how}"
    return Item("activations", tokens * held + outside, f"{how} + {human_bytes(outside)} outside; ±{tolerance} %")


class _Types(NamedTuple):
    """Bytes a value, by where it is kept; see activation_part for w and c."""

    compute: int
    inner: int
    """Of the MLP's inner units."""
    adapter: int
    """Of what LoRA's matrices compute with."""
    is_autocast: bool
    gives_back: bool
    """Whether a matrix gives back the type that it was given, as some of bitsandbytes' do, whatever autocast says."""


def _types(architecture: Architecture, mixed_precision: MixedPrecision, device_type: str) -> _Types:
    is_autocast, residual = mixed_precision is not MixedPrecision.no, architecture.bytes_per_parameter
    compute = 2 if is_autocast else residual
    gives_back = architecture.quantised_bits == 4 or (architecture.quantised_bits == 8 and device_type == "cuda")
    return _Types(compute, residual if gives_back else compute, 2 if is_autocast else FP32, is_autocast, gives_back)


def _norm_bytes(norm: Norm, width: int, residual: int, *, is_trained: bool) -> int:
    if norm is Norm.layer:
        return residual * width + 2 * FP32
    return (FP32 + (residual if is_trained else 0)) * width + FP32


def _attention_bytes(
    architecture: Architecture, compute: int, q: int, kv: int, heads: int, seq: int, needs_mask: bool, device_type: str
) -> tuple[int, int]:
    """Give what attention keeps for each token, and what more where the matrix behind it keeps its input."""
    is_eager = architecture.attention == "eager"
    if not is_eager and (device_type == "cuda" or not architecture.has_attention_dropout):
        kept = compute * (4 * q + seq if needs_mask else 2 * (q + kv)) + FP32 * heads
        is_copied = architecture.is_rotary and architecture.block is not None and architecture.block.is_qkv_fused
        return kept + (compute * (q + kv) if is_copied else 0), 0
    wide = compute if is_eager else FP32  # sdpa's substitute computes in fp32
    squares = FP32 + (compute if compute < FP32 else 0)
    if architecture.has_attention_dropout:
        squares = FP32 + (1 if device_type == "cuda" else wide) + wide
    return wide * 3 * q + heads * seq * squares, compute * q


def _inner_gradient_bytes(architecture: Architecture, types: _Types) -> int:
    """Count for each inner unit the gradients of what the MLP's last matrix reads, when backward comes to its block."""
    adapter = architecture.adapter
    if adapter is None or not any(t.source is Source.ffn for targets in adapter.reached for t in targets):
        return types.inner
    is_copied = types.is_autocast or architecture.bytes_per_parameter != FP32
    return types.inner + (2 * FP32 if is_copied else FP32)


def _inputs(
    architecture: Architecture, adapter: AdapterShape, targets: Sequence[Target], types: _Types, device_type: str
) -> tuple[int, set[Source]]:
    """Count what LoRA keeps for each token of a block, and say which of the values that its matrices read are kept too.

    Frozen matrices keep no input, but for bitsandbytes' 8-bit ones. A of LoRA keeps what it reads: the matrix's own
    input where it has the right type; else a copy, 2 bytes a value under autocast, 4 without, since PEFT holds A and B
    in float32. Behind LoRA's dropout it is always a copy, with a mask. B keeps what A gives: rank values. DoRA keeps
    what the matrix gives and what LoRA gives.
    """
    residual, size = architecture.bytes_per_parameter, types.adapter
    # PEFT leaves casting to autocast beside quantised weights, if it sees it: on CUDA only
    leaves_it = architecture.quantised_bits is not None and types.is_autocast and device_type == "cuda"
    read = set(Source) if architecture.quantised_bits == 8 else set()
    kept = 0
    for target in targets:
        given = {Source.attention: types.compute, Source.ffn: types.inner}.get(target.source, residual)
        kept += size * target.rank
        if adapter.has_dropout:
            mask = 1 if device_type == "cuda" else FP32
            kept += (size + mask) * target.num_in
        elif given != size or (types.is_autocast and not leaves_it):
            kept += size * target.num_in
        else:
            read.add(target.source)
        if adapter.has_dora:
            result = given if types.gives_back else types.compute
            if target.has_bias:  # taken off the result again, in its own type
                result = max(result, residual)
            kept += (size + (size if adapter.has_dropout else result)) * target.num_out
    return kept, read


def _dora_weights(architecture: Architecture, adapter: AdapterShape, types: _Types) -> int:
    """Count the copies of weights that DoRA behind a dropout keeps, to multiply with what was dropped once more."""
    is_copied = types.is_autocast or architecture.quantised_bits is not None or architecture.bytes_per_parameter != FP32
    num = sum(target.num_in * target.num_out for targets in adapter.reached for target in targets)
    return num * types.adapter if is_copied else 0


def logits_part(
    architecture: Architecture,
    mixed_precision: MixedPrecision,
    num_tokens: int,
    num_supervised: int,
    uses_full_logits: bool = False,
) -> Item:
    """Forecast what scoring holds at once: see src.training.loss.token_nll.

    12 bytes a logit at the worst moment, in the backward of log-softmax: its result, the gradient that comes and the
    gradient that goes, all fp32 (measured). More positions than a chunk has are computed again, chunk by chunk. A model
    that computes all logits by itself holds them, those that are picked from them, and their log-softmax.

    Args:
        num_tokens: positions of the micro-batch, padding included.
        num_supervised: positions that are scored.
    """
    vocabulary = architecture.head_rows
    if vocabulary is None:
        return Item("logits", None, "unknown: the model names no head")
    chunk = max(1, MAX_LOGITS // vocabulary)
    at_once = min(num_supervised, chunk)
    if not uses_full_logits:
        what = "scored positions" if at_once == num_supervised else f"of {num_supervised:,} scored positions at once"
        how = f"{at_once:,} {what} x {vocabulary:,} x 12 B: log-softmax and two gradients of it, fp32"
        return Item("logits", at_once * vocabulary * 3 * FP32, how)
    size = 2 if _casts(architecture, mixed_precision) else architecture.bytes_per_parameter
    softmax = at_once * (FP32 if size == FP32 else 2 * FP32)
    held = max(size * (num_tokens + num_supervised) + softmax, 2 * size * num_tokens) * vocabulary
    how = f"the model computes all: {num_tokens:,} positions and the {num_supervised:,} scored x {vocabulary:,} x"
    return Item("logits", held, f"{how} {size} B and log-softmax in fp32; what the model does to them comes on top")


def _casts(architecture: Architecture, mixed_precision: MixedPrecision) -> bool:
    """Whether autocast makes 16-bit copies: it leaves weights alone that are 16-bit already."""
    return mixed_precision is not MixedPrecision.no and architecture.bytes_per_parameter == FP32


class _Kept:
    """A tensor that autograd keeps, for as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_saved_bytes(compute: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Run a forward and give the bytes that autograd keeps of it for backward, each storage counted once and whole.

    Autocast's copies of the weights are among them. Of what `torch.utils.checkpoint` computes again it sees what is
    kept to do so, not what comes then; of bitsandbytes' 8-bit layers it does not see the inputs that they keep.

    Args:
        compute: a forward without its backward; its result is held until it is counted.
        exclude: tensors that are there anyway, such as the model's parameters.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    living: WeakSet[_Kept] = WeakSet()

    def see(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        living.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(see, lambda kept: kept.tensor):
        result = compute()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in living}
    del result
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in there)


def checkpoint_bytes(trained: Iterable[Trained], optimizer: OptimizerConfig) -> tuple[int, int]:
    """Count what a resumable checkpoint holds: bytes of the weights, and of the optimizer's state.

    Left out, as in memory: the state's counters and the tables that all tensors share.

    Args:
        optimizer: of a type that is in OPTIMIZER_STATE.
    """
    trained = tuple(trained)
    weights = sum(tensor.num * tensor.bytes_per_value for tensor in trained)
    return weights, sum(num * size for (_, size), num in _state_counts(trained, optimizer).items())


def most_saves(config: CheckpointConfig, num_steps: int, steps_per_epoch: int | None) -> int | None:
    """Count the saves of a run, the last step's and one that a signal asks for included; None where nobody knows.

    Args:
        steps_per_epoch: None where the train set is streamed.
    """
    if config.checkpointing_steps is None:
        return 1
    every = steps_per_epoch if config.checkpointing_steps == "epoch" else int(config.checkpointing_steps)
    return None if every is None else math.ceil(num_steps / every) + 1


def disk_need(
    weights_bytes: int,
    optimizer_bytes: int,
    config: CheckpointConfig,
    export_bytes: int,
    has_metric: bool,
    num_saves: int | None = None,
) -> int:
    """Sum what a run's folder may come to hold: the checkpoints that are kept, one that is being written, the export.

    No more than this lies there at once: a best checkpoint may be among the newest, which are counted apart from it,
    and the export is written when no checkpoint is.

    Args:
        weights_bytes, optimizer_bytes: of one checkpoint, see checkpoint_bytes.
        export_bytes: of all that is exported.
        has_metric: whether an evaluation gives what tells the best.
        num_saves: how many there can be at most, see most_saves; None: any number.
    """
    parts = _checkpoint_parts(weights_bytes, optimizer_bytes, config, has_metric, num_saves)
    return sum(part.bytes or 0 for part in parts) + export_bytes


def _checkpoint_parts(
    weights_bytes: int, optimizer_bytes: int, config: CheckpointConfig, has_metric: bool, num_saves: int | None
) -> list[Item]:
    """Forecast the checkpoints when there are most of them: one is written, and the oldest is not deleted yet."""
    bare = weights_bytes + SMALL_BYTES
    resumable = bare + optimizer_bytes
    most = 1 if config.checkpointing_steps is None else num_saves
    num = config.keep_last + 1 if most is None else min(config.keep_last + 1, most)
    num_resumable = min(2, num) if config.newest_optimizer_only else num
    num_bare = num - num_resumable
    is_one_more = num > (1 if config.newest_optimizer_only else config.keep_last)
    how = f"{num_resumable - is_one_more} resumable of {human_bytes(resumable)}"
    if num_bare:
        how += f", {num_bare} with weights only, of {human_bytes(bare)}"
    if is_one_more:
        how += f", and one more{' resumable' if num_bare else ''} while it is written"
    if config.checkpointing_steps is None:
        how += ", at a signal"
    parts = [Item("checkpoints", num_resumable * resumable + num_bare * bare, how)]
    if has_metric and config.keep_best:
        how = f"{config.keep_best} with weights only, of {human_bytes(bare)}"
        parts.append(Item("best checkpoints", config.keep_best * bare, how))
    return parts


def disk_forecast(
    architecture: Architecture,
    run_dir: Path,
    optimizer: OptimizerConfig,
    checkpoint: CheckpointConfig,
    *,
    has_metric: bool,
    num_saves: int | None = None,
    tokenizer_bytes: int = 0,
    merge: bool = False,
) -> DiskForecast:
    """Forecast what a run writes that is large: its checkpoints, and the exported model or adapter.

    A checkpoint is what is trained, and the optimizer's state of it. In the exported model a matrix that is tied is
    written once. An adapter is what is trained: its matrices and the rows of new tokens.

    Args:
        run_dir: the run's folder; need not exist.
        has_metric, num_saves: see disk_need.
        tokenizer_bytes: files that are exported beside the weights.
        merge: whether an adapter is also merged into the whole model.
    """
    if optimizer.type in OPTIMIZER_STATE:
        sizes = checkpoint_bytes(architecture.trained, optimizer)
        parts = _checkpoint_parts(*sizes, checkpoint, has_metric, num_saves)
    else:
        parts = [Item("checkpoints", None, f"unknown: nothing is known of what {optimizer.type} keeps")]
    beside = f" + {human_bytes(tokenizer_bytes)} of tokenizer" if tokenizer_bytes else ""
    if architecture.adapter is None or merge:
        num = architecture.num_parameters - architecture.num_of_adapter
        whole, how = (
            num * architecture.bytes_per_parameter,
            f"{num:,} parameters x {architecture.bytes_per_parameter} B",
        )
        parts.append(Item("model", whole + tokenizer_bytes, how + beside))
    if architecture.adapter is not None:
        parts.append(Item("adapter", architecture.trained_bytes + tokenizer_bytes, architecture.how_trained + beside))
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    return DiskForecast(tuple(parts), shutil.disk_usage(place).free, place)


def training_flops(
    architecture: Architecture, num_tokens: int, num_supervised: int, seq: int, gradient_checkpointing: bool = False
) -> int | None:
    """Count the floating-point operations of forward and backward: 6·N a token, and attention 12·layers·q·seq a token.

    Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B),
    which do not halve attention for its causal mask. Of 6, 2 are the forward, 2 the gradients that are passed on and 2
    those of the weights, which frozen weights do without; gradient checkpointing does the forward twice. N leaves out
    tables that are only looked up, and Towline's head works for supervised positions only.

    Args:
        num_tokens: positions of the whole training, padding included.
        num_supervised: those of them that are scored.
        seq: mean length of a row.
    Returns:
        None for a mixture of experts, of which a token meets only some.
    """
    if architecture.is_mixture:
        return None
    again = 2 if gradient_checkpointing else 0
    per_parameter = 4 + 2 * architecture.num_trainable / architecture.num_parameters + again
    products = architecture.num_multiplied * num_tokens + architecture.num_head_parameters * num_supervised
    heads_width = (architecture.num_heads or 0) * (architecture.head_dim or 0)
    attention = (12 + 2 * again) * (architecture.num_layers or 0) * heads_width * seq * num_tokens
    return round(per_parameter * products) + attention


def time_forecast(
    architecture: Architecture,
    *,
    num_tokens: int,
    num_supervised: int,
    seq: int,
    flops_per_second: float,
    gradient_checkpointing: bool = False,
) -> TimeForecast:
    """Forecast from below: the run's operations at the full speed of this device's matrix products, and nothing else.

    Args:
        num_tokens, num_supervised, seq, gradient_checkpointing: see training_flops.
        flops_per_second: of matmul_flops_per_second.
    """
    flops = training_flops(architecture, num_tokens, num_supervised, seq, gradient_checkpointing)
    if flops is None:
        return TimeForecast(None, True, "unknown: a token meets only some experts of this model")
    how = f"at least: {flops:.3g} FLOP at the {flops_per_second:.3g} FLOP/s of this device's matrix products"
    return TimeForecast(flops / flops_per_second, True, f"{how}; all else that a step does comes on top")


def measured_time_forecast(seconds_per_micro_batch: float, num_micro_batches: int) -> TimeForecast:
    """Forecast from a micro-batch that was really computed, forward and backward, of the mean size."""
    how = f"{num_micro_batches:,} micro-batches x {seconds_per_micro_batch:.3g} s, as measured"
    return TimeForecast(seconds_per_micro_batch * num_micro_batches, False, how)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, budget_seconds: float = 0.3) -> float:
    """Measure how fast this device multiplies square matrices: the best of as many products as the budget has room for.

    Sizes double from 512 to 1024 on a CPU and to 4096 on a GPU, which 1024 would not fill.
    """
    largest = 1024 if device.type == "cpu" else 4096
    size, best, ends = 512, 0.0, time.perf_counter() + budget_seconds
    while True:
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        _seconds_of_product(a, b)  # the first one of a size chooses its kernel
        best = max(best, 2 * size**3 / _seconds_of_product(a, b))
        left = ends - time.perf_counter()
        fitting = [n for n in (size, min(2 * size, largest)) if 2 * (2 * n**3) / best < left]
        if not fitting:
            return best
        size = fitting[-1]


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started


def _total(parts: Sequence[Item], how: str) -> Item:
    unknown = [part.name for part in parts if part.bytes is None]
    least = f"at least: {', '.join(unknown)} unknown; " if unknown else ""
    return Item("total", sum(part.bytes or 0 for part in parts), least + how)
