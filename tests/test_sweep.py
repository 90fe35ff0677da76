"""Sweeps: what they plan, resume, skip, prune and survive, on real runs of a second."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from src.config.axes import Interval
from src.errors import ConfigError, RunFolderError, SweepError
from src.runtime.devices import shares, visible_gpus
from src.runtime.signals import StopRequest
from src.sweep.engines.local import Workers, modules_of_run
from src.sweep.pruning import Halving
from src.sweep.sweeper import lead
from src.tracking.lock import hold
from src.trials.folder import SweepFolder
from tests.conftest import ForkedCommand, read_lines, towline, write_lines
from tests.sweeps import (
    LONG,
    TINY,
    board_of,
    command,
    left_of,
    pid_of,
    planned,
    sleep_before_it_begins,
    starts,
    states,
    steps_of,
    study_of,
    sweep,
    until,
)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        planned(*arguments)
    return str(refused.value)


# ---- what is planned


def test_a_grid_is_numbered_as_hydra_does() -> None:
    plan = planned("optimizer.lr=1e-3,1e-2", "seed=1,2")
    assert [trial.label for trial in plan.trials] == [
        "optimizer.lr=0.001 seed=1",
        "optimizer.lr=0.001 seed=2",
        "optimizer.lr=0.01 seed=1",
        "optimizer.lr=0.01 seed=2",
    ]
    assert len({trial.identity for trial in plan.trials}) == 4
    assert len({trial.setting for trial in plan.trials}) == 2


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["seed=range(3)"], ["seed=0", "seed=1", "seed=2"]),
        (["seed=choice(7,5)"], ["seed=7", "seed=5"]),
        (["seed=1,1,2"], ["seed=1", "seed=2"]),
        (["optimizer=adamw,sgd"], ["optimizer=adamw", "optimizer=sgd"]),
        (["tokens=glob([t*,h*])"], ["tokens=hcot", "tokens=tow"]),
        (["sweep=seeds"], ["seed=42", "seed=43", "seed=44"]),
        (["sweep=seeds", "sweep.num_seeds=2", "seed=7"], ["seed=7", "seed=8"]),
        (["sweep=seeds", "seed=3,9"], ["seed=3", "seed=9"]),
        (["sweep=kfold", "data.num_folds=3"], ["data.fold=0", "data.fold=1", "data.fold=2"]),
        (["sweep.params={seed: '1,2'}"], ["seed=1", "seed=2"]),
        (["sweep.params={seed: [1,2], optimizer.lr: 1e-2}"], ["seed=1", "seed=2"]),
        (["sweep.params={seed: '1,2'}", "seed=5,6"], ["seed=5", "seed=6"]),
        (["sweep.params={seed: '1,2', tokens: 'tow,none'}", "seed=5"], ["tokens=tow", "tokens=none"]),
    ],
)  # fmt: skip
def test_what_is_varied(arguments: list[str], labels: list[str]) -> None:
    assert [trial.label for trial in planned(*arguments).trials] == labels


EIGHT = (
    *("optimizer.lr", "optimizer.weight_decay", "optimizer.eps", "loss.thought_weight", "loss.label_smoothing"),
    *("training.max_grad_norm", "training.num_train_epochs", "scheduler.warmup_ratio"),
)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.lr=1e-3,0", "seed=1,-1"], ["2 problems", "optimizer.lr = 0", "seed = -1"]),
        (["optimizer.lrr=1,2"], ["optimizer.lrr = 1", "did you mean optimizer.lr?"]),
        (["optimizer.lr=interval(0.1,1)"], ["a search space", "sweep=tpe"]),
        (["sweep=tpe", "optimizer.lr=interval(1,0)"], ["from a lower to a higher"]),
        (["sweep=tpe", "optimizer.lr=tag(log,interval(0,1))"], ["a log scale needs numbers above 0"]),
        (["sweep=tpe", "optimizer.lr=interval(0.1,1)", "optimizer.weight_decay=0,-1"], ["optimizer.weight_decay = -1"]),
        (["sweep=tpe", "sweep.n_trials=null", "optimizer.lr=interval(0.1,1)"], ["sweep.n_trials", "how many"]),
        (["sweep=tpe"], ["nothing is varied"]),
        (["sweep=tpe", "seed=interval(1,5)", "optimizer.lr=1,2"], ["a replicate needs values"]),
        (["sweep=kfold"], ["data.num_folds", "how many folds"]),
        (["seed=1,2", "seed=3"], ["given twice"]),
        (["seed=range(5,3)"], ["there is no value in it"]),
        (["seed=range(200000)"], ["200,000 values, more than sweep.max_points, 100,000", "sweep=tpe"]),
        (["optimizer.lr=range(0,1,5e-324)"], ["about 1e323 values, more than sweep.max_points", "1 problem"]),
        (["hydra/sweeper=basic", "optimizer.lr=range(0,1,5e-324)"], ["about 1e323 values"]),
        (["sweep=tpe", "optimizer.lr=range(0,1,5e-324)"], ["about 1e323 values"]),
        (["sweep.params={optimizer.lr: 'range(0,1,5e-324)'}"], ["about 1e323 values", "(sweep.params)"]),
        (
            [f"{key}=range(0,1e308,5e-324)" for key in EIGHT],  # more digits than Python writes
            ["9 problems", "about 1e5050 points (about 1e631 of optimizer.lr x"],
        ),
        (["optimizer.lr=range(0,1e400)"], ["a range that never ends"]),
        (["seed=range(0," + "9" * 400 + ")"], ["about 1e400 values"]),
        (
            ["hydra/sweeper=basic", "sweep=tpe", "seed=range(0,5000)", "optimizer.lr=range(1,5000)"],
            ["24,995,000 points"],
        ),
        (["sweep.n_jobs=1,2"], ["is the sweep's own"]),
        (
            ["sweep.metric=eval/validation/accuracy", "seed=1,2"],
            ["no evaluation computes this", "eval/validation/loss"],
        ),
        (["sweep.direction=maximize", "seed=1,2"], ["better when it is lower: minimize"]),
        (["sweep=asha", "sweep.metric=eval/test/loss", "seed=1,2", "optimizer.lr=1,2"], ["known at the end only"]),
        (["sweep.metric=loss", "seed=1,2"], ["no run computes this", "train/loss"]),
        (["sweep.metric=best/tokens_seen", "seed=1,2"], ["sweep.metric = best/tokens_seen", "no run computes this"]),
        (["hydra.run.dir=outputs/x", "seed=1,2"], ["multirun/<sweep.name>"]),
        (["checkpoint.resume=never", "seed=1,2"], ["checkpoint.resume = never", "a sweep resumes"]),
        (
            ["model=tiny_llama,tiny_bart", "data.batching=packed", "seed=1,2", "training.logging_steps=0"],
            ["2 problems", "(command line)", "(command line; at model=tiny_bart seed=1 and 1 more)"],
        ),
        (["sweep.params={tokens: 'tow,nope'}"], ["sweep.params.tokens", "no such option; one of dialogue"]),
        (["tokens=glob(x*)"], ["matches none of"]),
        (["sweep.n_job=2"], ["did you mean sweep.n_jobs?"]),
        (["model=tiny_llama,tiny_lama", "optimizer.lr=1,0"], ["2 problems", "tiny_lama", "optimizer.lr = 0"]),
    ],
)
def test_a_bad_point_is_refused_before_anything_starts(arguments: list[str], told: list[str]) -> None:
    said = refusal(*arguments)
    for words in told:
        assert words in said


def test_the_same_command_is_the_same_sweep_however_it_is_written() -> None:
    first = planned("optimizer.lr=1e-3,1e-2", "seed=1,2").folder
    assert planned("seed=1,2", "optimizer.lr=1e-3,1e-2", "sweep.n_jobs=2", "sweep.max_retries=3").folder == first
    assert planned("optimizer.lr=1e-3,1e-2", "seed=1,3").folder != first
    assert planned("optimizer.lr=1e-3,1e-2", "seed=1,2", "sweep.name=mine").folder == Path("multirun/mine")
    assert planned("optimizer.lr=1e-3,1e-2", "seed=1,2", "--config-dir=tests").folder != first


def test_names_and_tracking_are_no_part_of_an_identity() -> None:
    (plain,), (named,) = (planned("seed=1", *more).trials for more in ([], ["name=other", "data.cache_dir=null"]))
    assert plain.identity == named.identity
    (other,) = planned("seed=1", "optimizer.lr=1e-5").trials
    assert other.identity != plain.identity


def test_intervals_keep_their_scale_and_whole_numbers() -> None:
    plan = planned(
        "sweep=tpe", "optimizer.lr=tag(log,interval(1e-5,1e-2))", "data.max_seq_length=int(interval(64,128))"
    )
    log, whole = (axis.interval for axis in plan.axes)
    assert log == Interval(1e-5, 1e-2, is_log=True, is_int=False)
    assert whole == Interval(64, 128, is_log=False, is_int=True)
    (from_zero,) = planned("sweep=tpe", "data.max_seq_length=128", "scheduler.warmup_steps=int(interval(0,3))").axes
    assert from_zero.interval == Interval(0, 3, is_log=False, is_int=True)
    assert [axis.ends for axis in plan.axes] == [
        ("optimizer.lr=1e-05", "optimizer.lr=0.01"),
        ("data.max_seq_length=64", "data.max_seq_length=128"),
    ]


def test_paths_with_the_seed_in_them_are_one_setting() -> None:
    plan = planned("seed=1,2", "optimizer.lr=1e-3,1e-2", "init_from=null", "data.prompt_template='{prompt}${seed}'")
    assert len({trial.setting for trial in plan.trials}) == 2
    assert len({trial.identity for trial in plan.trials}) == 4


@pytest.mark.parametrize(("devices", "jobs", "each", "given"), [
    ([], 2, 1, [[], []]),
    (["0", "1"], 2, 1, [["0"], ["1"]]),
    (["0", "1", "2", "3"], 2, 2, [["0", "1"], ["2", "3"]]),
    (["0"], 2, 1, [["0"], ["0"]]),
    (["3", "5"], 3, 1, [["3"], ["5"], ["3"]]),
])  # fmt: skip
def test_gpus_are_divided(devices: list[str], jobs: int, each: int, given: list[list[str]]) -> None:
    assert shares(devices, jobs, each) == given
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ",".join(devices)}) == devices


def test_rungs_and_who_is_promoted() -> None:
    halving = Halving(min_resource=2, reduction_factor=3)
    assert [halving.rung_from(n) for n in (1, 2, 3, 6, 7, 18, 19)] == [2, 2, 6, 6, 18, 18, 54]

    def pause(unit: int, *reports: float) -> None:
        halving.note(unit, reports)
        halving.pause(unit, reports)

    pause(0, 9.0, 4.0)
    pause(1, 9.0, 3.0)
    assert halving.promote() is None  # one in three of two is none
    pause(2, 9.0, 5.0)
    assert halving.promote() == 1
    assert halving.promote() is None  # 1 runs on, and is the best
    halving.note(3, [9.0, 2.0])  # it finished
    pause(4, 9.0, 6.0)
    assert halving.promote() is None
    pause(1, 9.0, 3.0, 1, 1, 1, 7.0)
    pause(5, 9.0, 1.0)
    assert halving.promote() == 5  # one in three of six: 5 and 3
    assert halving.promote(at_least_one=True) == 1  # the highest rung comes first
    assert halving.take_paused() == [0, 2, 4]
    assert not halving
    high = Halving(1, 2, sign=-1)
    for unit, accuracy in enumerate((0.2, 0.9)):
        high.note(unit, [accuracy])
        high.pause(unit, [accuracy])
    assert high.promote() == 1


# ---- what is run


def test_a_grid_runs_ranks_and_is_left_alone_when_it_is_done(swept_and_drawn: Callable[..., int], folder: Path) -> None:
    grid = ("optimizer.lr=1e-4,1e-2", "seed=1,2,3", "sweep.n_jobs=2")
    assert swept_and_drawn(*grid) == 0
    assert states(folder) == ["FINISHED"] * 6
    best, other = board_of(folder)
    assert (best["rank"], best["setting"], best["n"]) == ("1", "optimizer.lr=0.01", "3")
    assert (other["rank"], other["tied"]) == ("2", "false")
    ends = [json.loads((folder / str(n) / "summary.json").read_text()) for n in (3, 4, 5)]
    values = [end["eval/validation/loss"] for end in ends]
    for name in ("perf/elapsed_seconds", "eval/validation/thought_loss"):
        assert float(best[name]) == pytest.approx(sum(end[name] for end in ends) / 3, rel=1e-6)
    assert float(best["mean"]) == pytest.approx(sum(values) / 3, rel=1e-6)
    assert [trial.value for trial in study_of(folder).trials if trial.params["optimizer.lr"] == "0.01"] == values
    assert sum(1 for _ in folder.glob("plots/*.png")) == 2
    log = (folder / "3" / "logs" / "output.log").read_text()
    assert log.startswith("run         default")
    before = {file: file.stat().st_mtime_ns for file in folder.glob("[0-9]/*.json*")}

    assert swept_and_drawn(*grid) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.glob("[0-9]/*.json*")} == before
    assert len(study_of(folder).trials) == 6


def test_a_trial_computes_what_the_same_run_alone_does(swept: Callable[..., int], folder: Path, tmp_path: Path) -> None:

    assert swept("seed=7") == 0
    assert towline(*TINY, "tracking=none", "seed=7", f"hydra.run.dir={tmp_path / 'alone'}").returncode == 0
    alone, trial = ([{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(one)]
                    for one in (tmp_path / "alone" / "metrics.jsonl", folder / "0" / "metrics.jsonl"))  # fmt: skip
    assert alone == trial


def test_more_values_are_added_to_a_sweep_that_is_named(swept: Callable[..., int], folder: Path) -> None:
    assert swept("optimizer.lr=1e-3,1e-2", "seed=1") == 0
    assert swept("optimizer.lr=1e-3,1e-2", "seed=1,2") == 0
    assert starts(folder) == [1, 1, 1, 1]
    labels = [trial.label for trial in SweepFolder(folder).trials()]
    assert labels[0] == "optimizer.lr=0.001 seed=1"
    assert sorted(trial.params["optimizer.lr"] for trial in study_of(folder).trials) == [
        "0.001",
        "0.001",
        "0.01",
        "0.01",
    ]


def test_force_begins_anew(swept: Callable[..., int], folder: Path) -> None:
    assert swept("seed=1,2") == 0
    assert swept("seed=1,2", "force=true") == 0
    assert starts(folder) == [1, 1]
    assert len(study_of(folder).trials) == 2


def test_a_trial_that_fails_is_told_and_tried_again_by_the_same_command(
    swept: Callable[..., int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i}=", "completion": "x"} for i in range(8)]
    for seed in (1, 2, 3):
        write_lines(tmp_path / f"{seed}.jsonl", rows)
    (tmp_path / "2.jsonl").write_text("{damaged\n")
    grid = ("seed=1,2,3", f"'data.train_files=[\"{tmp_path}/${{seed}}.jsonl\"]'".strip("'"))
    assert swept(*grid) == 1
    said = capsys.readouterr().out
    assert "1 of 3 trials failed:" in said
    assert "DataError" in said
    assert str(folder / "1" / "logs" / "output.log") in said
    assert states(folder) == ["FINISHED", "FAILED", "FINISHED"]
    assert starts(folder) == [1, 1, 1], "a mistake in a file is not tried twice by itself"
    (row,) = board_of(folder)
    assert (row["n"], row["failed"]) == ("2", "1")

    write_lines(tmp_path / "2.jsonl", rows)
    assert swept(*grid) == 0
    assert starts(folder) == [1, 2, 1]
    assert [row["n"] for row in board_of(folder)] == ["3"]


def test_editing_yaml_changes_nothing_for_a_sweep_that_began(
    swept: Callable[..., int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.01\n")
    grid = (f"--config-dir={own.parent}", "experiment=mine", "seed=1,2", "sweep.max_retries=0")
    assert swept(*grid) == 0
    shutil.rmtree(folder / "1")  # as if it had not begun
    (own / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.5\n")
    assert swept(*grid) == 0
    assert "conf/ has changed" in capsys.readouterr().err
    assert [trial.config["optimizer"]["lr"] for trial in SweepFolder(folder).trials()] == [0.01, 0.01]


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\udcff"])
def test_a_model_without_a_usable_config_is_left_to_its_trials_to_tell(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    needs = modules_of_run(planned(f"model.checkpoint={tmp_path}", "seed=1,2").sample)
    assert not [name for name in needs if name.startswith("transformers.models")]
    assert "transformers.models.llama.modeling_llama" in modules_of_run(planned("seed=1,2").sample)


def test_a_missing_objective_is_a_failure(swept: Callable[..., int], folder: Path) -> None:
    assert swept("seed=1", "sweep.metric=train/objective") == 1  # it is not told where it is the loss
    assert json.loads((folder / "sweep.json").read_text())["counts"]["FAILED"] == 1
    assert states(folder) == ["FINISHED"]


def test_another_metric_ranks_what_is_there_anew(swept: Callable[..., int], folder: Path) -> None:
    grid = ("sweep.name=n", "optimizer.lr=1e-4,1e-2", "evaluation.metrics=[exact_match]")
    assert swept(*grid) == 0
    assert swept(*grid, "sweep.metric=eval/test/exact_match", "sweep.direction=maximize") == 0
    assert starts(folder) == [1, 1]
    study = study_of(folder)
    assert (study.direction.name, [trial.value for trial in study.trials]) == ("MAXIMIZE", [0.0, 0.0])
    assert [point["value"] for point in json.loads((folder / "sweep.json").read_text())["history"]] == [0.0, 0.0]


def test_fail_fast_stops_the_others(swept: Callable[..., int], folder: Path) -> None:
    assert swept("optimizer.lr=1e30,1e-3", "training.max_grad_norm=null", "seed=1,2", "sweep.fail_fast=true") == 1
    assert len(states(folder)) < 4


def test_asha_finds_the_best_in_at_most_half_of_the_steps(swept: Callable[..., int], folder: Path) -> None:
    rates = "optimizer.lr=1e-7,2e-7,5e-7,1e-6,2e-6,5e-6,1e-5,2e-5,5e-5,1e-4,3e-4,2e-3"
    long = ("training.max_train_steps=9", "training.num_train_epochs=9", "evaluation.eval_steps=1", "data.limit=36",
            "scheduler=constant", "checkpoint.checkpointing_steps=null", "sweep.n_jobs=2")  # fmt: skip
    assert swept("sweep=asha", rates, *long) == 0
    assert board_of(folder)[0]["setting"] == "optimizer.lr=0.002"
    assert len(states(folder)) == 12
    assert sum(steps_of(folder)) <= 12 * 9 / 2
    pruned = [trial for trial in study_of(folder).trials if trial.state.name == "PRUNED"]
    assert len(pruned) == states(folder).count("PRUNED") > 0


def test_tpe_proposes_on_a_scale_averages_seeds_and_goes_on(swept: Callable[..., int], folder: Path) -> None:
    search = ("sweep=tpe", "sweep.pruner=none", "optimizer.lr=tag(log,interval(1e-5,1e-2))", "seed=1,2")
    assert swept(*search, "sweep.n_trials=2") == 0
    assert swept(*search, "sweep.n_trials=4", "sweep.n_jobs=2") == 0
    assert states(folder) == ["FINISHED"] * 8
    study = study_of(folder)
    assert len({trial.params["optimizer.lr"] for trial in study.trials}) == 4
    for number, trial in enumerate(study.trials):
        values = [
            json.loads((folder / str(one.number) / "summary.json").read_text())["eval/validation/loss"]
            for one in SweepFolder(folder).trials()
            if one.unit == number
        ]
        assert trial.value == pytest.approx(sum(values) / 2, rel=1e-12)
    assert starts(folder) == [1] * 8


def test_a_missing_replicate_is_run_behind_its_first_that_is_done(swept: Callable[..., int], folder: Path) -> None:
    grid = ("sweep=tpe", "optimizer.lr=1e-3,1e-2", "seed=1,2", "sweep.n_jobs=2")
    assert swept(*grid) == 0
    shutil.rmtree(folder / "1")
    assert swept(*grid) == 0
    assert starts(folder) == [1, 1, 1, 1]
    assert [row["n"] for row in board_of(folder)] == ["2", "2"]
    assert len(json.loads((folder / "sweep.json").read_text())["history"]) == 5


def test_another_seed_of_a_proposal_that_is_known_joins_its_setting(swept: Callable[..., int], folder: Path) -> None:
    search = ("sweep.name=n", "sweep=tpe", "sweep.pruner=none", "optimizer.lr=1e-2,1e-3,1e-4,1e-5")
    assert swept(*search, "sweep.n_trials=1", "seed=1,2") == 0
    assert swept(*search, "sweep.n_trials=3", "seed=2,3") == 0
    trials = SweepFolder(folder).trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({trial.identity for trial in trials}) == len(trials)
    assert all(len({t.unit for t in trials if t.setting == one.setting}) == 1 for one in trials)


def test_a_sampler_that_repeats_itself_costs_no_runs(swept: Callable[..., int], folder: Path) -> None:
    sampled = ("sweep=tpe", "sweep.sampler=random", "sweep.pruner=none", "sweep.n_trials=3")
    assert swept(*sampled, "optimizer.lr=1e-3,1e-2", "optimizer.weight_decay=0,0.1") == 0
    assert len({trial.identity for trial in SweepFolder(folder).trials()}) == 3
    assert starts(folder) == [1, 1, 1]


def test_folds_are_averaged(swept: Callable[..., int], folder: Path) -> None:
    assert swept("sweep=kfold", "data.num_folds=2", "optimizer.lr=1e-4,1e-2") == 0
    assert [row["n"] for row in board_of(folder)] == ["2", "2"]
    assert [len(study_of(folder).trials), study_of(folder).best_trial.params] == [2, {"optimizer.lr": "0.01"}]


def test_values_that_come_and_go_are_one_study(swept: Callable[..., int], folder: Path) -> None:
    assert swept("sweep.name=n", "optimizer.lr=1e-5,1e-4") == 0
    for _ in range(2):
        assert swept("sweep.name=n", "optimizer.lr=1e-4,1e-3") == 0
        shutil.rmtree(folder / "2")
    assert swept("sweep.name=n", "optimizer.lr=1e-4,1e-3") == 0
    assert {trial.params["optimizer.lr"] for trial in study_of(folder).trials} == {"1e-05", "0.0001", "0.001"}


def test_an_interval_may_become_narrower(swept: Callable[..., int], folder: Path) -> None:
    search = ("sweep.name=n", "sweep=tpe", "sweep.pruner=none")
    assert swept(*search, "sweep.n_trials=2", "optimizer.lr=tag(log,interval(1e-7,1e-2))") == 0
    assert swept(*search, "sweep.n_trials=3", "optimizer.lr=tag(log,interval(1e-3,1e-2))") == 0
    trials = study_of(folder).trials
    assert [trial.value is not None for trial in trials] == [True] * 3
    assert trials[-1].params["optimizer.lr"] >= 1e-3


def test_a_first_seed_that_failed_and_is_not_asked_for_holds_nobody_up(
    swept: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    for seed in (2, 3):
        write_lines(tmp_path / f"rows-{seed}.jsonl", [{"prompt": f"{i}+1=", "completion": str(i)} for i in range(16)])
    (tmp_path / "rows-1.jsonl").write_text('{"prompt": 1}\n')
    files = f"data.train_files=['{tmp_path}/rows-${{seed}}.jsonl']"
    search = ("sweep.name=n", "sweep=tpe", "optimizer.lr=1e-3,1e-2", files)
    assert swept(*search, "seed=1,2") == 1
    assert sorted(states(folder)) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert swept(*search, "seed=2,3") == 0
    assert states(folder).count("FINISHED") == 4
    assert [row["n"] for row in board_of(folder)] == ["2", "2"]
    assert not [trial for trial in study_of(folder).trials if not trial.state.is_finished()]


def test_a_stop_before_a_trial_began_leaves_it_for_the_next_start(swept: Callable[..., int], folder: Path) -> None:
    plan, stop = planned("seed=1,2", f"hydra.sweep.dir={folder}"), StopRequest()
    workers = Workers(sleep_before_it_begins, 2, 1, uses_gpus=False)

    def ask() -> None:
        until(lambda: len(list(folder.glob("*/sleeps"))) == 2, "both trials are there")
        stop.on_signal(signal.SIGTERM, None)

    threading.Thread(target=ask, daemon=True).start()
    assert lead(plan, stop, workers) == 75
    assert json.loads((folder / "sweep.json").read_text())["state"] == "PREEMPTED"
    for number in (0, 1):
        (folder / str(number) / "sleeps").unlink()
    assert swept("seed=1,2") == 0
    assert starts(folder) == [1, 1]


def test_a_first_start_that_died_while_it_wrote_is_no_other_folder(swept: Callable[..., int], folder: Path) -> None:
    folder.mkdir()
    (folder / ".trials.jsonl.part").touch()
    assert swept("seed=1") == 0


@pytest.mark.parametrize(
    ("storage", "said"),
    [("sqlite:////nowhere/study.db", "unable to open database file"), ("nonsense", "Could not parse SQLAlchemy URL")],
)
def test_a_search_needs_no_copy_of_its_study(
    swept: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], storage: str, said: str
) -> None:
    search = ("sweep=tpe", "sweep.pruner=none", "optimizer.lr=tag(log,interval(1e-5,1e-2))", "sweep.n_trials=2")
    assert swept(*search, f"sweep.storage={storage}") == 0
    warned = capsys.readouterr().err
    assert warned.count("has no copy of the study") == 1
    assert said in warned
    assert states(folder) == ["FINISHED"] * 2


def test_a_dry_run_says_what_of_a_sweep_is_left(
    swept: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("sweep.name=n", "optimizer.lr=1e-4,1e-2", "seed=1,2")
    assert swept(*grid) == 0
    shutil.rmtree(folder / "1")
    shutil.rmtree(folder / "2")
    capsys.readouterr()
    assert swept("sweep.name=n", "optimizer.lr=1e-4", "seed=1,2", "sweep.dry_run=true") == 0
    listed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "seed=" in line]
    assert listed[2].endswith("seed=2 waiting to run")
    assert listed[3].endswith("seed=1 waiting")


def test_a_folder_of_something_else_is_left_alone(swept: Callable[..., int], folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(SweepError, match=r"no sweep's folder, but holds thesis\.txt"):
        swept("seed=1,2")
    assert {file.name for file in folder.iterdir()} <= {"thesis.txt", "lock"}


def test_a_second_sweep_on_the_same_folder_is_refused(swept: Callable[..., int], folder: Path) -> None:
    with hold(folder), pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        swept("seed=1,2")


def test_a_trial_of_two_processes_rests_and_goes_on(swept: Callable[..., int], folder: Path) -> None:
    rungs = ("sweep.pruner=asha", "evaluation.eval_steps=1", "training.max_train_steps=2")
    assert swept("seed=1", "runtime.num_processes=2", *rungs) == 0
    assert (states(folder), steps_of(folder)) == (["FINISHED"], [2])
    assert [line["resumed_step"] for line in read_lines(folder / "0" / "starts.jsonl")] == [None, 1]
    assert not left_of(folder)


def test_a_full_disk_stops_the_sweep_which_goes_on_with_room(
    swept: Callable[..., int], small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk("size=12m") / "sweep"
    grid = ("seed=1,2,3", f"hydra.sweep.dir={folder}")
    assert swept(*grid) == 1
    assert f"Stopped: the disk is full: {folder}." in capsys.readouterr().out
    assert states(folder)[-1] == "FAILED"
    assert len(states(folder)) < 3
    small_disk("size=100m")
    assert swept(*grid) == 0
    assert states(folder) == ["FINISHED"] * 3


def test_models_are_compared_in_groups(swept: Callable[..., int], folder: Path) -> None:
    assert swept("model=tiny_llama,tiny_bart", "data.batching=padded", "seed=1,2", "sweep.n_jobs=2") == 0
    assert {row["model"] for row in board_of(folder)} == {"tiny_llama", "tiny_bart"}
    assert "## tiny_bart" in (folder / "leaderboard.md").read_text()


# ---- from the command line


def test_a_grid_survives_a_failure_a_kill_and_the_death_of_its_parent(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(64)]
    rates = ("1e-05", "0.0001", "0.001", "0.002")
    for rate in rates:
        for seed in (1, 2):
            write_lines(tmp_path / f"rows-{rate}-{seed}.jsonl", rows)
    damaged = tmp_path / "rows-0.001-1.jsonl"  # trial 4's
    damaged.write_text('{"prompt": 1}\n')
    grid = (
        f"optimizer.lr={','.join(rates)}", "seed=1,2", f"hydra.sweep.dir={folder}", "sweep.n_jobs=2",
        f"data.train_files=['{tmp_path}/rows-${{optimizer.lr}}-${{seed}}.jsonl']", "data.limit=64",
        "training.max_train_steps=30", "training.num_train_epochs=9", "checkpoint.checkpointing_steps=10",
        "evaluation.eval_steps=null",
    )  # fmt: skip

    dry = sweep(*grid, "sweep.dry_run=true")
    assert dry.returncode == 0
    assert "8 trials, 8 to run, 2 at a time. Nothing was run or written." in dry.stdout
    assert re.search(r"^time +at least \d+:\d\d of computing", dry.stdout, flags=re.MULTILINE)
    assert re.search(r"^memory +\d+\.\d MiB for each process; 2 trials at a time, 1 process each", dry.stdout, re.M)
    assert not folder.exists()
    bad = sweep(*grid, "training.per_device_train_batch_size=4,0")
    assert bad.returncode == 2
    assert not folder.exists()

    first = started(*grid)
    os.kill(until(lambda: pid_of(folder, 6), "trial 6 trains"), signal.SIGKILL)
    first.kill()
    first.communicate()
    finished = {int(file.parent.name) for file in folder.glob("*/summary.json")}
    assert len(finished) >= 4

    second = sweep(*grid)
    said = second.stdout + second.stderr
    assert second.returncode == 1, said
    assert "1 of 8 trials failed:" in said
    assert "DataError" in said
    assert str(folder / "4" / "logs" / "output.log") in said
    assert states(folder) == ["FINISHED"] * 4 + ["FAILED"] + ["FINISHED"] * 3
    assert [starts(folder)[n] for n in finished] == [1] * len(finished)
    listed = [line.split("  ", 3)[1].strip() for line in dry.stdout.splitlines() if "waiting" in line]
    assert len(listed) == 8
    assert sorted(row["n"] for row in board_of(folder)) == ["1", "2", "2", "2"]
    for number in range(8):
        steps = [line["step"] for line in read_lines(folder / str(number) / "metrics.jsonl")] if number != 4 else []
        assert steps == sorted(set(steps)), "no step twice"

    write_lines(damaged, rows)
    before = starts(folder)
    third = sweep(*grid)
    assert third.returncode == 0, third.stdout + third.stderr
    assert starts(folder) == [count + (number == 4) for number, count in enumerate(before)]
    assert [row["n"] for row in board_of(folder)] == ["2"] * 4
    assert not left_of(folder)


def test_ctrl_c_once_has_trials_save_and_the_sweep_goes_on(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    process = started(*LONG, f"hydra.sweep.dir={folder}")
    until(lambda: pid_of(folder, 0) and pid_of(folder, 1), "two trials train")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Stopped: SIGINT" in said
    assert states(folder) == ["PREEMPTED", "PREEMPTED"]
    for number in (0, 1):
        status = json.loads((folder / str(number) / "status.json").read_text())
        assert (folder / str(number) / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").exists()
    assert json.loads((folder / "sweep.json").read_text())["state"] == "PREEMPTED"
    assert not left_of(folder)


def test_trials_save_and_end_when_their_sweep_is_killed(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    process = started(*LONG, f"hydra.sweep.dir={folder}")
    until(lambda: pid_of(folder, 0) and pid_of(folder, 1), "two trials train")
    process.kill()
    until(lambda: states(folder) == ["PREEMPTED", "PREEMPTED"], "both have saved", 30)
    until(lambda: not left_of(folder), "nothing is left", 30)


def test_ctrl_c_twice_ends_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = ForkedCommand(command(*LONG, f"hydra.sweep.dir={folder}"), tmp_path / "log", prepare=os.setsid)
    for number in (0, 1):
        pid = until(lambda number=number: pid_of(folder, number), f"trial {number} trains")
        os.kill(pid, signal.SIGSTOP)  # one that can't end by itself
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75
    assert not left_of(folder)


def test_submitit_runs_what_a_search_proposes_in_batches(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    search = ("sweep=tpe", "optimizer.lr=tag(log,interval(1e-5,1e-2))", "sweep.n_trials=2", "sweep.n_jobs=2")
    done = sweep("hydra/launcher=submitit_local", *search, f"hydra.sweep.dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(folder) == ["FINISHED", "FINISHED"]
    for number, trial in enumerate(study_of(folder).trials):
        config = yaml.safe_load((folder / str(number) / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == trial.params["optimizer.lr"]
    assert list((folder / ".submitit").glob("*/*_log.out"))
