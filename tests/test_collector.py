"""Python's collector rests while libraries are imported and when the process ends, and looks in between."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from src import predict, preflight, run
from src.cli import main, start
from src.evaluation import predicting
from src.inspection import preview
from src.sweep import sweeper
from src.sweep.engines.engine import TrialJob
from src.sweep.engines.local import PRELOAD_MODULE, Workers
from src.tracking import lock
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


def test_commands_rest_from_their_first_line() -> None:
    given = "import gc, runpy, sys\ntry: runpy.run_module(sys.argv[1], run_name='__main__')\nexcept SystemExit: {tell}"
    command = [sys.executable, "-c", given.format(tell="print(gc.isenabled())")]
    for entry in ("src.run", "src.preflight", "src.predict"):
        done = subprocess.run([*command, entry, "nonsense=1"], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.split() == ["False"], entry


def test_what_takes_long_looks_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **options: Any) -> Any:
            looks.append(gc.isenabled())
            return work(*args, **options)

        return do

    run_dir, in_use = tmp_path / "run", tmp_path / "in-use"
    tiny = ["debug=smoke", "tracking=none", f"data.cache_dir={ROWS}"]
    commands = {
        (run, "train"): (main.main, [*tiny, f"hydra.run.dir={run_dir}"]),
        (predicting, "predict_rows"): (predict.main, [f"run={run_dir}", "data.limit=1"]),
        (preview, "build_data"): (preflight.main, [*tiny, f"hydra.run.dir={tmp_path / 'ahead'}"]),
        (sweeper, "plan_sweep"): (main.main, ["-m", *tiny, "sweep.dry_run=true", "seed=1,2"]),
        (start, "hold"): (main.main, [*tiny, f"hydra.run.dir={in_use}", "runtime.num_processes=2"]),
    }
    for (module, name), (entry, arguments) in commands.items():
        looks.clear()
        with monkeypatch.context() as patched, lock.hold(in_use):
            patched.setattr(module, name, watched(getattr(module, name)))
            gc.disable()
            try:
                code = entry(arguments)
            finally:
                gc.enable()
                gc.unfreeze()
        assert code == (2 if name == "hold" else 0), arguments
        assert looks == [True], arguments


def tell_how_it_begins(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    lacking = [name for name in sys.modules[PRELOAD_MODULE].NEEDED if name not in sys.modules]
    found = {"collects": gc.isenabled(), "lacking": lacking}
    Path(run_dir, "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def test_a_trial_begins_with_all_imported_and_without_looking_through_it(tmp_path: Path) -> None:
    workers = Workers(tell_how_it_begins, 1, 1, uses_gpus=False)
    workers.start(TrialJob(0, {}, tmp_path))
    assert [code for _, code in workers.wait(120)] == [0]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found == {"collects": False, "lacking": []}
