"""The loop: how a batch is cut changes nothing, the same seed gives the same run, a bad loss stops it by name.

What stops it otherwise leaves the state as if the step had not begun.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from src.config.schema import Device, MixedPrecision, RunConfig, RuntimeConfig
from src.data.batching import Batch, Position
from src.data.dataset import Data, build_data
from src.data.tokenizer import load_tokenizer
from src.errors import CheckpointError, Interrupted, NonFiniteLossError
from src.model.build import build_model
from src.model.embeddings import resize_and_initialise
from src.runtime import signals
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import STOP_SIGNALS, StopRequest, stop_on_signals
from src.training.loop import MicroBatch, Step, step_once, train
from src.training.state import StepResult, StepStats, TrainState, build_train_state, num_train_steps
from tests.conftest import admitted, write_lines

CPU = RuntimeConfig(device=Device.cpu, deterministic=False)


@dataclass
class Trained:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def assembled(runtime: Runtime, *overrides: str) -> tuple[RunConfig, Data, TrainState]:
    config = admitted(*overrides).config
    torch.manual_seed(0)
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer)
    model = build_model(config, torch.device("cpu"))
    resize_and_initialise(model, tokenizer, new, config.tokens, config.seed)
    return config, data, build_train_state(model, data.train, config, runtime)


def trained(runtime: Runtime, *overrides: str) -> Trained:
    """Train 20 steps and give the loss of each."""
    config, data, state = assembled(runtime, "training.max_train_steps=20", "debug=none", *overrides)
    result = Trained([], [], {})
    for step in train(state, data.train, config, runtime, pad_token_id=0):
        result.losses.append(step.pop_metrics()["train/loss"])
        result.grad_norms.append(step.grad_norm)
    result.weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    return result


def rows_of(file: str) -> list[str]:
    return [f"data.train_files=[{file}]", "data.validation_files=null", "data.test_files=null"]


def test_a_run_whose_loss_moves_nothing_says_so_once(runtime: Runtime) -> None:
    """Rows cut within their first thought, and thoughts that weigh nothing."""
    cut = ["loss.thought_weight=0", "data.max_seq_length=16", "data.limit=64", "training.max_train_steps=2"]
    for overrides, said in ((cut, [1, 0]), ([*cut, "loss.thought_weight=1"], [0, 0])):
        config, data, state = assembled(runtime, *overrides)
        warned = [step.warnings for step in train(state, data.train, config, runtime, pad_token_id=0)]
        assert [len(of_step) for of_step in warned] == said
        assert all("no trained parameter got a gradient in step 1" in text for text in warned[0])


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


def test_weighted_and_smoothed_steps_do_not_depend_on_the_cut_either(runtime: Runtime, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path("data/tow_addition/train.jsonl").read_text().splitlines()[:27]]
    write_lines(tmp_path / "rows.jsonl", [row | {"worth": [1, 0, 0.25, 3][i % 4]} for i, row in enumerate(rows)])
    parts = ["thought_weight=0.3", "thought_open_weight=2", "thought_close_weight=0.5", "after_thought_weight=1.5"]
    settings = [f"loss.{one}" for one in (*parts, "label_smoothing=0.1")]
    settings += ["optimizer=sgd", "data.weight_column=worth", *rows_of(str(tmp_path / "rows.jsonl"))]
    names = ("loss", "objective", "thought_loss", "answer_loss", "thought_open_loss", "after_thought_loss")
    runs = []
    for size, accumulation in CUTS:
        cut = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"]
        config, data, state = assembled(runtime, "training.max_train_steps=8", *settings, *cut)
        lines = [step.pop_metrics() for step in train(state, data.train, config, runtime, pad_token_id=0)]
        assert lines[0].keys() >= {f"train/{name}" for name in names}
        runs.append(lines)
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            for name in names:
                assert theirs[f"train/{name}"] == pytest.approx(ours[f"train/{name}"], abs=1e-5)


def hand_made(rows: list[list[int]], supervised_from: list[int]) -> Batch:
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = input_ids.clone()
    for i, (row, start) in enumerate(zip(rows, supervised_from, strict=True)):
        labels[i, :start] = -100
        labels[i, len(row) :] = -100
    counts = np.array([int((labels[:, 1:] != -100).sum()), 0, 0, 0, 0])
    return Batch(input_ids, labels, list(range(len(rows))), sum(map(len, rows)), counts, counts)


def test_a_micro_batch_without_any_supervised_token_adds_nothing(runtime: Runtime) -> None:
    def after(batches: list[Batch]) -> tuple[float, TrainState]:
        config, data, state = assembled(runtime, "optimizer=sgd", "scheduler=constant", "data.limit=8")
        step_once(state, [MicroBatch(data.train, batch) for batch in batches], config, runtime)
        return state.stats.loss, state

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
        nll, num_supervised = step.stats.nll, step.stats.num_supervised
    assert num_supervised == data.reports["train"].supervised_tokens
    assert step.pop_metrics()["train/loss"] == nll / num_supervised
    assert step.stats.num_supervised == 0


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


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_training_is_followed_between_micro_batches(runtime: Runtime, number: signal.Signals) -> None:
    config, data, state = assembled(runtime, "data.limit=8", "training.per_device_train_batch_size=2")
    steps = train(state, data.train, config, runtime, pad_token_id=0)
    next(steps)
    runtime.stop.is_deferred = True
    runtime.stop.on_signal(number, None)
    with pytest.raises(Interrupted, match=number.name):
        next(steps)
    assert state.step == 1
    with pytest.raises(KeyboardInterrupt):
        runtime.stop.on_signal(signal.SIGINT, None)


class AfterChecks(StopRequest):
    """A signal comes after so many checks."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.name = "SIGTERM"
        super().check()


