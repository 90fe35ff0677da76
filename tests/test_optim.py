"""Optimizers and schedules, by their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn
from transformers import get_scheduler

from src.config.schema import SCHEDULES, MixedPrecision, SchedulerConfig
from src.errors import ModelError
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest
from src.training.optim import build_optimizer, build_schedule, parameter_groups, warmup_warnings
from tests.conftest import ROOT, admitted


def schedule(kind: str, warmup: int, min_ratio: float) -> SchedulerConfig:
    """Return a schedule whose keys it has are set so."""
    config = SCHEDULES[kind]
    given = {"type": kind, "warmup_ratio": 0.0, "warmup_steps": warmup, "min_lr_ratio": min_ratio}
    made: SchedulerConfig = config(**{field.name: given[field.name] for field in dataclasses.fields(config)})
    return made


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_a_schedule_at_five_points(kind: str, expected: list[float]) -> None:
    found = [schedule(kind, 10, 0.0).factor(step, num_steps=110) for step in (0, 5, 10, 60, 110)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_decay_ends_at_its_minimum(kind: str) -> None:
    assert schedule(kind, 7, 0.1).factor(100, 100) == 0.1
    assert schedule(kind, 0, 0.1).factor(50, 100) == pytest.approx(0.55)
    assert schedule(kind, 0, 0.1).factor(0, 100) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_those_of_transformers(name: str) -> None:
    warmup = [] if name == "constant" else ["scheduler.warmup_steps=7"]
    config = admitted(f"scheduler={name}", *warmup).config.scheduler
    parameter = nn.Parameter(torch.zeros(2, 2))
    ours, theirs = (torch.optim.SGD([parameter], lr=0.3) for _ in range(2))
    schedules = build_schedule(config, ours, 40), get_scheduler(name, theirs, 7, 40)
    for _ in range(40):
        assert schedules[0].get_last_lr() == pytest.approx(schedules[1].get_last_lr())
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()


def test_a_warm_up_that_takes_the_whole_run_is_reported() -> None:
    def said(num_steps: int, *overrides: str) -> str:
        return " ".join(warmup_warnings(admitted(*overrides).config.scheduler, num_steps))

    assert "one step" in said(1, "scheduler.warmup_ratio=0.03")
    assert "scheduler.warmup_ratio=0" in said(1, "scheduler.warmup_ratio=0.03")
    long = ["scheduler.warmup_steps=50", "training.num_train_epochs=3"]
    assert "the warm-up takes 50 steps and the run has 50" in said(50, *long)
    assert "smaller scheduler.warmup_steps" in said(12, *long)
    assert said(51, *long) == said(1, "scheduler.warmup_ratio=0") == said(1, "scheduler=constant") == ""


def test_warmup_steps_take_the_place_of_the_ratio() -> None:
    assert admitted("scheduler=linear", "scheduler.warmup_ratio=0.05").config.scheduler.num_warmup_steps(110) == 6
    assert admitted("scheduler.warmup_steps=3").config.scheduler.num_warmup_steps(110) == 3
    assert admitted("scheduler.warmup_steps=0").config.scheduler.num_warmup_steps(110) == 0
    assert admitted("scheduler=constant").config.scheduler.num_warmup_steps(110) == 0


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    model[2].weight.requires_grad = False
    decaying, other = parameter_groups(model.parameters(), 0.1)
    assert [p is model[0].weight for p in decaying["params"]] == [True]
    assert decaying["weight_decay"] == 0.1
    assert len(other["params"]) == 3
    assert other["weight_decay"] == 0.0


def test_one_adamw_step_by_hand() -> None:
    config = admitted("optimizer.lr=0.1", "optimizer.weight_decay=0.5", "optimizer.eps=1e-8").config.optimizer
    weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1)


def test_two_sgd_steps_with_momentum_by_hand() -> None:
    config = admitted("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.5").config.optimizer
    weight = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = build_optimizer(config, [weight])
    for _ in range(2):
        weight.grad = torch.tensor([[1.0]])
        optimizer.step()
    assert weight.item() == pytest.approx(1.0 - 0.1 - 0.15)


OPTIONS = sorted(file.stem for file in (ROOT / "conf" / "optimizer").glob("*.yaml"))


def step(optimizer: torch.optim.Optimizer, *gradients: torch.Tensor) -> None:
    """Do one update with these gradients, in the order of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def test_embeddings_with_a_rate_of_their_own_are_groups_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight  # tied: one parameter
    rows, matrix, bias = model[0].weight, model[1].weight, model[1].bias
    twice = [*model.parameters(), model[2].weight]
    config = admitted("optimizer.lr=0.1", "optimizer.embedding_lr=0.3", "optimizer.weight_decay=0.5").config
    groups = build_optimizer(config.optimizer, twice, [rows, model[2].weight]).param_groups
    found = [(group["lr"], group["weight_decay"], [id(p) for p in group["params"]]) for group in groups]
    assert found == [(0.1, 0.5, [id(matrix)]), (0.1, 0.0, [id(bias)]), (0.3, 0.5, [id(rows)])]
    groups = build_optimizer(admitted("optimizer.lr=0.1").config.optimizer, twice, [rows]).param_groups
    assert [(group["lr"], [id(p) for p in group["params"]]) for group in groups] == [
        (0.1, [id(rows), id(matrix)]),
        (0.1, [id(bias)]),
    ]


