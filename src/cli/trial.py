"""A trial of a sweep, which runs its frozen configuration in a process of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.cli.environment import set_switches
from src.cli.exits import guarded_run
from src.config.gate import parse_stored
from src.config.job import Job
from src.errors import Interrupted
from src.runtime.launch import follow_parent
from src.runtime.signals import stop_on_signals


def run_trial(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    """Run a frozen configuration, and return the exit code.

    Args:
        link: the study that may end the trial early, see src.sweep.study.Pruning.
    """
    set_switches()
    try:
        with stop_on_signals() as stop:
            follow_parent()
            return guarded_run(Job(parse_stored(config), config, Path(run_dir), trial=link), stop)
    except (Interrupted, KeyboardInterrupt):  # before there was anything to end
        return Interrupted.exit_code
