"""The forecast: exact where it is arithmetic, and held against what autograd, the optimizer and the disk really do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from src.checkpoint.store import SMALL_BYTES
from src.config.schema import (
    AdafactorConfig,
    AdamWConfig,
    CheckpointConfig,
    LoraBias,
    LoraConfig,
    MixedPrecision,
    SGDConfig,
)
from src.errors import human_bytes
from src.forecast import (
    ADAPTER_TOLERANCE,
    CHECKPOINTING_TOLERANCE,
    LLAMA_TOLERANCE,
    OTHER_TOLERANCE,
    Architecture,
    Block,
    Held,
    Norm,
    Source,
    Trained,
    activation_part,
    architecture_of,
    checkpoint_bytes,
    disk_forecast,
    disk_need,
    logits_part,
    matmul_flops_per_second,
    measure_saved_bytes,
    measured_time_forecast,
    memory_forecast,
    most_saves,
    optimizer_part,
    time_forecast,
    trained_of,
    training_flops,
    with_adapter,
)
from src.inspection.outlook import planned_architecture
from src.model.adapters import Adapter, add_adapter
from src.model.build import build_model, empty_model
from src.model.embeddings import embedding_matrices, fit_embeddings
from src.model.export import export
from src.training.head import ScoredModel
from src.training.loss import MAX_LOGITS
from src.training.optim import build_optimizer
from tests.conftest import ROOT, admitted

ADAMW = AdamWConfig(type="adamw", lr=1e-3, embedding_lr=None, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
ADAMW_8BIT, PAGED = replace(ADAMW, type="adamw_8bit"), replace(ADAMW, type="paged_adamw_32bit")
ADAFACTOR = AdafactorConfig(type="adafactor", lr=1e-2, embedding_lr=None, weight_decay=0.0)
SGD = SGDConfig(type="sgd", lr=0.1, embedding_lr=None, weight_decay=0.0, momentum=0.0)
MOMENTUM = SGDConfig(type="sgd", lr=0.1, embedding_lr=None, weight_decay=0.0, momentum=0.9)
CHECKPOINT = CheckpointConfig(
    checkpointing_steps="epoch",
    keep_last=2,
    keep_best=1,
    newest_optimizer_only=False,
    metric_for_best_model="eval/validation/loss",
    greater_is_better=None,
    load_best_model_at_end=False,
    resume="auto",
    allow_changed=False,
)

TOY = Architecture(  # Llama's shape: 10 x 8 embedding, 2 blocks of 592, a norm of 8, 10 x 8 head
    held=(Held(1352, 4 * 1352, "1,352 parameters x 4 B"),),
    trained=(Trained((1352,), 4),),
    num_looked_up=80,
    embedding_rows=10,
    head_rows=10,
    is_tied=False,
    is_mixture=False,
    bytes_per_parameter=4,
    width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    is_rotary=True,
    attention="sdpa",
    has_dropout=False,
    has_attention_dropout=False,
    block=Block(
        ffn_width=16,
        is_gated=True,
        num_ffn_kept=4,
        num_frozen_ffn_kept=3,
        is_ffn_fused=False,
        is_qkv_fused=False,
        norm=Norm.rms,
        num_norms=2,
        has_qk_norm=False,
        sources={},
    ),
    unknown="",
)
SMALL: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama() -> PreTrainedConfig:
    return AutoConfig.from_pretrained("assets/tiny_llama")


def gpt2() -> PreTrainedConfig:
    return GPT2Config(n_layer=2, n_embd=128, n_head=4, n_positions=256, **SMALL)


def qwen3() -> PreTrainedConfig:  # grouped heads wider than the model, normalised q and k, tied
    return Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True, **SMALL)


def gemma3() -> PreTrainedConfig:  # four norms a block
    return Gemma3TextConfig(**SIZES, head_dim=32, **SMALL)


def phi3() -> PreTrainedConfig:  # q, k and v are one matrix, gate and up another
    return Phi3Config(**SIZES, **SMALL)


def neox() -> PreTrainedConfig:  # attention and MLP side by side
    return GPTNeoXConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, **SMALL)


def on_meta(config: PreTrainedConfig, **options: Any) -> Architecture:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    return architecture_of(model, model.config)


def test_memory_is_the_sum_of_its_parts() -> None:
    forecast = memory_forecast(TOY, ADAMW, MixedPrecision.no, batch=1, seq=4)
    assert {part.name: part.bytes for part in forecast.parts} == {
        "parameters": 1352 * 4,
        "gradients": 1352 * 4,
        "optimizer state": 2 * 1352 * 4,
        # a token and block: norms 2·(8·8 + 4), inputs 4·2·8, attention 4·2·(8 + 4) + 4·2, MLP 4·4·16
        "activations": 4 * 2 * (136 + 64 + 104 + 256) + 4 * (8 + 68) + 2 * 4 * 4 * 4 + 3 * (4 * 8 + 8),
        "logits": 3 * 10 * 12,
    }
    assert forecast.total.bytes == 5408 + 5408 + 10816 + 5032 + 360


def test_autocast_adds_casts_of_the_weights_and_halves_what_products_keep() -> None:
    forecast = memory_forecast(TOY, ADAMW, MixedPrecision.bf16, batch=1, seq=4)
    sizes = {part.name: part.bytes for part in forecast.parts}
    assert sizes["cast weights"] == 2 * (1352 - 80)
    # norms stay fp32; the inputs of q, k, v, gate and up are cast five times
    a_block = 136 + 2 * 5 * 8 + (2 * 2 * 12 + 8) + 2 * 4 * 16
    assert sizes["activations"] == 4 * 2 * a_block + 4 * (8 + 68) + 2 * 4 * 4 * 4 + 3 * (2 * 8 + 8)
    names = [part.name for part in memory_forecast(half(TOY), ADAMW, MixedPrecision.bf16, batch=1, seq=4).parts]
    assert "cast weights" not in names


def half(architecture: Architecture) -> Architecture:
    held = (Held(architecture.num_parameters, 2 * architecture.num_parameters, ""),)
    return replace(architecture, bytes_per_parameter=2, held=held, trained=(Trained((1352,), 2),))


def test_only_eager_attention_grows_with_the_square_of_the_length() -> None:
    def second_difference(architecture: Architecture) -> int:
        sizes = [activation_part(architecture, MixedPrecision.no, 1, seq, 0).bytes or 0 for seq in (8, 16, 24)]
        return sizes[2] - 2 * sizes[1] + sizes[0]

    assert second_difference(TOY) == 0
    assert second_difference(replace(TOY, attention="eager")) == 2 * 8**2 * (2 * 2 * 4)  # 2·8² · layers · heads · 4 B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ADAMW, {"exp_avg", "exp_avg_sq"}),
        (ADAMW_8BIT, {"state1", "state2", "absmax1", "absmax2"}),
        (PAGED, {"state1", "state2"}),
        (ADAFACTOR, {"row_var", "col_var", "variance"}),
        (MOMENTUM, {"momentum_buffer"}),
        (SGD, set()),
    ],
)
def test_the_optimizer_keeps_what_is_forecast(config: Any, names: set[str], dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(qwen3(), dtype=dtype)
    optimizer = build_optimizer(config, model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    uncounted = ("step", "qmap1", "qmap2")  # a number a tensor, and what all tensors share
    kept = [
        (name, value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if value is not None and name not in uncounted
    ]
    part = optimizer_part(architecture_of(model, model.config), config)
    assert {name for name, _ in kept} == names
    assert part.bytes == sum(value.nbytes for _, value in kept)
    assert all(name in part.how for name in names)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert checkpoint_bytes(trained_of(model), config) == (weights, part.bytes)
    held = {id(tensor): tensor.nbytes for tensor in tree_leaves(optimizer.state_dict()) if isinstance(tensor, Tensor)}
    assert weights + (part.bytes or 0) == pytest.approx(weights + sum(held.values()), rel=0.01)  # counters and tables


def test_what_an_optimizer_keeps_is_told_with_its_numbers() -> None:
    many = replace(TOY, trained=(Trained((64, 128), 4), Trained((10, 4), 4), Trained((64,), 4)))
    assert optimizer_part(many, ADAMW).how == "2 x 8,296 trained parameters x 4 B: exp_avg, exp_avg_sq"
    assert optimizer_part(many, ADAMW_8BIT).how == (
        "2 x 8,192 values x 1 B: state1, state2 + 2 x 32 values x 4 B: absmax1, absmax2 "
        "+ 2 x 104 values x 4 B: state1, state2"
    )
    assert optimizer_part(many, ADAFACTOR).how == (
        "1 x 74 values x 4 B: row_var + 1 x 132 values x 4 B: col_var + 1 x 64 values x 4 B: variance"
    )
    assert optimizer_part(many, PAGED, "cuda").how.endswith("moved to the CPU's memory where the GPU's is full")
    assert optimizer_part(many, SGD).how == "sgd keeps nothing with these settings"


def test_an_optimizer_that_is_not_known_is_said_to_be_unknown() -> None:
    forecast = memory_forecast(TOY, replace(SGD, type="lion"), MixedPrecision.no, batch=1, seq=4)
    assert forecast.parts[2].bytes is None
    assert forecast.total.how.startswith("at least: optimizer state unknown")


def test_few_trained_parameters_need_few_gradients() -> None:
    forecast = memory_forecast(replace(TOY, trained=(Trained((10,), 4),)), ADAMW, MixedPrecision.no, batch=1, seq=4)
    assert [part.bytes for part in forecast.parts[:3]] == [5408, 40, 80]


def test_logits_are_held_for_a_chunk_of_scored_positions() -> None:
    wide = replace(TOY, head_rows=2**20)
    chunk = MAX_LOGITS // 2**20
    assert logits_part(wide, MixedPrecision.no, 1000, 10).bytes == 10 * 2**20 * 12
    assert logits_part(wide, MixedPrecision.no, 1000, 1000).bytes == chunk * 2**20 * 12
    # all positions, those picked of them, and their log-softmax
    assert logits_part(TOY, MixedPrecision.no, 4, 3, uses_full_logits=True).bytes == 10 * (4 * 4 + 3 * 4 + 3 * 4)


def test_saved_bytes_are_counted_by_storage() -> None:
    x = torch.ones(8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    assert measure_saved_bytes(lambda: (x * 2).square()) == 32
    assert measure_saved_bytes(lambda: x[:2] * weight[:2], exclude=[weight]) == 32  # of a view, all that it keeps alive
    assert measure_saved_bytes(lambda: x * weight, exclude=[x, weight]) == 0
    assert measure_saved_bytes(lambda: (x * 2).square().detach()) == 0  # its graph is gone, and what it kept


EXACT = {"dtype": torch.float32}
HALF = {"dtype": torch.bfloat16}
EAGER = {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    ("make", "options", "precision", "tolerance"),
    [
        (tiny_llama, EXACT, MixedPrecision.no, 0.2),
        (tiny_llama, EXACT, MixedPrecision.bf16, 0.5),
        (tiny_llama, HALF, MixedPrecision.no, 0.2),
        (tiny_llama, EXACT | EAGER, MixedPrecision.no, 0.2),
        (tiny_llama, EXACT | EAGER, MixedPrecision.bf16, 0.5),
        (qwen3, EXACT, MixedPrecision.no, 0.2),
        (qwen3, EXACT, MixedPrecision.bf16, 0.5),
        (gpt2, EXACT, MixedPrecision.no, 6),
        (gpt2, EXACT, MixedPrecision.bf16, 1),
        (gpt2, EXACT | EAGER, MixedPrecision.no, 1),
        (gemma3, EXACT, MixedPrecision.no, 1),
        (gemma3, HALF, MixedPrecision.no, 16),
        (phi3, EXACT, MixedPrecision.no, 5),
        (phi3, EXACT, MixedPrecision.bf16, 5),
        (neox, EXACT, MixedPrecision.no, 2),
        (neox, EXACT, MixedPrecision.bf16, 10),
    ],
)
def test_activations_are_what_autograd_saves(
    make: Callable[[], PreTrainedConfig], options: dict[str, Any], precision: MixedPrecision, tolerance: float
) -> None:
    architecture = on_meta(make(), **options)
    assert architecture.block is not None
    promised = LLAMA_TOLERANCE if make in (tiny_llama, qwen3) else OTHER_TOLERANCE
    assert tolerance <= promised == architecture.block.tolerance
    scored = ScoredModel(AutoModelForCausalLM.from_config(make(), **options)).train()
    for batch, seq in ((1, 32), (4, 64), (2, 192)):
        input_ids = torch.randint(3, 259, (batch, seq))
        labels = input_ids.clone()
        labels[:, : seq // 2] = -100
        num_supervised = batch * (seq - seq // 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is MixedPrecision.bf16):
            saved = measure_saved_bytes(lambda: scored(input_ids, labels), exclude=scored.parameters())  # noqa: B023
        saved -= num_supervised * 259 * 4  # log-softmax: of the logits
        if precision is MixedPrecision.bf16:
            saved -= 2 * architecture.num_cast
        part = activation_part(architecture, precision, batch, seq, num_supervised)
        assert part.bytes == pytest.approx(saved, rel=tolerance / 100)
        assert part.how.endswith(f"±{promised} %")


def test_activations_of_packed_rows_hold_masks_and_repeated_heads() -> None:
    architecture = on_meta(qwen3())
    scored = ScoredModel(AutoModelForCausalLM.from_config(qwen3())).train()
    for batch, seq in ((1, 64), (4, 256)):
        input_ids = torch.randint(3, 259, (batch, seq))
        positions = (torch.arange(seq) % 32).expand(batch, seq)
        saved = measure_saved_bytes(
            lambda: scored.model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False),  # noqa: B023
            exclude=scored.parameters(),
        )
        part = activation_part(architecture, MixedPrecision.no, batch, seq, 0, is_packed=True)
        assert part.bytes == pytest.approx(saved, rel=0.01)


def test_an_architecture_is_read_without_weights() -> None:
    read = on_meta(qwen3())
    assert read == on_meta(qwen3(), attn_implementation="sdpa")
    assert (read.embedding_rows, read.head_rows, read.is_tied, read.bytes_per_parameter) == (259, 259, True, 4)
    assert (read.num_heads, read.num_kv_heads, read.head_dim, read.num_layers) == (4, 2, 64, 2)
    assert read.num_looked_up == read.num_head_parameters == 259 * 128
    assert read.num_multiplied == read.num_parameters - 259 * 128
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    reads = [Source.attention_norm] * 3 + [Source.attention] + [Source.ffn_norm] * 2 + [Source.ffn]
    sources = dict(zip(names, reads, strict=True))
    assert read.block == Block(384, True, 4, 3, False, False, Norm.rms, 2, True, sources)
    of_gpt2 = {"attn.c_attn": reads[0], "attn.c_proj": reads[3], "mlp.c_fc": reads[4], "mlp.c_proj": reads[6]}
    assert on_meta(gpt2()).block == Block(512, False, 5, 4, False, True, Norm.layer, 2, False, of_gpt2)


MIXTURE = MixtralConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_local_experts=2, **SMALL
)
FALCON = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **SMALL)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (MIXTURE, "its MixtralDecoderLayer holds more than linear layers and norms of one kind"),
        (FALCON, "the matrices of its FalconDecoderLayer are not q, k, v, o and an MLP"),
    ],
)
def test_activations_of_an_unusual_architecture_are_unknown(config: PreTrainedConfig, why: str) -> None:
    architecture = on_meta(config)
    assert architecture.block is None
    forecast = memory_forecast(architecture, ADAMW, MixedPrecision.no, batch=1, seq=4)
    assert forecast.parts[3] == ("activations", None, f"unknown for this architecture: {why}")
    assert forecast.total.bytes == sum(part.bytes or 0 for part in forecast.parts)
    assert forecast.total.how.startswith("at least: activations unknown")


def test_two_stacks_of_blocks_are_unknown() -> None:
    config = BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, **SMALL)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    architecture = architecture_of(model, config)
    assert architecture.block is None
    assert architecture.unknown == "it has an encoder and a decoder"


def test_only_a_mixture_of_experts_is_a_mixture() -> None:
    assert [on_meta(config).is_mixture for config in (MIXTURE, FALCON, tiny_llama(), gpt2())] == [True] + 3 * [False]


def test_disk_holds_checkpoints_and_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    forecast = disk_forecast(half(TOY), folder, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7)
    resumable, bare = 3 * 2704 + SMALL_BYTES, 2704 + SMALL_BYTES
    assert forecast.parts == (
        ("checkpoints", 3 * resumable, "2 resumable of 105.6 KiB, and one more while it is written"),
        ("best checkpoints", bare, "1 with weights only, of 100.3 KiB"),
        ("model", 2711, "1,352 parameters x 2 B + 7 B of tokenizer"),
    )
    assert forecast.place == tmp_path
    assert forecast.total.bytes == disk_need(2704, 2 * 2704, CHECKPOINT, 2711, has_metric=True)
    assert forecast.fits
    assert not replace(forecast, free_bytes=forecast.total.bytes - 1).fits
    assert disk_forecast(TOY, folder, replace(SGD, type="lion"), CHECKPOINT, has_metric=False).total.how.startswith(
        "at least: checkpoints unknown"
    )


WEIGHTS, STATE, EXPORT = 10**6, 2 * 10**6, 5 * 10**6
RESUMABLE, BARE = WEIGHTS + STATE + SMALL_BYTES, WEIGHTS + SMALL_BYTES


@pytest.mark.parametrize(
    ("changed", "num_saves", "has_metric", "num_resumable", "num_bare"),
    [
        ({}, None, False, 3, 0),
        ({}, None, True, 3, 1),
        ({"keep_best": 3}, None, True, 3, 3),
        ({"keep_best": 0}, None, True, 3, 0),
        ({"keep_last": 1}, None, False, 2, 0),
        ({"keep_last": 4, "newest_optimizer_only": True}, None, False, 2, 3),
        ({"keep_last": 4, "newest_optimizer_only": True}, None, True, 2, 4),
        ({"keep_last": 1, "newest_optimizer_only": True}, None, False, 2, 0),
        ({"checkpointing_steps": None}, None, True, 1, 1),
        ({"checkpointing_steps": None, "newest_optimizer_only": True}, None, False, 1, 0),
        ({}, 1, False, 1, 0),
        ({}, 2, False, 2, 0),
        ({}, 9, False, 3, 0),
        ({"keep_last": 4, "newest_optimizer_only": True}, 3, False, 2, 1),
    ],
)
def test_disk_is_needed_for_what_is_kept_and_one_more(
    changed: dict[str, Any], num_saves: int | None, has_metric: bool, num_resumable: int, num_bare: int
) -> None:
    need = disk_need(WEIGHTS, STATE, replace(CHECKPOINT, **changed), EXPORT, has_metric, num_saves)
    assert need == num_resumable * RESUMABLE + num_bare * BARE + EXPORT


@pytest.mark.parametrize(
    ("changed", "num_saves", "how"),
    [
        ({"keep_last": 3, "newest_optimizer_only": True}, None, "1 resumable of {r}, 2 with weights only, of {b}, {m}"),
        ({"keep_last": 3, "newest_optimizer_only": True}, 2, "1 resumable of {r}, and one more while it is written"),
        ({"keep_last": 3}, 2, "2 resumable of {r}"),
        ({"checkpointing_steps": None}, None, "1 resumable of {r}, at a signal"),
    ],
)
def test_checkpoints_are_told_with_their_numbers(
    tmp_path: Path, changed: dict[str, Any], num_saves: int | None, how: str
) -> None:
    checkpoint = replace(CHECKPOINT, **changed)
    part = disk_forecast(half(TOY), tmp_path, ADAMW, checkpoint, has_metric=False, num_saves=num_saves).parts[0]
    assert part.how == how.format(r="105.6 KiB", b="100.3 KiB", m="and one more resumable while it is written")


@pytest.mark.parametrize(
    ("every", "num_steps", "steps_per_epoch", "most"),
    [("epoch", 10, 10, 2), ("epoch", 25, 10, 4), (4, 10, None, 4), ("epoch", 10, None, None), (None, 10, 5, 1)],
)
def test_saves_are_counted_with_the_last_steps_and_a_signals(
    every: str | int | None, num_steps: int, steps_per_epoch: int | None, most: int | None
) -> None:
    assert most_saves(replace(CHECKPOINT, checkpointing_steps=every), num_steps, steps_per_epoch) == most


@pytest.mark.parametrize("make", [tiny_llama, qwen3])
def test_an_export_is_as_large_as_forecast(make: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(make())
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    export(model, None, tokenizer, tmp_path / "model", admitted().config, "")
    forecast = disk_forecast(architecture_of(model, model.config), tmp_path, ADAMW, CHECKPOINT, has_metric=False)
    assert forecast.parts[1].name == "model"
    assert forecast.parts[1].bytes == pytest.approx(written_to(tmp_path / "model"), rel=0.01)


def written_to(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# Adapters, quantised weights and gradient checkpointing

LORA = LoraConfig(
    type="lora",
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    bias=LoraBias.none,
    target_modules="all-linear",
    exclude_modules=None,
    use_dora=False,
    use_rslora=False,
    init_lora_weights=True,
    layers_to_transform=None,
    rank_pattern={},
    alpha_pattern={},
)
NEW_IDS = [259, 260]


def adapted(
    make: Callable[[], PreTrainedConfig], options: dict[str, Any], adapter: LoraConfig | None, new_ids: Sequence[int]
) -> tuple[Any, Architecture]:
    """Give a real model with an adapter, and what is read of it."""
    model = AutoModelForCausalLM.from_config(make(), **options)
    fit_embeddings(model, 261, 8)
    architecture = architecture_of(model, model.config)
    if adapter is None:
        return model, architecture
    add_adapter(model, adapter, admitted().config.model, new_ids, [one.module for one in embedding_matrices(model)])
    return model, with_adapter(architecture, model)


def scoring(scored: ScoredModel, batch: int, seq: int) -> tuple[Callable[[], Tensor], int]:
    """Give a forward of random ids whose second half is supervised, and how many positions that are."""
    input_ids = torch.randint(3, 259, (batch, seq))
    labels = input_ids.clone()
    labels[:, : seq // 2] = -100
    return lambda: scored(input_ids, labels).objective, batch * (seq - seq // 2)


def test_an_adapter_is_read_with_its_rows_once_where_matrices_are_tied() -> None:
    _, bare = adapted(qwen3, EXACT, None, ())
    _, architecture = adapted(qwen3, EXACT, LORA, NEW_IDS)
    # q 128 -> 256, k and v 128 -> 128, o 256 -> 128, gate and up 128 -> 384, down 384 -> 128, in two blocks
    matrices = 2 * 8 * ((128 + 256) * 2 + (128 + 128) * 2 + (128 + 384) * 3)
    assert architecture.num_trainable == architecture.num_of_adapter == matrices + 2 * 128
    assert architecture.held == (*bare.held, Held(matrices + 256, 4 * (matrices + 256), "45,312 of the adapter x 4 B"))
    assert architecture.num_multiplied == bare.num_multiplied + architecture.num_of_adapter
    assert architecture.adapter is not None
    assert architecture.adapter.trains_rows
    targets = architecture.adapter.targets
    assert len(targets) == 2
    assert targets[0] == targets[1]
    assert targets[0][0] == (Source.attention_norm, 128, 256, 8, False)
    assert targets[0][-1] == (Source.ffn, 384, 128, 8, False)


def test_gradients_reach_down_to_the_lowest_block_that_is_adapted() -> None:
    named = replace(LORA, target_modules=["q_proj", "down_proj"])
    for layers, new_ids, reached in (([1, 2], [], 2), ([2], [], 1), ([2], NEW_IDS, 3)):
        _, architecture = adapted(tiny_llama, EXACT, replace(named, layers_to_transform=layers), new_ids)
        assert architecture.adapter is not None
        assert len(architecture.adapter.reached) == reached


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (gemma3, ["o_proj", "down_proj"]),
        (phi3, ["o_proj", "down_proj"]),
        (neox, ["dense", "dense_4h_to_h"]),
    ],
)
def test_what_a_matrix_reads_is_told_by_its_place(make: Callable[[], PreTrainedConfig], names: list[str]) -> None:
    block = on_meta(make()).block
    assert block is not None
    reading = [[name.rpartition(".")[2] for name, read in block.sources.items() if read is what] for what in Source]
    assert reading[1] == names[:1]
    assert reading[3] == names[1:]


ONLY_QV = replace(LORA, target_modules=["q_proj", "v_proj"])
DROPPED = replace(LORA, lora_dropout=0.1)
DORA = replace(LORA, use_dora=True)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it itself where it must be
@pytest.mark.parametrize(
    ("make", "options", "precision", "adapter", "new_ids", "tolerance"),
    [
        (tiny_llama, EXACT, MixedPrecision.no, LORA, [], 0.2),
        (tiny_llama, EXACT, MixedPrecision.no, LORA, NEW_IDS, 0.2),
        (tiny_llama, HALF, MixedPrecision.no, LORA, NEW_IDS, 0.2),
        (tiny_llama, EXACT, MixedPrecision.bf16, LORA, NEW_IDS, 0.2),
        (tiny_llama, HALF, MixedPrecision.bf16, LORA, NEW_IDS, 0.2),
        (tiny_llama, EXACT | EAGER, MixedPrecision.no, LORA, [], 0.2),
        (tiny_llama, EXACT, MixedPrecision.no, ONLY_QV, [], 0.2),
        (tiny_llama, HALF, MixedPrecision.bf16, ONLY_QV, [], 3.5),
        (tiny_llama, EXACT, MixedPrecision.no, replace(ONLY_QV, layers_to_transform=[1, 2]), [], 0.2),
        (tiny_llama, EXACT, MixedPrecision.no, DROPPED, NEW_IDS, 0.2),
        (tiny_llama, EXACT, MixedPrecision.bf16, DROPPED, NEW_IDS, 0.2),
        (tiny_llama, EXACT, MixedPrecision.no, DORA, NEW_IDS, 0.5),
        (tiny_llama, HALF, MixedPrecision.bf16, replace(DORA, lora_dropout=0.1), NEW_IDS, 0.5),
        (qwen3, EXACT, MixedPrecision.no, LORA, NEW_IDS, 0.2),
        (qwen3, EXACT, MixedPrecision.no, ONLY_QV, [], 3),
        (gpt2, EXACT, MixedPrecision.no, LORA, NEW_IDS, 3),
        (gpt2, EXACT, MixedPrecision.bf16, LORA, NEW_IDS, 2),
        (gemma3, EXACT, MixedPrecision.no, LORA, NEW_IDS, 1),
        (phi3, EXACT, MixedPrecision.no, LORA, NEW_IDS, 5),
        (neox, EXACT, MixedPrecision.bf16, LORA, NEW_IDS, 12),
    ],
)
def test_activations_with_an_adapter_are_what_autograd_saves(
    make: Callable[[], PreTrainedConfig],
    options: dict[str, Any],
    precision: MixedPrecision,
    adapter: LoraConfig,
    new_ids: list[int],
    tolerance: float,
) -> None:
    model, architecture = adapted(make, options, adapter, new_ids)
    promised = ADAPTER_TOLERANCE if make in (tiny_llama, qwen3) else OTHER_TOLERANCE
    assert tolerance <= promised
    scored = ScoredModel(model).train()
    for batch, seq in ((4, 64), (2, 192)):
        score, num_supervised = scoring(scored, batch, seq)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is MixedPrecision.bf16):
            saved = measure_saved_bytes(score, exclude=scored.parameters())
        saved -= num_supervised * 264 * 4  # log-softmax: of the logits
        if precision is MixedPrecision.bf16:
            saved -= 2 * architecture.num_cast
        part = activation_part(architecture, precision, batch, seq, num_supervised)
        assert part.bytes == pytest.approx(saved, rel=tolerance / 100)
        assert part.how.endswith(f"±{promised} %")


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on, as long as they live."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def held_after(score: Callable[[], Tensor], model: Any, precision: MixedPrecision) -> tuple[int, int]:
    """Give the bytes that a forward leaves behind, and the most that are held in its backward, gradients aside."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Living([*model.parameters(), *model.buffers(), *gradients]) as living:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is MixedPrecision.bf16):
            loss = score()
        after = living.peak = living.bytes
        loss.backward()
    return after, living.peak


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it itself where it must be
@pytest.mark.parametrize("precision", [MixedPrecision.no, MixedPrecision.bf16])
@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("options", [EXACT, HALF])
@pytest.mark.parametrize("make", [tiny_llama, qwen3, gpt2])
def test_checkpointing_holds_the_blocks_inputs_and_one_block(
    make: Callable[[], PreTrainedConfig], options: dict[str, Any], adapter: LoraConfig | None, precision: MixedPrecision
) -> None:
    model, architecture = adapted(make, options, adapter, NEW_IDS)
    model.activation_checkpointing_enable()
    score, num_supervised = scoring(ScoredModel(model).train(), 4, 192)
    _, peak = held_after(score, model, precision)
    forecast = memory_forecast(
        architecture, ADAMW, precision, batch=4, seq=192, num_supervised=num_supervised, gradient_checkpointing=True
    )
    sizes = {part.name: part.bytes or 0 for part in forecast.parts}
    promised = CHECKPOINTING_TOLERANCE + (LLAMA_TOLERANCE if make in (tiny_llama, qwen3) else OTHER_TOLERANCE)
    held = sizes["activations"] + sizes.get("cast weights", 0)  # the logits are gone before a block is computed again
    assert held == pytest.approx(peak, rel=promised / 100)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "assets/tiny_llama")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets/tiny_llama").save_pretrained(folder)
    return folder


