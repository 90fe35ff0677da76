"""A finished run that is asked for more goes on in its folder, and is then the run that was as long from the start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from src.cli.exits import guarded_run as guarded
from src.cli.start import run_job as run
from src.config.gate import admit_finished
from src.errors import ExportError
from src.model import export as exporting
from src.runtime.signals import StopRequest
from tests.conftest import admitted, read_lines, towline, write_lines
from tests.test_resume import LORA, Fate, Killed, assert_same, plain, start

TINY = (
    "data.limit=24",
    "training.per_device_train_batch_size=4",  # six steps an epoch
    "training.per_device_eval_batch_size=4",
    "training.logging_steps=4",
    "evaluation.eval_steps=4",
    "evaluation.max_samples=6",
    "evaluation.sample_steps=5",
    "evaluation.sample_prompts=1",
    "generation.max_new_tokens=4",
    "checkpoint.checkpointing_steps=4",
)
CONSTANT = (*TINY, "scheduler=constant")
ONE, TWO = "training.num_train_epochs=1", "training.num_train_epochs=2"
BEST = ("checkpoint.load_best_model_at_end=true",)


def asked(folder: Path, *overrides: str) -> int:
    """Give a command on a folder; returns the exit code."""
    return guarded(admitted(f"hydra.run.dir={folder}", *overrides), StopRequest())


def again(folder: Path, *overrides: str) -> int:
    """Give `make resume run=DIR ARGS=…`; returns the exit code."""
    return asked(folder, f"rerun={folder}", *overrides)


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text()))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file of a folder but its lock, with when it was written."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of one epoch with a constant learning rate."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert asked(folder, *CONSTANT, ONE) == 0
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run of two epochs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert asked(folder, *CONSTANT, TWO) == 0
    return folder


@pytest.fixture
def short(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# It goes on


def test_more_epochs_by_the_same_command_are_the_longer_run(short: Path, straight: Path) -> None:
    assert "eval/test/loss" in read_lines(short / "metrics.jsonl")[-1]
    assert asked(short, *CONSTANT, TWO) == 0
    assert_same(short, straight)
    assert (status(short)["state"], status(short)["step"], status(short)["num_steps"]) == ("FINISHED", 12, 12)
    assert sorted(place.name for place in (short / "checkpoints").iterdir()) == sorted(
        place.name for place in (straight / "checkpoints").iterdir()
    )
    started = read_lines(short / "starts.jsonl")
    assert [line["resumed_step"] for line in started] == [None, 6]
    assert started[1]["changed"] == {"training.num_train_epochs": 2}
    assert yaml.safe_load((short / "config.yaml").read_text())["training"]["num_train_epochs"] == 1
    assert (
        admit_finished([f"run={short}"], "predict").config.training.num_train_epochs == 1
    )  # the first start's, as ever


def test_make_resume_goes_on_and_then_leaves_it_as_it_is(short: Path, straight: Path) -> None:
    assert again(short) == 0
    assert status(short)["step"] == 6
    assert again(short, TWO) == 0
    assert_same(short, straight)
    before = content(short)
    assert again(short) == again(short, TWO) == asked(short, *CONSTANT, ONE) == asked(short, *CONSTANT, TWO) == 0
    assert content(short) == before


FORMS: dict[str, tuple[tuple[str, ...], int]] = {  # overrides, steps that the shorter run has of an epoch of six
    "saved by epoch": (("checkpoint.checkpointing_steps=epoch", "evaluation.eval_steps=epoch"), 6),
    "lora": (LORA, 5),
    "packed": (("data.batching=packed", "data.max_seq_length=128"), 3),
    "the best is exported": ((*BEST, "optimizer.lr=0.2"), 6),
    "the best, evaluated by epoch": ((*BEST, "evaluation.eval_steps=epoch", "optimizer.lr=0.2"), 6),
    "the best is the last": ((*BEST, "optimizer.lr=1e-3"), 6),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_longer_run_whatever_is_trained_and_kept(tmp_path: Path, form: str) -> None:
    overrides, steps = FORMS[form]
    assert asked(tmp_path / "run", *CONSTANT, *overrides, f"training.max_train_steps={steps}") == 0
    longer = (*CONSTANT, *overrides, f"training.max_train_steps={steps + 4}")
    assert asked(tmp_path / "run", *longer) == 0
    assert asked(tmp_path / "straight", *longer) == 0
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("fates", [[1], [3], [2, 9], [14, 1, 4], [18]], ids=str)
def test_one_that_is_killed_while_it_gets_longer_goes_on(
    short: Path, straight: Path, tmp_path: Path, fates: list[int]
) -> None:
    model = content(short / "model")
    for number, at in enumerate(fates):
        dead = number % 2 == 0
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            start(short, *CONSTANT, TWO, fate=Fate(at, dead=dead))
        assert isinstance(caught.value, Killed) == dead
        assert content(short / "model") == model
    assert again(short) == 0  # the length of the last start counts, though no checkpoint may have it yet
    assert_same(short, straight)


def test_the_model_is_replaced_once_the_new_one_is_whole(
    short: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = content(short / "model")

    def refuse(*_: Any, **__: Any) -> None:
        raise ExportError("what was written does not load")

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_check_tokenizer", refuse)
        assert again(short, TWO) == 1
    assert (content(short / "model"), status(short)["state"]) == (model, "FAILED")
    assert again(short) == 0
    assert_same(short, straight)
    assert not list(short.glob(".model.*"))


def test_a_schedule_that_depends_on_the_length_moves_as_that_of_an_unfinished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = (*TINY, "scheduler=linear", "scheduler.warmup_steps=2", "training.logging_steps=1")
    assert asked(tmp_path / "finished", *linear, ONE) == 0
    capsys.readouterr()
    assert asked(tmp_path / "finished", *linear, TWO) == 0
    assert (
        "training.num_train_epochs: 1 → 2 (the learning rate's schedule moves to the new end)"
        in capsys.readouterr().err
    )
    with pytest.raises(Killed):
        seen = Fate()
        run(admitted(f"hydra.run.dir={tmp_path / 'counted'}", *linear, ONE), seen)
        start(tmp_path / "stopped", *linear, ONE, fate=Fate(seen.seen, dead=True))  # in what follows its last step
    assert read_lines(tmp_path / "stopped" / "metrics.jsonl")[-1]["step"] == 5
    assert asked(tmp_path / "stopped", *linear, TWO) == 0
    assert_same(tmp_path / "finished", tmp_path / "stopped")
    config = admitted(*linear, TWO).config.scheduler
    rates = [line["train/lr"] for line in read_lines(tmp_path / "finished" / "metrics.jsonl")]
    assert rates[6:] == pytest.approx([0.002 * config.factor(step, 12) for step in range(6, 12)])


@pytest.mark.parametrize(
    ("first", "then", "steps"),
    [
        (("training.max_train_steps=6",), (TWO,), 12),
        ((ONE,), ("training.max_train_steps=9",), 9),
        (("training.max_train_steps=4",), ("training.num_train_epochs=1.5",), 9),
    ],
    ids=str,
)
def test_epochs_and_steps_take_each_others_place(
    tmp_path: Path, first: tuple[str, ...], then: tuple[str, ...], steps: int
) -> None:
    assert asked(tmp_path, *CONSTANT, *first) == 0
    before = content(tmp_path)
    null = ("training.max_train_steps=null",)
    assert asked(tmp_path, *CONSTANT, *null, "training.num_train_epochs=0.5") == 0
    assert content(tmp_path) == before
    assert asked(tmp_path, *CONSTANT, *then) == 0
    assert status(tmp_path)["step"] == steps
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == sorted({*range(4, steps + 1, 4), steps})


@pytest.mark.parametrize("epochs", [1.1, 2.3, 0.7, 1 / 3])
def test_part_of_an_epoch_is_not_asked_for_more_by_the_same_command(tmp_path: Path, epochs: float) -> None:
    few = (*CONSTANT, f"training.num_train_epochs={epochs}", "evaluation.eval_steps=null", "data.limit=40")
    assert asked(tmp_path, *few) == 0
    before = content(tmp_path)
    assert asked(tmp_path, *few) == 0
    assert content(tmp_path) == before


def test_mlflows_run_runs_again_and_has_each_value_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracked = (*CONSTANT, "tracking=mlflow", f"tracking.uri={uri}")
    assert asked(tmp_path / "run", *tracked, ONE) == 0
    first = status(tmp_path / "run")["tracker_run_id"]
    assert asked(tmp_path / "run", *tracked, TWO) == 0
    assert status(tmp_path / "run")["tracker_run_id"] == first
    client = MlflowClient(uri)
    assert client.get_run(first).info.status == "FINISHED"
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("train/loss", "train/lr", "eval/validation/loss"):
        there = [(point.step, point.value) for point in client.get_metric_history(first, name)]
        told = [(line["step"], line[name]) for line in lines if name in line]
        assert [point for point in there if point[0] != 6] == told, name
        assert len(there) == len(set(there)) == len(told) + 1  # what was measured when it was finished stays
    assert {point.step for point in client.get_metric_history(first, "eval/test/loss")} == {6, 12}
    assert client.get_run(first).data.metrics["eval/test/loss"] == lines[-1]["eval/test/loss"]
    summary = client.download_artifacts(first, "summary.json", str(tmp_path))
    assert json.loads(Path(summary).read_text()) == json.loads((tmp_path / "run" / "summary.json").read_text())


# It is left as it is


@pytest.mark.parametrize(
    "overrides",
    [
        (ONE,),
        ("training.num_train_epochs=0.5",),
        ("training.max_train_steps=6",),
        (ONE, "optimizer.lr=1"),
        (ONE, "seed=7"),
    ],
    ids=str,
)
def test_without_more_steps_it_is_left_as_it_is(
    short: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    before = content(short)
    assert asked(short, *CONSTANT, *overrides) == 0
    assert content(short) == before
    told = capsys.readouterr()
    assert "is finished and left as it is" in told.out
    above = (
        "training.max_train_steps above 6" if "max_train_steps" in overrides[0] else "training.num_train_epochs above 1"
    )
    assert told.out.index(above) < told.out.index("force=true")
    assert ("is not the one that this run was made with" in told.err) == (overrides != (ONE,))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Give a command that is refused and changes nothing; returns what it says."""
    before = content(folder)
    capsys.readouterr()
    assert asked(folder, *overrides) == 2
    told = capsys.readouterr().err
    changed = {name for name, found in content(folder).items() if found != before.get(name)}
    assert changed <= {"status.json", "starts.jsonl"}
    now = status(folder)
    was = json.loads(before["status.json"][0])
    assert now | {"updated": was["updated"]} == was
    assert "force=true" not in told.split("\n")[1]
    return told


