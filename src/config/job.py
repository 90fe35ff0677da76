"""What the gate admits: a job to run, or what else a command line asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.config.command_line import CommandLine
from src.config.composed import Composed
from src.config.schema import RunConfig, SweepConfig

FROZEN = "--frozen"  # precedes the file of a frozen job and the run's folder: this process is one of several


@dataclass
class Job:
    """A configuration that passed: typed, as plain containers to freeze, and where the run's folder will be."""

    config: RunConfig
    frozen: dict[str, Any]
    run_dir: Path
    entry_section: Any = None  # the section that the entry alone reads, where it has one
    is_finished: bool = False  # whether the folder is that of a finished run, which an entry uses
    is_held: bool = False  # whether the process that started this one holds the run's folder
    sweep: SweepConfig | None = None  # the section `sweep`, with -m
    chosen: Mapping[str, str] = field(default_factory=dict)
    """What keys that are `auto` mean, as the process that started this one chose; see ResumePoint.chosen."""
    trial: Mapping[str, Any] | None = None
    """When a trial ends early, see src.sweep.pruning.Pruning; None of other runs."""


@dataclass
class Request:
    """What the command line asks for: one run that was admitted, a sweep (-m), or something that Hydra's main does."""

    line: CommandLine
    run: Job | None = None
    shown: Composed | None = None  # what --help and --cfg show the values of
