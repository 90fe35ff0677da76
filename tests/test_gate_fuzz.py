"""The gate under command lines that no person would write: admitted or refused, never ended in a traceback."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from benchmarks.conf_fuzz import ask, files, lines
from src.config.gate import admit, admit_finished
from src.errors import ConfigError
from src.sweep.plan import plan_sweep
from tests.conftest import admitted, towline

SEED, NUM_LINES, NUM_FILES = 17, 40, 40


def test_no_command_line_ends_in_a_traceback() -> None:
    for number, line in enumerate(lines(SEED, NUM_LINES)):
        try:
            ask(line, SEED)
        except Exception as error:
            raise AssertionError(f"line {number} of seed {SEED}: {json.dumps(line)}") from error


def test_no_mutated_file_ends_in_a_traceback(tmp_path: Path) -> None:
    said = set()
    for line in files(SEED, NUM_FILES, tmp_path):
        try:
            said.add(ask(line, SEED))
        except Exception as error:
            text = next(Path(line[line.index("--config-dir") + 1]).rglob("mutated.yaml")).read_bytes()
            raise AssertionError(f"{line}: {text!r}") from error
    assert said == {"admitted", "refused"}


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        admitted(*arguments)
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.type=[1]", "optimizer.type"),
        ("deepspeed.zero_optimization.stage=[2]", "deepspeed.zero_optimization.stage"),
        ("deepspeed.zero_optimization.stage=7", "deepspeed.zero_optimization.stage"),
        ("data.mixture={a: 3}", "data.mixture"),
        ("data.mixture={a: {weight: [1]}}", "data.mixture.a.weight"),
        ("data.thought_pattern='a{99999999999}'", "data.thought_pattern"),
        ("data.thought_pattern='" + "(" * 5000 + "'", "data.thought_pattern"),
        ("experiment=[null]", "experiment"),
        ("hydra.run.dir=" + "안" * 100, "hydra.run.dir"),
        ("data.train_files=[" + "x" * 300 + ".jsonl]", "data.train_files"),
        ("tokens.pad_to_multiple_of=99999999999", "tokens.pad_to_multiple_of"),
        ("data.preprocessing_num_workers=1000000", "data.preprocessing_num_workers"),
        ("runtime.num_processes=1000000", "runtime.num_processes"),
        ("seed=99999999999999999999", "seed"),
        ("seed=1e400", "seed"),
    ],
)
def test_what_can_only_fail_later_is_refused_by_key(override: str, key: str) -> None:
    extra = ["deepspeed=zero2"] if override.startswith("deepspeed.") else []
    assert key in refusal("tracking=none", *extra, override)


@pytest.mark.parametrize("override", ["adapter.r=100000000", "adapter.r=0"])
def test_a_rank_has_bounds(override: str) -> None:
    assert "adapter.r" in refusal("tracking=none", "adapter=lora", "export.merge=true", override)


@pytest.mark.parametrize("temperature", ["1e-300", "0"])
def test_a_temperature_has_a_lower_bound(temperature: str) -> None:
    assert "generation.temperature" in refusal("generation=sample", f"generation.temperature={temperature}")


def test_links_to_themselves_and_files_in_a_folders_place_are_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    file = tmp_path / "file"
    file.write_text("")
    for place in (loop, loop / "x", file / "x", file):
        assert "hydra.run.dir" in refusal(f"hydra.run.dir={place}")
        assert "rerun" in refusal(f"rerun={place}")
        assert "data.train_files" in refusal(f"data.train_files=['{place}/a.jsonl']")


def test_a_grid_of_twenty_million_points_is_refused_by_counting() -> None:
    for axes in (["seed=range(0,20000000)"], ["seed=range(0,5000)", "optimizer.lr=range(1,5000)"]):
        started = time.thread_time()
        with pytest.raises(ConfigError, match=r"sweep\.max_points"):
            plan_sweep(admit(["-m", *axes]).line)
        assert time.thread_time() - started < 5


def test_a_broken_file_that_nobody_chose_is_a_warning(tmp_path: Path) -> None:
    own = tmp_path / "data"
    own.mkdir()
    (own / "broken.yaml").write_text("format: text\n  - indented: [\n")
    for arguments in (["--cfg", "job"], ["--help"]):
        done = towline(f"--config-dir={tmp_path}", *arguments)
        assert (done.returncode, done.stderr.count("broken.yaml")) == (0, 1), done.stderr
        assert "line 2" in done.stderr
    chosen = towline(f"--config-dir={tmp_path}", "data=broken")
    assert chosen.returncode == 2
    assert "broken.yaml" in chosen.stderr
    assert "line 2" in chosen.stderr


def test_the_frozen_config_of_a_folder_may_be_anything(tmp_path: Path) -> None:
    frozen = admitted("tracking=none").frozen
    draw = random.Random(SEED)
    (tmp_path / "model").mkdir()
    (tmp_path / "status.json").write_text('{"state": "FINISHED", "step": 1}')
    for _ in range(10):
        other = yaml.safe_load(draw.choice(["3", "[1]", "null", "{a: {}}", "text", "{type: [1]}"]))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(frozen | {draw.choice(sorted(frozen)): other}))
        with suppress(ConfigError):
            admit([f"rerun={tmp_path}"])
        with suppress(ConfigError):
            admit_finished([f"run={tmp_path}"], "predict")
