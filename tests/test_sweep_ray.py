"""Sweeps on Ray: on one that the sweep starts, and on a cluster of two nodes of this machine, one of which dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from src.tracking.lock import holder_of
from tests.sweeps import ASHA, LONG, board_of, left_of, pid_of, starts, states, steps_of, sweep, until, values_of

pytest.importorskip("ray")
RAY = ("sweep.engine=ray", "sweep.n_jobs=2")
RUN = ("training.max_train_steps=40", "training.num_train_epochs=90", "evaluation.eval_steps=null",
       "checkpoint.checkpointing_steps=5")  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have each trial compute with one thread, and mark this test's processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SWEPT_BY", str(tmp_path))


def of_ray(tmp_path: Path) -> set[int]:
    """Find the processes of Ray's that a test has begun."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or [])
        is_ray = "ray::" in words or "/raylet" in words or "gcs_server" in words
        if is_ray and (process.info["environ"] or {}).get("SWEPT_BY") == str(tmp_path):
            found.add(process.info["pid"])
    return found


def worker_of(pid: int) -> psutil.Process:
    """Find the Ray worker whose fork server a trial's process comes from."""
    return next(one for one in psutil.Process(pid).parents() if "ray::" in " ".join(one.cmdline()))


def test_trials_are_ray_tasks_and_come_to_what_they_do_here(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Of four, one loses its process, one its worker, then all lose their sweep; the same command has each whole."""
    folder = tmp_path / "sweep"
    grid = ("seed=1,2,3,4", *RUN)
    alone = sweep(*grid, "sweep.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'here'}")
    assert alone.returncode == 0, alone.stdout + alone.stderr

    process = started(*grid, *RAY, "sweep.max_retries=3", f"hydra.sweep.dir={folder}")
    pids = [until(lambda number=number: pid_of(folder, number), f"trial {number} trains") for number in (0, 1)]
    assert len(of_ray(tmp_path)) >= 4, "a store of facts, a node, two workers: two trials at once"
    os.kill(pids[0], signal.SIGKILL)
    worker_of(pids[1]).kill()
    until(lambda: any(starts(folder)[n] == 2 and pid_of(folder, n) for n in (0, 1)), "one of them is tried again")
    process.kill()
    process.wait()
    until(lambda: not left_of(folder), "its trials save and end")
    finished = {int(file.parent.name) for file in folder.glob("*/summary.json")}
    counts = [*starts(folder), 0, 0][:4]

    again = sweep(*grid, *RAY, f"hydra.sweep.dir={folder}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert starts(folder) == [count + (number not in finished) for number, count in enumerate(counts)]
    for number in range(4):
        assert values_of(folder / str(number)) == values_of(tmp_path / "here" / str(number))
    assert board_of(folder)[0]["mean"] == board_of(tmp_path / "here")[0]["mean"]
    assert not left_of(folder)
    until(lambda: not of_ray(tmp_path), "Ray dies with its sweep; its agents notice within a minute")


def test_ctrl_c_has_all_save_and_leaves_no_ray(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = started(*LONG, "sweep.engine=ray", f"hydra.sweep.dir={folder}")
    until(lambda: pid_of(folder, 0) and pid_of(folder, 1), "two trials train")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert states(folder) == ["PREEMPTED", "PREEMPTED"]
    for number in (0, 1):
        status = json.loads((folder / str(number) / "status.json").read_text())
        assert (folder / str(number) / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").exists()
    assert not of_ray(tmp_path)
    assert not left_of(folder)


def test_asha_on_ray_saves_half_of_the_steps(tmp_path: Path) -> None:
    done = sweep(*ASHA, *RAY, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert board_of(tmp_path)[0]["setting"] == "optimizer.lr=0.002"
    assert len(states(tmp_path)) == 6
    assert sum(steps_of(tmp_path)) <= 6 * 9 / 2


@pytest.fixture
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """Start a cluster of two nodes with one CPU each; gives it and its second node."""
    from ray.cluster_utils import Cluster

    least = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**least, "include_dashboard": False})
    yield cluster, cluster.add_node(**least)
    cluster.shutdown()


def test_a_node_that_dies_costs_no_trial(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path, two_nodes: tuple[Any, Any]
) -> None:
    (cluster, second), folder = two_nodes, tmp_path / "sweep"
    process = started("seed=1,2,3", *RUN, *RAY, f"sweep.ray_address={cluster.address}", f"hydra.sweep.dir={folder}")
    pids = [until(lambda number=number: pid_of(folder, number), f"trial {number} trains") for number in (0, 1)]
    nodes = [worker_of(pid).ppid() for pid in pids]
    assert len(set(nodes)) == 2, "one on each node"
    lost = nodes.index(second.all_processes["raylet"][0].process.pid)
    cluster.remove_node(second, allow_graceful=False)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert states(folder) == ["FINISHED"] * 3
    assert starts(folder)[lost] == 2
    assert [row["n"] for row in board_of(folder)] == ["3"]
    assert not any(holder_of(folder / str(number)) for number in range(3))
