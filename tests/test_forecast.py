"""The forecast: exact where it is arithmetic, and held against what autograd, the optimizer and the disk really do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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

from src.config.schema import AdamWConfig, MixedPrecision, SGDConfig
from src.forecast import (
    LLAMA_TOLERANCE,
    OTHER_TOLERANCE,
    Architecture,
    Block,
    Norm,
    activation_part,
    architecture_of,
    disk_forecast,
    human_bytes,
    logits_part,
    matmul_flops_per_second,
    measure_saved_bytes,
    measured_time_forecast,
    memory_forecast,
    optimizer_part,
    time_forecast,
    training_flops,
)
from src.model.export import export
from src.training.head import ScoredModel
from src.training.loss import MAX_LOGITS
from src.training.optim import build_optimizer

ADAMW = AdamWConfig(type="adamw", lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
SGD = SGDConfig(type="sgd", lr=0.1, weight_decay=0.0, momentum=0.0)
MOMENTUM = SGDConfig(type="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)

TOY = Architecture(  # Llama's shape: 10 x 8 embedding, 2 blocks of 592, a norm of 8, 10 x 8 head
    num_parameters=1352,
    num_trainable=1352,
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
        is_ffn_fused=False,
        is_qkv_fused=False,
        norm=Norm.rms,
        num_norms=2,
        has_qk_norm=False,
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
    return replace(architecture, bytes_per_parameter=2)


def test_only_eager_attention_grows_with_the_square_of_the_length() -> None:
    def second_difference(architecture: Architecture) -> int:
        sizes = [activation_part(architecture, MixedPrecision.no, 1, seq, 0).bytes or 0 for seq in (8, 16, 24)]
        return sizes[2] - 2 * sizes[1] + sizes[0]

    assert second_difference(TOY) == 0
    assert second_difference(replace(TOY, attention="eager")) == 2 * 8**2 * (2 * 2 * 4)  # 2·8² · layers · heads · 4 B


@pytest.mark.parametrize(
    ("config", "names", "how"),
    [
        (ADAMW, ["exp_avg", "exp_avg_sq"], "2 x 706,176 trained parameters x 4 B: exp_avg, exp_avg_sq"),
        (MOMENTUM, ["momentum_buffer"], "1 x 706,176 trained parameters x 4 B: momentum_buffer"),
        (SGD, [], "sgd keeps nothing with these settings"),
    ],
)
def test_the_optimizer_keeps_what_is_forecast(config: Any, names: list[str], how: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama())
    optimizer = build_optimizer(config, model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {
        name: sum(state[name].nbytes for state in optimizer.state.values())
        for name in {name for state in optimizer.state.values() for name, value in state.items() if value is not None}
        if name != "step"
    }
    part = optimizer_part(architecture_of(model, model.config), config)
    assert sorted(kept) == names
    assert part.bytes == sum(kept.values())
    assert part.how == how


def test_an_optimizer_that_is_not_known_is_said_to_be_unknown() -> None:
    forecast = memory_forecast(TOY, replace(SGD, type="lion"), MixedPrecision.no, batch=1, seq=4)
    assert forecast.parts[2].bytes is None
    assert forecast.total.how.startswith("at least: optimizer state unknown")


def test_few_trained_parameters_need_few_gradients() -> None:
    forecast = memory_forecast(replace(TOY, num_trainable=10), ADAMW, MixedPrecision.no, batch=1, seq=4)
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
            saved -= 2 * (architecture.num_multiplied + architecture.num_head_parameters)
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
    assert read.block == Block(384, True, 4, False, False, Norm.rms, 2, True)
    assert on_meta(gpt2()).block == Block(512, False, 5, False, True, Norm.layer, 2, False)


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


def test_disk_holds_the_model_and_the_best_weights(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    forecast = disk_forecast(half(TOY), folder, load_best_model_at_end=True, tokenizer_bytes=7)
    assert [(part.name, part.bytes) for part in forecast.parts] == [("model", 2711), ("best weights", 2704)]
    assert forecast.place == tmp_path
    assert forecast.total.bytes == 5415
    assert forecast.fits
    assert not replace(forecast, free_bytes=5414).fits
    assert disk_forecast(half(TOY), folder, load_best_model_at_end=False).total.bytes == 2704


@pytest.mark.parametrize("make", [tiny_llama, qwen3])
def test_an_export_is_as_large_as_forecast(make: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(make())
    export(model, AutoTokenizer.from_pretrained("assets/tiny_llama"), tmp_path / "model")
    written = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    forecast = disk_forecast(architecture_of(model, model.config), tmp_path, load_best_model_at_end=False)
    assert forecast.total.bytes == pytest.approx(written, rel=0.01)


def test_flops_are_six_a_parameter_and_attention() -> None:
    attention = 12 * 2 * 8 * 4 * 100
    assert training_flops(TOY, num_tokens=100, num_supervised=10, seq=4) == 6 * (1192 * 100 + 80 * 10) + attention
    tied = replace(TOY, is_tied=True, num_parameters=1272, num_trainable=1272)
    assert training_flops(tied, num_tokens=100, num_supervised=10, seq=4) == 6 * (1192 * 100 + 80 * 10) + attention
    frozen = replace(TOY, num_trainable=0)
    assert training_flops(frozen, num_tokens=100, num_supervised=10, seq=4) == 4 * (1192 * 100 + 80 * 10) + attention


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
