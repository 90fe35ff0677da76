"""`python -m src.report`: the table of all runs, and the language that chooses among them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config.frozen import config_hash
from src.records import read_similar_yaml, read_yaml
from src.report import main
from src.reporting.where import WhereError, read_where
from tests.conftest import ROOT, admitted, write_lines

KNOWN = {
    "seed": 3,
    "state": "FINISHED",
    "optimizer.lr": 1e-3,
    "data.streaming": False,
    "tokens/<a>/norm": 0.5,
    "fold": None,
}
TIME = "2026-01-02T03:04:05+00:00"


def write_run(folder: Path, config: Mapping[str, Any], state: str = "FINISHED", **summary: Any) -> Path:
    """Write the files that a run leaves, but for its weights."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    write_lines(folder / "starts.jsonl", [{"time": TIME, "command": ["x"], "config_hash": config_hash(config)}])
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 4, "started": TIME}), encoding="utf-8")
    if state == "FINISHED":
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads(json.dumps(admitted().frozen))


@pytest.fixture
def place(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs and a folder that is damaged, in the places where runs are looked for."""
    loss = "eval/validation/loss"
    write_run(
        tmp_path / "outputs" / "default" / "a", config, **{loss: 0.5, f"best/{loss}": 0.25, "train_seconds": 61.0}
    )
    other = config | {"seed": 7}
    folder = write_run(tmp_path / "multirun" / "s" / "0", other, "PREEMPTED")
    write_lines(folder / "metrics.jsonl", [{"step": 1, loss: 0.75}, {"step": 2, loss: 1.5}])
    write_run(tmp_path / "outputs" / "b", config | {"name": "another"}, "RUNNING")
    write_run(tmp_path / "outputs" / "c", config)
    (tmp_path / "outputs" / "c" / "status.json").write_text("{", encoding="utf-8")
    (tmp_path / "rows.csv").write_text("prompt,completion\n1+1=,2\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    with open(file, encoding="utf-8") as lines:
        return {row["folder"]: row for row in csv.DictReader(lines)}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("seed = 3", True),
        ("seed == 3.0 and state = FINISHED", True),
        ("seed != 3 or state != FINISHED", False),
        ("seed < 3", False),
        ("seed <= 3 and seed >= 3 and seed > 2", True),
        ("not seed = 3", False),
        ("not (seed = 3 and state = FAILED)", True),
        ("state = FAILED or state = FINISHED and seed = 4", False),
        ("(state = FAILED or state = FINISHED) and seed = 3", True),
        ("optimizer.lr>=1e-3", True),
        ("data.streaming = false", True),
        ("data.streaming = 0", False),
        ("fold = null", True),
        ("fold < 1", False),
        ("state ~ finish", True),
        ("state < 3", False),
        ('"tokens/<a>/norm" > 0.4', True),
        ("state = 'FINISHED'", True),
    ],
)
def test_a_condition_holds(text: str, holds: bool) -> None:
    assert read_where(text).holds(KNOWN.get) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "at character 5: it ends, where"),
        ("seed =", "at character 7: it ends, where a value"),
        ("seed = 3 state = x", "at character 10: there is state, where and"),
        ("(seed = 3", "at character 10: it ends, where )"),
        ("seed = 3 and", "at character 13: it ends, where a key"),
        ('seed = "3', "at character 8: a quote without its end"),
        ("seed ! 3", "at character 6: ! has no meaning"),
        ("__import__('os')", "at character 11: there is (, where =, !="),
        ("not " * 60 + "seed = 1", "nested more than 50 deep"),
    ],
)
def test_a_condition_that_can_not_be_read_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(WhereError) as error:
        read_where(text)
    assert said in str(error.value)


def test_the_table_has_every_run_and_only_what_differs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report.csv=t.csv"]) == main(["report.csv=t.csv"]) == 0
    rows = rows_of(place / "t.csv")
    assert rows.keys() == {"outputs/default/a", "multirun/s/0", "outputs/b", "outputs/c"}
    first, stopped = rows["outputs/default/a"], rows["multirun/s/0"]
    assert (first["state"], first["seed"], first["last"], first["best"], first["seconds"]) == (
        *("FINISHED", "42", "0.5", "0.25", "61.0"),
    )
    assert (stopped["state"], stopped["seed"], stopped["last"], stopped["best"]) == ("PREEMPTED", "7", "1.5", "0.75")
    assert (rows["outputs/b"]["state"], rows["outputs/b"]["cause"]) == ("FAILED", "killed at step 4")
    assert rows["outputs/c"]["state"] == "DAMAGED"
    assert "status.json is damaged" in rows["outputs/c"]["cause"]
    assert set(first) == {"folder", "state", "started", "seed", "last", "best", "seconds", "memory", "cause"}
    printed = capsys.readouterr().out
    assert printed.startswith("last and best: eval/validation/loss\n")
    assert len(printed.splitlines()) == 2 * 7
    assert "seed=7" in printed


def test_hostile_names_are_shown_on_one_line_and_obeyed_by_nobody(
    place: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\n\u202e<b>'\""
    write_run(place / "outputs" / name, config | {"name": name, "seed": 9})
    assert main(["report.columns=[folder,name,seed]", "report.where=seed = 9", "report.csv=t.csv"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split("  ")[:2] == ["outputs/a\\x1b[31m\\n\\u202e<b>'\"", "a\\x1b[31m\\n\\u202e<b>'\""]
    assert list(rows_of(place / "t.csv")) == [f"outputs/{name}"]


def test_rows_and_columns_are_chosen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report.where=seed > 40 and state = FINISHED", "report.columns=[folder,optimizer.lr]"]) == 0
    assert capsys.readouterr().out.splitlines() == ["folder             optimizer.lr", "outputs/default/a  0.002"]
    assert main(["report.where=seed = 1"]) == 0
    assert "None of 4 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report.where=sed = 1"], ["report.where", "at character 1", "did you mean seed?"]),
        (["report.where=seed = 1 and ("], ["at character 15", "a key"]),
        (["report.columns=[stat]"], ["report.columns", "did you mean state?"]),
        (["report.columns=folder"], ["report.columns", "list"]),
        (["report.wher=1"], ["report.wher", "did you mean report.where?"]),
        (["optimizer.lr=1", "model=tiny_bart"], ["optimizer.lr", "model"]),
        (["--cfg", "job"], ["--cfg", "takes KEY=VALUE"]),
        (["dir=nothing"], ["dir", "no such folder"]),
        (["dir=outputs"], ["dir", "no folder of a run or a sweep"]),
        (["dir=outputs/b", "dirs=[outputs/b,outputs/c]"], ["one of them"]),
        (["dirs=[outputs/b]"], ["two folders or more"]),
        (["dirs=[outputs/b,outputs/../outputs/b]"], ["twice"]),
        (["dir=outputs/b", "report.where=seed = 1"], ["report.where", "a page"]),
        (["report.output=x.html"], ["report.output"]),
        (["report.csv=outputs"], ["report.csv", "a folder"]),
        (["report.csv=outputs/b/mine.csv"], ["report.csv", "a run's or a sweep's"]),
        (["report.csv=rows.csv"], ["report.csv", "there already"]),
        (["dir=outputs/b", "report.output=outputs/b/config.yaml"], ["report.output", "there already"]),
        (["dir=outputs/b", "report.output=outputs/b/model.html"], ["report.output", "a run's or a sweep's"]),
    ],
)
def test_mistakes_are_refused(
    place: Path, arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in said), printed
    assert not list(place.glob("**/*.html"))
    assert (place / "rows.csv").read_text(encoding="utf-8").startswith("prompt")


def test_a_table_costs_no_heavy_import(place: Path) -> None:
    code = (
        "import sys; from src.report import main; assert main([]) == 0; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'numpy', 'bokeh', 'mlflow') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n- x\n- y: {z: 2}\nc: 'x\n\n  y'\n",
        "a: &x [1]\nb: *x\n",
        "a: 1\na: 2\n",
        "# c\na: 1\n",
        "a: |\n  b: 1\n",
    ],
)
def test_sections_read_one_by_one_are_those_of_the_file(tmp_path: Path, text: str, config: dict[str, Any]) -> None:
    for number, content in enumerate((text, yaml.safe_dump(config))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(content, encoding="utf-8")
        assert read_similar_yaml(file) == read_yaml(file)
