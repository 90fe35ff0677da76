"""The forecast: exact where it is arithmetic, and held against what autograd, the optimizer and the disk really do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
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
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

from src.checkpoint.store import SMALL_BYTES
from src.config.schema import (
    OPTIMIZERS,
    AdafactorConfig,
    AdamWConfig,
    CheckpointConfig,
    LoraBias,
    LoraConfig,
    MixedPrecision,
    OptimizerConfig,
    SGDConfig,
)
from src.forecast.counting import (
    ForwardCount,
    MicroBatchShape,
    TrainingCount,
    UncountableError,
    counted,
    measure_saved_bytes,
)
from src.forecast.disk import disk_forecast, most_saves
from src.forecast.memory import memory_forecast
from src.forecast.parameters import (
    ModelParameters,
    ParameterStorage,
    TrainableTensor,
    optimizer_part,
    parameters_of,
    with_adapter,
)
from src.forecast.time import counted_time, measured_time
from src.inspection.run_forecast import planned_parameters
from src.model.adapters import Adapter, add_adapter
from src.model.build import build_model, empty_model
from src.model.embeddings import resize_embeddings
from src.model.export import export
from src.training.head import PLAIN, ModelWithLoss
from src.training.optim import build_optimizer
from src.util import human_bytes
from tests.conftest import ROOT, admitted

ADAMW = AdamWConfig(type="adamw", lr=1e-3, embedding_lr=None, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8)
ADAMW_8BIT = OPTIMIZERS["adamw_8bit"](**vars(ADAMW) | {"type": "adamw_8bit"})
PAGED = OPTIMIZERS["paged_adamw_32bit"](**vars(ADAMW) | {"type": "paged_adamw_32bit"})
ADAFACTOR = AdafactorConfig(type="adafactor", lr=1e-2, embedding_lr=None, weight_decay=0.0)
SGD = SGDConfig(type="sgd", lr=0.1, embedding_lr=None, weight_decay=0.0, momentum=0.0)
MOMENTUM = SGDConfig(type="sgd", lr=0.1, embedding_lr=None, weight_decay=0.0, momentum=0.9)
LION = OptimizerConfig("lion", lr=0.1, embedding_lr=None, weight_decay=0.0)
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

TOY = ModelParameters((ParameterStorage(1352, 5408, "1,352 parameters x 4 B"),), (TrainableTensor((1352,), 4),), 4)
SHAPE = MicroBatchShape(batch=1, seq=4, num_supervised=3)
STEP = TrainingCount(saved_bytes=70, peak_bytes=100, peak_gradient_bytes=20, flops=1)
CPU = torch.device("cpu")
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


def gemma2() -> PreTrainedConfig:  # caps its attention and its logits
    return Gemma2Config(**SIZES, head_dim=32, **SMALL)


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**SIZES | {"intermediate_size": 64}, num_local_experts=4, **SMALL)


def falcon() -> PreTrainedConfig:
    return FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **SMALL)


def bart() -> PreTrainedConfig:
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartConfig(**sizes, **heads, encoder_layers=2, decoder_layers=2, **SMALL)


def t5() -> PreTrainedConfig:
    return T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL)


def model_of(make: Callable[[], PreTrainedConfig], options: dict[str, Any]) -> Any:
    kind = AutoModelForSeq2SeqLM if make in (bart, t5) else AutoModelForCausalLM
    return kind.from_config(make(), **options)


def on_meta(make: Callable[[], PreTrainedConfig], options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return model_of(make, options)


def test_memory_is_the_sum_of_its_parts() -> None:
    forecast = memory_forecast(TOY, ADAMW, SHAPE, STEP, libraries_bytes=1000)
    assert {part.name: part.bytes for part in forecast.parts} == {
        "libraries and data": 1000,
        "free blocks": 100,
        "parameters": 1352 * 4,
        "optimizer state": 2 * 1352 * 4,
        "activations": 70,
        "backward": 30,
    }
    assert forecast.total.bytes == 1000 + 100 + 5408 + 10816 + 100
    assert "training step" in forecast.total.how


@pytest.mark.parametrize(("peak", "most", "when"), [(99, 100, "a training step"), (101, 101, "generation")])
def test_memory_is_that_of_the_worst_moment(peak: int, most: int, when: str) -> None:
    others = [("evaluation", ForwardCount(90, 1)), ("generation", ForwardCount(peak, 1))]
    forecast = memory_forecast(TOY, ADAMW, SHAPE, STEP, others)
    assert forecast.total.bytes == 5408 + 10816 + most
    assert forecast.total.how.endswith(when)


def test_what_cannot_be_counted_is_unknown() -> None:
    forecast = memory_forecast(TOY, ADAMW, SHAPE, None, uncounted="because")
    assert [part for part in forecast.parts if part.bytes is None] == [
        (name, None, "unknown: because") for name in ("activations", "backward")
    ]
    assert forecast.total.bytes == 5408 + 10816
    assert forecast.total.how.startswith("at least: activations, backward unknown")


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
    parameters = parameters_of(model)
    part = optimizer_part(parameters, config)
    assert {name for name, _ in kept} == names
    assert part.bytes == sum(value.nbytes for _, value in kept)
    assert all(name in part.how for name in names)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert parameters.trained_bytes == weights
    held = {id(tensor): tensor.nbytes for tensor in tree_leaves(optimizer.state_dict()) if isinstance(tensor, Tensor)}
    assert weights + (part.bytes or 0) == pytest.approx(weights + sum(held.values()), rel=0.01)  # counters and tables


def test_what_an_optimizer_keeps_is_told_with_its_numbers() -> None:
    many = replace(TOY, trained=(TrainableTensor((64, 128), 4), TrainableTensor((10, 4), 4), TrainableTensor((64,), 4)))
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
    forecast = memory_forecast(TOY, LION, SHAPE, STEP)
    assert forecast.parts[1].bytes is None
    assert forecast.total.how.startswith("at least: optimizer state unknown")


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


ONLY_QV = replace(LORA, target_modules=["q_proj", "v_proj"])
DROPPED = replace(LORA, lora_dropout=0.1)
DORA = replace(LORA, use_dora=True)


def adapted(model: Any, adapter: LoraConfig | None) -> Any:
    """Return a model with rows for new tokens and, where there is one, an adapter."""
    resize_embeddings(model, 261, 8)
    if adapter is not None:
        add_adapter(model, replace(admitted().config, adapter=adapter), NEW_IDS)
    return model


def scoring(loss_model: ModelWithLoss, shape: MicroBatchShape) -> Callable[[], Tensor]:
    """Return a forward of random ids of a shape."""
    ids = torch.randint(3, 259, (shape.batch, shape.seq))
    inputs = {"input_ids": ids}
    labels = torch.full((shape.batch, shape.target_seq or shape.seq), -100)
    for i in range(shape.num_supervised):  # from the right, so that the first position is never one
        labels[i % shape.batch, -1 - i // shape.batch] = 5
    if shape.target_seq is not None:
        inputs["target_ids"] = labels.clamp(min=3)
    if shape.has_padding:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -3:] = 0
    if shape.is_packed:
        inputs["position_ids"] = (torch.arange(shape.seq) % 32).expand(shape.batch, shape.seq)
    return lambda: loss_model(labels=labels, **inputs).objective


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
    """Return the bytes that a forward leaves behind, and the most that it and its backward hold.

    Gradients are there before, and not counted.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Living([*model.parameters(), *model.buffers(), *gradients]) as living:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is MixedPrecision.bf16):
            loss = score()
        after = living.bytes
        loss.backward()
    return after, living.peak


