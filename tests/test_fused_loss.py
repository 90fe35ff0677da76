"""Matrix and cross-entropy in one: the losses and gradients of a plain reference, for every head, cut and precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from src.config.schema import LossConfig, Reduction
from src.data.encoding import IGNORE_INDEX
from src.forecast.live_tensors import LiveTensors
from src.training.fused_loss import LinearHead, chunk_size, fused_losses
from src.training.head import ModelWithLoss
from src.training.head_form import HeadForm, is_fused, measure_form
from src.training.loss import Supervised, compute_losses
from tests.test_loss import bart, batch, cut_into_chunks, hook_into, reference, t5, tiny

HEADS = list(itertools.product([False, True], [None, 2.0], [0.0, 0.1], [False, True]))  # bias, cap, smoothing, weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def case(
    has_bias: bool, has_weights: bool, dtype: torch.dtype, sizes: tuple[int, int, int] = (11, 37, 5)
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return states, weight, bias, targets and weights."""
    num, vocabulary, width = sizes
    states, weight = torch.randn(num, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if has_bias else None
    weights = torch.rand(num) if has_weights else None
    return states.requires_grad_(), weight.requires_grad_(), bias, torch.randint(vocabulary, (num,)), weights


def plain(
    states: Tensor, head: LinearHead, targets: Tensor, weights: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    logits = functional.linear(states, head.weight, head.bias)
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    losses = functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
    nll = functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses if weights is None else losses * weights).sum(), nll


@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize(("has_bias", "cap", "smoothing", "has_weights"), HEADS)
def test_losses_and_gradients_are_the_references(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool, cap: float | None, smoothing: float, has_weights: bool, rows: int
) -> None:
    cut_into_chunks(monkeypatch, rows, num_vocabulary=37)
    states, weight, bias, targets, weights = case(has_bias, has_weights, torch.float32)
    inputs = [one for one in (states, weight, bias) if one is not None]
    found, nll = fused_losses(states, LinearHead(weight, bias, cap), targets, weights, smoothing)
    expected, expected_nll = plain(states, LinearHead(weight, bias, cap), targets, weights, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-5, atol=1e-6)
    assert not nll.requires_grad
    pairs = zip(torch.autograd.grad(found / 3, inputs), torch.autograd.grad(expected / 3, inputs), strict=True)
    for gradient, of_reference in pairs:
        assert (gradient - of_reference).norm() <= 1e-5 * of_reference.norm()


@pytest.mark.parametrize(("has_bias", "cap", "smoothing", "has_weights"), HEADS)
def test_gradients_are_the_slopes(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool, cap: float | None, smoothing: float, has_weights: bool
) -> None:
    cut_into_chunks(monkeypatch, rows=2, num_vocabulary=7)
    states, weight, bias, targets, weights = case(has_bias, has_weights, torch.float64, (5, 7, 3))

    inputs = [one for one in (states, weight, bias) if one is not None]

    def of(*inputs: Tensor) -> Tensor:
        return fused_losses(inputs[0], LinearHead(inputs[1], *inputs[2:], cap=cap), targets, weights, smoothing)[0]

    gradients = torch.autograd.grad(of(*inputs), inputs)
    for place, (one, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        for step in 1e-6 * torch.eye(one.numel(), dtype=one.dtype).reshape(-1, *one.shape):
            above, below = (of(*inputs[:place], one + sign * step, *inputs[place + 1 :]).item() for sign in (1, -1))
            assert (above - below) / 2e-6 == pytest.approx((gradient * step).sum().item() / 1e-6, abs=1e-8)


def test_what_is_frozen_or_not_asked_for_has_no_gradient() -> None:
    states, weight, bias, targets, _ = case(True, False, torch.float32)
    assert bias is not None
    expected = torch.autograd.grad(plain(states, LinearHead(weight, bias), targets, None, 0.0)[0], (states, weight))
    head = LinearHead(weight.detach(), bias.detach())
    torch.testing.assert_close(torch.autograd.grad(fused_losses(states, head, targets)[0], states)[0], expected[0])
    head = LinearHead(weight, bias.detach())
    found = torch.autograd.grad(fused_losses(states.detach(), head, targets)[0], weight)[0]
    torch.testing.assert_close(found, expected[1])
    with torch.no_grad():
        assert not fused_losses(states, head, targets)[0].requires_grad


def test_it_is_not_differentiated_twice() -> None:
    states, weight, _, targets, _ = case(False, False, torch.float32)
    objective, _ = fused_losses(states, LinearHead(weight), targets)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(objective, states, create_graph=True)


def test_its_gradients_are_taken_once() -> None:
    states, weight, _, targets, _ = case(False, False, torch.float32)
    objective, _ = fused_losses(states, LinearHead(weight), targets)
    torch.autograd.grad(objective / 3, (states, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(objective / 3, (states, weight))


def test_an_impossible_target_costs_what_its_logit_says() -> None:
    logits = torch.tensor([[0.0, -500.0, 1.0]])
    _, nll = fused_losses(torch.eye(1), LinearHead(logits.t()), torch.tensor([1]))
    assert nll.item() == pytest.approx(501.3132617)


def test_the_same_numbers_come_again() -> None:
    states, weight, _, targets, weights = case(False, True, torch.float32, (600, 300, 16))
    runs = [fused_losses(states, LinearHead(weight), targets, weights) for _ in range(2)]
    gradients = [torch.autograd.grad(objective, (states, weight)) for objective, _ in runs]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the weights
def test_bfloat16_is_as_exact_as_the_called_head(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    cut_into_chunks(monkeypatch, rows=64, num_vocabulary=50)
    head = nn.Linear(32, 50)
    states, targets = torch.randn(256, 32), torch.randint(50, (256,))
    given = {"targets": targets, "row_weights": torch.rand(256)}
    config = LossConfig(Reduction.sum, 1.0, 0.1)

    def gradients(autocast: bool, fused: bool, dtype: torch.dtype) -> list[Tensor]:
        one = nn.Linear(32, 50).to(dtype)
        one.load_state_dict(head.state_dict())
        fed = states.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            used: Any = LinearHead(one.weight, one.bias) if fused else one
            losses = compute_losses(Supervised(fed, **given), used, 50, config)
        found = torch.autograd.grad(losses.objective, (fed, one.weight, one.bias))
        assert [gradient.dtype for gradient in found] == [dtype] * 3
        return [losses.nll, *(gradient.float() for gradient in found)]

    exact = gradients(False, False, torch.float32)
    called, found = (gradients(dtype is torch.float32, fused, dtype) for fused in (False, True))
    torch.testing.assert_close(found[0], called[0])
    for one, other, expected in zip(found[1:], called[1:], exact[1:], strict=True):
        assert (one - expected).norm() < 1.05 * (other - expected).norm()


@pytest.mark.parametrize(
    ("num", "vocabulary", "device", "size"),
    [
        (0, 264, "cpu", 1), (1000, 264, "cpu", 1000), (1000, 32768, "cpu", 250), (300, 32768, "cpu", 300),
        (600, 131072, "cpu", 300), (10000, 131072, "cuda", 1000),
    ],
)  # fmt: skip
def test_chunks_are_even(num: int, vocabulary: int, device: str, size: int) -> None:
    assert chunk_size(num, vocabulary, torch.device(device)) == size


def test_only_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_chunks(monkeypatch, rows=64, num_vocabulary=1024)
    states, weight, _, targets, _ = case(False, False, torch.float32, (1024, 1024, 8))
    with LiveTensors([states, weight, targets]) as live:
        fused_losses(states, LinearHead(weight), targets)[0].backward()
    logits, gradients = 64 * 1024 * 4, states.nbytes + weight.nbytes
    assert live.peak < logits + 2 * gradients + 10 * targets.nbytes < targets.numel() * 1024 * 4 / 4


def test_what_is_not_a_plain_matrix_is_called() -> None:
    def head_of(model: Any) -> Any:
        return model.get_output_embeddings()

    model = tiny(tie_word_embeddings=False)
    assert is_fused(head_of(model))
    with torch.autocast("cpu", torch.float16):
        assert not is_fused(head_of(model))
    head_of(model).weight.ds_id = 0  # as DeepSpeed marks a sharded one
    assert not is_fused(head_of(model))
    del head_of(model).weight.ds_id
    hook_into(head_of(model))
    assert not is_fused(head_of(model))
    for target_modules, new_rows in ((["lm_head"], None), (["q_proj"], {"lm_head": [3]})):
        settings = LoraConfig(target_modules=target_modules, trainable_token_indices=new_rows)
        assert not is_fused(head_of(get_peft_model(tiny(tie_word_embeddings=False), settings)))


def in_8_bits(folder: Path, **settings: Any) -> Any:
    """Return the tiny model with its matrices in 8 bits, but those that settings leave out, and by default its head."""
    tiny(tie_word_embeddings=False).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_8bit=True, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


def test_a_head_in_8_bits_is_called(tmp_path: Path) -> None:
    model = in_8_bits(tmp_path, llm_int8_skip_modules=["model"])
    assert model.lm_head.weight.dtype == torch.int8
    loss_model, (input_ids, labels) = ModelWithLoss(model), batch()
    loss_model.probe_head()
    assert not is_fused(model.get_output_embeddings())
    objective = loss_model(input_ids, labels).objective
    torch.testing.assert_close(objective, reference(model, input_ids, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("body", ["float32", "int8"])
def test_called_and_fused_heads_agree_where_only_an_adapter_is_trained(tmp_path: Path, body: str) -> None:
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny() if body == "float32" else in_8_bits(tmp_path), settings).base_model.model
    loss_model, (input_ids, labels) = ModelWithLoss(model), batch()
    loss_model.probe_head()
    assert is_fused(model.get_output_embeddings())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = torch.autograd.grad(loss_model(input_ids, labels).objective, trained)
    hook_into(model.get_output_embeddings())
    called = torch.autograd.grad(loss_model(input_ids, labels).objective, trained)
    torch.testing.assert_close(fused, called, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_losses_of_the_full_logits() -> None:
    """60 steps of the default model, at each of them to 1e-4."""
    batches = [batch(rows=4) for _ in range(6)] * 10
    curves = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        model = tiny().train()
        loss_model = ModelWithLoss(model)
        loss_model.probe_head()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for input_ids, labels in batches:
            num = (labels[:, 1:] != IGNORE_INDEX).sum()
            loss = (loss_model(input_ids, labels).objective if is_ours else reference(model, input_ids, labels)) / num
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0] - 1


class Changed(nn.Module):
    """A model that does something to its logits."""

    def __init__(self, change: Callable[[Tensor], Tensor], scale: nn.Parameter | None = None) -> None:
        super().__init__()
        self.inner, self.change, self.scale = tiny(), change, scale
        self.config, self.base_model = self.inner.config, self.inner.base_model

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Tensor) -> Any:
        result = self.inner(**inputs)
        result.logits = self.change(result.logits if self.scale is None else result.logits * self.scale)
        return result


def form_of(model: Any) -> HeadForm | None:
    return measure_form(model, {"input_ids": torch.arange(12)[None], "use_cache": False})[0]


def test_the_form_of_a_head_is_measured() -> None:
    assert form_of(Changed(lambda logits: logits)) == HeadForm()
    assert form_of(Changed(lambda logits: logits / 6)) == HeadForm(after=pytest.approx(1 / 6))
    capped = form_of(Changed(lambda logits: 30 * torch.tanh(logits * 0.5 / 30)))
    assert capped == HeadForm(after=0.5, cap=30.0)
    bias = torch.randn(tiny().config.vocab_size)
    shifted = form_of(Changed(lambda logits: logits + bias))
    assert shifted is not None
    assert torch.equal(shifted.linear(nn.Linear(1, 1, bias=False)).bias, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        Changed(functional.softsign),
        Changed(lambda logits: logits.clamp(max=1e4)),
        Changed(lambda logits: logits + logits.mean(-1, keepdim=True)),
        Changed(lambda logits: logits * 0 + 1),
        Changed(lambda logits: logits[..., :-1]),
        Changed(lambda logits: logits, nn.Parameter(torch.ones(()))),  # its scale is trained
    ],
)
def test_what_is_more_than_a_form_is_computed_by_the_model(model: Changed) -> None:
    assert form_of(model) is None


@pytest.mark.parametrize("make", [t5, bart])
def test_padded_inputs_of_pairs_are_masked_by_the_shortcut_too(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    loss_model = ModelWithLoss(model)
    loss_model.probe_head()
    ids, targets = torch.randint(3, 64, (2, 9)), torch.randint(3, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = loss_model(ids, targets, target_ids=targets, attention_mask=mask)
    assert not loss_model.uses_full_logits
    loss_model.form = None
    expected = loss_model(ids, targets, target_ids=targets, attention_mask=mask)
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5, atol=1e-6)
