"""The loop: how a batch is cut changes nothing, the same seed gives the same run, a bad loss stops it by name."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from src.config.schema import Device, MixedPrecision, RunConfig, RuntimeConfig
from src.data.batching import Batch
from src.data.dataset import Data, build_data
from src.errors import Interrupted, NonFiniteLossError
from src.model.build import build_model
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import StopRequest, stop_on_signals
from src.tokens import grow_embeddings, load_tokenizer
from src.training.loop import Meter, step_once, train
from src.training.state import TrainState, prepare
from tests.conftest import admitted

CPU = RuntimeConfig(device=Device.cpu, deterministic=False)


@dataclass
class Trained:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with start_runtime(CPU, MixedPrecision.no, 42, StopRequest()) as started:
        yield started


def assembled(runtime: Runtime, *overrides: str) -> tuple[RunConfig, Data, TrainState]:
    config = admitted(*overrides).config
    torch.manual_seed(0)
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer)
    model = build_model(config, torch.device("cpu"))
    grow_embeddings(model, tokenizer, new, config.tokens, config.seed)
    return config, data, prepare(model, data.train, config, runtime)


def trained(runtime: Runtime, *overrides: str) -> Trained:
    """Train 20 steps and give the loss of each."""
    config, data, state = assembled(runtime, "training.max_train_steps=20", "debug=none", *overrides)
    result = Trained([], [], {})
    for step in train(state, data.train, config, runtime, pad_token_id=0):
        result.losses.append(step.collect()["train/loss"])
        result.grad_norms.append(step.grad_norm)
    result.weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    return result


def rows_of(file: str) -> list[str]:
    return [f"data.train_files=[{file}]", "data.validation_files=null", "data.test_files=null"]


CUTS = [(8, 1), (4, 2), (1, 8)]


@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [(["optimizer=sgd"], 1e-5), (["optimizer=adamw", "optimizer.lr=1e-3"], 1e-4)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_does_not_depend_on_how_the_batch_is_cut(
    runtime: Runtime,
    rows_of_different_length: Callable[..., str],
    optimizer: list[str],
    tolerance: float,
    reduction: str,
) -> None:
    lr = ["optimizer.lr=0.002"] if reduction == "sum" and optimizer == ["optimizer=sgd"] else []
    runs = [
        trained(
            runtime,
            *rows_of(rows_of_different_length(27)),  # four windows an epoch, the last of three rows
            *optimizer,
            *lr,
            f"loss.reduction={reduction}",
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={accumulation}",
        )
        for size, accumulation in CUTS
    ]
    first = runs[0]
    assert len(first.losses) == 20
    assert first.losses[-1] < first.losses[0]
    for other in runs[1:]:
        assert other.losses == pytest.approx(first.losses, abs=1e-5)
        assert other.grad_norms == pytest.approx(first.grad_norms, rel=1e-3)
        for name, weight in first.weights.items():
            torch.testing.assert_close(other.weights[name], weight, rtol=0, atol=tolerance)


def test_weighted_and_smoothed_steps_do_not_depend_on_the_cut_either(runtime: Runtime) -> None:
    settings = ["loss.thought_weight=0.3", "loss.label_smoothing=0.1", "data.limit=27", "optimizer=sgd"]
    runs = []
    for size, accumulation in CUTS:
        cut = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"]
        config, data, state = assembled(runtime, "training.max_train_steps=8", *settings, *cut)
        lines = [step.collect() for step in train(state, data.train, config, runtime, pad_token_id=0)]
        assert lines[0].keys() >= {"train/loss", "train/objective", "train/thought_loss", "train/answer_loss"}
        runs.append(lines)
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            for name in ("train/loss", "train/objective", "train/thought_loss", "train/answer_loss"):
                assert theirs[name] == pytest.approx(ours[name], abs=1e-5)
    plain = trained(runtime, "data.limit=27", "optimizer=sgd", "training.per_device_train_batch_size=8")
    assert plain.losses[0] == pytest.approx(runs[0][0]["train/loss"], abs=1e-5)  # unweighted, unsmoothed


def hand_made(rows: list[list[int]], supervised_from: list[int]) -> Batch:
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = input_ids.clone()
    for i, (row, start) in enumerate(zip(rows, supervised_from, strict=True)):
        labels[i, :start] = -100
        labels[i, len(row) :] = -100
    count = int((labels[:, 1:] != -100).sum())
    return Batch(input_ids, labels, list(range(len(rows))), sum(map(len, rows)), count)


def test_a_micro_batch_without_any_supervised_token_adds_nothing(runtime: Runtime) -> None:
    def after(batches: list[Batch]) -> tuple[float, TrainState]:
        config, data, state = assembled(runtime, "optimizer=sgd", "scheduler=constant", "data.limit=8")
        meter = Meter()
        step_once(state, [(data.train, batch) for batch in batches], config, runtime, meter)
        return meter.loss, state

    learned, nothing = [5, 6, 7, 8], [9, 10, 11]
    loss_with, with_empty = after([hand_made([nothing], [3]), hand_made([learned, [7, 8]], [2, 1])])
    loss_without, without = after([hand_made([learned], [2]), hand_made([[7, 8]], [1])])
    assert loss_with == pytest.approx(loss_without, abs=1e-6)
    for ours, theirs in zip(with_empty.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    loss_of_nothing, _ = after([hand_made([nothing], [3])])
    assert loss_of_nothing == 0.0


def test_the_logged_loss_is_over_all_tokens_since_the_line_before(
    runtime: Runtime, rows_of_different_length: Callable[..., str]
) -> None:
    overrides = [
        *rows_of(rows_of_different_length(12)),
        "training.max_train_steps=6",
        "training.per_device_train_batch_size=2",
    ]
    config, data, state = assembled(runtime, *overrides)
    nll = num_supervised = 0.0
    for step in train(state, data.train, config, runtime, pad_token_id=0):
        nll, num_supervised = step.meter.nll, step.meter.num_supervised
    assert num_supervised == data.reports["train"].supervised_tokens
    assert step.collect()["train/loss"] == nll / num_supervised
    assert step.meter.num_supervised == 0


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(runtime: Runtime) -> None:
    overrides = ["training.max_train_steps=5", "data.limit=64"]
    first, again, other = (trained(runtime, *overrides, f"seed={seed}") for seed in (1, 1, 2))
    assert first.losses == again.losses
    assert all(torch.equal(weight, again.weights[name]) for name, weight in first.weights.items())
    assert first.losses != other.losses


def test_a_loss_that_is_not_finite_names_the_rows_and_leaves_the_weights(
    runtime: Runtime, rows_of_different_length: Callable[..., str]
) -> None:
    overrides = rows_of(rows_of_different_length(4))
    config, data, state = assembled(runtime, *overrides, "training.per_device_train_batch_size=2")
    with torch.no_grad():
        state.model.get_output_embeddings().weight[5] = float("nan")
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"nan in step 1(.|\n)*train\.jsonl:\d(.|\n)*train\.jsonl:\d"):
        next(train(state, data.train, config, runtime, pad_token_id=0))
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(runtime: Runtime) -> None:
    config, data, state = assembled(runtime, "optimizer=sgd", "data.limit=8", "training.per_device_train_batch_size=4")
    weight = state.model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match="gradient's norm became"):
        next(train(state, data.train, config, runtime, pad_token_id=0))
    assert torch.equal(weight, before)


def test_the_environment_can_not_have_the_loss_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        with start_runtime(CPU, MixedPrecision.no, 1, StopRequest()) as runtime:
            config, data, state = assembled(runtime, "data.limit=8")
            norms.append(next(train(state, data.train, config, runtime, pad_token_id=0)).grad_norm)
    assert norms[0] == norms[1]


def test_a_signal_while_training_is_followed_between_micro_batches(runtime: Runtime) -> None:
    config, data, state = assembled(runtime, "data.limit=8", "training.per_device_train_batch_size=2")
    steps = train(state, data.train, config, runtime, pad_token_id=0)
    next(steps)
    runtime.stop.is_deferred = True
    runtime.stop(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="SIGTERM"):
        next(steps)
    assert state.step == 1
    with pytest.raises(KeyboardInterrupt):
        runtime.stop(signal.SIGINT, None)


def test_a_signal_before_training_is_followed_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # SIG_IGN where a shell started this in the background
    with pytest.raises(Interrupted, match="SIGINT"), stop_on_signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_a_library_works_is_no_error_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    config = admitted().config
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"), stop_on_signals():
        load_tokenizer(config.model, config.tokens)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_computes_in_its_type_and_learns(precision: str) -> None:
    with start_runtime(CPU, MixedPrecision[precision], 1, StopRequest()) as runtime:
        result = trained(runtime, f"training.mixed_precision={precision}", "data.limit=32", "optimizer.lr=2e-3")
    assert result.losses[-1] < result.losses[0] - 1
    assert all(weight.dtype == torch.float32 for weight in result.weights.values())


def test_evaluating_or_sampling_does_not_move_the_training_stream(runtime: Runtime) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with runtime.isolated_rng(99):
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)