def planned_and_real(weights: Path, *overrides: str) -> tuple[Any, Architecture, Any, Adapter]:
    """Give the configuration, what is read without weights, and the model with its adapter as a run makes it."""
    config = admitted("model=causal_lm", f"model.checkpoint={weights}", *overrides).config
    empty, model = empty_model(config.model), build_model(config, torch.device("cpu"))
    for one in (empty, model):
        fit_embeddings(one, 261, 8)
    architecture = planned_architecture(config, empty, NEW_IDS)
    matrices = [matrix.module for matrix in embedding_matrices(model)]
    adapter = add_adapter(model, config.adapter, config.model, NEW_IDS, matrices)
    assert adapter is not None
    return config, architecture, model, adapter


def real_bytes(model: Any) -> int:
    """Sum what the parameters hold, with the scales and tables of those that are quantised."""
    tensors: list[Tensor] = []
    for parameter in model.parameters():
        tensors.append(parameter.data)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=lora"],
        ["adapter=lora", "model.dtype=bfloat16", "optimizer=paged_adamw_32bit"],
        ["adapter=dora", "adapter.init_lora_weights=pissa", "optimizer=adafactor"],
        ["adapter=lora", "quantization=int8", "adapter.r=64", "optimizer=adamw_8bit"],
        ["adapter=qlora", "model.dtype=bfloat16"],
        ["adapter=qlora", "quantization.bnb_4bit_use_double_quant=false", "adapter.target_modules=[q_proj]"],
    ],
    ids=" ".join,
)
def test_what_an_adapter_run_holds_is_forecast_to_the_byte(weights: Path, overrides: list[str]) -> None:
    config, architecture, model, _ = planned_and_real(weights, *overrides)
    forecast = memory_forecast(architecture, config.optimizer, MixedPrecision.no, batch=1, seq=8)
    sizes = {part.name: part.bytes for part in forecast.parts}
    assert sizes["parameters"] == real_bytes(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optimizer, trained)
    scoring(ScoredModel(model).train(), 2, 16)[0]().backward()
    assert sizes["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    uncounted = ("step", "qmap1", "qmap2")
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name not in uncounted]
    assert sizes["optimizer state"] == sum(value.nbytes for value in kept)


