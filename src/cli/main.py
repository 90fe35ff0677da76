"""Finds which command was given: one run, one of its processes, a sweep, or a question."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from src.cli.exits import guarded_run
from src.cli.hydra_main import run_hydra
from src.config.gate import admit, parse_stored
from src.config.job import FROZEN, Job
from src.config.show import shown_config
from src.errors import Interrupted, TowlineError, report, show
from src.runtime.launch import copy_output, follow_parent, place_of
from src.runtime.signals import StopRequest, stop_on_signals
from src.util import load_json


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then run it; return the exit code. One process of several exits here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with stop_on_signals() as stop:
        is_frozen = arguments[:1] == [FROZEN]
        code = _run_frozen(*arguments[1:], stop=stop) if is_frozen else _admit_and_run(arguments, stop)
        if place_of() is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the destructor of a process group may abort or hang (docs/decisions/0021)
    return code


def _run_frozen(file: str, run_dir: str, *, stop: StopRequest) -> int:
    """Run as one of several processes the job that their parent froze and whose folder it holds; return its code."""
    follow_parent()
    if (place := place_of()) is not None and place.is_main:
        copy_output(Path(run_dir))
    frozen = load_json(Path(file))
    config = parse_stored(frozen["config"])
    of_parent = {"chosen": frozen["chosen"], "trial": frozen["trial"]}
    return guarded_run(Job(config, frozen["config"], Path(run_dir), is_held=True, **of_parent), stop)


def _admit_and_run(arguments: Sequence[str], stop: StopRequest) -> int:
    try:
        request = admit(arguments)
        if request.shown is not None and request.line.flags.cfg:
            show(shown_config(request.shown, request.line), end="")
            return 0
        if request.shown is not None and request.line.flags.help:
            from src.config.help import help_of_run

            return help_of_run(request.shown, request.line)
        return run_hydra(request, stop) if request.run is None else guarded_run(request.run, stop)
    except TowlineError as error:
        report(error)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        return Interrupted.exit_code