def test_a_step_that_is_given_up_leaves_the_state_as_if_it_had_not_begun() -> None:
    overrides = ["data.limit=8", "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    with start_runtime(CPU, MixedPrecision.no, 1, AfterChecks(4 + 3)) as runtime:
        config, data, state = assembled(runtime, *overrides)
        steps = train(state, data.train, config, runtime, pad_token_id=0)
        next(steps)
        before = deepcopy(state.snapshot(runtime, {}))
        with pytest.raises(Interrupted):  # before the last of the second step's micro-batches
            next(steps)
        after = state.snapshot(runtime, {})
    assert before.state["position"]["num_sequences"] == 4
    assert after.state == before.state
    for ours, theirs in ((before.weights, after.weights), (before.optimizer or {}, after.optimizer or {})):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_only_ctrl_c_is_followed_at_once_when_the_run_was_asked_to_stop_already() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with stop_on_signals() as stop:
        stop.is_deferred = True
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGUSR1"):
            stop.check()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until `now` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_time_that_is_up_stops_a_run_as_a_signal_does(clock: SimpleNamespace) -> None:
    stop = StopRequest()
    stop.set_time_limit(30)
    stop.is_deferred = True
    clock.now += 29.9
    stop.check()
    clock.now += 0.1
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"^training\.max_seconds = 30$"):
            stop.check()
    stop.on_signal(signal.SIGTERM, None)
    assert stop.name == "training.max_seconds = 30"
    with pytest.raises(KeyboardInterrupt):
        stop.on_signal(signal.SIGINT, None)


def test_what_came_first_is_named_and_each_run_has_its_own_time(clock: SimpleNamespace) -> None:
    stop = StopRequest()
    stop.set_time_limit(30)
    clock.now += 20
    stop.set_time_limit(30)  # the next run of a sweep
    clock.now += 20
    stop.check()
    stop.set_time_limit(None)
    clock.now += 1e9
    stop.check()
    stop.set_time_limit(0.5)
    stop.is_deferred = True
    stop.on_signal(signal.SIGTERM, None)
    clock.now += 1
    with pytest.raises(Interrupted, match=r"^SIGTERM$"):
        stop.check()


