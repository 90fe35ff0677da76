"""What a run will need, before it is spent: memory, disk and time, each with how it was reckoned.

Numbers in, numbers out. An `Architecture` is read from a model that may live on the meta device: no weight is needed.
What can't be known is None and said to be unknown; it is never filled with a guess.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from src.config.schema import MixedPrecision, OptimizerConfig
from src.model.build import num_parameters
from src.training.loss import MAX_LOGITS

FP32 = 4  # bytes
LLAMA_TOLERANCE, OTHER_TOLERANCE = 2, 20
"""Percent by which the forecast of activations may miss what autograd saves on CPU, held by tests/test_forecast.py: for
blocks that compute as Llama's do (Mistral, Qwen), and for all others that are recognised."""


class Norm(Enum):
    rms = "RMSNorm"
    layer = "LayerNorm"


@dataclass(frozen=True)
class Block:
    """How one block of the model computes, as far as it decides what is kept for backward."""

    ffn_width: int
    is_gated: bool
    """Whether the MLP is act(gate) * up, as in Llama, or act(up), as in GPT-2."""
    num_ffn_kept: int
    """Values kept for each of the MLP's inner units: gate, act(gate), up and their product make 4 with SiLU."""
    is_ffn_fused: bool
    """Whether gate and up are one matrix."""
    is_qkv_fused: bool
    """Whether q, k and v are one matrix."""
    norm: Norm
    num_norms: int
    """Norms over the whole width."""
    has_qk_norm: bool
    """Whether q and k are normalised too, as in Qwen3."""

    @property
    def tolerance(self) -> int:
        """Percent by which the forecast of activations may be wrong."""
        fused = self.is_ffn_fused or self.is_qkv_fused
        as_llama = self.norm is Norm.rms and self.num_norms == 2 and self.is_gated and not fused
        return LLAMA_TOLERANCE if as_llama else OTHER_TOLERANCE


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that decide what it costs. None where the model does not say."""

    num_parameters: int
    num_trainable: int
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

    @property
    def num_head_parameters(self) -> int:
        return (self.head_rows or 0) * (self.width or 0)

    @property
    def num_multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but looked-up tables and the head."""
        return self.num_parameters - self.num_looked_up - (0 if self.is_tied else self.num_head_parameters)


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

    @property
    def total(self) -> Item:
        """The sum: the most that can be held at once, since gradients grow while activations go."""
        return _total(self.parts, "sum of all, as in the second micro-batch of a step; libraries come on top")


@dataclass(frozen=True)
class DiskForecast:
    """What the run's folder gets, and what its disk has."""

    parts: tuple[Item, ...]
    free_bytes: int
    place: Path
    """The nearest folder that exists, where free_bytes were read."""

    @property
    def total(self) -> Item:
        """The most that lies there at once."""
        how = (
            "at most at once; the best weights go before the model is written" if len(self.parts) > 1 else "at the end"
        )
        return _total(self.parts, how)

    @property
    def fits(self) -> bool:
        return (self.total.bytes or 0) <= self.free_bytes


@dataclass(frozen=True)
class TimeForecast:
    """How long training will take, in seconds (None: unknown), without evaluation, samples and loading."""

    seconds: float | None
    is_lower_bound: bool
    how: str


def architecture_of(model: Any, config: Any) -> Architecture:
    """Read the sizes of a transformers model; only shapes and types are looked at.

    Args:
        model: may live on the meta device: `with torch.device("meta"): AutoModelForCausalLM.from_config(config)`,
            resized to the vocabulary that it will have.
        config: the model's transformers config.
    """
    text = config.get_text_config()
    total, trainable = num_parameters(model)
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
        num_parameters=total,
        num_trainable=trainable,
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
    )


def _any_above_0(config: Any, *keys: str) -> bool:
    return any(getattr(config, key, None) for key in keys)