def test_a_rate_for_embeddings_needs_one_that_is_trained() -> None:
    config = admitted("optimizer.embedding_lr=0.3").config.optimizer
    rows, matrix = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    for embeddings in ([], [rows.requires_grad_(False)]):
        with pytest.raises(ModelError, match=r"embedding_lr = 0\.3, but no embedding is trained"):
            build_optimizer(config, [rows, matrix], embeddings)


def test_the_schedule_scales_each_group_from_its_own_peak() -> None:
    rows, matrix = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    config = admitted(
        "optimizer.lr=0.1", "optimizer.embedding_lr=0.3", "scheduler.min_lr_ratio=0.1", "scheduler.warmup_steps=2"
    ).config
    optimizer = build_optimizer(config.optimizer, [rows, matrix], [rows])
    schedule = build_schedule(config.scheduler, optimizer, 10)
    seen = []
    for _ in range(10):
        step(optimizer, torch.ones(2, 2), torch.ones(2, 2))
        schedule.step()
        seen.append(schedule.get_last_lr())
    assert all(of_rows == pytest.approx(3 * of_matrix) for of_matrix, of_rows in seen)
    assert seen[0] == pytest.approx([0.05, 0.15])
    assert seen[1] == pytest.approx([0.1, 0.3])
    assert seen[9] == pytest.approx([0.01, 0.03])


@pytest.mark.parametrize(
    ("option", "matrix_after", "rows_after"),
    [
        ("sgd", 2.0 - 0.1 * (3.0 + 0.5 * 2.0), 1.0 - 0.3 * (-4.0 + 0.5 * 1.0)),  # decay goes through the gradient
        ("adamw", 2.0 * (1 - 0.1 * 0.5) - 0.1, 1.0 * (1 - 0.3 * 0.5) + 0.3),  # the first step is lr · sign
        ("adamw_8bit", 2.0 * (1 - 0.1 * 0.5) - 0.1, 1.0 * (1 - 0.3 * 0.5) + 0.3),
        ("paged_adamw_32bit", 2.0 * (1 - 0.1 * 0.5) - 0.1, 1.0 * (1 - 0.3 * 0.5) + 0.3),
        # lr · size · sign, and decay that knows nothing of the size
        ("adafactor", 2.0 * (1 - 0.1 * 0.5) - 0.1 * 2.0, 1.0 * (1 - 0.3 * 0.5) + 0.3 * 1.0),
    ],
)
def test_one_step_with_a_rate_for_embeddings_by_hand(option: str, matrix_after: float, rows_after: float) -> None:
    rates = ["optimizer.lr=0.1", "optimizer.embedding_lr=0.3", "optimizer.weight_decay=0.5"]
    matrix, rows = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([[1.0]]))
    optimizer = build_optimizer(admitted(f"optimizer={option}", *rates).config.optimizer, [matrix, rows], [rows])
    step(optimizer, torch.tensor([[3.0]]), torch.tensor([[-4.0]]))
    assert matrix.item() == pytest.approx(matrix_after, abs=3e-7)
    assert rows.item() == pytest.approx(rows_after, abs=3e-7)


def test_adafactor_keeps_rows_and_columns_and_steps_by_the_size_of_a_weight() -> None:
    matrix = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([5.0, 0.0]))
    config = admitted("optimizer=adafactor", "optimizer.lr=0.5", "optimizer.weight_decay=0.1").config.optimizer
    optimizer = build_optimizer(config, [matrix, bias])
    before, sizes = [matrix.detach().clone(), bias.detach().clone()], [7.5**0.5, 12.5**0.5]  # root mean squares
    step(optimizer, torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([1.0, -2.0]))
    # squares of a gradient of rank one are found again from their rows and columns: all that is left of it is its sign
    assert torch.allclose(matrix, before[0] * (1 - 0.5 * 0.1) - 0.5 * sizes[0], atol=1e-6)
    assert torch.allclose(bias, before[1] - 0.5 * sizes[1] * torch.tensor([1.0, -1.0]), atol=1e-6)
    kept = [{name: tuple(v.shape) for name, v in optimizer.state[p].items()} for p in (matrix, bias)]
    assert kept == [{"step": (), "row_var": (2, 1), "col_var": (1, 2)}, {"step": (), "variance": (2,)}]