CAUSAL = MicroBatchShape(4, 64, num_supervised=100)
PADDED_PAIRS = MicroBatchShape(4, 64, num_supervised=100, target_seq=48, has_padding=True)
PACKED = MicroBatchShape(2, 192, num_supervised=150, is_packed=True)


NO, BF16 = MixedPrecision.no, MixedPrecision.bf16


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it itself where it must be
@pytest.mark.parametrize(
    ("make", "options", "adapter", "shape", "precision"),
    [
        (tiny_llama, EXACT, None, CAUSAL, NO),
        (tiny_llama, EXACT, None, CAUSAL, BF16),
        (tiny_llama, HALF, None, CAUSAL, NO),
        (tiny_llama, EXACT | EAGER, None, CAUSAL, BF16),
        (tiny_llama, EXACT, LORA, CAUSAL, BF16),
        (tiny_llama, HALF, ONLY_QV, CAUSAL, NO),
        (tiny_llama, HALF, ONLY_QV, CAUSAL, BF16),
        (tiny_llama, EXACT, DROPPED, CAUSAL, NO),
        (tiny_llama, EXACT, DORA, CAUSAL, BF16),
        (qwen3, EXACT, None, CAUSAL, BF16),
        (qwen3, EXACT, None, PACKED, NO),
        (qwen3, EXACT, LORA, PACKED, BF16),
        (gpt2, EXACT, None, CAUSAL, NO),
        (gpt2, EXACT | EAGER, LORA, CAUSAL, BF16),
        (gemma2, EXACT, None, CAUSAL, NO),
        (gemma2, EXACT, None, CAUSAL, BF16),
        (gemma3, EXACT, None, CAUSAL, NO),
        (phi3, EXACT, LORA, CAUSAL, NO),
        (neox, EXACT, None, CAUSAL, BF16),
        (falcon, EXACT, None, CAUSAL, NO),
        (mixtral, EXACT, None, CAUSAL, NO),
        (mixtral, EXACT, None, CAUSAL, BF16),
        (t5, EXACT, None, PADDED_PAIRS, NO),
        (t5, EXACT, None, PADDED_PAIRS, BF16),
    ],
)
def test_a_step_holds_what_was_counted(
    make: Callable[[], PreTrainedConfig],
    options: dict[str, Any],
    adapter: LoraConfig | None,
    shape: MicroBatchShape,
    precision: MixedPrecision,
) -> None:
    model = adapted(model_of(make, options), adapter)
    loss_model = ModelWithLoss(model)
    loss_model.probe_head()
    forward = scoring(loss_model.train(), shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is MixedPrecision.bf16):
        saved = measure_saved_bytes(forward, [*loss_model.parameters(), *loss_model.buffers()])
    after, peak = held_after(forward, loss_model, precision)
    found = counted_step(adapted(on_meta(make, options), adapter), shape, precision)
    assert found.saved_bytes == pytest.approx(saved, rel=0.01)
    assert found.saved_bytes == pytest.approx(after, rel=0.002)
    assert found.peak_bytes - found.peak_gradient_bytes == pytest.approx(peak, rel=0.01)