def _block_of(model: Any, num_layers: int, width: int, q_width: int, kv_width: int) -> tuple[Block | None, str]:
    """Recognise the model's blocks, or say why not: every parameter must be of a matrix or a norm that is known."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
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
        num_ffn_kept = _num_ffn_kept(activation, is_gated)
    except Exception:  # a module of any kind may stand there
        return None, f"the {type(activation).__name__} of its {name} is no activation function"
    return Block(
        ffn_width=ffn_width,
        is_gated=is_gated,
        num_ffn_kept=num_ffn_kept,
        is_ffn_fused=is_ffn_fused,
        is_qkv_fused=attention is fused,
        norm=norms[0][0],
        num_norms=num_wide,
        has_qk_norm=num_wide < len(norms),
    ), ""


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


def _num_ffn_kept(activation: nn.Module, is_gated: bool) -> int:
    """Count what autograd keeps for each inner unit of an MLP, by doing it once: an activation written in several
    operations keeps more than one kernel (GPT-2's GELU 5 with what the last matrix reads, a fused one 2, ReLU 1)."""
    tokens, inner = 8, 16
    gate, up = (torch.zeros(tokens, inner, device="cpu", requires_grad=True) for _ in range(2))
    down = torch.zeros(1, inner, device="cpu", requires_grad=True)
    kept = measure_saved_bytes(
        lambda: functional.linear(activation(gate) * up if is_gated else activation(gate), down), exclude=[down]
    )
    return round(kept / (tokens * inner * FP32))


class StateTensor(NamedTuple):
    """What an optimizer keeps for every trained parameter."""

    name: str
    bytes_per_value: int | None = None
    """None: as many as the parameter's own."""


OPTIMIZER_STATE: dict[str, Callable[[Any], tuple[StateTensor, ...]]] = {
    "adamw": lambda config: (StateTensor("exp_avg"), StateTensor("exp_avg_sq")),
    "sgd": lambda config: (StateTensor("momentum_buffer"),) if config.momentum else (),
}
"""The optimizer's type -> what it keeps, each tensor as large as the trained parameters."""


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
) -> MemoryForecast:
    """Forecast what training holds on its device.

    Args:
        batch: rows of a micro-batch.
        seq: tokens of its longest row, to which the others are padded.
        num_supervised: positions of the micro-batch that are scored; None: all that can be, batch * (seq - 1).
        is_packed: whether several rows share a sequence, so that attention needs a mask.
        device_type: cpu or cuda.
        uses_full_logits: see ScoredModel.
    """
    scored = batch * (seq - 1) if num_supervised is None else num_supervised
    size = architecture.bytes_per_parameter
    parts = [
        Item(
            "parameters",
            architecture.num_parameters * size,
            f"{architecture.num_parameters:,} parameters x {size} B",
        ),
        Item(
            "gradients",
            architecture.num_trainable * size,
            f"{architecture.num_trainable:,} trained parameters x {size} B",
        ),
        optimizer_part(architecture, optimizer),
        activation_part(architecture, mixed_precision, batch, seq, scored, is_packed, device_type),
        logits_part(architecture, mixed_precision, batch * seq, scored, uses_full_logits),
    ]
    if _casts(architecture, mixed_precision):
        multiplied = architecture.num_multiplied + architecture.num_head_parameters
        how = f"{multiplied:,} parameters of products x 2 B: autocast's {mixed_precision.value} copies, until backward"
        parts.insert(1, Item("cast weights", 2 * multiplied, how))
    return MemoryForecast(tuple(parts))


def optimizer_part(architecture: Architecture, optimizer: OptimizerConfig) -> Item:
    """Forecast the optimizer's state, tensor by tensor."""
    if optimizer.type not in OPTIMIZER_STATE:
        return Item("optimizer state", None, f"unknown: nothing is known of what {optimizer.type} keeps")
    states = OPTIMIZER_STATE[optimizer.type](optimizer)
    if not states:
        return Item("optimizer state", 0, f"{optimizer.type} keeps nothing with these settings")
    sizes: dict[int, list[str]] = {}
    for state in states:
        sizes.setdefault(state.bytes_per_value or architecture.bytes_per_parameter, []).append(state.name)
    trained = architecture.num_trainable
    how = " + ".join(f"{len(names)} x {trained:,} trained parameters x {size} B" for size, names in sizes.items())
    held = sum(len(names) * trained * size for size, names in sizes.items())
    return Item("optimizer state", held, f"{how}: {', '.join(state.name for state in states)}")


