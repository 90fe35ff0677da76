"""A small share of the soaks in benchmarks/, with seeds that draw the same places every time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SHARE = """
from benchmarks import crash_soak, damage_soak
from benchmarks.soaking import get_ready

get_ready()
kills = ["--kills=2", "--seed=1", "--variants=best", "--jobs=1"]
damages = ["--damages=2", "--seed=1", "--mlflow=0", "--jobs=1"]
raise SystemExit(crash_soak.main(kills, is_ready=True) or damage_soak.main(damages, is_ready=True))
"""


def test_kills_at_drawn_calls_and_drawn_damages_cost_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHARE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, " in done.stdout
    assert re.search(r"2 damages, \d+ commands, ", done.stdout)
    assert not list(tmp_path.glob("towline-*")), "what the soaks made is removed"
