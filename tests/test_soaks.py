"""A small share of the soaks in benchmarks/, with seeds that draw the same places every time."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.conftest import ForkedCommand


def share(_arguments: list[str]) -> int:
    from benchmarks import crash_soak, damage_soak
    from benchmarks.soaking import get_ready

    tempfile.tempdir = None  # TMPDIR counts
    get_ready()
    kills = ["--kills=2", "--seed=1", "--variants=best", "--jobs=1"]
    damages = ["--damages=2", "--seed=1", "--mlflow=0", "--jobs=1"]
    return crash_soak.main(kills, is_ready=True) or damage_soak.main(damages, is_ready=True)


def test_kills_at_drawn_calls_and_drawn_damages_cost_nothing(tmp_path: Path) -> None:
    said, folder = tmp_path / "said.txt", tmp_path / "soaks"
    folder.mkdir()
    code = ForkedCommand([], said, main=share, TMPDIR=str(folder)).wait(300)
    text = said.read_text(encoding="utf-8")
    assert code == 0, text
    assert "2 kills, " in text
    assert re.search(r"2 damages, \d+ commands, ", text)
    assert not list(folder.glob("towline-*")), "what the soaks made is removed"