def counted_step(
    model: Any, shape: MicroBatchShape, precision: MixedPrecision, num_micro_batches: int = 2
) -> TrainingCount:
    with counted(model, PLAIN, CPU, autocast_of(precision)) as counter:
        return counter.count_training(shape, num_micro_batches)


def autocast_of(precision: MixedPrecision) -> torch.dtype | None:
    return torch.bfloat16 if precision is MixedPrecision.bf16 else None


def test_a_bias_of_zeros_is_counted_as_a_bias() -> None:
    """It is none in the model that is trained, but on the meta device it has no values."""
    loss_model = ModelWithLoss(model_of(bart, EXACT))
    loss_model.probe_head()
    assert loss_model.form is not None
    assert loss_model.form.is_identity
    saved = measure_saved_bytes(
        scoring(loss_model.train(), PADDED_PAIRS), [*loss_model.parameters(), *loss_model.buffers()]
    )
    found = counted_step(on_meta(bart, EXACT), PADDED_PAIRS, MixedPrecision.no)
    assert saved < found.saved_bytes < 1.02 * saved


@pytest.mark.parametrize(
    ("make", "adapter", "precision"),
    [
        (tiny_llama, None, NO),
        (tiny_llama, LORA, BF16),
        (gpt2, LORA, NO),
        (gpt2, None, BF16),
        (gemma2, None, NO),
        (gemma2, LORA, BF16),
        (bart, None, BF16),
        (bart, LORA, NO),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_checkpointing_is_counted_with_the_block_that_is_computed_again(
    make: Callable[[], PreTrainedConfig], adapter: LoraConfig | None, precision: MixedPrecision
) -> None:
    shape = PADDED_PAIRS if make is bart else MicroBatchShape(4, 192, num_supervised=300)
    model, empty = adapted(model_of(make, EXACT), adapter), adapted(on_meta(make, EXACT), adapter)
    for one in (model, empty):
        one.activation_checkpointing_enable({"use_reentrant": False})
    loss_model = ModelWithLoss(model)
    loss_model.probe_head()
    after, peak = held_after(scoring(loss_model.train(), shape), loss_model, precision)
    found = counted_step(empty, shape, precision)
    assert found.saved_bytes == pytest.approx(after, rel=0.05 if make is bart else 0.02)
    assert found.peak_bytes - found.peak_gradient_bytes == pytest.approx(peak, rel=0.03 if make is bart else 0.02)


def test_gradients_are_there_from_the_second_micro_batch_on() -> None:
    first, second = on_meta(tiny_llama, EXACT), on_meta(tiny_llama, EXACT)
    trained = sum(p.nbytes for p in first.parameters())
    assert counted_step(first, CAUSAL, MixedPrecision.no, 1).peak_gradient_bytes < trained
    assert counted_step(second, CAUSAL, MixedPrecision.no, 2).peak_gradient_bytes == trained


def test_a_model_that_looks_at_values_is_unknown() -> None:
    config = mixtral()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # loops over those hit
    with pytest.raises(UncountableError, match="MixtralForCausalLM can't be computed without values"):
        counted_step(model, CAUSAL, MixedPrecision.no)


def test_operations_are_six_a_parameter_and_attention() -> None:
    """Kaplan et al. 2020, arXiv 2001.08361, section 2.1: forward 2 a parameter and token, backward twice that."""
    model = on_meta(tiny_llama, EXACT)
    config = model.config
    head = config.vocab_size * config.hidden_size
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    tokens, seq = CAUSAL.num_tokens, CAUSAL.seq
    products = 6 * (blocks * tokens + head * CAUSAL.num_supervised)
    attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * seq * tokens  # forward; backward 2.5 times
    with counted(model, PLAIN, CPU) as counter:
        assert counter.count_evaluation(CAUSAL).flops == products // 3 + attention
        assert counter.count_training(CAUSAL).flops == products + round(3.5 * attention)


@pytest.mark.parametrize("make", [tiny_llama, gpt2, gemma2, t5])
def test_generation_holds_what_was_counted(make: Callable[[], PreTrainedConfig]) -> None:
    model = model_of(make, EXACT).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 259, (4, 32))
    real = torch.ones_like(ids)
    real[0, -3 if make is t5 else 0] = 0
    with Living([*model.parameters(), *model.buffers()]) as living, torch.no_grad():
        model.generate(ids, attention_mask=real, max_new_tokens=16, do_sample=False, pad_token_id=0)
    with counted(on_meta(make, EXACT), PLAIN, CPU) as counter:
        assert counter.count_generation(4, 32, 16).peak_bytes == pytest.approx(living.peak, rel=0.05)


@pytest.mark.parametrize("make", [tiny_llama, gemma2, t5])
def test_evaluation_holds_what_was_counted(make: Callable[[], PreTrainedConfig]) -> None:
    shape = PADDED_PAIRS if make is t5 else CAUSAL
    loss_model = ModelWithLoss(model_of(make, EXACT))
    loss_model.probe_head()
    forward = scoring(loss_model.eval(), shape)
    with Living([*loss_model.parameters(), *loss_model.buffers()]) as living, torch.no_grad():
        forward()
    with counted(on_meta(make, EXACT), PLAIN, CPU) as counter:
        assert counter.count_evaluation(shape).peak_bytes == pytest.approx(living.peak, rel=0.01)


def test_disk_holds_checkpoints_and_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    forecast = disk_forecast(TOY.in_bf16(), folder, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7)
    resumable, bare = 3 * 2704 + SMALL_BYTES, 2704 + SMALL_BYTES
    assert forecast.parts == (
        ("checkpoints", 3 * resumable, "2 resumable of 105.6 KiB, and one more while it is written"),
        ("best checkpoints", bare, "1 with weights only, of 100.3 KiB"),
        ("model", 2711, "1,352 parameters x 2 B + 7 B of tokenizer"),
    )
    assert forecast.place == tmp_path
    assert forecast.total.bytes == 3 * resumable + bare + 2711
    assert forecast.fits
    assert not replace(forecast, free_bytes=forecast.total.bytes - 1).fits
    assert disk_forecast(TOY, folder, LION, CHECKPOINT, has_metric=False).total.how.startswith(
        "at least: checkpoints unknown"
    )


RESUMABLE, BARE = 3 * 5408 + SMALL_BYTES, 5408 + SMALL_BYTES  # of TOY's weights, with and without AdamW's state


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
    tmp_path: Path, changed: dict[str, Any], num_saves: int | None, has_metric: bool, num_resumable: int, num_bare: int
) -> None:
    checkpoint = replace(CHECKPOINT, **changed)
    forecast = disk_forecast(TOY, tmp_path, ADAMW, checkpoint, has_metric=has_metric, num_saves=num_saves)
    assert forecast.total.bytes == num_resumable * RESUMABLE + num_bare * BARE + 5408


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
    part = disk_forecast(TOY.in_bf16(), tmp_path, ADAMW, checkpoint, has_metric=False, num_saves=num_saves).parts[0]
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
    forecast = disk_forecast(parameters_of(model), tmp_path, ADAMW, CHECKPOINT, has_metric=False)
    assert forecast.parts[1].name == "model"
    assert forecast.parts[1].bytes == pytest.approx(written_to(tmp_path / "model"), rel=0.01)


