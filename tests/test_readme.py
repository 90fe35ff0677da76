"""What README says is so: its commands are admitted, its refusal is the real one, its tree exists."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from src.config.gate import admit
from src.sweep.plan import plan_sweep
from tests.conftest import ROOT, admitted, towline

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(start: str) -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(start)]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What the commands name that a clean clone does not have, and what stands for it here."""
    frozen = tmp_path / "mine"
    frozen.mkdir()
    (frozen / "config.yaml").write_text(yaml.safe_dump(admitted().frozen))
    model = tmp_path / "gsm8k"
    shutil.copytree(ROOT / "assets" / "tiny_llama", model)
    (model / "model.safetensors").touch()
    shutil.copytree(model, frozen / "model")
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    return {
        "rerun=outputs/mine": f"rerun={frozen}",
        "init_from=outputs/mine": f"init_from={frozen}",
        "models/gsm8k": str(model),
        "[train.jsonl]": f"[{tmp_path}/train.jsonl]",
    }


@pytest.mark.parametrize("command", commands("python -m src.run"))
def test_every_run_command_is_admitted(command: str, places: dict[str, str]) -> None:
    for written, here in places.items():
        command = command.replace(written, here)
    request = admit(shlex.split(command, comments=True)[3:])
    assert plan_sweep(request.line).admitted if request.line.flags.multirun else request


@pytest.mark.parametrize("command", commands("python -m src.preflight"))
def test_every_preflight_command_is_admitted(command: str) -> None:
    assert admit(shlex.split(command, comments=True)[3:], "preflight")


def test_there_are_commands_to_check() -> None:
    assert len(commands("python -m src.run")) >= 9


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_refusal_is_the_real_one() -> None:
    (block,) = [block for block in blocks("text") if block.startswith("$ ")]
    command, _, expected = block.partition("\n")
    done = towline(*shlex.split(command)[4:])
    assert (done.returncode, done.stderr) == (2, expected)


def test_the_tree_exists() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("conf/ ")]
    top = ""
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+/|[\w.]+\.(?:py|yaml)", line.partition("  the groups")[0].split("   ")[0] + " ")
        if not line.startswith(" "):
            top = ""
        for name in names:
            assert (ROOT / top / name).exists(), f"{top}{name}"
        if not line.startswith(" ") and len(names) == 1:
            top = names[0]
