"""What commands have in common: environment switches, and ways to end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from src.cli import environment
from src.cli.exits import guarded
from src.errors import ConfigError, Interrupted, ModelError, TrainingError
from src.runtime.launch import has_lost_a_peer
from src.runtime.signals import stop_on_signals
from tests.conftest import ROOT


def test_switches_leave_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.SWITCHES, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    environment.set_switches()
    assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["GOMP_SPINCOUNT"]) == ("true", "1000")
    assert all(os.environ[name] for name in environment.SWITCHES)
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    environment.set_switches()
    assert "GOMP_SPINCOUNT" not in os.environ


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