def test_with_another_change_it_is_the_contract_that_decides(
    short: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = refused(short, capsys, *CONSTANT, TWO, "optimizer.lr=1e-3")
    assert "optimizer.lr: 0.002 → 0.001" in told
    assert "checkpoint.allow_changed=true" in told
    assert asked(short, *CONSTANT, TWO, "optimizer.lr=1e-3", "checkpoint.allow_changed=true") == 0
    assert read_lines(short / "metrics.jsonl")[-1]["train/lr"] == 1e-3


def test_with_other_rows_it_stays_finished(short: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{i}=", "completion": str(i)} for i in range(24)])
    told = refused(short, capsys, *CONSTANT, TWO, f"data.train_files=['{rows}']")
    assert "the train rows changed" in told
    assert len(read_lines(short / "starts.jsonl")) == 2
    assert admit_finished([f"run={short}"], "predict").run_dir == short
    assert again(short) == 0
    assert status(short)["step"] == 6
    assert asked(short, *CONSTANT, TWO) == 0
    assert status(short)["step"] == 12


def test_without_a_checkpoint_it_says_what_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, unsaved = tmp_path / "run", (*CONSTANT, "checkpoint.checkpointing_steps=null")
    assert asked(folder, *unsaved, ONE) == 0
    told = refused(folder, capsys, *unsaved, TWO)
    assert "is finished at step 6, and keeps no checkpoint" in told
    assert f"init_from={folder}" in told
    assert "force=true" not in told
    assert asked(tmp_path / "new", *unsaved, ONE, f"init_from={folder}") == 0


@pytest.mark.parametrize("damage", ["[1]", "3", "{", "\0", "[" * 100_000, None])
def test_checkpoints_that_are_all_damaged_are_told_by_name(
    short: Path, capsys: pytest.CaptureFixture[str], damage: str | None
) -> None:
    manifests = sorted((short / "checkpoints").glob("*/manifest.json"))
    for manifest in manifests:
        manifest.unlink()
        if damage is None:
            manifest.mkdir()
        else:
            manifest.write_text(damage)
    told = refused(short, capsys, *CONSTANT, TWO)
    assert "checkpointing_steps" not in told
    for manifest in manifests:
        assert f"{manifest.parent}: manifest.json is " in told
    assert f"init_from={short}" in told


def test_the_newest_checkpoint_that_is_whole_is_gone_on_from(
    short: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(short / "checkpoints" / "step-00000006" / "optimizer.safetensors", 9)
    assert asked(short, *CONSTANT, TWO) == 0
    assert "step-00000006 is damaged" in capsys.readouterr().err
    assert read_lines(short / "starts.jsonl")[-1]["resumed_step"] == 4
    assert_same(short, straight)


def test_where_all_are_damaged_nothing_is_changed(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (short / "checkpoints").iterdir():
        (place / "state.json").write_text("{}")
    told = refused(short, capsys, *CONSTANT, TWO)
    assert "is damaged" in told
    assert told.index("Restore one from a copy") < told.index("force=true")


@pytest.mark.parametrize(
    ("change", "overrides", "words"),
    [
        (lambda _: None, ("checkpoint.resume=never",), "the same command continues"),
        (lambda short: (short.parent / "sweep.json").write_text("{}"), (), "as a trial of the sweep"),
    ],
    ids=["never", "trial"],
)
def test_where_it_may_not_go_on_the_way_that_works_is_told(
    short: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    overrides: tuple[str, ...],
    words: str,
) -> None:
    change(short)
    told = refused(short, capsys, *CONSTANT, TWO, *overrides)
    assert words in told
    assert "force=true" not in told


def test_a_trial_goes_on_in_a_folder_of_its_own(short: Path, straight: Path, tmp_path: Path) -> None:
    (short.parent / "sweep.json").write_text("{}")
    before = content(short)
    where = f"hydra.run.dir={tmp_path / 'longer' / 'run'}"
    assert guarded(admitted(f"rerun={short}", where, f"checkpoint.resume={short}", TWO), StopRequest()) == 0
    assert content(short) == before
    lines = [plain(line) for line in read_lines(tmp_path / "longer" / "run" / "metrics.jsonl")]
    assert lines == [plain(line) for line in read_lines(straight / "metrics.jsonl") if line["step"] > 6]


def test_where_nothing_may_be_written_it_is_told(
    short: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    assert asked(short, *CONSTANT, ONE) == 0
    assert "no permission to write" in refused(short, capsys, *CONSTANT, TWO)


def test_a_stop_before_anything_was_changed_leaves_it_finished(short: Path) -> None:
    before = status(short)
    stop = StopRequest()
    stop.name = "SIGTERM"
    assert guarded(admitted(f"hydra.run.dir={short}", *CONSTANT, TWO), stop) == 75
    assert status(short) == before


def test_a_process_that_gets_more_holds_the_folder(short: Path, tmp_path: Path) -> None:
    from src.tracking.lock import hold

    with hold(short):
        done = towline(f"rerun={short}", f"hydra.run.dir={short}", TWO)
    assert done.returncode == 2
    assert "is in use by another process" in done.stderr
    assert status(short)["state"] == "FINISHED"
