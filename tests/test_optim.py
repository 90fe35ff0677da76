"""Optimizers and schedules, by their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from src.config.schema import ScheduleType
from src.training.optim import build_optimizer, build_schedule, lr_factor, num_warmup_steps, parameter_groups
from tests.conftest import admitted


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ScheduleType.linear, [0.0, 0.5, 1.0, 0.5, 0.0]),
        (ScheduleType.cosine, [0.0, 0.5, 1.0, 0.5, 0.0]),
        (ScheduleType.constant, [1.0, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleType.constant_with_warmup, [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_a_schedule_at_five_points(kind: ScheduleType, expected: list[float]) -> None:
    found = [lr_factor(kind, step, num_steps=110, warmup=10, min_ratio=0.0) for step in (0, 5, 10, 60, 110)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", [ScheduleType.linear, ScheduleType.cosine])
def test_a_decay_ends_at_its_minimum(kind: ScheduleType) -> None:
    assert lr_factor(kind, 100, 100, 0, 0.1) == pytest.approx(0.1)
    assert lr_factor(kind, 50, 100, 0, 0.1) == pytest.approx(0.55)
    assert lr_factor(kind, 0, 100, 0, 0.1) == 1.0


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


def test_warmup_steps_take_the_place_of_the_ratio() -> None:
    assert num_warmup_steps(admitted("scheduler=linear", "scheduler.warmup_ratio=0.05").config.scheduler, 110) == 6
    assert num_warmup_steps(admitted("scheduler.warmup_steps=3").config.scheduler, 110) == 3
    assert num_warmup_steps(admitted("scheduler.warmup_steps=0").config.scheduler, 110) == 0
    assert num_warmup_steps(admitted("scheduler=constant").config.scheduler, 110) == 0


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
