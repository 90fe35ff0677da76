"""What a sweep asks of whatever runs its trials, and what all of that has in common. No torch here."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

RunTrial = Callable[[dict[str, Any], str, Mapping[str, Any] | None], int]
"""Runs a frozen configuration in a folder, told when it ends early (see src.sweep.pruning); returns the exit code."""


@dataclass(frozen=True)
class TrialJob:
    """A trial that is to run, or runs."""

    number: int
    config: dict[str, Any]
    run_dir: Path
    link: Mapping[str, Any] | None = None


class Engine(Protocol):
    """Runs trials somewhere. All else that passes between a trial and its sweep is in the sweep's folder."""

    @property
    def room(self) -> int:
        """How many trials may be started now."""

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that were started and have not ended."""

    def open(self) -> None:
        """Start what runs trials, in a folder that is held; SweepError says why that can't be."""

    def is_ready(self, seconds: float) -> bool:
        """Wait until trials start at once, or so long; whether they do."""

    def start(self, job: TrialJob) -> None:
        """Start a trial, for which there is room."""

    def wait(self, seconds: float) -> list[tuple[TrialJob, int]]:
        """Wait until a trial ends, or so long; return those that have ended, with their exit codes."""

    def ask_to_stop(self) -> None:
        """Ask every trial to save and end."""

    def stop_at_once(self) -> None:
        """End every trial, and all that they started."""

    def close(self) -> None:
        """End what `open` started. Trials that still run save and end by themselves."""


def note(file: Path, text: str) -> None:
    """Add a line to what a trial printed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as log:
        log.write(f"{text}\n")


def print_into(file: Path) -> None:
    """Append all that this process prints to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    into = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(into, number)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(into)