def test_time_that_is_up_is_followed_between_micro_batches(runtime: Runtime, clock: SimpleNamespace) -> None:
    config, data, state = assembled(runtime, "data.limit=8", "training.per_device_train_batch_size=2")
    runtime.stop.set_time_limit(2.5)
    steps = train(state, data.train, config, runtime, pad_token_id=0)
    for step in steps:
        clock.now += 1
        if step.number == 3:
            break
    with pytest.raises(Interrupted, match=r"training\.max_seconds = 2\.5"):
        next(steps)
    assert state.step == 3


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
    few = ["data.limit=8", "training.per_device_train_batch_size=8"]  # bf16 is slow on a CPU
    with start_runtime(CPU, MixedPrecision[precision], 1, StopRequest()) as runtime:
        result = trained(runtime, f"training.mixed_precision={precision}", *few, "optimizer.lr=2e-3")
    assert result.losses[-1] < result.losses[0] - 1
    assert all(weight.dtype == torch.float32 for weight in result.weights.values())


def test_evaluating_or_sampling_does_not_move_the_training_stream(runtime: Runtime) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with runtime.isolated_rng(99):
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


def test_a_step_says_what_is_due_after_it() -> None:
    step = Step(number=6, epoch=1, ends_epoch=True, lr=0.1, grad_norm=2.0, is_last=False, stats=StepStats())
    assert [every for every in (1, 2, 3, 4, 6, 7, "epoch", None) if step.is_due(every)] == [1, 2, 3, 6, "epoch"]
    assert not replace(step, ends_epoch=False).is_due("epoch")
    last = replace(step, number=7, is_last=True, ends_epoch=False)
    assert [last.is_due(every) for every in (4, 7, None)] == [True, True, True]
    assert [last.is_due(every, at_end=False) for every in (4, 7, None)] == [False, True, False]
    assert (step.number, step.lr) == (6, 0.1)


def test_a_step_gives_the_means_since_they_were_last_taken_and_what_is_minimised_where_that_differs() -> None:
    result = {"number": 6, "epoch": 1, "ends_epoch": True, "lr": 0.1, "grad_norm": 2.0, "is_last": False}
    stats = StepStats(nll=6.0, part_counts=(3, 0, 0, 0, 0), objective=8.0, num_steps=4, num_tokens=50, seconds=5.0)
    step = Step(**result, stats=stats, with_objective=True)
    assert (step.loss, step.tokens_per_second) == (2.0, 10.0)
    own = {"train/lr": 0.1, "train/grad_norm": 2.0}
    means = {"train/loss": 2.0, "perf/tokens_per_second": 10.0}
    assert step.pop_metrics() == {**means, "train/objective": 2.0, **own}
    assert stats == StepStats()
    assert "train/objective" not in Step(**result, stats=stats).pop_metrics()


def test_a_step_that_was_not_over_comes_again_and_one_that_was_does_not(runtime: Runtime) -> None:
    overrides = ["data.limit=12", "training.per_device_train_batch_size=2", "training.max_train_steps=4"]

    def numbers(*, is_complete: bool, done: int = 2) -> list[tuple[int, bool, float]]:
        config, data, state = assembled(runtime, *overrides)
        first = train(state, data.train, config, runtime, pad_token_id=0)
        for _ in range(done):
            next(first)
        state.is_last_step_complete = is_complete
        again = train(state, data.train, config, runtime, pad_token_id=0)
        return [(step.number, step.is_last, step.pop_metrics()["train/loss"]) for step in again]

    came_again, went_on = numbers(is_complete=False), numbers(is_complete=True)
    assert [number for number, _, _ in came_again] == [2, 3, 4]
    assert [number for number, _, _ in went_on] == [3, 4]
    assert came_again[-1] == went_on[-1]
    assert [one[:2] for one in numbers(is_complete=False, done=4)] == [(4, True)]
    assert numbers(is_complete=True, done=4) == []


