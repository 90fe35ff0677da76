"""The loss is the loss: it equals a plain full-logits reference, however it is computed and however it is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import src.training.loss as loss_module
from src.config.schema import Reduction
from src.data.encoding import IGNORE_INDEX
from src.training.head import ScoredModel
from src.training.loss import step_objective, supervised_positions, token_nll


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(**changes: object) -> nn.Module:
    config = AutoConfig.from_pretrained("assets/tiny_llama", **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(rows: int = 3, length: int = 12, vocabulary: int = 259) -> tuple[Tensor, Tensor]:
    input_ids = torch.randint(3, vocabulary, (rows, length))
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : 3 + row] = IGNORE_INDEX
        labels[row, length - row :] = IGNORE_INDEX
    return input_ids, labels


def reference(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy as everybody writes it: all logits, shifted by one, summed."""
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_logits", [2**25, 259 * 4])
def test_loss_and_gradients_equal_a_full_logits_reference(
    monkeypatch: pytest.MonkeyPatch, tied: bool, max_logits: int
) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", max_logits)  # the second: eight chunks of four positions
    model = tiny(tie_word_embeddings=tied)
    input_ids, labels = batch()
    expected = reference(model, input_ids, labels)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = ScoredModel(model)(input_ids, labels)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_the_mean_is_the_reference_mean_to_a_millionth() -> None:
    model = tiny()
    input_ids, labels = batch()
    supervised = (labels[:, 1:] != IGNORE_INDEX).sum().item()
    expected = model(input_ids=input_ids, labels=labels).loss
    found = step_objective(ScoredModel(model)(input_ids, labels), supervised, Reduction.mean)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_right_padding_without_a_mask_changes_nothing() -> None:
    scored = ScoredModel(tiny())
    input_ids, labels = batch(rows=1)
    padded = (functional.pad(input_ids, (0, 7)), functional.pad(labels, (0, 7), value=IGNORE_INDEX))
    assert scored(*padded).item() == pytest.approx(scored(input_ids, labels).item(), rel=1e-6)


def test_nothing_supervised_is_zero_and_still_has_gradients() -> None:
    scored = ScoredModel(tiny())
    input_ids, labels = batch()
    nll = scored(input_ids, torch.full_like(labels, IGNORE_INDEX))
    nll.backward()
    assert nll.item() == 0
    gradients = [parameter.grad for parameter in scored.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_states_predict_the_next_label() -> None:
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX]])
    states, targets = supervised_positions(hidden, labels)
    assert states.flatten().tolist() == [1.0, 2.0]
    assert targets.tolist() == [7, 8]


def test_the_loss_of_even_odds_is_the_logarithm_of_the_vocabulary() -> None:
    nll = token_nll(torch.zeros(6, 2), torch.arange(6), nn.Linear(2, 32, bias=False), 32)
    assert nll.item() == pytest.approx(6 * 3.4657359, rel=1e-6)


def test_sum_and_mean_differ_by_the_supervised_tokens_of_the_step() -> None:
    nll = torch.tensor(12.0)
    assert step_objective(nll, 8, Reduction.sum).item() == 12.0
    assert step_objective(nll, 8, Reduction.mean).item() == 1.5
    assert step_objective(torch.tensor(0.0), 0, Reduction.mean).item() == 0.0


def test_the_head_is_used_where_it_gives_the_models_own_logits() -> None:
    for tied in (False, True):
        scored = ScoredModel(tiny(tie_word_embeddings=tied))
        scored.choose_head()
        assert not scored.uses_full_logits


def granite() -> nn.Module:
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return GraniteForCausalLM(config).eval()


def gemma() -> nn.Module:
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=1.0, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("family", [granite, gemma])
def test_a_model_that_changes_its_logits_is_noticed_and_trained_right(family: Callable[[], nn.Module]) -> None:
    model = family()  # a soft cap can't be seen in the loss of small random weights: what the head gives is watched
    scored = ScoredModel(model)
    input_ids, labels = batch(rows=1, vocabulary=64)
    scored.choose_head()
    assert scored.uses_full_logits
    with torch.no_grad():
        model.get_output_embeddings().weight *= 50
    assert scored(input_ids, labels).item() == pytest.approx(reference(model, input_ids, labels).item(), rel=1e-6)