def written_to(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_an_adapter_is_read_with_its_rows_once_where_matrices_are_tied() -> None:
    model = adapted(on_meta(qwen3, EXACT), None)
    bare = parameters_of(model)
    parameters = with_adapter(bare, adapted(model, LORA))
    assert with_adapter(parameters_of(model), model) == parameters  # of a model that has its adapter already
    # q 128 -> 256, k and v 128 -> 128, o 256 -> 128, gate and up 128 -> 384, down 384 -> 128, in two blocks
    matrices = 2 * 8 * ((128 + 256) * 2 + (128 + 128) * 2 + (128 + 384) * 3)
    assert parameters.num_trained == parameters.num_of_adapter == matrices + 2 * 128
    of_adapter = ParameterStorage(matrices + 256, 4 * (matrices + 256), "45,312 of the adapter x 4 B")
    assert parameters.stored == (*bare.stored, of_adapter)


def test_a_sharded_model_is_read_as_the_whole_one() -> None:
    """DeepSpeed leaves a part of each parameter in place, and notes the shape of the whole."""
    model = on_meta(qwen3, EXACT)
    parameters = parameters_of(model)
    for parameter in model.parameters():
        vars(parameter)["ds_shape"], parameter.data = parameter.shape, torch.empty(0, device="meta")
    assert parameters_of(model) == parameters


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "assets/tiny_llama")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets/tiny_llama").save_pretrained(folder)
    return folder


