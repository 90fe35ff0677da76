"""Sweeps whose folder is damaged: no result counts for another setting, what is wrong is named and can be mended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.errors import DamagedFileError
from src.records import Digest
from src.runtime.signals import StopRequest
from src.sweep.engines.engine import TrialJob
from src.sweep.engines.local import Workers
from src.sweep.engines.remote import code_of_lost
from src.sweep.sweeper import lead
from src.tracking.sweep_files import read_sweep
from src.trials.standings import read_standings
from tests.conftest import read_lines, write_lines
from tests.sweeps import board_of, planned, starts, states, study_of
from tests.test_damage import contents

GRID = ("optimizer.lr=1e-4,1e-2", "seed=1,2", "training.max_train_steps=2", "sweep.max_retries=0")
LOSS = "eval/validation/loss"


pytestmark = pytest.mark.usefixtures("no_pictures")


def start(folder: Path, *more: str) -> int:
    """Lead the sweep in a folder as its command does, and return the exit code."""
    from src.cli.hydra_main import run_trial

    plan = planned(f"hydra.sweep.dir={folder}", *GRID, *more)
    return lead(plan, StopRequest(), Workers(run_trial, plan.config.n_jobs, 1, uses_gpus=False))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of four trials that is done."""
    folder = tmp_path_factory.mktemp("done") / "sweep"
    assert start(folder) == 0
    return folder


@pytest.fixture
def sweep(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "sweep"))


def values(folder: Path) -> dict[str, str]:
    return {row["setting"]: row["values"] for row in board_of(folder)}


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def copy(folder: Path, source: str, target: str) -> None:
    shutil.rmtree(folder / target)
    shutil.copytree(folder / source, folder / target)


def without(name: str) -> Callable[[Path], None]:
    """Swap two folders in which a file is missing that could tell."""

    def misplace(folder: Path) -> None:
        for number in ("0", "2"):
            (folder / number / name).unlink()
        swap(folder, "0", "2")

    return misplace


# ---- whose results they are


@pytest.mark.parametrize(
    ("misplace", "told"),
    [
        (lambda folder: swap(folder, "0", "2"), {"0": "2", "2": "0"}),
        (lambda folder: swap(folder, "0", "1"), {"0": "1", "1": "0"}),  # one setting, the seeds of each other
        (lambda folder: copy(folder, "3", "1"), {"1": "3"}),
        (without("starts.jsonl"), {"0": "", "2": ""}),
        (without("config.yaml"), {"0": "2", "2": "0"}),
    ],
)
def test_a_folder_in_the_place_of_another_is_refused(
    sweep: Path, misplace: Callable[[Path], None], told: dict[str, str]
) -> None:
    misplace(sweep)
    before = contents(sweep)
    for more in ([], ["sweep.dry_run=true"]):
        with pytest.raises(DamagedFileError) as refused:
            start(sweep, *more)
        said = str(refused.value)
        for number, owner in told.items():
            assert f"{sweep / number}: " in said
            assert not owner or f"that of trial {owner}" in said.partition(f"{sweep / number}: ")[2].split("\n")[0]
        assert contents(sweep) == before


def test_named_again_or_moved_away_it_is_mended(sweep: Path, done: Path) -> None:
    swap(sweep, "0", "2")
    swap(sweep, "0", "2")
    assert start(sweep) == 0
    copy(sweep, "3", "1")
    shutil.rmtree(sweep / "1")
    assert start(sweep) == 0
    assert (starts(sweep), values(sweep)) == ([1] * 4, values(done))


def test_a_folder_that_nothing_tells_of_is_not_taken_for_a_trials(sweep: Path) -> None:
    for name in ("starts.jsonl", "config.yaml"):
        (sweep / "2" / name).unlink()
    with pytest.raises(DamagedFileError, match=r"2: neither starts\.jsonl nor config\.yaml"):
        start(sweep)


def test_where_paths_have_changed_it_is_the_same_trial(sweep: Path, tmp_path: Path) -> None:
    more = f"data.cache_dir={tmp_path / 'cache'}"
    assert start(sweep, more) == 0
    shutil.rmtree(sweep / "1")
    assert start(sweep, more) == 0
    assert start(sweep) == 0
    assert starts(sweep) == [1] * 4


def edited(**changes: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda lines: lines[1].update(changes)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (edited(number=0), 2),
        (edited(number=3), 2),
        (edited(unit=0), 2),
        (edited(setting="0" * 16), 2),
        (edited(overrides=["optimizer.lr=0.01", "seed=2"]), 2),
        (edited(seed=1), 2),
        (edited(fold=1), 2),
        (edited(identity="0" * 16), 2),
        (edited(checksum="0" * 32), 2),
        (lambda lines: lines[1]["config"]["optimizer"].update(lr=0.5), 2),
        (lambda lines: lines.pop(1), 2),
        (lambda lines: lines.pop(0), 1),
        (lambda lines: lines.insert(0, lines.pop()), 1),
        (lambda lines: lines.append(lines[0]), 5),
    ],
)
def test_a_trial_that_is_not_as_it_was_written_is_refused(
    sweep: Path, edit: Callable[[list[dict[str, Any]]], Any], line: int
) -> None:
    lines = read_lines(sweep / "trials.jsonl")
    edit(lines)
    write_lines(sweep / "trials.jsonl", lines)
    before = contents(sweep)
    with pytest.raises(DamagedFileError, match=rf"trials\.jsonl is damaged: line {line}: .*force=true"):
        start(sweep)
    assert contents(sweep) == before


