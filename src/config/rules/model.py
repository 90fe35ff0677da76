"""Rules of `model`: a checkpoint in a folder can be loaded."""

import os
from collections.abc import Iterator
from pathlib import Path

from src.config.problems import Problem
from src.config.rules.rule import applies_to
from src.config.schema import ModelConfig, Weights


@applies_to("run")
def checkpoint_can_be_loaded(model: ModelConfig) -> Iterator[Problem]:
    folder = Path(model.checkpoint)
    if not os.path.exists(folder):
        if folder.is_absolute() or model.checkpoint.startswith((".", "~")) or os.path.isdir(folder.parts[0]):
            yield Problem("model.checkpoint", f"no such folder (looked in {Path.cwd()})", model.checkpoint)
        return
    if not folder.is_dir():
        yield Problem("model.checkpoint", "a file; a checkpoint is a folder or a hub id", model.checkpoint)
    elif not os.path.isfile(folder / "config.json"):
        yield Problem("model.checkpoint", "a folder without config.json: not a model", model.checkpoint)
    elif model.weights is Weights.pretrained:
        safe, pickled = (
            any(os.path.isfile(folder / f"{name}{end}") for end in ("", ".index.json"))
            for name in ("model.safetensors", "pytorch_model.bin")
        )
        if pickled and not safe and model.use_safetensors:
            reason = (
                "only pickled weights (pytorch_model.bin), which may run code; model.use_safetensors=false takes them"
            )
            yield Problem("model.checkpoint", reason, model.checkpoint)
        elif not pickled and not safe:
            reason = "a folder without weights (model.safetensors); model.weights=random starts without"
            yield Problem("model.checkpoint", reason, model.checkpoint)