def planned_and_real(weights: Path, *overrides: str) -> tuple[Any, ModelParameters, Any, Any, Adapter]:
    """Return the configuration, what is read without weights, that model, and model and adapter as a run makes them."""
    config = admitted("model=causal_lm", f"model.checkpoint={weights}", *overrides).config
    empty, model = empty_model(config.model), build_model(config, torch.device("cpu"))
    for one in (empty, model):
        resize_embeddings(one, 261, 8)
    parameters = planned_parameters(config, empty, NEW_IDS)
    adapter = add_adapter(model, config, NEW_IDS)
    assert adapter is not None
    return config, parameters, empty, model, adapter


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
        ["adapter=tokens_only"],
        ["adapter=lora", "model.dtype=bfloat16", "optimizer=paged_adamw_32bit"],
        ["adapter=dora", "adapter.init_lora_weights=pissa", "optimizer=adafactor"],
        ["adapter=lora", "quantization=int8", "adapter.r=64", "optimizer=adamw_8bit"],
        ["adapter=qlora", "model.dtype=bfloat16"],
        ["adapter=qlora", "quantization.bnb_4bit_use_double_quant=false", "adapter.target_modules=[q_proj]"],
    ],
    ids=" ".join,
)
def test_what_an_adapter_run_holds_is_forecast_to_the_byte(weights: Path, overrides: list[str]) -> None:
    config, parameters, _, model, _ = planned_and_real(weights, *overrides)
    forecast = memory_forecast(parameters, config.optimizer, SHAPE, STEP)
    sizes = {part.name: part.bytes for part in forecast.parts}
    assert sizes["parameters"] == real_bytes(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optimizer, trained)
    scoring(ModelWithLoss(model).train(), CAUSAL)().backward()
    assert parameters.trained_bytes == sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    uncounted = ("step", "qmap1", "qmap2")
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name not in uncounted]
    assert sizes["optimizer state"] == sum(value.nbytes for value in kept)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", NO), ("float32", BF16), ("bfloat16", BF16)])
