"""A composed configuration, and where each of its keys was set."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.config.command_line import CommandLine, is_group, primary_file
from src.config.merging import Merged
from src.config.options import KeyPosition, find_key, shown
from src.config.problems import COMMAND_LINE, Problem

_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")


@dataclass
class Composed:
    """A composed configuration: plain sections, the run's folder, and what each group chose."""

    sections: dict[str, Any] = field(default_factory=dict)
    run_dir: Path = Path()
    choices: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)  # the sections as they are written to files: without secrets
    hydra: DictConfig | None = None
    """All that Hydra composed, its own section included; None for a frozen configuration."""
    files: tuple[Merged, ...] = ()
    """The files that Hydra composed it of, later ones over earlier; empty for a frozen configuration."""
    is_finished: bool = False
    """Whether it is a finished run's, for an entry that uses it."""
    own: Any = None
    """The section of that entry as it was given; elsewhere it is among `sections`."""
    unresolved: set[str] = field(default_factory=set)
    """Keys that could not be resolved, of a section the outermost ones; `problems` says why."""

    @property
    def has_run_dir(self) -> bool:
        """Whether the path of the run's folder could be resolved."""
        return not self.unresolved & {"hydra.run.dir", "hydra.sweep.dir"}


def where_set(key: str, line: CommandLine, composed: Composed) -> str | KeyPosition:
    """Return where a key got its value: the place in a file, a file alone, the command line or the environment."""
    inside = key.partition("[")[0]
    for override in line.overrides:
        given = override.key_or_group
        if not is_group(override, line.roots) and (f"{inside}.".startswith(f"{given}.") or given.startswith(f"{key}.")):
            return COMMAND_LINE
    if not composed.files:
        return "frozen config"
    for merged in reversed(composed.files):
        if (inner := merged.within(inside)) and (place := find_key(merged.file, inner)) is not None:
            variable = next((name for name in _VARIABLE.findall(place.value or "") if os.environ.get(name)), None)
            return place if variable is None else f"environment variable {variable}, by {place}"
    section = key.partition(".")[0]
    for merged in reversed(composed.files):
        if (inner := merged.within(section)) is not None and (not inner or find_key(merged.file, inner) is not None):
            return shown(merged.file)
    return shown(primary_file(line))
