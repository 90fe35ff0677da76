"""Real signals at real processes: at moments that are steps, so that no machine is too fast or too slow for them.

What a run prints goes through a socket that holds a few lines. It can't be further than these ahead of what the test
has read, so a signal that is sent at a line meets the run a few steps behind it at most.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from src.checkpoint.manifest import newest_resumable, problems_of
from src.config.places import folder_of
from tests.conftest import ForkedCommand, read_lines, towline
from tests.test_resume import assert_same

RUN = (
    "tracking=none",
    "data.batching=padded",
    "data.limit=70",  # eighteen windows an epoch, the last one short
    "data.thought_dropout=0.3",
    "data.thought_schedule={tokens_per_epoch: 3, smoothing: 0.5}",
    "training.max_train_steps=40",
    "training.per_device_train_batch_size=1",
    "training.per_device_eval_batch_size=4",
    "training.gradient_accumulation_steps=4",
    "training.logging_steps=2",
    "evaluation.eval_steps=5",
    "evaluation.max_samples=6",
    "evaluation.sample_steps=7",
    "evaluation.sample_prompts=2",
    "generation.max_new_tokens=4",
    "checkpoint.checkpointing_steps=3",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = towline(*RUN, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def started(run_dir: Path) -> Iterator[tuple[ForkedCommand, socket.socket]]:
    """Start the run as a user would, and give it with what it prints; it does not outlive the block."""
    errors = run_dir.with_name("errors.txt")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it the least that it allows
            process = ForkedCommand([*RUN, f"hydra.run.dir={run_dir}"], theirs, errors)
        try:
            yield process, ours
        finally:
            process.kill()
    assert "Traceback" not in errors.read_text()


def await_line(output: socket.socket, beginning: str) -> None:
    """Read what a run prints up to a line that begins like this, and no further."""
    with output.makefile("rb", buffering=0) as lines:
        assert any(re.match(beginning, line.decode()) for line in lines), f"the run ended without {beginning!r}"


def signalled(run_dir: Path, number: signal.Signals, line: str) -> int:
    """Start the run, send it a signal when it has printed a line that begins like this, and give its exit code."""
    with started(run_dir) as (process, output):
        await_line(output, line)
        process.send_signal(number)
        while output.recv(1 << 16):
            pass
        return process.wait()


def killed_while_saving(run_dir: Path) -> None:
    """Start the run and kill it while there is a checkpoint that is not yet whole.

    It only goes on in between two looks, so what was seen is still so when it is killed.
    """
    with started(run_dir) as (process, output):
        await_line(output, "step ")
        output.setblocking(False)
        while True:
            process.send_signal(signal.SIGSTOP)
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                assert process.poll() is None, "the run ended and was never seen to save"
            if any((run_dir / "checkpoints").glob(".step-*.part")):
                return
            with suppress(BlockingIOError):
                output.recv(64)  # less than a line, so that it is not far ahead here either
            process.send_signal(signal.SIGCONT)
            time.sleep(0.001)


def resumed_steps(run_dir: Path) -> list[int | None]:
    return [line["resumed_step"] for line in read_lines(run_dir / "starts.jsonl")]


def test_each_sigterm_saves_the_step_and_nothing_is_other_in_the_end(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved = []
    for line in ("step +4/", "  evaluated at step", "run ", "    answer "):  # "run": nothing is set up yet
        assert signalled(run, signal.SIGTERM, line) == 75
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["cause"]) == ("PREEMPTED", "stopped by SIGTERM")
        assert not list(problems_of(folder_of(run / "checkpoints", status["step"])))
        assert newest_resumable(run / "checkpoints") == status["step"]
        saved.append(status["step"])
    assert towline(*RUN, f"hydra.run.dir={run}").returncode == 0
    assert saved[2] == saved[1]
    assert 4 <= saved[0] < saved[1] < saved[3] < 40
    assert {*resumed_steps(run)} == {None, *saved}
    assert_same(straight, run)


def test_sigkill_at_a_step_in_a_save_and_in_an_evaluation_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert signalled(run, signal.SIGKILL, "step +8/") == -9
    killed_while_saving(run)
    assert list((run / "checkpoints").glob(".step-*.part"))
    assert signalled(run, signal.SIGKILL, "  evaluated at step") == -9
    assert towline(*RUN, f"hydra.run.dir={run}").returncode == 0
    steps = resumed_steps(run)
    assert steps[0] is None
    assert None not in steps[1:]
    assert steps[1:] == sorted(steps[1:])
    assert_same(straight, run)
