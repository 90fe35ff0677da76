"""`force=true`: what commands left in a run's folder goes, what its user put there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.evaluation.evaluated_set import FILES, EvaluatedSet
from src.evaluation.predicted_set import PredictedSet
from src.exporting.folder import write_record
from src.report import main
from src.tracking.own_files import remove_results
from src.tracking.run_folder import Start
from src.util import write_json
from tests.conftest import write_lines
from tests.test_tracking import open_folder, stopped_folder

OF_THE_USER = (
    *("notes.txt", "report_figures/mine.csv", "report_figures/mine.png", "predictions/notes.json"),
    *("evaluations/test/notes.txt", "benchmarks/mine.jsonl", "export/merged-float32/GGUF/model.gguf"),
)


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def write_results(run: Path) -> None:
    """Write what predict, evaluate, benchmark and export leave, each with its record."""
    for name in ("predictions", "evaluations/test", "benchmarks"):
        (run / name).mkdir(parents=True)
    PredictedSet(run / "predictions", "test", {"seed": 1}).resume([], 1)
    (run / "predictions" / "test.csv").write_text("row\n", encoding="utf-8")
    write_json(run / "predictions" / "metrics.json", {"eval/test/exact_match": 1.0})
    for log in EvaluatedSet(run / "evaluations", "test", {FILES: {}}, {}).logs():
        log.resume([], 1)
    write_json(run / "evaluations" / "evaluation.json", {"metrics": {}})
    write_json(run / "benchmarks" / "sums.json", {"decided_by": {"seed": 1}})
    (run / "benchmarks" / "sums.jsonl").write_text("{}\n", encoding="utf-8")
    export = run / "export" / "merged-float32"
    (export / "adapter").mkdir(parents=True)
    for name in ("model.safetensors", "README.md", "generation_config.json", "adapter/adapter_config.json"):
        (export / name).write_text("{}", encoding="utf-8")
    write_record(export, {})


def test_a_run_that_begins_anew_leaves_only_what_the_user_put_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_folder(tmp_path / "fresh"):
        pass
    run = tmp_path / "run"
    stopped_folder(run, 3)
    write_lines(run / "metrics.jsonl", [{"step": 3, "train/loss": 1.0}])
    assert main([f"dir={run}"]) == 0
    write_results(run)
    for name in OF_THE_USER:
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_text("{}", encoding="utf-8")
    assert {"report.html", "report_figures/loss.csv", "report_figures/loss.png"} < files_in(run)
    with open_folder(run, Start(force=True)):
        pass
    assert files_in(run) == files_in(tmp_path / "fresh") | set(OF_THE_USER)


def test_a_page_of_the_user_stays_with_its_figures(tmp_path: Path) -> None:
    stopped_folder(tmp_path, 3)
    own = {"report.html", "report_figures/loss.csv"}
    (tmp_path / "report_figures").mkdir()
    for name in own:
        (tmp_path / name).write_text("series,step,loss\n", encoding="utf-8")
    with open_folder(tmp_path, Start(force=True)):
        pass
    assert own < files_in(tmp_path)


def test_what_a_damaged_record_was_of_stays_and_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    PredictedSet(folder, "test", {"seed": 1}).resume([], 1)
    (folder / "test.json").write_text("{", encoding="utf-8")
    before = files_in(tmp_path)
    remove_results(folder)
    assert files_in(tmp_path) == before
    (tmp_path / "export").symlink_to(folder)
    remove_results(tmp_path / "export")
    assert files_in(tmp_path) == before
    assert not (tmp_path / "export").is_symlink()
