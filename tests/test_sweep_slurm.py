"""Sweeps whose trials run elsewhere: what they share, and by submitit, a job a trial, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.errors import SweepError
from src.sweep.engines.engine import TrialJob
from src.sweep.engines.remote import Order, withdraw
from src.sweep.sweeper import engine_of
from src.tracking.lock import holder_of
from tests.conftest import read_lines
from tests.sweeps import (
    ASHA,
    LONG,
    board_of,
    left_of,
    pid_of,
    planned,
    starts,
    states,
    steps_of,
    sweep,
    until,
    values_of,
)

SUBMITIT = ("sweep.engine=slurm", "sweep.n_jobs=2", "sweep.slurm={cluster: local, time: 10}")


@pytest.mark.slow
def test_jobs_survive_a_kill_a_time_limit_and_their_sweep(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    grid = ("seed=1,2", "training.max_train_steps=150", "training.num_train_epochs=900", f"hydra.sweep.dir={folder}",
            "evaluation.eval_steps=null", "checkpoint.checkpointing_steps=20", "sweep.max_retries=0")  # fmt: skip
    process = started(*grid, *SUBMITIT)
    pids = [until(lambda number=number: pid_of(folder, number), f"trial {number} trains") for number in (0, 1)]
    os.kill(pids[0], signal.SIGUSR2)  # as SLURM does before the time limit
    until(lambda: starts(folder)[0] == 2, "it is submitted again, and no attempt is counted")
    assert states(folder)[0] == "RUNNING"
    process.kill()
    process.wait()
    assert holder_of(folder / "0"), "a job outlives its sweep"

    again = sweep(*grid, *SUBMITIT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(folder) == ["FINISHED"] * 2
    for number in range(2):
        steps = [line["step"] for line in read_lines(folder / str(number) / "metrics.jsonl")]
        assert steps == sorted(set(steps)), "no step twice"
    assert [row["n"] for row in board_of(folder)] == ["2"]
    assert not left_of(folder)


@pytest.mark.slow
def test_a_job_that_is_killed_ends_as_one_that_was_not(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the same here and there
    run = ("training.max_train_steps=40", "training.num_train_epochs=90", "evaluation.eval_steps=null")
    grid = ("seed=1,2", *run, "checkpoint.checkpointing_steps=5")
    alone = sweep(*grid, "sweep.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'here'}")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    process = started(*grid, *SUBMITIT, f"hydra.sweep.dir={tmp_path / 'jobs'}")
    os.kill(until(lambda: pid_of(tmp_path / "jobs", 0), "trial 0 trains"), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert starts(tmp_path / "jobs") == [2, 1]
    for number in ("0", "1"):
        assert values_of(tmp_path / "jobs" / number) == values_of(tmp_path / "here" / number)


@pytest.mark.slow
def test_asha_by_jobs_saves_half_of_the_steps(tmp_path: Path) -> None:
    done = sweep(*ASHA, *SUBMITIT, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert board_of(tmp_path)[0]["setting"] == "optimizer.lr=0.002"
    assert sum(steps_of(tmp_path)) <= 6 * 9 / 2


def test_ctrl_c_has_jobs_save(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = started(*LONG, *SUBMITIT[::2], f"hydra.sweep.dir={folder}")
    until(lambda: pid_of(folder, 0) and pid_of(folder, 1), "two trials train")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert states(folder) == ["PREEMPTED", "PREEMPTED"]
    assert json.loads((folder / "sweep.json").read_text())["state"] == "PREEMPTED"
    until(lambda: not left_of(folder), "nothing is left", 30)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sweep.slurm={partition: gpu}"], "sweep.slurm has no time"),
        (["sweep.slurm={cluster: local, time: soon}"], 'Parameter "timeout_min" expected type'),
        (["sweep.slurm={cluster: local, time: 5, partitoin: gpu}"], "Unknown argument 'partitoin'"),
        (["sweep.slurm={cluster: lsf, time: 5}"], "lsf"),
        (["sweep.slurm={time: 5}"], "there is no sbatch here"),
    ],
)
def test_what_slurm_can_not_do_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(SweepError, match=said):
        engine_of(planned("seed=1,2", "sweep.engine=slurm", *given, f"hydra.sweep.dir={tmp_path}"), int).open()


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"needs Ray, which is not installed: pip install .* '\.\[ray\]'"):
        engine_of(planned("seed=1,2", "sweep.engine=ray", f"hydra.sweep.dir={tmp_path}"), int)


def test_a_job_runs_once_and_only_where_its_folder_is_seen(tmp_path: Path) -> None:
    order = Order(tmp_path, 3)
    assert f"does not see {tmp_path}" in str(order.take())
    job = TrialJob(3, {"seed": 1}, tmp_path / "3")
    order.write(job)
    assert order.take() == job
    Order(tmp_path, 3).write(job)  # it was submitted again
    assert order.take() == 75
    order.write(job)
    (tmp_path / "stop").touch()
    assert order.take() == 75
    withdraw(tmp_path)
    assert "does not see" in str(order.take())


def test_where_the_engine_is_is_no_part_of_what_a_sweep_compares() -> None:
    here, there = planned("seed=1,2"), planned("seed=1,2", *SUBMITIT, "sweep.ray_address=auto")
    assert here.folder == there.folder
    assert [trial.identity for trial in here.trials] == [trial.identity for trial in there.trials]
