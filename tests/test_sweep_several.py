"""Sweeps by several metrics: what is refused, what samplers propose, and a sweep of real runs from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.report import page_of
from src.reporting.page import Table
from src.search.study import Study, Unit
from src.search.warm_start import earlier_units
from src.sweep.progress import ProgressTable, TableRow, ending
from src.trials.folder import SweepFolder, TrialStatus
from src.trials.trial import Trial
from tests.sweeps import board_of, planned, starts, study_of

LOSS = "eval/validation/loss"
TWO = (f"sweep.metric=[{LOSS},tokens_seen]", "sweep.direction=[minimize,minimize]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"sweep.metric=[{LOSS},tokens_seen]"], ["sweep.direction = minimize", "each of 2 metrics"]),
        (["sweep.direction=[minimize,minimize]"], ["sweep.direction", "each of 1 metric,"]),
        ([f"sweep.metric=[{LOSS},{LOSS}]", TWO[1]], ["sweep.metric", "is there twice"]),
        ([*TWO, "sweep.pruner=median"], ["sweep.pruner = median", "by one metric", "sweep.pruner=none"]),
        ([*TWO, "sweep.sampler=cmaes"], ["sweep.sampler = cmaes", "tpe, gp, random or qmc"]),
        ([TWO[0], "sweep.direction=[maximize,minimize]"], ["better when it is lower"]),
        ([f"sweep.metric=[{LOSS},eval/x/loss]", TWO[1]], ["sweep.metric = eval/x/loss", "no evaluation computes this"]),
        (["sweep.metric=[]"], ["sweep.metric", "or a list of them"]),
        (["sweep.metric=[3]"], ["sweep.metric", "or a list of them"]),
        (["sweep.direction=up"], ["sweep.direction = up", "minimize or maximize"]),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        planned("optimizer.lr=1e-3,1e-2", *arguments)
    for word in words:
        assert word in str(refused.value)


def test_a_list_of_one_is_the_text_itself() -> None:
    listed = planned("sweep.name=n", "seed=1,2", f"sweep.metric=[{LOSS}]", "sweep.direction=[minimize]")
    assert listed.settings == planned("sweep.name=n", "seed=1,2").settings


def test_the_table_of_progress_has_a_column_a_metric_and_marks_the_front() -> None:
    trial = Trial(0, 0, ("optimizer.lr=0.5",), "a", "b", 1, None, {})
    done = TrialStatus("FINISHED", (0.25, 1200.0), step=9, num_steps=9)
    table = ProgressTable("mine", ["loss", "tokens_seen"])._table([TableRow(trial, done, is_best=True)], "1 of 2")
    shown = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert (shown["loss"], shown["tokens_seen"]) == (["0.25"], ["1200 front"])
    waiting = ProgressTable("mine", ["loss", "tokens_seen"])._table([TableRow(trial, TrialStatus("WAITING"))], "")
    assert [[str(cell) for cell in column.cells] for column in waiting.columns][4:] == [[""], [""], [""]]
    assert ending(done, ["loss", "tokens_seen"]) == "finished, loss 0.25, tokens_seen 1200"


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "qmc"])
def test_a_study_made_anew_proposes_by_several_metrics_what_the_first_one_does(sampler: str) -> None:
    axes = ("optimizer.lr=tag(log,interval(1e-6,1e-2))", "optimizer.weight_decay=interval(0,0.1)")
    plan = planned("sweep=tpe", "sweep.pruner=none", f"sweep.sampler={sampler}", *TWO, *axes, "sweep.n_trials=20")

    def proposals(study: Study, first: int, count: int) -> list[tuple[str, ...]]:
        found = []
        for number in range(first, first + count):
            proposal = study.propose(number, 0)
            study.accept(Unit(number, proposal.overrides, attrs=json.loads(json.dumps(proposal.attrs))))
            rate, decay = (float(text.partition("=")[2]) for text in proposal.overrides)
            study.end(number, "FINISHED", (abs(math.log10(rate) + 3), decay))
            found.append(proposal.overrides)
        return found

    whole = Study(plan.config, plan.axes, [], lambda _: None)
    expected = proposals(whole, 0, 13)
    assert len(set(expected)) == 13
    for stop in (3, 12):  # tpe and gp learn from the 11th on
        again = Study(plan.config, plan.axes, [whole.units[number] for number in range(stop)], lambda _: None)
        assert proposals(again, stop, 1) == expected[stop : stop + 1]


def test_more_steps_and_fewer_tokens_are_a_front(
    swept_and_drawn: Callable[..., int], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("sweep.name=n", "training.max_train_steps=1,3", "seed=1,2", "sweep.n_jobs=2")
    assert swept_and_drawn(*grid, *TWO) == 0
    ends = [json.loads((folder / str(n) / "summary.json").read_text()) for n in range(4)]
    assert ends[2]["tokens_seen"] > ends[0]["tokens_seen"]
    assert max(ends[2][LOSS], ends[3][LOSS]) < min(ends[0][LOSS], ends[1][LOSS])
    rows = {row["setting"]: row for row in board_of(folder)}
    assert {(row["rank"], row["on_front"]) for row in rows.values()} == {("1", "true")}
    mean = (ends[0]["tokens_seen"] + ends[1]["tokens_seen"]) / 2
    assert float(rows["training.max_train_steps=1"]["tokens_seen"]) == mean
    assert {file.name for file in folder.glob("plots/*.png")} == {
        "pareto.png", "settings_1.png", "settings_2.png", "history_1.png", "history_2.png",
    }  # fmt: skip
    content = json.loads((folder / "sweep.json").read_text())
    assert [len(point["value"]) for point in content["history"]] == [2] * 4
    assert content["history"][-1]["best"] == [min(end[name] for end in ends) for name in (LOSS, "tokens_seen")]
    values = {one["trial"]: one["value"] for one in content["best"]}
    lowest = min(end[LOSS] for end in ends)
    assert [lowest, next(end["tokens_seen"] for end in ends if end[LOSS] == lowest)] in values.values()
    lacking = SweepFolder(folder).status(0, (LOSS, "train/objective"))  # not logged where it is the loss
    assert (lacking.state, lacking.values) == ("FAILED", ())
    assert "no value of train/objective" in lacking.cause
    study = study_of(folder)
    assert [one.name for one in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert [trial.values for trial in study.trials] == [[end[LOSS], end["tokens_seen"]] for end in ends]
    assert {trial.number for trial in study.best_trials} == values.keys()

    page = page_of([folder])
    assert {"pareto", "settings_1", "trials_1", "hyperparameter_training_max_train_steps_2"} <= {
        figure.key for figure in page.figures
    }
    ranking = next(block for block in page.sections[0].blocks if isinstance(block, Table))
    assert ranking.headings[:5] == ["rank", "setting", "loss", "tokens_seen", "n"]

    again = f"sweep.warm_start={folder}"
    plan = planned(f"hydra.sweep.dir={tmp_path / 'next'}", "sweep=tpe", "sweep.pruner=none", *grid[1:3], *TWO, again)
    plan.folder.mkdir()
    earlier = earlier_units(plan.config, plan.folder)
    assert [unit.values[1] for unit in earlier] == [mean, (ends[2]["tokens_seen"] + ends[3]["tokens_seen"]) / 2]
    assert len(Study(plan.config, plan.axes, [], lambda _: None, earlier)._optuna()[0].trials) == 2
    plan.config.metric = [*reversed(plan.config.metrics)]
    turned = earlier_units(plan.config, plan.folder)
    assert [unit.values for unit in turned] == [unit.values[::-1] for unit in earlier]
    plan.config.metric, plan.config.direction = LOSS, "minimize"
    assert [unit.values for unit in earlier_units(plan.config, plan.folder)] == [unit.values[:1] for unit in earlier]

    monkeypatch.setattr("src.sweep.sweeper.write_png", lambda *_: None)
    assert swept_and_drawn(*grid, *TWO) == 0
    plots = [folder / "plots" / name for name in ("pareto.png", "settings_2.png", "mine.png")]
    plots[0].parent.mkdir(exist_ok=True)
    for plot in plots:
        plot.touch()
    assert swept_and_drawn(*grid, "sweep.metric=tokens_seen") == 0
    assert [plot.exists() for plot in plots] == [False, False, True]  # what others drew there stays
    assert starts(folder) == [1] * 4
    assert next(row["setting"] for row in board_of(folder)) == "training.max_train_steps=1"
    assert (folder / "trials.jsonl").read_text().count("\n") == 4
