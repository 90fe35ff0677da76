"""docs/extending.md: every example is executed; plugins: what they register is checked, recorded and trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoint.compatibility import compare_configs
from src.config import keys, plugins
from src.config.gate import admit, admit_finished
from src.config.schema import OPTIMIZERS, SCHEDULES, OptimizerConfig
from src.config.schema.checks import POSITIVE
from src.config.schema.fields import Impact, key
from src.config.schema.tracking import TRACKERS, TrackingConfig
from src.data.formats import FORMATS
from src.metrics import METRICS, compute_metrics, greater_is_better, metric
from src.tracking.exporters import EXPORTERS
from src.tracking.line_exporter import LineExporter
from src.training.optim import build_optimizer
from tests.conftest import FORKS, ROOT, admitted, read_lines, write_lines
from tests.test_gate import refusal

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
EXAMPLES = [title for title, text in SECTIONS.items() if "```bash" in text]
TINY = (
    *("data.limit=8", "training.max_train_steps=3", "training.per_device_train_batch_size=2"),
    *("evaluation.max_samples=2", "evaluation.sample_prompts=1", "generation.max_new_tokens=4"),
    *("training.logging_steps=1", "tokens=none", "data.max_dropped_fraction=0.9"),
)


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have everything registered here gone afterwards."""
    registered = (METRICS, OPTIMIZERS, SCHEDULES, FORMATS, TRACKERS, EXPORTERS)
    before = [dict(registry) for registry in registered]
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_imported", {})
    yield
    for registry, entries in zip(registered, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in set(sys.modules) - modules:
        if not name.startswith(("src.", "torch", "transformers")):
            del sys.modules[name]
    keys.all_keys.cache_clear()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder as a user's is: the project's data and models are in it, and nothing else."""
    for name in ("data", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def give(folder: Path, commands: list[list[str]]) -> None:
    """Give commands in a folder, in this process: those of `python -m src.run`, and scripts."""
    os.chdir(folder)
    out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from src.cli.main import main

    for words in commands:
        if words[1] == "-m":
            sys.argv = [str(ROOT / "src" / "run.py"), *words[3:]]
            if code := main():
                sys.exit(code)
        else:
            runpy.run_path(words[1], run_name="__main__")


def forked(folder: Path, *commands: list[str]) -> str:
    """Give commands in a process of their own, and return what was printed."""
    process = FORKS.Process(target=give, args=(folder, list(commands)))
    process.start()
    process.join(200)
    printed = (folder / "output").read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    return printed


def write_example(section: str, folder: Path) -> list[list[str]]:
    """Write a section's files, each named in the line before it, and return its commands."""
    for name, text in re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)```", section, flags=re.M | re.S):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", section, flags=re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("title", EXAMPLES)
def test_every_example_runs(title: str, place: Path) -> None:
    commands = write_example(SECTIONS[title], place)
    tracking = [] if "tracking=" in SECTIONS[title] else ["tracking=none"]
    run = [*commands.pop(), *TINY, *tracking, "data.cache_dir=rows", "hydra.run.dir=run"]
    if title == "A data format":
        run.append("data.preprocessing_num_workers=2")  # which know the format and its plugin too
    forked(place, *commands, run)
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["train/loss"] > 0
    check = CHECKS.get(title)
    if check is not None:
        check(place, summary)


def check_metric(place: Path, summary: dict[str, float]) -> None:
    assert 0 < summary["eval/validation/cer"] == summary["best/eval/validation/cer"]
    assert not greater_is_better("eval/validation/nothing/loss")


def check_optimizer(place: Path, summary: dict[str, float]) -> None:
    rates = [line["train/lr"] for line in read_lines(place / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3 * (2 / 3) ** 0.5])


def check_format(place: Path, summary: dict[str, float]) -> None:
    samples = [line["prompt"] for line in read_lines(place / "run" / "samples.jsonl")]
    assert "Add.\n1 + 2\n" in samples
    known = json.loads((place / "run" / "provenance.json").read_text())["plugins"]
    sha256 = hashlib.sha256((place / "my_format.py").read_bytes()).hexdigest()
    assert known == {"my_format.py": {"file": str(place / "my_format.py"), "sha256": sha256}}


def check_model(place: Path, summary: dict[str, float]) -> None:
    assert json.loads((place / "run" / "model" / "config.json").read_text())["num_hidden_layers"] == 6


def check_tracker(place: Path, summary: dict[str, float]) -> None:
    rows = [line.split(",") for line in (place / "metrics.csv").read_text().split()]
    lines = read_lines(place / "run" / "metrics.jsonl")
    assert [int(row[0]) for row in rows if row[1] == "train/loss"] == [1, 2, 3]
    assert {row[1]: float(row[2]) for row in rows if row[0] == "3"}["train/loss"] == lines[-1]["train/loss"]
    assert (place / "metrics.state").read_text() == "FINISHED"


CHECKS = {
    "A metric": check_metric,
    "An optimizer and a schedule": check_optimizer,
    "A data format": check_format,
    "A model": check_model,
    "A tracker": check_tracker,
}


def test_there_is_an_example_of_each() -> None:
    assert set(CHECKS) == set(EXAMPLES)


# Names

MINE = """
from src.metrics import metric

@metric("alike", full_marks=1.0)
def alike(predictions, references):
    return float(predictions == references)
"""


def test_what_a_plugin_registers_is_known_once_all_else_is_good(place: Path) -> None:
    (place / "mine.py").write_text(MINE)
    assert "alike is not one of exact_match" in refusal("data.metrics=[alike]")
    assert "optimizer.lr" in refusal("plugins=[mine]", "data.metrics=[alike]", "optimizer.lr=-1")
    assert "alike" not in METRICS
    assert "did you mean alike" in refusal("plugins=[mine]", "data.metrics=[alik]")
    assert admitted("plugins=[mine]", "data.metrics=[alike]").config.metrics == ["alike"]


def test_a_plugin_that_can_not_be_imported_is_refused_with_its_line(place: Path) -> None:
    (place / "mine.py").write_text(MINE)
    for name, text, said in (
        ("broken", "import math\n\nmath.no_such\n", "broken.py:3: AttributeError"),
        ("unread", "def f(:\n", "unread.py:1: SyntaxError"),
        ("leaves", "import sys\nsys.exit(3)\n", "leaves.py:2: SystemExit: 3"),
        ("needy", "\nimport no_such_library\n", "needy.py:2: ModuleNotFoundError"),
        (
            "twice",
            "import src.metrics\nsrc.metrics.metric('bleu')(lambda predictions: 0.0)\n",
            "twice.py:2: ValueError",
        ),
        ("greedy", "from src.metrics import metric\nmetric('x')(lambda weights: 0.0)\n", "takes weights"),
    ):
        (place / f"{name}.py").write_text(text)
        for given in (name, f"{name}.py"):
            assert said in refusal(f"plugins=[{given}]"), given
    assert "did you mean mine?" in refusal("plugins=[mines]")
    assert "did you mean mine.py?" in refusal("plugins=[mimne.py]")
    (place / "bare").mkdir()
    assert "__init__.py" in refusal("plugins=[bare]")
    assert "a list" in refusal("plugins=mine")
    assert "a list" in refusal("plugins=[[mine]]")
    assert "no such module" in refusal("plugins=[5]")


def test_an_optimizer_s_keys_are_checked_once_it_is_registered(place: Path) -> None:
    write_example(SECTIONS["An optimizer and a schedule"], place)
    own = ["--config-dir", "my_conf", "plugins=[my_optimizers]", "optimizer=radam"]
    assert "not one of adamw" in refusal("--config-dir", "my_conf", "optimizer=radam")
    assert "optimizer.betas" in refusal(*own, "optimizer.betas=[2, 3]")
    assert "optimizer.beta " in refusal(*own, "optimizer.beta=[0, 0]")
    assert "did you mean radam" in refusal(*own, "optimizer.type=radan")


# By the registries alone


def test_a_metric_is_added_at_run_time() -> None:
    @metric("shorter", greater_is_better=False)
    def shorter(predictions: list[str]) -> float:
        return min(map(len, predictions))

    config = admitted("data.metrics=[shorter]", "checkpoint.metric_for_best_model=eval/validation/shorter").config
    assert not config.checkpoint.is_greater_better
    assert compute_metrics(config.metrics, ["abc", "a"], ["b", "c"], None) == {"shorter": 1}


def test_an_optimizer_with_a_key_of_its_own_is_added_at_run_time(tmp_path: Path) -> None:
    @OPTIMIZERS.register("slow")
    @dataclass
    class SlowConfig(OptimizerConfig):
        pause: float = key(POSITIVE, resume=Impact.harmless)

        def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups, lr=self.lr / self.pause)

    keys.all_keys.cache_clear()
    (tmp_path / "optimizer").mkdir()
    option = "type: slow\nlr: 1.0\nembedding_lr: null\nweight_decay: 0.0\n"
    (tmp_path / "optimizer" / "slow.yaml").write_text(option)
    chosen = ["--config-dir", str(tmp_path), "optimizer=slow"]
    assert "optimizer.pause" in refusal(*chosen)
    assert "not a number above 0" in refusal(*chosen, "optimizer.pause=0")
    assert "did you mean optimizer.pause" in refusal(*chosen, "optimizer.pause=1", "optimizer.paus=1")
    first, second = (admitted(*chosen, f"optimizer.pause={pause}") for pause in (2, 4))
    assert build_optimizer(first.config.optimizer, [torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"] == 0.5
    changes = [change for change in compare_configs(first.frozen, second.frozen) if change.key == "optimizer.pause"]
    assert [change.impact for change in changes] == [Impact.harmless]


def test_a_tracker_is_added_at_run_time(tmp_path: Path) -> None:
    delivered: list[float] = []

    @TRACKERS.register("list")
    @dataclass
    class ListConfig(TrackingConfig):
        pass

    @EXPORTERS.register("list")
    class ListTracker(LineExporter):
        def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
            delivered.extend(line["train/loss"] for line in lines)

    config = admitted("tracking=none", "tracking.type=list").config.tracking
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.5}])
    for _ in range(2):  # what was delivered is not delivered again
        list(EXPORTERS[config.type](config, tmp_path, warn=print).deliver())
    assert delivered == [2.0, 1.5]


# Trust


def test_a_plugin_of_a_folder_from_elsewhere_waits_for_the_user_s_word(place: Path, tmp_path: Path) -> None:
    (place / "mine.py").write_text(MINE)
    run = ["python", "-m", "src.run", *TINY, "tracking=none", "plugins=[mine]", "data.cache_dir=rows"]
    forked(place, [*run, "hydra.run.dir=run"])
    assert admitted("rerun=run").config.plugins == ["mine"]
    shutil.copytree("run", "elsewhere")
    del plugins._imported["mine"]
    refused = refusal("rerun=elsewhere")
    assert "not started here by you" in refused
    assert "'plugins=[mine]'" in refused
    assert plugins.names() == []
    assert admit(["rerun=elsewhere", "plugins=[mine]"]).run
    assert admit_finished(["run=elsewhere", "plugins=[mine]"], "predict").config.plugins == ["mine"]


def test_a_resume_with_another_plugin_says_so(place: Path) -> None:
    (place / "mine.py").write_text(MINE)
    run = ["python", "-m", "src.run", *TINY, "tracking=none", "plugins=[mine]", "data.cache_dir=rows"]
    run += ["hydra.run.dir=run", "checkpoint.checkpointing_steps=1"]
    forked(place, run)
    (place / "mine.py").write_text(f"{MINE}\n# another version\n")
    assert "versions.plugin mine" in forked(place, [*run, "training.max_train_steps=4"])
