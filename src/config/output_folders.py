"""Whether the folders that a command writes to can be made, without making them."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.config import frozen
from src.config.command_line import CommandLine
from src.config.composed import Composed
from src.config.files import unusable
from src.config.options import PROJECT_ROOT
from src.config.places import CHECKPOINTS
from src.config.problems import COMMAND_LINE, Problem
from src.config.schema import RuntimeConfig
from src.config.sections import Parsed
from src.errors import DamagedFileError


def output_problems(own: Any, run_dir: Path, entry: str) -> Iterator[Problem]:
    """Check that what an entry makes of a finished run can be written, and not among the files of a run.

    `own` is the entry's section; None where it is not good.
    """
    place = own.folder(run_dir) if hasattr(own, "folder") else getattr(own, "output", None)
    if place is None:
        return
    output, key = Path(place), f"{entry}.output"
    if os.path.exists(output / frozen.CONFIG) and entry != "ensemble":  # of which some are runs themselves
        yield Problem(key, f"a run's folder; what {entry} writes needs one of its own", str(output))
    if folder := next(filter(_is_of_run, (output.resolve(), *output.resolve().parents)), None):
        yield Problem(
            key, f"{folder} is what a run has written; what {entry} writes needs a place of its own", str(output)
        )
    yield from _folder_problems(output, key, f"where {entry} writes")


def _is_of_run(folder: Path) -> bool:
    """Return whether a folder is where a run keeps its result or its checkpoints."""
    return folder.name in (CHECKPOINTS, "model") and (folder.parent / frozen.STARTS).is_file()


def meeting_problems(parsed: dict[str, Parsed], line: CommandLine) -> Iterator[Problem]:
    """Several machines, each with this command, need one folder; the default one has the time in its name."""
    runtime = parsed["runtime"].value if "runtime" in parsed else None
    if isinstance(runtime, RuntimeConfig) and runtime.num_machines > 1 and line.value_of("hydra.run.dir") is None:
        reason = "several machines need one folder that all of them reach: give it"
        yield Problem("hydra.run.dir", reason, has_value=False, where=COMMAND_LINE)


def run_dir_problems(composed: Composed, line: CommandLine) -> Iterator[Problem]:
    key = "hydra.sweep.dir" if line.flags.multirun else "hydra.run.dir"
    if not composed.has_run_dir:
        return
    if reason := unusable(str(composed.run_dir)):
        yield Problem(key, f"can't be made: {reason}", str(composed.run_dir), where="the run's folder")
    elif not _is_left(composed, line):
        yield from _folder_problems(composed.run_dir, key)


def _is_left(composed: Composed, line: CommandLine) -> bool:
    """Return whether the folder holds a finished run, which is left as it is and needs no permission to write."""
    with suppress(DamagedFileError):  # reported when the run begins
        is_finished = frozen.read_status(composed.run_dir).get("state") == "FINISHED"
        return is_finished and not (line.flags.multirun or composed.sections.get("force"))
    return False


def _folder_problems(run_dir: Path, key: str, where: str = "the run's folder") -> Iterator[Problem]:
    """Check that a run's folder is there or can be made, without making it."""
    if run_dir.resolve() in (Path.cwd(), PROJECT_ROOT):
        yield Problem(key, "a run needs a folder of its own", str(run_dir), where=where)
    place = next(place for place in (run_dir, *run_dir.absolute().parents) if os.path.exists(place))
    if not place.is_dir():
        yield Problem(key, f"can't be made: {place} is a file", str(run_dir), where=where)
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(key, f"can't be made: no permission to write in {place}", str(run_dir), where=where)