@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=qlora"],
        ["adapter=lora", "quantization=int8"],
        ["adapter=lora", "quantization=int8", "adapter.lora_dropout=0.1"],
    ],
    ids=" ".join,
)
def test_activations_on_quantised_weights_are_what_a_forward_leaves(
    weights: Path, overrides: list[str], dtype: str, precision: MixedPrecision
) -> None:
    words = [*overrides, f"model.dtype={dtype}", f"training.mixed_precision={precision.value}"]
    _, _, empty, model, _ = planned_and_real(weights, *words)
    loss_model = ModelWithLoss(model).train()
    after, peak = held_after(scoring(loss_model, CAUSAL), loss_model, precision)
    found = counted_step(empty, CAUSAL, precision)
    assert found.saved_bytes == pytest.approx(after, rel=0.05)
    assert found.peak_bytes - found.peak_gradient_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("overrides", [["adapter=lora"], ["adapter=qlora"], ["adapter=qlora", "model.dtype=bfloat16"]])
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapters_export_is_as_large_as_forecast(
    weights: Path, tmp_path: Path, overrides: list[str], merge: bool
) -> None:
    merging = f"export.merge={'true' if merge else 'false'}"
    config, parameters, _, model, adapter = planned_and_real(weights, *overrides, merging)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    export(model, adapter, tokenizer, tmp_path / "model", config, "")
    forecast = disk_forecast(parameters, tmp_path, config.optimizer, config.checkpoint, has_metric=False, merge=merge)
    exported = {part.name: part.bytes or 0 for part in forecast.parts[1:]}
    assert list(exported) == (["model", "adapter"] if merge else ["adapter"])
    of_names = pytest.approx(written_to(tmp_path / "model"), rel=0.02)  # names of tensors come on top
    assert sum(exported.values()) == of_names


def test_the_checkpoints_of_an_adapter_run_are_what_is_trained(tmp_path: Path) -> None:
    model = on_meta(qwen3, EXACT)
    parameters = with_adapter(parameters_of(model), adapted(model, LORA))
    forecast = disk_forecast(parameters, tmp_path, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7)
    trained = 4 * parameters.num_trained
    checkpoints = [("checkpoints", 3 * (3 * trained + SMALL_BYTES)), ("best checkpoints", trained + SMALL_BYTES)]
    assert [(part.name, part.bytes) for part in forecast.parts] == [*checkpoints, ("adapter", trained + 7)]
    merged = disk_forecast(parameters, tmp_path, ADAMW, CHECKPOINT, has_metric=True, tokenizer_bytes=7, merge=True)
    whole = 4 * (parameters.num - parameters.num_trained)
    exported = [("model", whole + 7), ("adapter", trained + 7)]
    assert [(part.name, part.bytes) for part in merged.parts] == [*checkpoints, *exported]


def test_time_is_bounded_from_below_or_taken_as_measured() -> None:
    least = counted_time("training", 800, flops_per_second=100)
    assert (least.seconds, least.is_lower_bound) == (8, True)
    measured = measured_time("training", 0.25, 40, "micro-batches")
    assert (measured.seconds, measured.is_lower_bound) == (10, False)
    unknown = counted_time("evaluation", None, 100, "because")
    assert (unknown.seconds, unknown.how) == (None, "unknown: because")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2_829_824, "2.7 MiB"), (2**30 - 1, "1.0 GiB")]
)
def test_sizes_are_written_in_binary_units(count: int, text: str) -> None:
    assert human_bytes(count) == text
