"""What tests share: admitted configurations, small runs, tokenizers made on the spot."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from src.cli.environment import set_switches
from src.config.frozen import config_hash
from src.config.gate import admit
from src.config.job import Job
from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import StopRequest
from src.sweep.engines.local import OPTIONAL_MODULES, PRELOAD_MODULE, start_fork_server

set_switches()

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"

SMOLLM2 = Path(os.environ.get("TOWLINE_SMOLLM2", ROOT / "models" / "smollm2"))
"""A folder with SmolLM2-135M-Instruct, for tests that are marked slow."""

ROWS = tempfile.mkdtemp(prefix="towline-test-rows-")
"""Where this process's tests keep encoded rows, unless they say otherwise."""
atexit.register(shutil.rmtree, ROWS, ignore_errors=True)
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


LONGEST_FIRST = [
    *("test_processes.py", "test_sweep.py", "test_resume.py", "test_delivery.py", "test_run.py"),
    *("test_sweep_damage.py", "test_cache.py", "test_early_stopping.py", "test_secrets.py", "test_longer.py"),
    *("test_preflight.py", "test_damage.py", "test_tracking.py", "test_checkpoint.py", "test_predict.py"),
    *("test_forecast.py", "test_loop.py", "test_report_page.py", "test_soaks.py", "test_soak.py", "test_ensemble.py"),
    *("test_own_conf.py", "test_adapters.py", "test_composition.py", "test_positions.py", "test_benchmark.py"),
]
"""The files that take longest begin, so that no worker has one of them left when the other is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Look for garbage less often, and not in what the imports made: a tenth of the suite's time went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of a real pretrained chat model of 135M parameters, tied, with 49,152 tokens."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(f"SmolLM2-135M-Instruct is not in {SMOLLM2}; TOWLINE_SMOLLM2 names another folder")
    return SMOLLM2


@pytest.fixture(autouse=True)
def _project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """One process on the CPU in float32, seeded with 42."""
    cpu = RuntimeConfig(device=Device.cpu, deterministic=False)
    with start_runtime(cpu, MixedPrecision.no, 42, StopRequest()) as started:
        yield started


def admitted(*overrides: str) -> Job:
    """Admit one run without a tracker, unless the overrides say otherwise."""
    chosen = any(override.startswith(("tracking=", "rerun=")) for override in overrides)
    request = admit([*([] if chosen else ["tracking=none"]), f"data.cache_dir={ROWS}", *overrides])
    assert request.run is not None
    return request.run


NEEDS = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "bart")]
NEEDS += [*(name for names in OPTIONAL_MODULES.values() for name in names), "deepspeed", "tests.conftest"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([PRELOAD_MODULE, *NEEDS])
"""Where commands come from that the tests give by the dozen: a process that has imported what takes seconds."""
FORK_SERVER = "fork_server"
"""What a worker of pytest-xdist is told the address of that process by."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have the workers of pytest-xdist fork from one process, which imports while they collect the tests."""
    start_fork_server(NEEDS)
    node.workerinput[FORK_SERVER] = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]


def pytest_configure(config: pytest.Config) -> None:
    if FORK_SERVER in (given := getattr(config, "workerinput", {})):
        fork_from(given[FORK_SERVER])
        # sent along to what is forked; the server lives as long as the process that started it
        forkserver._forkserver._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # type: ignore[attr-defined]


def fork_from(server: str) -> None:
    """Have this process fork from a server that another one started."""
    own: Any = forkserver._forkserver  # type: ignore[attr-defined]
    own._forkserver_address, own.ensure_running = server, lambda: None
    forkserver.ensure_running = own.ensure_running


