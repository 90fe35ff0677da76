"""Early stopping: a run ends at the evaluation that the rule names, also where it was resumed, and is a whole run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from src.checkpoint.manifest import entry_of, read_manifest
from src.cli.exits import guarded_run as guarded
from src.config.frozen import config_hash
from src.runtime.signals import StopRequest
from src.training import saving
from src.training.early_stopping import EarlyStopping
from tests.conftest import admitted, read_lines, write_config
from tests.sweeps import states
from tests.test_gate import refusal
from tests.test_resume import LORA, Fate, Killed, assert_same, plain, start

TINY = (
    *("data.limit=24", "training.num_train_epochs=2", "training.per_device_train_batch_size=4"),  # twelve steps
    *("training.per_device_eval_batch_size=4", "training.logging_steps=1", "evaluation.eval_steps=2"),
    *("evaluation.max_samples=6", "evaluation.sample_steps=null", "evaluation.sample_prompts=1"),
    *("evaluation.metrics=[]", "generation.max_new_tokens=4", "checkpoint.checkpointing_steps=4"),
)
ONLY_THE_FIRST = "training.early_stopping_threshold=100"
"""Nothing is as much better as the first evaluation, after step 2."""


def patience(count: int | str) -> tuple[str, str]:
    return f"training.early_stopping_patience={count}", ONLY_THE_FIRST


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run without early stopping."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, *TINY)
    return folder


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run, which stops after step 6, the second evaluation without an improvement."""
    folder = tmp_path_factory.mktemp("early") / "run"
    start(folder, *TINY, *patience(2))
    return folder


@pytest.fixture
def stopped(early: Path, tmp_path: Path) -> Path:
    return shutil.copytree(early, tmp_path / "run")


# The rule

RISING = "checkpoint.metric_for_best_model=eval/validation/exact_match"


@pytest.mark.parametrize(
    ("overrides", "values", "ends_at"),
    [
        (["training.early_stopping_patience=1"], [3, 2, 1, 1, 0], 4),
        (["training.early_stopping_patience=2"], [3, 2, 2.5, 1, 1, 2, 0], 6),
        (["training.early_stopping_patience=3"], [3, 4, 5, 2, 2, 2, 2], 7),
        (["training.early_stopping_patience=2"], [5, 4, 3, 2, 1], None),
        (["training.early_stopping_patience=null"], [1, 2, 3, 4, 5, 6], None),
        (["training.early_stopping_patience=2", "training.early_stopping_threshold=1"], [5, 4.5, 4.1], 3),
        (["training.early_stopping_patience=2", "training.early_stopping_threshold=1"], [5, 4.5, 3.9, 3.0, 2.95], 5),
        (["training.early_stopping_patience=2", "training.early_stopping_threshold=1"], [5, 4.5, 3.9, 2.8, 2.7], None),
        (["training.early_stopping_patience=2"], [math.nan, math.nan, 1], 2),
        (["training.early_stopping_patience=2"], [1, math.nan, None], 3),
        (["training.early_stopping_patience=2"], [1, math.inf, 0.5, math.nan, 2], 5),
        (["training.early_stopping_patience=1", RISING], [0.1, 0.2, 0.3, 0.3], 4),
        (["training.early_stopping_patience=2", RISING, "checkpoint.greater_is_better=false"], [3, 4, 5], 3),
    ],
)
def test_it_counts_evaluations_since_the_last_improvement(
    overrides: list[str], values: Sequence[float | None], ends_at: int | None
) -> None:
    config = admitted("evaluation.eval_steps=1", *overrides).config
    metric = config.checkpoint.metric_for_best_model
    stopping = EarlyStopping(config, [])
    found = [stopping.add(n, {metric: value, "train/loss": 1}) for n, value in enumerate(values, 1)]
    assert next((n for n, ends in enumerate(found, 1) if ends), None) == ends_at
    lines = [{"step": n, metric: value} for n, value in enumerate(values[:ends_at], 1)]
    assert EarlyStopping(config, lines).is_reached == (ends_at is not None)
    assert not EarlyStopping(config, lines[:-1]).is_reached
    assert not EarlyStopping(config, [*lines[:-1], {"step": 9, "train/loss": 1}]).is_reached  # no evaluation


