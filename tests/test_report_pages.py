"""`python -m src.report`: comparisons and sweeps, held against what is computed by hand."""

from __future__ import annotations

import copy
import difflib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.report import main, page_of
from src.reporting.page import Block, Figures, Page, Table, Text, rendered
from src.reporting.rows import mcnemar
from src.trials.folder import SweepFolder
from src.trials.importance import importances
from src.trials.trial import setting_of, trial_of
from tests.browser import CHROMIUM, Browser
from tests.conftest import admitted, write_lines
from tests.test_report import write_run
from tests.test_report_page import BITS, write_evaluation

LOSS = "eval/validation/loss"
LARGEST = 3_000_000  # bytes of a page


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads(json.dumps(admitted().frozen))


def changed(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Return a configuration with other values; `optimizer__lr` stands for optimizer.lr."""
    made = copy.deepcopy(dict(config))
    for key, value in values.items():
        *parents, leaf = key.split("__")
        node = made
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return made


def blocks(page: Page, title: str) -> list[Block]:
    return next((section.blocks for section in page.sections if section.title == title), [])


def table(page: Page, section: str, title: str = "") -> Table:
    return next(one for one in blocks(page, section) if isinstance(one, Table) and title in one.title)


def texts(page: Page, section: str) -> str:
    return " ".join(one.text for one in blocks(page, section) if isinstance(one, Text))


def predicted(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"row": i, "source": f"a.jsonl:{i + 1}", "prompt": f"{i}+1=", "text": "", "stop_reason": "eos"}
        | {"answer": f" {i + draw.randint(1, 3)}", "reference": None if i % 10 == 9 else f"{i + 1}"}
        for i in range(count)
    ]


@pytest.fixture
def pair(tmp_path: Path, config: dict[str, Any]) -> list[Path]:
    """Two runs that differ in configuration, code, data and versions, and have predicted some rows in common."""
    other = changed(config, seed=7, optimizer__lr=0.5, data__columns={"prompt": "q", "completion": "a"}, name="other")
    folders = [
        write_run(tmp_path / name, one, **{LOSS: 0.5, f"best/{LOSS}": 0.25, "tokens_seen": 800 * number, "steps": 4})
        for number, (name, one) in enumerate({"one": config, "other": other}.items(), 1)
    ]
    for number, folder in enumerate(folders, 1):
        write_lines(folder / "metrics.jsonl", [{"step": step, LOSS: 1 / step, "train/loss": 1.0} for step in (2, 4)])
        git = {"commit": "c0ffee", "dirty": True, "diff": f"same\n-a\n+b{number}\n"}
        versions = {"torch": f"2.{number}", "numpy": "2.4"}
        content = {"git": git, "versions": versions, "data": {"a.jsonl": "0" * 64, "b.jsonl": str(number) * 64}}
        (folder / "provenance.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "predictions").mkdir()
        write_lines(folder / "predictions" / "test.jsonl", predicted(40 + 10 * number, number))
    return folders


def test_mcnemars_exact_test_is_a_binomial_test_of_the_rows_that_differ() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(3, 1) == 2 * (1 + 4) / 16
    assert mcnemar(10, 2) == 2 * (1 + 12 + 66) / 4096


def test_rows_right_and_wrong_are_those_of_the_predictions(pair: list[Path]) -> None:
    right = [
        {
            one["source"]: one["answer"].strip() == one["reference"]
            for one in predicted(40 + 10 * n, n)
            if one["reference"]
        }
        for n in (1, 2)
    ]
    shared = [source for source in right[0] if source in right[1]]
    only = [
        [source for source in shared if (right[0][source], right[1][source]) == kind]
        for kind in ((True, False), (False, True))
    ]
    page = page_of(pair)
    said = texts(page, "Right and wrong")
    assert f"test, {len(shared)} rows" in said
    assert f"{len(only[0])} only in one, {len(only[1])} only in other" in said
    assert f"p {mcnemar(len(only[0]), len(only[1])):.2g}" in said
    for name, sources in zip(("one", "other"), only, strict=True):
        assert [row[0] for row in table(page, "Right and wrong", f"right only in {name}").rows] == sources != []


def test_rows_that_were_evaluated_count_beside_others_that_were_predicted(pair: list[Path]) -> None:
    for folder in pair:
        (folder / "evaluations" / "test").mkdir(parents=True)
        (folder / "predictions" / "test.jsonl").rename(folder / "evaluations" / "test" / "predictions.jsonl")
    evaluated = texts(page_of(pair), "Right and wrong")
    asked = [{**row, "source": f"questions.jsonl:{row['row'] + 1}", "reference": None} for row in predicted(3, 1)]
    write_lines(pair[0] / "predictions" / "test.jsonl", asked)
    assert texts(page_of(pair), "Right and wrong") == evaluated != ""


def test_differences_of_the_configuration_are_those_of_a_diff(pair: list[Path]) -> None:
    def lines(node: Any, prefix: str = "") -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from lines(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={json.dumps(value)}"

    sides = [list(lines(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))) for folder in pair]
    diff = [line for line in difflib.unified_diff(*sides, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    keys = {line[1:].partition("=")[0] for line in diff if line[0] in "+-"}
    rows = table(page_of(pair), "Configuration").rows
    assert (
        {row[0] for row in rows}
        == keys - {"name"}
        == {"seed", "optimizer.lr", "data.columns.prompt", "data.columns.completion"}
    )
    assert ["optimizer.lr", "0.002", "0.5"] in rows


def test_curves_are_over_steps_and_over_tokens_and_all_else_that_differs_is_shown(pair: list[Path]) -> None:
    page = page_of(pair)
    for section, xs in {"Over steps": [[2, 4], [2, 4]], "Over tokens": [[400, 800], [800, 1600]]}.items():
        (group,) = [one for one in blocks(page, section) if isinstance(one, Figures)]
        assert [figure.title for figure in group.figures] == [LOSS, "train/loss"]
        (loss, _) = group.figures
        assert [(one.name, list(one.x), list(one.y)) for one in loss.series] == [
            ("one", xs[0], [0.5, 0.25]),
            ("other", xs[1], [0.5, 0.25]),
        ]
    assert [row[0] for row in table(page, "Data").rows] == ["b.jsonl"]
    assert [row[0] for row in table(page, "Versions and hardware").rows] == ["versions.torch"]
    html = rendered(page)
    assert "-+b1" in html
    assert "++b2" in html


def test_thoughts_are_compared_over_steps_and_by_views(pair: list[Path]) -> None:
    for folder in pair:
        lines = [{"step": step, LOSS: 1.0, "eval/validation/thought_tokens": 3.0 * step} for step in (2, 4)]
        write_lines(folder / "metrics.jsonl", lines)
        write_evaluation(folder, "test")
    page = page_of(pair)
    titles = {
        section: [figure.title for one in blocks(page, section) if isinstance(one, Figures) for figure in one.figures]
        for section in ("Over steps", "Over tokens")
    }
    assert titles == {"Over steps": [LOSS, "eval/validation/thought_tokens"], "Over tokens": [LOSS]}
    (group,) = blocks(page, "What thoughts are worth")
    assert isinstance(group, Figures)
    (bits,) = group.figures
    expected = [BITS[view] for view in ("gold", "own", "shuffled", "none")]
    assert [(one.name, [*one.y]) for one in bits.series] == [("one: test", expected), ("other: test", expected)]


@pytest.fixture
def sweep(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A sweep of twelve trials: three learning rates, two weight decays, two seeds; some pruned, one failed."""
    folder = SweepFolder(tmp_path / "sweep")
    folder.folder.mkdir()
    points = [(lr, decay, seed) for lr in (1e-4, 1e-3, 1e-2) for decay in (0.0, 0.1) for seed in (1, 2)]
    trials = []
    for number, (lr, decay, seed) in enumerate(points):
        own = changed(config, optimizer__lr=lr, optimizer__weight_decay=decay, seed=seed)
        overrides = (f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}", f"seed={seed}")
        trials.append(trial_of(number, number, overrides, own, setting_of(own)))
        state = {6: "FAILED", 10: "PRUNED", 11: "PRUNED"}.get(number, "FINISHED")
        value = 100 * lr + decay + seed / 1000
        others = {"perf/elapsed_seconds": 60.0, LOSS.replace("loss", "rougeL"): 0.5, "eval/another/rougeL": 1.0}
        place = write_run(folder.run_dir(number), own, state, **{LOSS: value}, **others)
        write_lines(place / "metrics.jsonl", [{"step": 2, LOSS: 2 * value}, {"step": 4, LOSS: value}])
        if state != "FINISHED":
            status = {"state": state, "step": 4, "cause": f"<b>because</b> of {number}"}
            (place / "status.json").write_text(json.dumps(status), encoding="utf-8")
    folder.write_trials(trials)
    times = dict.fromkeys(("started", "updated"), "2026-01-01T00:00:00+00:00")
    folder.write(
        {"name": "sweep", "id": "1", "state": "FAILED", "space": {}, "history": [], "elapsed_seconds": 1.0, **times}
        | {"sweep": {"metric": LOSS, "direction": "minimize"}, "counts": {"FINISHED": 9, "PRUNED": 2, "FAILED": 1}}
    )
    return folder.folder


def test_a_sweep_is_ranked_and_its_failures_and_pruned_trials_have_their_causes(sweep: Path) -> None:
    page = page_of([sweep])
    ranking = table(page, "Ranking")
    assert ranking.rows[0][1] == "optimizer.lr=0.0001 optimizer.weight_decay=0.0"
    assert ranking.rows[0][2].startswith("0.0115 ± 0.0064")
    assert len(ranking.rows) == 6
    costs = dict(zip(ranking.headings[7:], ranking.rows[0][7:], strict=True))
    assert costs == {"time": "1:00", "rougeL": "0.5", "trials": "0 1"}
    assert [row[:2] + row[3:4] for row in table(page, "Failed").rows] == [
        ["6", "optimizer.lr=0.001 optimizer.weight_decay=0.1 seed=1", "<b>because</b> of 6"]
    ]
    assert [row[0] for row in table(page, "Pruned").rows] == ["10", "11"]
    figures = {one.key: one for one in page.figures}
    assert {"settings", "parallel", "trials"} < figures.keys()
    rates = figures["hyperparameter_optimizer_lr"]
    assert rates.has_log_x
    assert [(one.name, len(one.x)) for one in rates.series] == [("finished", 9), ("not finished, newest value", 3)]
    assert table(page, "Hyperparameters", "Importance").rows[0][0] == "optimizer.lr"


def test_importance_is_of_what_the_metric_depends_on() -> None:
    trials = [({"a": a, "b": b, "c": "same"}, 10 * a) for a in (0.0, 1.0, 2.0, 3.0) for b in (0.0, 1.0)]
    shares = importances(trials)
    assert list(shares) == ["a", "b"]
    assert shares["a"] > 0.95
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(trials[:3]) == {}


def test_pages_are_shown_without_a_complaint(pair: list[Path], sweep: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (the Debian package chromium)")
    file = tmp_path / "page.html"
    with Browser(tmp_path / "profile") as browser:
        for folders in (pair, [sweep]):
            file.write_text(rendered(page_of(folders)), encoding="utf-8")
            assert file.stat().st_size < LARGEST
            for width, is_dark in ((390, True), (1440, False)):
                browser.open(file, width, is_dark=is_dark)
                assert browser.complaints() == []
                assert browser.value("document.documentElement.scrollWidth <= innerWidth")


def test_a_comparison_is_written_where_it_is_asked_for(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    assert main([f"dirs=[{pair[0]},{pair[1]}]", f"report.output={output}"]) == 0
    assert output.is_file()
    assert (tmp_path / "page_figures" / "steps_eval_validation_loss.csv").is_file()
    assert str(output) in capsys.readouterr().out


def test_a_sweep_without_a_trial_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    assert main([f"dir={tmp_path}"]) == 2
    assert "sweep.json is damaged" in capsys.readouterr().err
