"""What commands have in common: environment switches, and ways to end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.cli import environment
from src.cli.exits import guarded
from src.errors import ConfigError, Interrupted, ModelError, TrainingError
from src.runtime.launch import has_lost_a_peer
from src.runtime.signals import stop_on_signals
from tests.conftest import ROOT


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of what set_switches sets."""
    for name in (*environment.SWITCHES, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    return monkeypatch


def test_switches_leave_what_the_environment_says(unset: pytest.MonkeyPatch) -> None:
    unset.setenv("TOKENIZERS_PARALLELISM", "true")
    unset.setenv("OMP_WAIT_POLICY", "passive")
    environment.set_switches()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert all(os.environ[name] for name in environment.SWITCHES)
    assert "GOMP_SPINCOUNT" not in os.environ
    unset.delenv("OMP_WAIT_POLICY")
    unset.setenv("GOMP_SPINCOUNT", "7")
    environment.set_switches()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    ("num_running", "threads", "quota", "spins"),
    [
        (1, None, None, True),
        (1, None, "max 100000", True),
        (1, None, "400000 100000", True),
        (1, None, "390000 100000", False),  # a container with less time than four cores have
        (1, "3", "390000 100000", True),
        (2, None, None, False),  # another thread runs
        (2, "3,1", None, True),
        (3, "3", None, False),
    ],
)
def test_threads_spin_only_on_cores_of_their_own(
    unset: pytest.MonkeyPatch, tmp_path: Path, num_running: int, threads: str | None, quota: str | None, spins: bool
) -> None:
    load, cpu_quota = tmp_path / "loadavg", tmp_path / "cpu.max"
    load.write_text(f"0.08 0.03 0.16 {num_running}/79 30642\n")
    if quota is not None:
        cpu_quota.write_text(quota + "\n")
    if threads is not None:
        unset.setenv("OMP_NUM_THREADS", threads)
    unset.setattr(environment, "LOAD", load)
    unset.setattr(environment, "CPU_QUOTA", cpu_quota)
    unset.setattr(os, "cpu_count", lambda: 4)
    unset.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    environment.set_switches()
    assert os.environ.get("GOMP_SPINCOUNT") == (None if spins else "1000")


def test_threads_spin_less_where_the_load_cannot_be_seen(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unset.setattr(environment, "LOAD", tmp_path / "no")
    environment.set_switches()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("a key"), 2, "a key\n"),
        (ModelError("a model"), 2, "\na model\n"),
        (TrainingError("a loss"), 1, "\na loss\n"),
        (Interrupted("SIGTERM"), 75, "\nStopped by SIGTERM. Half is done.\n"),
        (KeyboardInterrupt(), 75, "\nStopped by Ctrl-C. Half is done.\n"),
        (OSError(errno.ENOSPC, "No space", "a.json"), 1, "\nThe disk is full: No space. Make room.\n"),
        (OSError(errno.EACCES, "No permission", "a.json"), 2, "\na.json can't be written or read: No permission\n"),
    ],
)
def test_each_way_to_end_has_its_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail, when_stopped="Half is done.", when_full="Make room.") == code
    assert capsys.readouterr().err == words
    assert guarded(lambda: 3) == 3


def test_a_fault_of_the_program_is_shown_as_one() -> None:
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(fail)


def test_a_signal_waits_within_a_block_only() -> None:
    with stop_on_signals() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked() == "SIGTERM"
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()
        assert not stop.is_deferred


def test_a_lost_peer_is_told_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import DistNetworkError

    lost = [RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"), DistNetworkError("gone")]
    assert not any(map(has_lost_a_peer, lost))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert all(map(has_lost_a_peer, lost))
    assert not any(map(has_lost_a_peer, [RuntimeError("shapes differ"), ValueError("by peer")]))


def test_a_folder_is_looked_at_before_torch_is_imported() -> None:
    heavy = ("torch", "transformers", "mlflow", "accelerate", "pyarrow")
    code = f"import src.cli.start, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_command_outlives_what_reads_its_output() -> None:
    program = (
        "import sys\n"
        "from src.cli.entry import as_command\n"
        "def main():\n"
        "    for stream in (sys.stdout, sys.stderr):\n"
        "        for _ in range(2):\n"
        "            print('x' * 100_000, file=stream, flush=True)\n"
        "    return 3\n"
        "as_command(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 3