# The run


def test_the_run_is_the_whole_one_up_to_there_and_comes_to_its_end(early: Path, whole: Path) -> None:
    ours, theirs = ([plain(line) for line in read_lines(run / "metrics.jsonl")] for run in (early, whole))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert ours[:5] == theirs[:5]  # the schedule is that of all twelve steps
    assert theirs[5].items() <= ours[5].items()
    assert {name for name in ours[5].keys() - theirs[5].keys() if not name.startswith("eval/test/")} == set()
    assert "eval/test/loss" in ours[5]
    ended = status(early)
    assert (ended["state"], ended["step"], ended["num_steps"]) == ("FINISHED", 6, 6)
    assert ended["cause"].startswith("stopped early: eval/validation/loss did not improve by more than 100 in 2 eval")
    assert "at step 2" in ended["cause"]
    assert json.loads((early / "summary.json").read_text())["steps"] == 6
    assert [line["step"] for line in read_lines(early / "samples.jsonl")] == [6]
    kept, exported = (
        load_file(early / place / "model.safetensors") for place in ("checkpoints/step-00000006", "model")
    )
    assert all(torch.equal(tensor, kept[name]) for name, tensor in exported.items() if name in kept)


@pytest.fixture(
    scope="module", params=[("checkpoint.checkpointing_steps=2",), LORA], ids=["saved there anyway", "lora"]
)
def never_killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that stops early, and what it was asked for."""
    asked, straight = [*TINY, *patience(2), *request.param], tmp_path_factory.mktemp("straight")
    start(straight, *asked)
    return straight, asked


@pytest.mark.parametrize("fates", [[2], [5], [9], [12], [3, 6]], ids=str)
def test_a_run_that_is_killed_and_resumed_stops_at_the_same_step(
    tmp_path: Path, fates: list[int], never_killed: tuple[Path, list[str]]
) -> None:
    straight, asked = never_killed
    for number, at in enumerate(fates):
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            start(tmp_path / "run", *asked, fate=Fate(at, dead=number % 2 == 0))
        assert type(caught.value).__name__ in ("Killed", "Interrupted")
    start(tmp_path / "run", *asked)
    assert_same(tmp_path / "run", straight)
    assert status(tmp_path / "run")["cause"] == status(straight)["cause"]


def killed(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("point", ["export", "exported_digests"])
def test_one_that_dies_while_it_is_exported_stops_there_again(
    early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(saving, point, killed)
        with pytest.raises(Killed):
            start(tmp_path / "run", *TINY, *patience(2))
    assert status(tmp_path / "run")["state"] == "FAILED"
    start(tmp_path / "run", *TINY, *patience(2))
    assert_same(tmp_path / "run", early)
    assert [line["resumed_step"] for line in read_lines(tmp_path / "run" / "starts.jsonl")] == [None, 6]


def test_the_best_weights_are_exported_where_that_is_asked(tmp_path: Path) -> None:
    best = ("checkpoint.load_best_model_at_end=true", "optimizer.lr=0.2", "scheduler=constant")
    start(tmp_path / "run", *TINY, "training.early_stopping_patience=2", *best)
    lines = {line["step"]: line["eval/validation/loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")
             if "eval/validation/loss" in line}  # fmt: skip
    step = min(lines, key=lambda step: lines[step])
    assert status(tmp_path / "run")["step"] == max(lines) == step + 4 < 12
    kept = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08}" / "model.safetensors")
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in exported.items() if name in kept)


def test_in_a_sweep_it_is_a_finished_trial(swept: Callable[..., int], folder: Path) -> None:
    assert swept(*TINY, *patience(2), "training.max_train_steps=12", "optimizer.lr=1e-3,2e-3", "tracking=none") == 0
    assert states(folder) == ["FINISHED", "FINISHED"]
    assert {status(trial)["step"] for trial in folder.glob("[0-9]")} == {6}


# Asked again


def asked(folder: Path, *overrides: str) -> int:
    return guarded(admitted(f"hydra.run.dir={folder}", *overrides), StopRequest())


def test_the_same_command_leaves_it_as_it_is(stopped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file() and file.name != "lock"}
    for again in ((*TINY, *patience(2)), (f"rerun={stopped}",), (*TINY, *patience(1)), (*TINY[1:], *patience(2))):
        assert asked(stopped, *again) == 0
        assert "training.early_stopping_patience" in capfd.readouterr().out
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("more", [3, "null"])
def test_more_patience_continues_it_as_if_it_had_been_there_from_the_start(
    stopped: Path, whole: Path, tmp_path: Path, more: int | str
) -> None:
    asking = patience(more) if more != "null" else ("training.early_stopping_patience=null",
                                                    "training.early_stopping_threshold=0")  # fmt: skip
    assert asked(stopped, f"rerun={stopped}", *asking) == 0
    straight = whole
    if more != "null":
        straight = tmp_path / "straight"
        start(straight, *TINY, *asking)
    assert_same(stopped, straight)
    assert status(stopped)["step"] == (8 if more == 3 else 12)
    assert [line["resumed_step"] for line in read_lines(stopped / "starts.jsonl")] == [None, 6]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_one_that_dies_while_it_is_continued_is_continued_all_the_same(stopped: Path, whole: Path, at: int) -> None:
    more = ("training.early_stopping_patience=null", "training.early_stopping_threshold=0")
    with pytest.raises(Killed):
        start(stopped, *TINY, *more, fate=Fate(at, dead=True))
    assert asked(stopped, f"rerun={stopped}") == 0
    assert_same(stopped, whole)


def test_a_folder_of_an_earlier_version_is_run_again_and_continued(whole: Path, tmp_path: Path) -> None:
    older = shutil.copytree(whole, tmp_path / "run")
    frozen = yaml.safe_load((older / "config.yaml").read_text())
    digest = config_hash(frozen)
    for key in ("early_stopping_patience", "early_stopping_threshold"):
        del frozen["training"][key]
    assert config_hash(frozen) == digest
    write_config(older, frozen)
    for place in (older / "checkpoints").iterdir():
        state = json.loads((place / "state.json").read_text())
        state["config"]["training"] = frozen["training"]
        (place / "state.json").write_text(json.dumps(state))
        written = read_manifest(place)
        files = written.files | {"state.json": entry_of(place / "state.json")}
        (place / "manifest.json").write_text(replace(written, files=files).text())
    assert asked(older, f"rerun={older}") == 0
    assert asked(older, f"rerun={older}", "training.num_train_epochs=2.5") == 0
    assert status(older)["step"] == 15


# The gate


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["training.early_stopping_patience=0"], ["training.early_stopping_patience = 0", "at least 1"]),
        (["training.early_stopping_patience=2", "training.early_stopping_threshold=-1"],
         ["training.early_stopping_threshold = -1", "at least 0"]),
        (["training.early_stopping_threshold=0.1"],
         ["training.early_stopping_threshold = 0.1", "training.early_stopping_patience"]),
        (["training.early_stopping_patience=2", "evaluation.eval_steps=null"],
         ["training.early_stopping_patience = 2", "evaluation.eval_steps"]),
        (["training.early_stopping_patience=2", "data.validation_files=null"],
         ["checkpoint.metric_for_best_model", "no validation set"]),
        (["training.early_stopping_patience=2", "checkpoint.metric_for_best_model=eval/validation/rougeL"],
         ["checkpoint.metric_for_best_model", "no evaluation computes this"]),
    ],
)  # fmt: skip
def test_what_could_not_stop_is_refused(overrides: list[str], told: list[str]) -> None:
    problem = refusal(*overrides)
    assert not [words for words in told if words not in problem], problem