@pytest.mark.parametrize("precision", [MixedPrecision.no, MixedPrecision.bf16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=qlora"],
        ["adapter=qlora", "adapter.use_dora=true"],
        ["adapter=lora", "quantization=int8"],
        ["adapter=lora", "quantization=int8", "adapter.lora_dropout=0.1"],
    ],
    ids=" ".join,
)
def test_activations_on_quantised_weights_are_what_a_forward_leaves(
    weights: Path, overrides: list[str], dtype: str, precision: MixedPrecision
) -> None:
    words = [*overrides, f"model.dtype={dtype}", f"training.mixed_precision={precision.value}"]
    _, architecture, model, _ = planned_and_real(weights, *words)
    score, num_supervised = scoring(ScoredModel(model).train(), 4, 96)
    after, _ = held_after(score, model, precision)
    forecast = memory_forecast(architecture, ADAMW, precision, batch=4, seq=96, num_supervised=num_supervised)
    sizes = {part.name: part.bytes or 0 for part in forecast.parts}
    held = sizes["activations"] + sizes.get("cast weights", 0) + num_supervised * 264 * 4
    assert held == pytest.approx(after, rel=0.01)


@pytest.mark.parametrize("overrides", [["adapter=lora"], ["adapter=qlora"], ["adapter=qlora", "model.dtype=bfloat16"]])
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapters_export_is_as_large_as_forecast(
    weights: Path, tmp_path: Path, overrides: list[str], merge: bool
) -> None:
    merging = f"export.merge={'true' if merge else 'false'}"
    config, architecture, model, adapter = planned_and_real(weights, *overrides, merging)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    export(model, adapter, tokenizer, tmp_path / "model", config, "")
    forecast = disk_forecast(architecture, tmp_path, config.optimizer, config.checkpoint, has_metric=False, merge=merge)
    exported = {part.name: part.bytes or 0 for part in forecast.parts[1:]}
    assert list(exported) == (["model", "adapter"] if merge else ["adapter"])
    of_names = pytest.approx(written_to(tmp_path / "model"), rel=0.02)  # names of tensors come on top
    assert sum(exported.values()) == of_names


