"""The loss is the loss: it equals a plain full-logits reference, however it is computed and however it is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import src.training.fused_loss as fused_loss
import src.training.loss as loss_module
from src.config.schema import LossConfig, Reduction
from src.data.encoding import IGNORE_INDEX
from src.training.head import ModelWithLoss, shifted
from src.training.head_form import HeadForm
from src.training.loss import (
    part_losses,
    part_weights,
    span_losses,
    step_objective,
    sum_of_weights,
    supervised_positions,
    token_losses,
)

EACH = {"thought_open_weight": 2.0, "thought_close_weight": 0.5, "after_thought_weight": 3.0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(**changes: object) -> nn.Module:
    config = AutoConfig.from_pretrained("assets/tiny_llama", **changes)
    return AutoModelForCausalLM.from_config(config).eval()


def cut_into_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, num_vocabulary: int) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", rows * num_vocabulary)
    monkeypatch.setattr(fused_loss, "LOGITS_ON_CPU", rows * num_vocabulary)
    monkeypatch.setattr(fused_loss, "LEAST_ROWS", rows)


def hook_into(head: nn.Module) -> None:
    """Have a head called: what hooks into it must see its result."""
    head.register_forward_hook(lambda *_: None)


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
@pytest.mark.parametrize("rows", [256, 4])  # the second: chunks of four positions
@pytest.mark.parametrize("is_called", [False, True])
def test_loss_and_gradients_equal_a_full_logits_reference(
    monkeypatch: pytest.MonkeyPatch, tied: bool, rows: int, is_called: bool
) -> None:
    cut_into_chunks(monkeypatch, rows, num_vocabulary=259)
    model = tiny(tie_word_embeddings=tied)
    if is_called:
        hook_into(model.get_output_embeddings())
    input_ids, labels = batch()
    expected = reference(model, input_ids, labels)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = ModelWithLoss(model)(input_ids, labels).objective
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_the_mean_is_the_reference_mean_to_a_millionth() -> None:
    model = tiny()
    input_ids, labels = batch()
    supervised = (labels[:, 1:] != IGNORE_INDEX).sum().item()
    expected = model(input_ids=input_ids, labels=labels).loss
    found = step_objective(ModelWithLoss(model)(input_ids, labels).objective, supervised, Reduction.mean)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_right_padding_without_a_mask_changes_nothing() -> None:
    loss_model = ModelWithLoss(tiny())
    input_ids, labels = batch(rows=1)
    padded = (functional.pad(input_ids, (0, 7)), functional.pad(labels, (0, 7), value=IGNORE_INDEX))
    assert loss_model(*padded).objective.item() == pytest.approx(
        loss_model(input_ids, labels).objective.item(), rel=1e-6
    )


def test_nothing_supervised_is_zero_and_still_has_gradients() -> None:
    loss_model = ModelWithLoss(tiny())
    input_ids, labels = batch()
    nll = loss_model(input_ids, torch.full_like(labels, IGNORE_INDEX)).objective
    nll.backward()
    assert nll.item() == 0
    gradients = [parameter.grad for parameter in loss_model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_states_predict_the_next_label() -> None:
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX]])
    states, targets, parts, weights = supervised_positions(hidden, labels)
    assert (parts, weights) == (None, None)
    assert states.flatten().tolist() == [1.0, 2.0]
    assert targets.tolist() == [7, 8]


def test_the_loss_of_even_odds_is_the_logarithm_of_the_vocabulary() -> None:
    nll, _ = token_losses(torch.zeros(6, 2), torch.arange(6), nn.Linear(2, 32, bias=False), 32)
    assert nll.tolist() == pytest.approx([3.4657359] * 6, rel=1e-6)


def test_sum_and_mean_differ_by_the_supervised_tokens_of_the_step() -> None:
    nll = torch.tensor(12.0)
    assert step_objective(nll, 8, Reduction.sum).item() == 12.0
    assert step_objective(nll, 8, Reduction.mean).item() == 1.5
    assert step_objective(torch.tensor(0.0), 0, Reduction.mean).item() == 0.0


def test_the_head_is_used_where_it_gives_the_models_own_logits() -> None:
    for tied in (False, True):
        loss_model = ModelWithLoss(tiny(tie_word_embeddings=tied))
        loss_model.form = None
        loss_model.probe_head()
        assert loss_model.form == HeadForm()


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


@pytest.mark.parametrize("is_called", [False, True])
@pytest.mark.parametrize("family", [granite, gemma])
def test_a_model_that_changes_its_logits_is_noticed_and_trained_right(
    family: Callable[[], nn.Module], is_called: bool
) -> None:
    model = family()  # a soft cap can't be seen in the loss of small random weights: the head's result is replaced
    if is_called:
        hook_into(model.get_output_embeddings())
    loss_model = ModelWithLoss(model)
    input_ids, labels = batch(rows=1, vocabulary=64)
    loss_model.probe_head()
    assert loss_model.form == (HeadForm(after=1 / 8) if family is granite else HeadForm(cap=1.0))
    assert loss_model.uses_full_logits is is_called
    with torch.no_grad():
        model.get_output_embeddings().weight *= 50
    found = loss_model(input_ids, labels).objective.item()
    assert found == pytest.approx(reference(model, input_ids, labels).item(), rel=1e-6)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=True,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_ffn_dim=32,
        decoder_attention_heads=2, encoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
        scale_embedding=True, decoder_start_token_id=2,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("family", [granite, gemma, t5, bart])
def test_special_heads_train_as_the_models_own_loss_says(family: Callable[[], nn.Module]) -> None:
    model = family()
    is_pair = model.config.is_encoder_decoder
    own = copy.deepcopy(model)
    loss_model = ModelWithLoss(model)
    loss_model.probe_head()
    assert not loss_model.uses_full_logits
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, own)]
    for _ in range(5):
        input_ids, labels = batch(rows=2, vocabulary=64)
        pair = {"target_ids": input_ids.flip(1)} if is_pair else {}
        if is_pair:
            labels = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, pair["target_ids"])
        supervised = (labels[:, 0 if is_pair else 1 :] != IGNORE_INDEX).sum().item()
        ours = step_objective(loss_model(input_ids, labels, **pair).objective, supervised, Reduction.mean)
        start = {"decoder_input_ids": shifted(input_ids.flip(1), own.config.decoder_start_token_id)} if is_pair else {}
        theirs = own(input_ids=input_ids, labels=labels, **start).loss
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
        for optimizer, loss in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours_after, theirs_after in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours_after, theirs_after, rtol=1e-4, atol=1e-5)


def test_smoothing_is_the_librarys_and_the_nll_stays_unsmoothed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states, targets = nn.Linear(4, 9), torch.randn(7, 4), torch.randint(0, 9, (7,))
    expected = functional.cross_entropy(head(states), targets, reduction="none", label_smoothing=0.1)
    for most in (2**26, 9 * 2):  # the second: chunks of two
        monkeypatch.setattr(loss_module, "MAX_LOGITS", most)
        smoothed, nll = token_losses(states, targets, head, 9, label_smoothing=0.1)
        torch.testing.assert_close(smoothed, expected)
        torch.testing.assert_close(nll, functional.cross_entropy(head(states), targets, reduction="none"))
    smoothed.sum().backward()
    assert head.weight.grad is not None


def test_thoughts_weigh_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    input_ids, labels = batch(rows=2)
    parts = torch.zeros_like(labels, dtype=torch.uint8)
    parts[:, 5:9] = torch.tensor([2, 1, 3, 4])  # <ToW> x </ToW> y
    plain = ModelWithLoss(model)(input_ids, labels, parts=parts)
    assert plain.parts is not None
    of_part = [plain.nll[plain.parts == part].sum().item() for part in range(5)]
    assert plain.sums().tolist() == pytest.approx([plain.objective.item(), plain.nll.sum().item(), *of_part])
    assert plain.is_thought is not None
    assert plain.is_thought.sum() == 6
    for given, weights in (({}, [1, 0.25, 0.25, 0.25, 1]), (EACH, [1, 0.25, 2, 0.5, 3])):
        config = LossConfig(Reduction.mean, 0.25, 0.0, **given)
        weighted = ModelWithLoss(model, config)(input_ids, labels, parts=parts)
        assert torch.equal(plain.nll, weighted.nll)
        expected = sum(weight * nll for weight, nll in zip(weights, of_part, strict=True))
        assert weighted.objective.item() == pytest.approx(expected, rel=1e-6)
        assert part_weights(config) == weights
        assert sum_of_weights([14, 6.5, 2, 2, 1], config) == pytest.approx(
            14 + 6.5 / 4 + sum(weights[2:4]) * 2 + weights[4]
        )


def test_rows_weigh_what_they_are_given() -> None:
    model = tiny()
    input_ids, labels = batch(rows=2)
    weights = torch.tensor([[0.5], [2.0]]).expand(labels.shape)
    apart = [ModelWithLoss(model)(input_ids[[i]], labels[[i]]).objective.item() for i in range(2)]
    weighted = ModelWithLoss(model)(input_ids, labels, row_weights=weights)
    assert weighted.objective.item() == pytest.approx(0.5 * apart[0] + 2 * apart[1], rel=1e-6)
    assert weighted.sums()[1].item() == pytest.approx(sum(apart), rel=1e-6)  # the loss itself is not weighted


def test_losses_of_spans() -> None:
    assert span_losses(10.0, 5, 0.0, 0) == {}
    assert span_losses(10.0, 5, 4.0, 2) == {"thought_loss": 2.0, "answer_loss": 2.0}
    assert span_losses(4.0, 2, 4.0, 2) == {"thought_loss": 2.0}


def test_losses_of_parts() -> None:
    assert part_losses([10.0, 0, 0, 0, 0], [5, 0, 0, 0, 0]) == {}
    assert part_losses([10.0, 6.0, 1.0, 2.0, 5.0], [5, 3, 2, 1, 1]) == {
        "thought_loss": 1.5, "answer_loss": 2.5,
        "thought_inner_loss": 2.0, "thought_open_loss": 0.5, "thought_close_loss": 2.0, "after_thought_loss": 5.0,
    }  # fmt: skip
    cut = part_losses([0, 6.0, 1.0, 0, 0], [0, 3, 2, 0, 0])
    assert cut == {"thought_loss": 1.4, "thought_inner_loss": 2.0, "thought_open_loss": 0.5}