def test_adafactor_moves_16_bit_weights_as_far_as_32_bit_ones() -> None:
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(4, 4, dtype=dtype))
        optimizer = build_optimizer(admitted("optimizer=adafactor").config.optimizer, [weight])
        step(optimizer, torch.full((4, 4), 1e-5))
        moved.append(1 - weight.detach().float().mean().item())
    assert moved[0] == pytest.approx(0.01, rel=1e-4)
    assert moved[1] == pytest.approx(0.01, rel=0.25)  # to the nearest bfloat16


def regression(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype
) -> tuple[float, torch.optim.Optimizer]:
    """Fit 100 steps; give the loss before and after as a share, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 4)).to(dtype)
    inputs = torch.randn(128, 64, dtype=dtype)
    optimizer, losses = optimizer_of(model), []
    for _ in range(100):
        loss = (model(inputs) - inputs[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0], optimizer


@pytest.mark.parametrize(
    ("option", "dtype"),
    [(option, torch.float32) for option in OPTIONS]
    # plain SGD's steps are too small for bfloat16 weights here
    + [(option, torch.bfloat16) for option in OPTIONS if option != "sgd"],
)
def test_every_optimizer_learns(option: str, dtype: torch.dtype) -> None:
    config = admitted(f"optimizer={option}").config.optimizer
    left, _ = regression(lambda model: build_optimizer(config, model.parameters()), dtype)
    assert left < 0.1


def test_8_bit_adamw_learns_as_adamw_with_a_quarter_of_its_state() -> None:
    configs = [admitted(f"optimizer={option}").config.optimizer for option in ("adamw", "adamw_8bit")]
    runs = [regression(lambda m, c=c: build_optimizer(c, m.parameters()), torch.float32) for c in configs]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=0.2)
    large, *small = (p for group in runs[1][1].param_groups for p in group["params"])
    state = runs[1][1].state
    assert [state[large][name].dtype for name in ("state1", "state2")] == [torch.uint8] * 2
    assert [state[large][name].shape for name in ("absmax1", "absmax2")] == [(64 * 128 // 256,)] * 2
    assert {state[p]["state1"].dtype for p in small} == {torch.float32}  # below 4,096 values
    assert not GlobalOptimManager.get_instance().uses_config_override  # bitsandbytes would exempt embeddings by it


def test_8_bit_adamw_stays_close_to_adamw_step_by_step() -> None:
    weights = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizers = [
        build_optimizer(admitted(f"optimizer={option}", "optimizer.lr=1e-2").config.optimizer, [weight])
        for option, weight in zip(("adamw", "adamw_8bit"), weights, strict=True)
    ]
    gradients = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(0))
    for i, gradient in enumerate(gradients):
        for optimizer in optimizers:
            step(optimizer, gradient)
        apart = (weights[0] - weights[1]).abs().max().item()
        assert apart < (1e-6 if i == 0 else 0.2 * 1e-2)  # a fifth of one step, after five


def test_the_paged_optimizer_keeps_32_bits_and_trains_without_a_gpu() -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = build_optimizer(admitted("optimizer=paged_adamw_32bit").config.optimizer, [weight])
    step(optimizer, torch.ones(64, 64))
    assert {v.dtype for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)} == {torch.float32}
    assert weight.detach().float().mean().item() < 1


@pytest.mark.parametrize("option", OPTIONS)
def test_every_optimizer_works_as_accelerate_wraps_it(option: str) -> None:
    config = admitted(f"optimizer={option}", "optimizer.embedding_lr=5e-3", "scheduler.min_lr_ratio=0.5").config
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    optimizer = build_optimizer(config.optimizer, model.parameters(), [model[0].weight])
    schedule = build_schedule(config.scheduler, optimizer, 4)
    with start_runtime(config.runtime, MixedPrecision.bf16, 0, StopRequest()) as runtime:
        wrapped, prepared = runtime.prepare(model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(4):
            runtime.strategy.backward(wrapped(torch.arange(64)).square().mean())
            prepared.step()
            schedule.step()
            prepared.zero_grad()
        assert not runtime.step_was_skipped()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [group["lr"] for group in prepared.param_groups] == pytest.approx(
        [config.optimizer.lr * 0.5, config.optimizer.lr * 0.5, 2.5e-3], abs=0
    )