@pytest.mark.parametrize("change", [{"number": 3}, {"seed": 2}, {"fold": 1}, {"overrides": [3]}])
def test_a_sweep_of_an_earlier_version_goes_on_and_is_looked_at(sweep: Path, change: dict[str, Any]) -> None:
    lines = [{key: line[key] for key in line if key != "checksum"} for line in read_lines(sweep / "trials.jsonl")]
    write_lines(sweep / "trials.jsonl", [*lines[:2], lines[2] | change, lines[3]])
    with pytest.raises(DamagedFileError, match="line 3"):
        start(sweep)
    write_lines(sweep / "trials.jsonl", lines)
    assert start(sweep) == 0
    assert all("checksum" in line for line in read_lines(sweep / "trials.jsonl"))


# ---- what came of a trial


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def other(file: Path) -> None:
    """Put another trial's in its place."""
    shutil.copy(file.parent.parent / "3" / file.name, file)


def better(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {LOSS: 0.001, f"best/{LOSS}": 0.001}))


@pytest.mark.parametrize("damage", [remove, cut, pipe, other, better])
@pytest.mark.parametrize("metric", [LOSS, f"best/{LOSS}"])
def test_a_value_that_the_summary_does_not_have_is_that_of_the_metrics(
    sweep: Path, done: Path, damage: Callable[[Path], None], metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(sweep / "0" / "summary.json")
    assert start(sweep, f"sweep.metric={metric}") == 0
    assert f"trial 0: {sweep / '0' / 'summary.json'} is" in capsys.readouterr().err
    expected = [json.loads((done / number / "summary.json").read_text())[metric] for number in "0123"]
    assert values(sweep) == {
        "optimizer.lr=0.0001": f"{expected[0]} {expected[1]}",
        "optimizer.lr=0.01": f"{expected[2]} {expected[3]}",
    }
    assert starts(sweep) == [1] * 4


@pytest.mark.parametrize("damage", [remove, cut])
def test_where_nothing_else_has_the_value_it_is_said_what_to_do_and_that_does_it(
    sweep: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    judged = ("sweep.metric=train_seconds", "sweep.direction=minimize")
    damage(sweep / "0" / "summary.json")
    assert start(sweep, *judged) == 1
    said = capsys.readouterr().out
    assert f"{sweep / '0' / 'summary.json'} is" in said
    assert f"move {sweep / '0'} away" in said
    (sweep / "0").rename(sweep.parent / "away")
    assert start(sweep, *judged) == 0
    assert states(sweep) == ["FINISHED"] * 4
    assert len(read_lines(sweep / "0" / "starts.jsonl")) == 1


def test_metrics_that_are_damaged_are_no_value(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep / "0" / "metrics.jsonl"
    number = read_lines(file)[-1][LOSS]
    file.write_text(file.read_text().replace(repr(number), repr(number + 1)))
    remove(sweep / "0" / "summary.json")
    assert start(sweep) == 1
    assert f"{file} is damaged" in capsys.readouterr().out
    assert [row["failed"] for row in board_of(sweep)] == ["0", "1"]


def test_a_status_of_another_trial_is_not_believed(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("status.json", "summary.json"):
        other(sweep / "0" / name)
    assert start(sweep) == 1
    said = capsys.readouterr().out
    assert f"{sweep / '0' / 'metrics.jsonl'} is damaged" in said
    assert "(status.json)" in said
    assert values(sweep)["optimizer.lr=0.0001"] == values(sweep)["optimizer.lr=0.0001"].split()[0]  # of seed 2 alone


def test_what_a_status_says_of_its_summary_is_its_checksum(done: Path) -> None:
    for number in "0123":
        status = json.loads((done / number / "status.json").read_text())
        assert status["summary"] == Digest((done / number / "summary.json").read_bytes()).as_dict()


@pytest.mark.parametrize("wrong", [{"cause": 5}, {"cause": ["x"]}, {"num_steps": "x"}, {"step": "x"}, {"state": 3}])
def test_a_status_of_wrong_shapes_is_that_trials_failure(
    sweep: Path, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep / "1" / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    assert start(sweep) == 1
    assert f"{file} is damaged" in capsys.readouterr().out
    assert [row["failed"] for row in board_of(sweep)] == ["0", "1"]
    lost = [code_of_lost(TrialJob(number, {}, sweep / str(number)), OSError("gone")) for number in (0, 1)]
    assert lost == [0, 1]


def in_the_way(folder: Path, name: str, kind: str) -> Path:
    """Have a trial not have begun, and something else be in a place that it needs."""
    shutil.rmtree(folder / "1")
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    {"file": place.touch, "folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}.get(
        kind, lambda: place.symlink_to(folder / "nowhere" / "at all")
    )()
    return place


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("1", "file"),
        ("1", "link"),
        ("1", "pipe"),
        ("1/logs", "file"),
        ("1/logs", "link"),
        ("1/logs/output.log", "folder"),
        ("1/logs/output.log", "pipe"),
        ("1/logs/output.log", "link"),
    ],
)
def test_what_is_in_the_place_of_a_trials_folder_is_named(
    sweep: Path, done: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = in_the_way(sweep, name, kind)
    assert start(sweep) == 1
    said, error = capsys.readouterr()
    assert f"{place} is no {'plain file' if name.endswith('.log') else 'folder'}. Move it away" in said
    assert "Traceback" not in error
    assert "no cause is known" not in said
    place.rename(sweep.parent / "away")
    assert start(sweep) == 0
    assert values(sweep) == values(done)


def test_what_a_finished_trial_printed_is_not_needed(sweep: Path) -> None:
    shutil.rmtree(sweep / "1" / "logs")
    (sweep / "1" / "logs").touch()
    assert start(sweep) == 0


# ---- what the sweep says of itself


@pytest.mark.parametrize(
    "changes",
    [
        {"history": [{"trial": 0, "value": "x", "best": 1.0, "elapsed_seconds": 1.0}]},
        {"history": [{"trial": 0, "value": 1.0, "best": [1.0], "elapsed_seconds": 1.0}]},
        {"history": [{"trial": "0", "value": 1.0, "best": 1.0, "elapsed_seconds": 1.0}]},
        {"history": [{"trial": 0, "value": 1.0, "best": 1.0, "elapsed_seconds": None}]},
        {"history": [{"trial": True, "value": 1.0, "best": 1.0, "elapsed_seconds": 1.0}]},
        {"history": [{"value": 1.0, "best": 1.0, "elapsed_seconds": 1.0}]},
        {"history": [[]]},
        {
            "history": [{"trial": 0, "value": [1.0], "best": 1.0, "elapsed_seconds": 1.0}],
            "sweep": {"metric": ["a", "b"]},
        },
        {"history": {"0": 1.0}},
        {"counts": {"FINISHED": "4"}},
        {"signatures": "x"},
        {"elapsed_seconds": "1"},
        {"id": 3},
        {"sweep": []},
    ],
)
def test_a_sweeps_file_of_wrong_shapes_is_told_by_name(sweep: Path, changes: dict[str, Any]) -> None:
    file = sweep / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    before = contents(sweep)
    with pytest.raises(DamagedFileError, match=rf"sweep\.json is damaged: .*{next(iter(changes))}.*force=true"):
        start(sweep)
    assert contents(sweep) == before
    if {"history", "counts"} & changes.keys():  # what goes to MLflow too
        with pytest.raises(DamagedFileError, match=r"sweep\.json is damaged"):
            read_sweep(sweep)


@pytest.mark.parametrize("judged", [{}, {"metric": "a"}, {"metric": ["a", "b"], "direction": "minimize"}])
def test_metrics_without_a_direction_each_are_told_where_the_sweep_is_read(sweep: Path, judged: dict[str, Any]) -> None:
    file = sweep / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sweep": judged, "history": []}))
    with pytest.raises(DamagedFileError, match=r"sweep\.json is damaged: .*direction"):
        read_standings(sweep)


def test_options_that_were_kept_are_those_that_are_composed(sweep: Path) -> None:
    option = sweep / "conf" / "0" / "optimizer" / "adamw.yaml"
    whole = option.read_text()
    for damage in (
        remove,
        cut,
        pipe,
        lambda file: file.write_text(whole.replace("weight_decay: ", "weight_decay: 0.5")),
    ):
        damage(option)
        with pytest.raises(DamagedFileError, match=r"conf is damaged: .*0/optimizer/adamw\.yaml"):
            start(sweep)
        option.unlink(missing_ok=True)
        option.write_text(whole)
    (option.parent / "more.yaml").write_text("lr: 3\n")
    with pytest.raises(DamagedFileError, match=r"0/optimizer/more\.yaml"):
        start(sweep)
    (sweep / "conf").rename(sweep.parent / "away")
    assert start(sweep) == 0
    assert starts(sweep) == [1] * 4
    (sweep / "conf" / "manifest.json").unlink()  # as an earlier version left it
    assert start(sweep) == 0


# ---- the study


def garbage(file: Path) -> None:
    file.write_bytes(b"no database\n" * 1000)


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:6000])


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = (garbage, torn, folder_instead, pipe)


@pytest.mark.parametrize("damage", [*DAMAGE, Path.unlink])
def test_the_copy_of_the_study_is_written_anew(
    sweep: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    values = [trial.value for trial in study_of(sweep).trials]
    damage(sweep / "study.journal")
    assert start(sweep) == 0
    is_refused = damage is folder_instead
    assert capsys.readouterr().err.count(f"{sweep / 'study.journal'} has no copy of the study") == is_refused
    assert starts(sweep) == [1] * 4
    if not is_refused:
        assert [trial.value for trial in study_of(sweep).trials] == values