def test_the_checkpoints_of_an_adapter_run_are_what_is_trained(tmp_path: Path) -> None:
    _, architecture = adapted(qwen3, EXACT, LORA, [])
    forecast = disk_forecast(architecture, tmp_path, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7)
    trained = 4 * architecture.num_trainable
    checkpoints = [
        ("checkpoints", 3 * (3 * trained + SMALL_BYTES)),
        ("best checkpoints", trained + SMALL_BYTES),
    ]
    assert [(part.name, part.bytes) for part in forecast.parts] == [*checkpoints, ("adapter", trained + 7)]
    merged = disk_forecast(architecture, tmp_path, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7, merge=True)
    whole = 4 * (architecture.num_parameters - architecture.num_trainable)
    exported = [("model", whole + 7), ("adapter", trained + 7)]
    assert [(part.name, part.bytes) for part in merged.parts] == [*checkpoints, *exported]


def test_flops_are_six_a_parameter_and_attention() -> None:
    attention = 12 * 2 * 8 * 4 * 100
    assert training_flops(TOY, num_tokens=100, num_supervised=10, seq=4) == 6 * (1192 * 100 + 80 * 10) + attention
    tied = replace(TOY, is_tied=True, held=(Held(1272, 5088, ""),), trained=(Trained((1272,), 4),))
    assert training_flops(tied, num_tokens=100, num_supervised=10, seq=4) == 6 * (1192 * 100 + 80 * 10) + attention
    frozen = replace(TOY, trained=())
    assert training_flops(frozen, num_tokens=100, num_supervised=10, seq=4) == 4 * (1192 * 100 + 80 * 10) + attention
    again = 8 * (1192 * 100 + 80 * 10) + attention * 4 // 3  # the forward twice
    assert training_flops(TOY, 100, 10, 4, gradient_checkpointing=True) == again


def test_time_is_bounded_from_below_or_taken_as_measured() -> None:
    sizes = {"num_tokens": 100, "num_supervised": 10, "seq": 4}
    least = time_forecast(TOY, **sizes, flops_per_second=1e5)
    assert least.seconds == 7.968
    assert least.is_lower_bound
    assert least.how.startswith("at least")
    assert time_forecast(replace(TOY, is_mixture=True), **sizes, flops_per_second=1e5).seconds is None
    measured = measured_time_forecast(0.25, 40)
    assert (measured.seconds, measured.is_lower_bound) == (10, False)


def test_the_speed_of_products_is_measured() -> None:
    assert matmul_flops_per_second(torch.device("cpu"), torch.float32, budget_seconds=0.01) > 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2_829_824, "2.7 MiB"), (2**30 - 1, "1.0 GiB")],
)
def test_sizes_are_written_in_binary_units(count: int, text: str) -> None:
    assert human_bytes(count) == text
