"""Python's collector rests while libraries are imported and when the process ends, and looks in between."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from src import predict, preflight, run
from src.sweep.workers import Job, Workers
from tests.conftest import ROOT, ROWS

BEGUN = """
import gc, sys
from src.runtime.collector import collect_from_here, rest_while_importing

class Loop:
    def __init__(self, name):
        self.name, self.itself = name, self
    def __del__(self):
        print("collected", self.name)

{begin}
Loop("imported")
gc.collect() if gc.isenabled() else print("rests")
collect_from_here()
Loop("made later")
gc.collect()
kept = Loop("kept to the end")
del kept
print("ends")
"""


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        ("", ["collected imported", "collected made later", "ends", "collected kept to the end"]),
        ("rest_while_importing()", ["rests", "collected made later", "ends"]),
    ],
)
def test_what_was_imported_is_not_looked_at_and_nothing_is_at_the_end(begin: str, said: list[str]) -> None:
    command = [sys.executable, "-c", BEGUN.format(begin=begin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == said


def test_a_run_its_preflight_and_its_predictions_look_for_garbage(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    line = ["debug=smoke", "tracking=none", f"data.cache_dir={ROWS}", folder]
    mains = {run.main: line, preflight.main: line[:-1], predict.main: [f"run={tmp_path / 'run'}", "data.limit=1"]}
    for main, arguments in mains.items():
        gc.disable()
        try:
            assert main(arguments) == 0
            assert gc.isenabled(), main
        finally:
            gc.enable()
            gc.unfreeze()


def tell_whether_it_collects(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    Path(run_dir, "collects").write_text(str(gc.isenabled()), encoding="utf-8")
    return 0


def test_a_trial_begins_without_looking_through_what_the_fork_server_imported(tmp_path: Path) -> None:
    workers = Workers(tell_whether_it_collects, 1, 1, uses_gpus=False)
    workers.start([Job(0, {}, tmp_path)])
    while not (ended := workers.wait(10)):
        pass
    assert [code for _, code in ended] == [0]
    assert (tmp_path / "collects").read_text(encoding="utf-8") == "False"
