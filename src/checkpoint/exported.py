"""What a run exported, held against what it wrote: status.json knows size and checksum of each file. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.config.frozen import read_status
from src.records import damaged, file_digest

MODEL = "model"
MAY_CHANGE = ("README.md", "generation_config.json")
"""Files of model/ that people change, and that decide no weight and no token."""


def exported_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of the files of an exported model, by their names below its folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in MAY_CHANGE)
    return {str(file.relative_to(folder)): file_digest(file) for file in files}


def check_exported(run_dir: Path) -> None:
    """Check that what a finished run exported is what it wrote; of one that did not note it nothing is known.

    Raises:
        DamagedFileError: naming the first file that is not.
    """
    folder, written = run_dir / MODEL, read_status(run_dir).get(MODEL)
    if not isinstance(written, dict):
        return
    try:
        there = exported_digests(folder)
    except OSError as error:
        remedy = "Make it readable, or restore it from a copy."
        raise damaged(Path(error.filename or folder), f"it can't be read: {error.strerror}", remedy) from error
    again = "Restore it from a copy; or have it exported again: move status.json away, and give the run's command."
    for name in sorted(written):
        if name not in there:
            raise damaged(folder / name, "it is missing", again)
        if there[name] != written[name]:
            raise damaged(folder / name, "it is not what the run exported, by the checksum in status.json", again)
