"""Arrows point one way, and each foreign library has one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

LAYERS = (
    ("preflight", "predict", "evaluate", "export", "benchmark", "ensemble", "report", "sync", "ui"),
    ("cli",),
    ("run",),
    ("overview", "inspection", "exporting", "reporting", "harness", "combining"),
    ("forecast",),
    ("training", "evaluation", "sweep"),
    ("search",),
    ("trials",),
    ("checkpoint", "data", "model", "tracking"),
    ("tokens", "templates"),
    ("runtime",),
    ("config",),
    ("metrics",),
    ("records", "markdown", "figures", "patterns", "registry"),
    ("errors", "util"),
    ("secrets", "terminal", "progress"),
)
SIBLINGS_ALLOWED = {("evaluation", "training.loss")}
DOORS = {
    "lm_eval": ("harness",),
    "hydra": ("cli", "config", "sweep"),
    "omegaconf": ("cli", "config", "sweep"),
    "bokeh": ("reporting",),
    "datasets": ("data",),
    "accelerate": ("runtime",),
    "deepspeed": ("runtime",),
    "mlflow": ("tracking",),
    "tensorboard": ("tracking",),
    "wandb": ("tracking",),
    "optuna": ("search", "trials.importance"),
    "ray": ("sweep.engines.ray_tasks",),
    "submitit": ("sweep.engines.slurm",),
    "safetensors": ("checkpoint", "model"),
    "torch": (
        "overview",
        "forecast",
        "inspection",
        "harness",
        "data",
        "model",
        "combining",
        "training",
        "evaluation",
        "runtime",
        "checkpoint",
        "sweep",  # the process of a trial sets its threads
        "config.schema.optimizer",  # in `build`, which is called after the gate
    ),  # not in front of the gate
    "transformers": ("data", "templates", "model", "evaluation"),
    "tokenizers": ("data",),
    "pyarrow": ("data",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted((ROOT / "src").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, file


def imports(file: Path) -> Iterator[str]:
    """Yield what a module imports, but not what it does as a command: `if __name__ == "__main__":`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_every_module_has_a_layer() -> None:
    assert [layer(name) for name, _ in modules()]


def test_imports_point_down() -> None:
    wrong = []
    for name, file in modules():
        for target in imports(file):
            if not target.startswith("src."):
                continue
            target = target.removeprefix("src.")
            package, other = name.split(".")[0], target.split(".")[0]
            if package == other or layer(other) > layer(package):
                continue
            if not any(package == a and target.startswith(b) for a, b in SIBLINGS_ALLOWED):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_there_is_no_cycle_between_modules() -> None:
    names = {name for name, _ in modules()}
    graph = {
        name: {
            target
            for imported in imports(file)
            for target in (imported.removeprefix("src."), imported.removeprefix("src.").rpartition(".")[0])
            if target in names and target != name
        }
        for name, file in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_each_foreign_library_has_one_door() -> None:
    wrong = []
    for name, file in modules():
        for target in imports(file):
            doors = DOORS.get(target.split(".")[0])
            if doors and not any(f"{name}.".startswith(f"{door}.") for door in doors):
                wrong.append(f"{name} imports {target}")
    assert not wrong