@pytest.mark.parametrize(
    ("overrides", "begin", "left", "expected"),
    [
        (["training.max_train_steps=7"], (0, 0), None, 7),
        (["training.max_train_steps=7"], (5, 2), 1, 7),
        (["training.num_train_epochs=2"], (0, 0), 10, 20),
        (["training.num_train_epochs=2.25"], (0, 0), 10, 23),
        (["training.num_train_epochs=0.01"], (0, 0), 10, 1),
        (["training.num_train_epochs=1.1"], (0, 0), 10, 11),  # 1.1 - 1 is more than a tenth
        (["training.num_train_epochs=2.1"], (0, 0), 10, 21),
        (["training.num_train_epochs=2.1"], (14, 1), 6, 21),
        (["training.num_train_epochs=3"], (14, 1), 6, 30),
        (["training.num_train_epochs=3"], (14, 1), 3, 27),  # larger batches from here on
        (["training.num_train_epochs=1"], (14, 1), 6, 14),  # nothing is left to do
        (["training.num_train_epochs=2"], (20, 2), 10, 20),
    ],
)
def test_the_end_is_counted_from_where_a_run_goes_on(
    overrides: list[str], begin: tuple[int, int], left: int | None, expected: int
) -> None:
    assert num_train_steps(admitted(*overrides).config.training, 10, *begin, left) == expected


def test_a_snapshot_in_fresh_objects_trains_on_bit_for_bit(runtime: Runtime) -> None:
    overrides = ["data.limit=12", "training.per_device_train_batch_size=2", "training.max_train_steps=5"]
    config, data, state = assembled(runtime, *overrides)
    steps = train(state, data.train, config, runtime, pad_token_id=0)
    for _ in range(3):
        next(steps)
    kept = deepcopy(state.snapshot(runtime, {"mine": 1}))
    assert kept.state["mine"] == 1
    expected = [step.pop_metrics() for step in steps]
    weights = {name: tensor.clone() for name, tensor in state.weights(runtime).items()}

    config, data, fresh = assembled(runtime, *overrides)
    position = Position(**json.loads(json.dumps(kept.state))["position"])
    fresh.position = position
    torch.manual_seed(99)
    fresh.restore(replace(kept, state=json.loads(json.dumps(kept.state))), runtime)
    assert (fresh.step, fresh.last_step, fresh.stats) == (
        3,
        StepResult(**kept.state["last"]),
        StepStats.from_dict(kept.state["meter"]),
    )
    found = [step.pop_metrics() for step in train(fresh, data.train, config, runtime, pad_token_id=0)]
    assert [plain(line) for line in found] == [plain(line) for line in expected]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fresh.weights(runtime).items())
    assert (fresh.examples_seen, fresh.tokens_seen) == (state.examples_seen, state.tokens_seen)


def plain(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith("perf/")}


def test_weights_of_another_form_are_told_and_change_nothing(runtime: Runtime) -> None:
    state = assembled(runtime, "data.limit=8")[2]
    before = {name: tensor.clone() for name, tensor in state.weights(runtime).items()}
    name, *_, last = before
    wrong = {key: tensor + 1 for key, tensor in before.items() if key != last}
    wrong |= {name: torch.zeros(3, 2), "another.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        state.restore_weights(wrong, runtime)
    told = str(caught.value)
    assert f"{last} is missing there" in told
    assert "another.weight is not trained here" in told
    assert f"{name}: [3, 2] there, {list(before[name].shape)} here" in told
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.weights(runtime).items())


def test_deterministic_is_on_for_the_runs_that_ask_for_it() -> None:
    for deterministic in (False, True, False):
        with start_runtime(replace(CPU, deterministic=deterministic), MixedPrecision.no, 1, StopRequest()):
            assert torch.are_deterministic_algorithms_enabled() is deterministic
