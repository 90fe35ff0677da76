"""The result of a run: a folder that plain transformers loads."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from src.errors import NonFiniteLossError, listed


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration, tokenizer and generation settings, beside and then into place.

    Raises:
        NonFiniteLossError: where the weights are not all finite, which no evaluation may have seen.
    """
    spoilt = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if spoilt:
        raise NonFiniteLossError(f"training has spoilt the weights, they are not finite:\n{listed(spoilt)}")
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    except SafetensorError as error:
        shutil.rmtree(beside, ignore_errors=True)
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"the model can't be written: {error}") from error
    umask = os.umask(0)
    os.umask(umask)
    for file in beside.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors would keep its file to one user
    os.replace(beside, folder)
