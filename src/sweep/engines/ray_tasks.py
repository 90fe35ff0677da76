"""Trials as plain Ray tasks, on a cluster that is there (`sweep.ray_address`) or one that this process starts and ends.

A Ray worker runs many trials, each in a process that it forks as this machine's sweeps do, so no trial imports torch by
itself or finds anything that another one left. No torch here.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.config.schema import Device
from src.errors import SweepError, one_line
from src.runtime.devices import visible_gpus
from src.runtime.signals import STOP_SIGNALS
from src.sweep.engines.engine import RunTrial, TrialJob
from src.sweep.engines.local import GRACE_SECONDS, Workers, start_fork_server
from src.sweep.engines.remote import AT_ONCE, NOT_SHARED, POLL_SECONDS, STOP_FILE, Order, Remote
from src.sweep.plan import Plan

STORE_BYTES = 80 * 2**20  # the least that Ray's object store takes; trials keep nothing in it
NODE_SECONDS = 60.0  # that a node may take to say what it sees


class RayTasks(Remote):
    """Runs up to `n_jobs` trials at the same time, each a Ray task with its share of the cluster's CPUs and GPUs."""

    def __init__(self, plan: Plan, run_trial: RunTrial, modules: Sequence[str]) -> None:
        super().__init__(plan.folder, plan.config.n_jobs, run_trial)
        self._address, self._modules, self._runtime = plan.config.ray_address, modules, plan.sample.runtime
        self._ray = _library()

    def open(self) -> None:
        address = self._address or "local"
        of_cluster = {"num_cpus": len(os.sched_getaffinity(0)), "num_gpus": len(visible_gpus()),
                      "object_store_memory": STORE_BYTES, "include_dashboard": False}  # fmt: skip
        more = {} if self._address else of_cluster
        try:
            with _signals_kept():
                self._ray.init(address=address, log_to_driver=False, logging_level="error", **more)
            self._check_nodes()
        except (self._ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise SweepError(f"Ray can't be used (sweep.ray_address={self._address}): {one_line(error)}") from error
        self._task = self._ray.remote(**self._share(), max_retries=0)(_run)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _share(self) -> dict[str, float]:
        """Return the CPUs and GPUs that Ray sets aside for a trial, which are on one node."""
        cpus, gpus = ([node["Resources"].get(kind, 0.0) for node in self._nodes()] for kind in ("CPU", "GPU"))
        processes = self._runtime.num_processes
        given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        wanted = int(given) if given.isdecimal() else int(sum(cpus)) // (self._n_jobs * processes)
        self._threads = max(1, min(wanted, int(max(cpus)) // processes))
        num_gpus = 0.0 if self._runtime.device is Device.cpu else min(processes, max(gpus))
        return {"num_cpus": min(self._threads * processes, max(cpus)), "num_gpus": num_gpus}

    def _check_nodes(self) -> None:
        """Check that every node sees the sweep's folder; SweepError names those that don't."""
        by_node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = self._ray.remote(num_cpus=0, max_retries=0)(_sees)
        seen = {
            node["NodeManagerAddress"]: look.options(scheduling_strategy=by_node(node["NodeID"], soft=False)).remote(
                self._folder, os.getcwd()
            )
            for node in self._nodes()
        }
        said = self._ray.get(list(seen.values()), timeout=NODE_SECONDS)
        if blind := [f"{name} ({place})" for name, place in zip(seen, said, strict=True) if place]:
            raise SweepError(f"not all nodes see what this one does: {', '.join(blind)}; {NOT_SHARED}")

    def _submit(self, order: Order) -> Any:
        return self._task.remote(self._run_trial, order, self._modules, self._threads)

    def _rest(self, handles: Sequence[Any], seconds: float) -> None:
        self._ray.wait(list(handles), timeout=seconds)

    def _outcome(self, handle: Any) -> int | str | None:
        ready, _ = self._ray.wait([handle], timeout=0)
        return self._ray.get(handle) if ready else None

    def stop_at_once(self) -> None:
        super().stop_at_once()
        if handles := [handle for _, handle in self._working.values()]:
            self._ray.wait(handles, num_returns=len(handles), timeout=2 * GRACE_SECONDS)

    def close(self) -> None:
        with _signals_kept():
            self._ray.shutdown()


def _library() -> Any:
    """Import Ray, which sends no statistics."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what it will do one day
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        hint = "pip install -c constraints.txt -e '.[ray]'"
        raise SweepError(f"sweep.engine = ray needs Ray, which is not installed: {hint}") from error
    return ray


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep this process's handlers of signals, where Ray would set its own."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _sees(folder: Path, directory: str) -> str:
    """Return which of what the sweep needs a node does not see, or ''."""
    return next((str(one) for one in (folder, directory) if not os.path.isdir(one)), "")


def _run(run_trial: RunTrial, order: Order, modules: Sequence[str], threads: int) -> int | str:
    """Run a trial in a process that this Ray worker forks; return its exit code, or why it can't run here."""
    job = order.take()
    if not isinstance(job, TrialJob):
        return job
    os.environ["OMP_NUM_THREADS"] = str(threads)
    vars(sys.modules["__main__"]).pop("__file__", None)  # else the trial's process would run Ray's main module
    start_fork_server(modules)
    workers, stop = Workers(run_trial, 1, 1, uses_gpus=False), order.folder / STOP_FILE  # Ray has chosen the GPUs
    workers.start(job)
    while not (ended := workers.wait(POLL_SECONDS)):
        if stop.exists():
            workers.stop_at_once() if stop.read_text() == AT_ONCE else workers.ask_to_stop()
    return ended[0][1]
