"""Where time and memory go: sums without what is within, peaks, and the files of a traced run."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.config.job import Job
from src.runtime.profiling import WARM_UP, Part, profiled, region, totals_by_part
from src.runtime.session import Runtime
from tests.conftest import ROOT, admitted, towline


def test_a_piece_counts_once_and_within_an_evaluation_as_that() -> None:
    parts = [
        Part("forward", 0.0, 4.0),
        Part("head", 1.0, 3.0),
        Part("backward", 4.0, 10.0),
        Part("tracking", 10.0, 16.0),
        Part("evaluation", 11.0, 15.0),
        Part("head", 12.0, 13.0),
        Part("forward", 18.0, 19.0),
    ]
    changes = [(0.5, 100), (1.5, 50), (2.0, -120), (4.0, 500), (11.0, -500), (12.5, 7), (18.5, 1)]
    totals, span = totals_by_part(parts, changes)
    assert span == 19.0
    assert {name: total.seconds for name, total in totals.items()} == {
        "forward": 3.0, "head": 2.0, "backward": 6.0, "tracking": 2.0, "evaluation": 4.0, "other": 2.0,
    }  # fmt: skip
    assert {name: total.count for name, total in totals.items()} == {
        "forward": 2, "head": 1, "backward": 1, "tracking": 1, "evaluation": 1, "other": 0,
    }  # fmt: skip
    assert totals["forward"].peak_bytes == 530  # the end of one piece is the start of the next
    assert totals["head"].peak_bytes == 150
    assert totals["evaluation"].peak_bytes == 530  # what was held when it began


def job_of(folder: Path, num_traced: int | str) -> Job:
    return admitted("tracking=none", f"runtime.profile_steps={num_traced}", f"hydra.run.dir={folder}")


def allocating(log: list[str]) -> Iterator[int]:
    for number in range(WARM_UP + 4):
        with region("forward"):
            block = torch.ones(2**18)  # 1 MiB
            del block
        log.append("step")
        yield number


def test_steps_are_traced_after_those_that_warm_up_and_all_are_yielded(tmp_path: Path, runtime: Runtime) -> None:
    log: list[str] = []
    found = list(
        profiled(allocating(log), job_of(tmp_path, 2), runtime, lambda label, text: log.append(f"{label}: {text}"))
    )
    assert found == list(range(WARM_UP + 4))
    said = [line for line in log if line != "step"]
    assert len(said) == 2
    assert said[1].startswith("profile: 2 steps in")
    assert log.index(said[0]) == WARM_UP + 2  # at once, not at the end
    rows = {line.split("  ")[0]: line for line in said[1].split("\n")}
    assert re.search(r"forward .* 2 +\+1\.0 MiB", rows["forward"])
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("towline/forward") == names.count("towline/tracking") == 2


def test_too_few_steps_are_said_and_none_is_traced_unless_asked(tmp_path: Path, runtime: Runtime) -> None:
    said: list[str] = []
    assert list(
        profiled(iter(range(WARM_UP)), job_of(tmp_path, 5), runtime, lambda _, text: said.append(text))
    ) == list(range(WARM_UP))
    assert said == [f"no step was traced: the first {WARM_UP} warm up, and there were no more"]
    list(profiled(iter(range(9)), job_of(tmp_path, "null"), runtime, lambda _, text: said.append(text)))
    assert len(said) == 1
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("num_steps", [WARM_UP, WARM_UP + 1])
def test_a_run_that_ends_or_fails_while_it_is_traced_ends_as_it_would(num_steps: int) -> None:
    """In a process of its own, as a tracer that is not stopped ends the process with a segmentation fault."""
    code = f"""
from types import SimpleNamespace as Of
from src.runtime.profiling import profiled
def steps():
    yield from range({num_steps})
    raise InterruptedError
try:
    list(profiled(steps(), Of(config=Of(runtime=Of(profile_steps=9))), Of(is_main=True), print))
except InterruptedError:
    print("saved")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr


def test_a_trace_that_can_not_be_written_ends_no_run(tmp_path: Path, runtime: Runtime) -> None:
    (tmp_path / "profile").write_text("in the way")
    said: list[str] = []
    steps = profiled(allocating([]), job_of(tmp_path, 1), runtime, lambda _, text: said.append(text))
    assert list(steps) == list(range(WARM_UP + 4))
    assert said[-1].startswith("not written: ")


def test_the_parts_of_a_run_are_in_its_table(tmp_path: Path) -> None:
    more = ("debug=profile", "tracking=none", "model=tiny_llama", "evaluation.metrics=[]", "data.limit=96")
    done = towline(*more, "training.per_device_train_batch_size=4", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "run" / "profile" / "table.md").read_text()
    shares = dict(re.findall(r"^\| (\w+) \| [\d.]+ s \| ([\d.]+) % \|", table, re.MULTILINE))
    assert set(shares) >= {"data", "forward", "head", "backward", "optimizer", "evaluation", "checkpoint", "tracking"}
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=1)
    assert "`aten::mm`" in table
    assert re.search(r"^profile +10 steps in", done.stdout, re.MULTILINE)
