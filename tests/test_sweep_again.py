"""A sweep with one job is the same sweep however often it is killed: the same trials, rungs, values and ranking."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from src.cli.hydra_main import run_trial
from src.errors import ConfigError
from src.runtime.signals import StopRequest
from src.search.study import Study, Unit
from src.search.warm_start import earlier_units
from src.sweep.engines.engine import TrialJob
from src.sweep.engines.local import Workers
from src.sweep.pruning import VERDICT_SECONDS, Pruning, answer
from src.sweep.sweeper import lead
from src.trials.folder import SweepFolder
from tests.conftest import read_lines
from tests.sweeps import board_of, planned, states, study_of

SEARCH = (
    "sweep=asha", "sweep.sampler=tpe", "sweep.n_trials=4", "sweep.reduction_factor=2", "sweep.max_retries=5",
    "optimizer.lr=tag(log,interval(1e-6,1e-2))", "training.max_train_steps=5", "training.num_train_epochs=9",
    "evaluation.eval_steps=1", "scheduler=constant", "data.limit=36", "checkpoint.checkpointing_steps=null",
)  # fmt: skip


class Killed(BaseException):
    """The parent is gone."""


class Mortal(Workers):
    """Workers of a sweep that dies at some of the starts of trials."""

    def __init__(self, *given: Any, dies_at: int) -> None:
        super().__init__(*given, uses_gpus=False)
        self.left = dies_at

    def start(self, job: TrialJob) -> None:
        self.left -= 1
        if not self.left:
            raise Killed
        super().start(job)


def run_and_die_once(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    """Run a trial, which is killed with its second evaluation logged, the first time that it comes so far."""
    marker, metrics = Path(run_dir, "died"), Path(run_dir, "metrics.jsonl")

    def watch() -> None:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            time.sleep(0.002)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if not marker.exists():
        threading.Thread(target=watch, daemon=True).start()
    return run_trial(config, run_dir, link)


def outcome(folder: Path) -> dict[str, Any]:
    """Return what may not depend on how a sweep came to its end."""
    trials = SweepFolder(folder).trials()
    values = {
        trial.number: [
            line["eval/validation/loss"] for line in read_lines(folder / str(trial.number) / "metrics.jsonl")
        ]
        for trial in trials
    }
    ranks = [(row["setting"], row["mean"], row["n"]) for row in board_of(folder)]
    return {"trials": [trial.overrides for trial in trials], "values": values, "states": states(folder), "ranks": ranks}


def test_a_search_that_was_killed_again_and_again_is_the_one_that_was_not(tmp_path: Path, no_pictures: None) -> None:
    def begin(folder: Path, workers: Workers) -> int:
        return lead(planned(f"hydra.sweep.dir={folder}", *SEARCH), StopRequest(), workers)

    assert begin(tmp_path / "whole", Workers(run_trial, 1, 1, uses_gpus=False)) == 0
    whole = outcome(tmp_path / "whole")
    assert {len(values) for values in whole["values"].values()} >= {1, 5}, "one ended early, one did not"
    for dies_at in (2, 2, 3):
        with pytest.raises(Killed):
            begin(tmp_path / "killed", Mortal(run_and_die_once, 1, 1, dies_at=dies_at))
    assert begin(tmp_path / "killed", Workers(run_and_die_once, 1, 1, uses_gpus=False)) == 0
    assert outcome(tmp_path / "killed") == whole
    assert list((tmp_path / "killed").glob("*/died"))
    assert study_of(tmp_path / "killed").metric_names == ["eval/validation/loss"]
    copied = study_of(tmp_path / "killed").trials
    assert [dict(trial.intermediate_values) for trial in copied] == [
        dict(enumerate(values, 1)) for values in whole["values"].values()
    ]
    assert [trial.state.name == "COMPLETE" for trial in copied] == [one == "FINISHED" for one in whole["states"]]


def test_a_trial_waits_for_the_verdict_on_its_own_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    link = {"metric": "best/eval/validation/loss", "pause_at": None, "waits": True}
    trial = Pruning(link, tmp_path, [{"step": 1}, {"eval/validation/loss": 3.0}], warned.append)
    answer(tmp_path, 2, "")
    assert trial.verdict({"train/loss": 1.0}) == ""  # no evaluation: nobody is asked
    assert trial.verdict({"eval/validation/loss": 2.0}) == ""
    asked = threading.Timer(0.05, answer, (tmp_path, 3, "worse than others"))
    asked.start()
    assert trial.verdict({"eval/validation/loss": 2.5}) == "worse than others"
    assert trial.verdict({"eval/validation/loss": float("nan")}) == ""  # a failure, which the run reports itself
    monkeypatch.setattr("src.sweep.pruning.VERDICT_SECONDS", 0.05)
    (tmp_path / "verdict.json").write_text("{")
    assert trial.verdict({"eval/validation/loss": 2.5}) == ""
    assert "so the run continues" in warned[0]
    assert VERDICT_SECONDS >= 30
    assert json.loads(json.dumps(link)) == link


def test_a_trial_pauses_at_its_rung_only(tmp_path: Path) -> None:
    link = {"metric": "eval/validation/loss", "pause_at": 3, "waits": False}
    trial = Pruning(link, tmp_path, [{"eval/validation/loss": 3.0}], print)
    assert trial.verdict({"eval/validation/loss": 2.0}) == ""
    assert trial.verdict({"eval/validation/loss": 1.5}).startswith("paused at evaluation 3 (eval/validation/loss 1.5)")
    assert Pruning(None, tmp_path, [], print).verdict({"eval/validation/loss": 1.5}) == ""


AXES = ("optimizer.lr=tag(log,interval(1e-6,1e-2))", "optimizer.weight_decay=interval(0,0.1)", "seed=1,2,3")


def proposals(study: Study, count: int, first: int = 0) -> list[tuple[str, ...]]:
    """Return what a study proposes, each answered at once with a value that its learning rate decides."""
    found = []
    for number in range(first, first + count):
        proposal = study.propose(number, 0)
        study.accept(Unit(number, proposal.overrides, attrs=json.loads(json.dumps(proposal.attrs))))
        study.report(number, [1.0])
        study.end(number, "FINISHED", (abs(math.log10(float(proposal.overrides[0].partition("=")[2])) + 3),))
        found.append(proposal.overrides)
    return found


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "cmaes", "qmc"])
def test_a_study_made_of_what_was_tried_proposes_what_the_one_that_was_there_does(sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    plan = planned("sweep=tpe", f"sweep.sampler={sampler}", *AXES, "sweep.n_trials=30")
    whole = Study(plan.config, plan.axes, [], lambda _: None)
    expected = proposals(whole, 24)
    assert len(set(expected)) == 24
    for stop in (1, 9, 17):  # a population of cmaes is 6, gp learns from the 11th on
        again = Study(plan.config, plan.axes, [whole.units[number] for number in range(stop)], lambda _: None)
        refused = again.propose(stop, 1)
        assert refused.overrides != expected[stop]
        again.refuse()
        assert proposals(again, 4, stop) == expected[stop : stop + 4]


def test_a_sampler_begins_with_the_results_of_another_sweep(
    swept: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    search = ("sweep=tpe", "sweep.pruner=none", "optimizer.lr=tag(log,interval(1e-6,1e-2))", "sweep.n_trials=2")
    assert swept(*search, "seed=1,2") == 0
    plan = planned(f"hydra.sweep.dir={tmp_path / 'next'}", *search, f"sweep.warm_start={folder}")
    plan.folder.mkdir()
    earlier = earlier_units(plan.config, plan.folder)
    means = {row["setting"]: float(row["mean"]) for row in board_of(folder)}
    assert {unit.overrides[0]: unit.values[0] for unit in earlier} == pytest.approx(means)
    (folder / "0" / "summary.json").unlink()
    (folder / "trials.jsonl").unlink()
    assert earlier_units(plan.config, plan.folder) == earlier  # as they were at the first start
    study = Study(plan.config, plan.axes, [], lambda _: None, earlier)
    study.propose(0, 0)
    assert [trial.value for trial in study._optuna()[0].trials[:2]] == [unit.values[0] for unit in earlier]
    with pytest.raises(ConfigError, match=r"sweep\.warm_start.*only tpe, gp or cmaes learn from it"):
        planned("seed=1,2", f"sweep.warm_start={folder}")


def test_hyperband_counts_its_trials_as_the_sweep_does() -> None:
    """Which trials compete is decided by their numbers, also where others were begun before."""
    plan = planned("sweep=tpe", "sweep.pruner=hyperband", "optimizer.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3,8e-3,9e-3")
    waiting = [Unit(trial.unit, trial.overrides, "WAITING") for trial in plan.trials]

    def verdicts(order: Sequence[int]) -> list[bool]:
        study = Study(plan.config, plan.axes, waiting, lambda _: None)
        found = {}
        for number in order:
            study.begin(Unit(number, plan.trials[number].overrides))
        for number in range(9):
            for evaluation in range(1, 10):
                study.report(number, [float(number)] * evaluation)
                if study.should_prune(number):
                    break
            found[number] = len(study.units[number].reports)
            study.end(
                number, "FINISHED" if found[number] == 9 else "PRUNED", (float(number),) if found[number] == 9 else ()
            )
        return [found[number] < 9 for number in range(9)]

    assert any(verdicts(range(9)))
    assert verdicts(range(9)) == verdicts([4, 2, 8, 0, 1, 3, 5, 6, 7])
