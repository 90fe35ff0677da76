"""Where a run's checkpoints are in its folder, and how they are listed and removed."""

import itertools
import os
import re
import shutil
from pathlib import Path

from src.errors import CheckpointError
from src.records import names_in

CHECKPOINTS = "checkpoints"
"""The folder in a run's folder that has one of its own for each checkpoint."""
MANIFEST, STATE = "manifest.json", "state.json"
"""Files of a checkpoint: its files with checksums, and the state of the run, with its configuration."""


def folder_of(folder: Path, step: int) -> Path:
    """Return the place of a step's checkpoint in a folder of checkpoints."""
    return folder / f"step-{step:08}"


def step_of(checkpoint: Path) -> int | None:
    """Return the step that a folder's name says; None where it is no name of `folder_of`."""
    match = re.fullmatch(r"step-([0-9]+)", checkpoint.name)
    return int(match[1]) if match and checkpoint == folder_of(checkpoint.parent, int(match[1])) else None


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order, whole or not, whatever kind of file they are.

    What goes by another name (step-9, step-00000009.copy) is somebody's own: not found, so not removed either.
    CheckpointError is raised where there is something that can't be looked into, which is not the same as none.
    """
    try:
        found = [step_of(folder / name) for name in names_in(folder)]
    except ValueError as error:
        raise CheckpointError(
            f"{folder} can't be looked into: {error}. Put the folder with the checkpoints back, or make it readable; "
            "once what is there is moved away, the run counts as one without checkpoints"
        ) from error
    return sorted(step for step in found if step is not None)


def remove_atomically(place: Path) -> None:
    """Rename a file or folder, then remove it, so that nobody finds half of it under its name; of a link, the link.

    OSError is raised where it can't be removed; it is renamed all the same, if it can be.
    """
    if (gone := set_aside(place)) is not None:
        remove_tree(gone)


def set_aside(place: Path) -> Path | None:
    """Rename a file or folder to a name that is removed later, and return it; None where nothing is there.

    It is `.NAME.gone`, or where an earlier one can't be removed `.NAME.gone-2` and so on; OSError where `place` can't
    be renamed.
    """
    names = (f".{place.name.lstrip('.')}.gone{'' if count == 1 else f'-{count}'}" for count in itertools.count(1))
    gone = next(free for name in names if _is_cleared(free := place.with_name(name)))
    if not os.path.lexists(place):
        return None
    os.replace(place, gone)
    return gone


def remove_tree(place: Path) -> None:
    """Remove a file or folder where it is, if there is one; of a link, the link; OSError where it can't be removed."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _is_cleared(place: Path) -> bool:
    try:
        remove_tree(place)
    except OSError:
        return False
    return True
