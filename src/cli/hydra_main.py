"""What Hydra's own main does: sweeps, by our sweeper or another one, with their trials, and --info."""

import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override

from src.cli.environment import set_switches
from src.cli.exits import guarded_run
from src.config.composed import Composed
from src.config.gate import parse_stored
from src.config.job import Job, Request
from src.config.options import CONF
from src.config.resolving import resolve_sections
from src.config.source import install
from src.errors import Interrupted, TrainingError, report, show
from src.runtime.collector import collect_from_here
from src.runtime.launch import follow_parent
from src.runtime.signals import StopRequest, stop_on_signals
from src.secrets import as_variables, clean

if TYPE_CHECKING:
    from src.sweep.plan import Plan
    from src.tracking.console import Console
    from src.trials.trial import Trial


def run_trial(config: dict[str, Any], run_dir: str, link: Mapping[str, Any] | None) -> int:
    """Run a trial's frozen configuration and return the exit code; `link` names the study that may end it early."""
    set_switches()
    try:
        with stop_on_signals() as stop:
            follow_parent()
            return guarded_run(Job(parse_stored(config), config, Path(run_dir), trial=link), stop)
    except (Interrupted, KeyboardInterrupt):  # before there was anything to end
        return Interrupted.exit_code


def show_sweep_cost(plan: "Plan", to_run: Sequence["Trial"], num_trials: int, console: "Console") -> None:
    """Print what trials that are to run will take; imports what takes seconds."""
    from src.inspection.sweep_cost import show_cost
    from src.inspection.trial_cost import forecast_trial

    show_cost(plan, to_run, num_trials, forecast_trial, console)


class Task:
    """Hydra's task function: carries our sweep to our sweeper, and runs the points of another one's sweep."""

    def __init__(self, request: Request, stop: StopRequest) -> None:
        self._stop, self._process, self._codes = stop, os.getpid(), list[int]()
        self.sweep = None  # the one that hydra_plugins/towline.py leads; None where another sweeper proposes the points
        if request.line.flags.multirun and not request.line.asks_hydra_only:
            from src.sweep.sweeper import request_sweep

            collect_from_here()  # composing leaves many cycles
            self.sweep = request_sweep(request.line, stop, run_trial, show_sweep_cost)

    def __call__(self, cfg: DictConfig) -> None:
        """Run a point of another sweeper's sweep."""
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        point = Composed({}, run_dir, {})
        sections: Any = OmegaConf.to_container(cfg)
        with flag_override(cfg, ["readonly", "struct"], [False, False]):
            cfg.merge_with(as_variables(sections))  # a launcher composes again where it runs, and pickles what it has
        resolve_sections(OmegaConf.create(sections), point)
        code = guarded_run(Job(parse_stored(point.sections), point.stored, run_dir), self._stop)
        self._codes.append(code)
        if code and os.getpid() != self._process:  # this process's list of codes is not the sweep's
            raise TrainingError(f"the run in {run_dir} ended with exit code {code}")
        if code == Interrupted.exit_code:
            sys.exit(Interrupted.exit_code)  # a stopped run stops the sweep; one that failed does not

    def exit_code(self) -> int:
        """Return the sweep's exit code, once Hydra has returned; report which runs failed."""
        if self.sweep is not None:
            return self.sweep.code
        if failed := [str(number) for number, code in enumerate(self._codes) if code]:
            report(f"\n{len(failed)} of {len(self._codes)} runs failed: number {', '.join(failed)} of the sweep")
        return max(self._codes, default=0)


def run_hydra(request: Request, stop: StopRequest) -> int:
    """Hand an admitted command line to Hydra's own main, return the exit code; a refused sweep raises TowlineError."""
    task = Task(request, stop)
    sys.argv = [sys.argv[0], *as_variables(request.line.hydra_argv)]
    install(hides_credentials=True)
    shown = io.StringIO()
    try:
        with redirect_stdout(shown) if request.line.asks_hydra_only else nullcontext():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except (Interrupted, KeyboardInterrupt) as reason:  # before the first run, or between two
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}")
        return Interrupted.exit_code
    finally:  # Hydra exits by itself once it has shown what was asked for
        show(clean(shown.getvalue()), end="")
    return task.exit_code()