def towline(
    *arguments: str, main: Callable[[list[str]], int] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Give `python -m src.run` as a user would, in a process of its own; with an environment, one from nothing.

    `main` is that of another command.
    """
    if environment:
        return subprocess.run(
            [sys.executable, "-m", "src.run", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        code = ForkedCommand(arguments, *files, main=main).wait(300)
        out, err = (file.read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(arguments, code, out, err)


class ForkedCommand:
    """A command under way in a process of its own, forked from one that has imported what takes seconds.

    Args:
        out: what it prints goes there, to the end of a file; `err` likewise, the same if it is None.
        prepare: what the process does before it reads its command line; a function of a module.
        main: the command, that of src.run if it is None.
        environment: variables that it has besides those of the tests.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        out: Path | socket.socket,
        err: Path | None = None,
        prepare: Callable[[], object] | None = None,
        main: Callable[[list[str]], int] | None = None,
        **environment: str,
    ) -> None:
        self.arguments = arguments
        forkserver.ensure_running()
        server = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
        given = (tuple(arguments), os.environ | environment, out, err or out, prepare, main, server)
        self._process = FORKS.Process(target=_give, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it is under way."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.join()


def _give(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    out: Path | socket.socket,
    err: Path | socket.socket,
    prepare: Callable[[], object] | None,
    main: Callable[[list[str]], int] | None,
    server: str,
) -> None:
    fork_from(server)  # trials come from where this process does
    for number, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if isinstance(file, Path) else file.detach()
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    from src.cli.main import main as run

    if prepare is not None:
        prepare()
    sys.argv = [str(ROOT / "src" / "run.py"), *arguments]
    sys.exit((main or run)(list(arguments)))


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def write_config(folder: Path, frozen: dict[str, Any]) -> None:
    """Have a run's folder be one that was begun with another configuration."""
    (folder / "config.yaml").write_text(yaml.safe_dump(frozen), encoding="utf-8")
    starts = [line | {"config_hash": config_hash(frozen)} for line in read_lines(folder / "starts.jsonl")]
    write_lines(folder / "starts.jsonl", starts)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Have permissions count for this thread, and those that it starts, as they do for a user who is not root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3; effective, permitted, …
    if libc.capget(header, sets):
        pytest.skip(f"root's rights can't be looked at: {os.strerror(ctypes.get_errno())}")
    effective = sets[0]
    sets[0] = effective & ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        pytest.skip(f"root's rights can't be given up: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        sets[0] = effective
        libc.capset(header, sets)


@pytest.fixture
def rows_of_different_length(tmp_path: Path) -> Callable[..., str]:
    """Write a train file whose rows differ in length; 27 of them, so that a window of 8 is short at the end."""

    def write(count: int = 27) -> str:
        rows = [{"prompt": "ab" * (i % 5) + "=", "completion": "xyz"[: 1 + i % 3] * (1 + i % 4)} for i in range(count)]
        return write_lines(tmp_path / "train.jsonl", rows)

    return write


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sweeps draw nothing: test_ranking looks at pictures, and one takes as long as a trial here."""
    monkeypatch.setattr("src.sweep.sweeper.write_png", lambda *_: None)


@pytest.fixture
def swept(swept_and_drawn: Callable[..., int], no_pictures: None) -> Callable[..., int]:
    """Lead a sweep in this process, its trials in processes of their own; gives the exit code."""
    return swept_and_drawn


@pytest.fixture
def swept_and_drawn(tmp_path: Path) -> Callable[..., int]:
    """Do the same, with pictures."""

    def run(*arguments: str) -> int:
        from src.cli.hydra_main import run_trial
        from src.runtime.signals import StopRequest
        from src.sweep.engines.local import Workers
        from src.sweep.sweeper import lead
        from tests.sweeps import planned

        plan = planned(f"hydra.sweep.dir={tmp_path / 'sweep'}", *arguments)
        workers = Workers(run_trial, plan.config.n_jobs, 1, uses_gpus=False)
        return lead(plan, StopRequest(), workers)

    return run


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a sweep's command, in a session of its own; what is left of it at the end is killed."""
    from tests.sweeps import command

    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "src.run", *command(*arguments)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory with such options; mounted again, it gets them while it is in use."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        more = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{more}{options}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"a small file system can't be mounted: {error}")
        if done.returncode:
            pytest.skip(f"a small file system can't be mounted (that needs root): {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)