def activation_part(
    architecture: Architecture,
    mixed_precision: MixedPrecision,
    batch: int,
    seq: int,
    num_supervised: int,
    is_packed: bool = False,
    device_type: str = "cpu",
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

    Against what autograd saves on CPU: ±2 % for blocks like Llama's (fp32, autocast and 16-bit weights, sdpa and eager)
    and ±20 % for the other ones (GPT-2 in fp32 and autocast: 6 %). GPT-2 with 16-bit weights and eager attention keeps
    less: its softmax is not in fp32. All weights are supposed to be trained; where most are frozen, less is kept.
    """
    block, width, layers = architecture.block, architecture.width, architecture.num_layers
    heads, kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    if block is None or not (width and layers and heads and kv_heads and head_dim):
        return Item("activations", None, f"unknown for this architecture: {architecture.unknown}")
    q, kv, residual = heads * head_dim, kv_heads * head_dim, architecture.bytes_per_parameter
    casts = _casts(architecture, mixed_precision)
    compute = 2 if casts else residual
    mask = 1 if device_type == "cuda" else compute

    norm = (FP32 + residual) * width + FP32 if block.norm is Norm.rms else residual * width + 2 * FP32
    norms = block.num_norms * norm
    if block.has_qk_norm:
        norms += (FP32 + compute) * (q + kv) + FP32 * (heads + kv_heads)
    copies = (1 if block.is_qkv_fused else 3) + (2 if block.is_gated and not block.is_ffn_fused else 1)
    inputs = compute * width * (copies if casts else 2)
    falls_back = architecture.has_attention_dropout and device_type != "cuda"
    is_eager, needs_mask = architecture.attention == "eager", is_packed and architecture.attention == "sdpa"
    if is_eager or falls_back:
        wide = compute if is_eager else FP32  # sdpa's substitute computes in fp32
        attention = wide * 3 * q + compute * q
        if architecture.has_attention_dropout:
            squares = FP32 + (1 if device_type == "cuda" else wide) + wide
        else:
            squares = FP32 + (compute if compute < FP32 else 0)
        attention += heads * seq * squares
    else:
        attention = compute * (4 * q + seq if needs_mask else 2 * (q + kv)) + FP32 * heads
        if block.is_qkv_fused and architecture.is_rotary:
            attention += compute * (q + kv)
    dropout = 2 * mask * width if architecture.has_dropout else 0
    mlp = compute * block.num_ffn_kept * block.ffn_width

    tokens = batch * seq
    a_block = norms + inputs + attention + dropout + mlp
    first_mask = (1 if device_type == "cuda" else residual) * width if architecture.has_dropout else 0
    rotary = 2 * seq * head_dim * residual if architecture.is_rotary else 0
    outside = (
        tokens * (8 + norm + first_mask + (seq if needs_mask else 0)) + rotary + num_supervised * (compute * width + 8)
    )
    how = f"{tokens:,} tokens x {layers} blocks x {a_block:,} B (norms {norms:,}, inputs {inputs:,}, "
    how += f"attention {attention:,}, {f'dropout {dropout:,}, ' if dropout else ''}MLP {mlp:,})"
    how += f" + {human_bytes(outside)} outside; ±{block.tolerance} %"
    return Item("activations", tokens * layers * a_block + outside, how)


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


def measure_saved_bytes(compute: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Run a forward and give the bytes that autograd keeps of it for backward, each storage counted once and whole.

    Autocast's copies of the weights are among them; what `torch.utils.checkpoint` keeps to compute again is not seen.
    All that is kept stays until the end of the call.

    Args:
        compute: a forward without its backward; its result is let go.
        exclude: tensors that are there anyway, such as the model's parameters.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())


def disk_forecast(
    architecture: Architecture, run_dir: Path, *, load_best_model_at_end: bool, tokenizer_bytes: int = 0
) -> DiskForecast:
    """Forecast what a run writes that is large: the exported model, and the best weights meanwhile.

    A matrix that is tied is written once. Best weights are written beside those they replace, so twice their size lies
    there for a moment; they are gone before the model is written (src/checkpoint/best.py, src/run.py).

    Args:
        run_dir: the run's folder; need not exist.
        tokenizer_bytes: files that are exported beside the weights.
    """
    weights = architecture.num_parameters * architecture.bytes_per_parameter
    how = f"{architecture.num_parameters:,} parameters x {architecture.bytes_per_parameter} B"
    beside = f" + {human_bytes(tokenizer_bytes)} of tokenizer" if tokenizer_bytes else ""
    parts = [Item("model", weights + tokenizer_bytes, how + beside)]
    if load_best_model_at_end:
        parts.append(Item("best weights", weights, f"{how}, until the end; twice while better ones replace them"))
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    return DiskForecast(tuple(parts), shutil.disk_usage(place).free, place)


def training_flops(architecture: Architecture, num_tokens: int, num_supervised: int, seq: int) -> int | None:
    """Count the floating-point operations of forward and backward: 6·N a token, and attention 12·layers·q·seq a token.

    Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B),
    which do not halve attention for its causal mask. Of 6, 2 are the forward, 2 the gradients that are passed on and 2
    those of the weights, which frozen weights do without. N leaves out tables that are only looked up, and Towline's
    head works for supervised positions only.

    Args:
        num_tokens: positions of the whole training, padding included.
        num_supervised: those of them that are scored.
        seq: mean length of a row.
    Returns:
        None for a mixture of experts, of which a token meets only some.
    """
    if architecture.is_mixture:
        return None
    per_parameter = 4 + 2 * architecture.num_trainable / architecture.num_parameters
    products = architecture.num_multiplied * num_tokens + architecture.num_head_parameters * num_supervised
    heads_width = (architecture.num_heads or 0) * (architecture.head_dim or 0)
    attention = 12 * (architecture.num_layers or 0) * heads_width * seq * num_tokens
    return round(per_parameter * products) + attention


def time_forecast(
    architecture: Architecture,
    *,
    num_tokens: int,
    num_supervised: int,
    seq: int,
    flops_per_second: float,
) -> TimeForecast:
    """Forecast from below: the run's operations at the full speed of this device's matrix products, and nothing else.

    Args:
        num_tokens, num_supervised, seq: see training_flops.
        flops_per_second: of matmul_flops_per_second.
    """
    flops = training_flops(architecture, num_tokens, num_supervised, seq)
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


def human_bytes(count: float) -> str:
    """Give a size in binary units: 512 B, 2.8 MiB, 14.0 GiB."""
    units = ["TiB", "GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count:.0f} B"
    while round(count) >= 1024 and units:
        count, unit = count / 1024, units.pop()
    return f"{count:.1f} {unit}"


def _total(parts: Sequence[Item], how: str) -> Item:
    unknown = [part.name for part in parts if part.bytes is None]
    least = f"at least: {', '.join(unknown)} unknown; " if unknown else ""
    return Item("total", sum(part.bytes or 0 for part in parts), least + how)
