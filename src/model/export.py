"""The result of a run: a folder that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig


def export(model: Any, tokenizer: Any, settings: dict[str, Any], folder: Path) -> None:
    """Write weights (safetensors), configuration, tokenizer and generation settings, beside and then into place.

    Args:
        settings: transformers' generation settings, so that plain `generate` writes what the run's samples showed.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model.generation_config = GenerationConfig(**settings)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    os.replace(beside, folder)
