"""A sweep from its admitted plan to its exit code. Hydra reaches it through hydra_plugins/towline.py. No torch here."""

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from src.config.axes import probes
from src.config.command_line import CommandLine
from src.config.kept import keep_options, kept_roots
from src.config.problems import refuse
from src.config.schema import Device, EngineName
from src.errors import Interrupted, RunFolderError, SweepError, TowlineError, is_disk_full, report, visible
from src.figures import write_png
from src.runtime.launch import ORPHAN_SECONDS
from src.runtime.signals import StopRequest
from src.search.mirror import Mirror
from src.search.study import Study
from src.search.warm_start import earlier_units
from src.sweep.controller import POLL_SECONDS, UNENDED, SweepController
from src.sweep.engines.engine import Engine, RunTrial
from src.sweep.engines.launched import Launched, is_own_launcher
from src.sweep.engines.local import Workers, end_fork_server, modules_of_run, start_fork_server
from src.sweep.engines.ray_tasks import RayTasks
from src.sweep.engines.remote import STOP_FILE, withdraw
from src.sweep.engines.slurm import Slurm
from src.sweep.plan import Plan, plan_sweep
from src.sweep.progress import ProgressTable, failures, listing
from src.sweep.state import SweepState, early_replicates, units_of
from src.tracking.console import Console
from src.tracking.lock import hold
from src.tracking.tracker import open_sweep_tracking
from src.trials import leaderboard
from src.trials.folder import SweepFolder, TrialStatus
from src.trials.front_figures import figures
from src.trials.standings import rank_trials
from src.trials.trial import Trial
from src.util import as_tuple, plural

ShowCost = Callable[[Plan, Sequence[Trial], int, Console], None]
"""Prints what trials will take: some of them, and how many there will be."""


@dataclasses.dataclass
class SweepRequest:
    """What the entry asks for: an admitted plan, and the means to run a trial; `code` is the exit code at the end."""

    plan: Plan
    stop: StopRequest
    run_trial: RunTrial
    engine: Engine
    show_cost: ShowCost
    code: int = 0


def request_sweep(
    line: CommandLine, stop: StopRequest, run_trial: RunTrial, show_cost: ShowCost
) -> SweepRequest | None:
    """Compose and check every point of a command line; ConfigError has all problems of all points.

    The fork server begins its imports after the first good point. None where another sweeper of Hydra's will run it.
    """
    with ExitStack() as if_refused:

        def begin(plan: Plan) -> None:
            if not plan.config.dry_run and plan.is_own_sweeper and plan.config.engine is EngineName.local:
                if_refused.callback(end_fork_server)
                start_fork_server(_modules(plan))

        plan = plan_sweep(line, begin)
        if_refused.pop_all()
    if not plan.is_own_sweeper:
        return None
    return SweepRequest(plan, stop, run_trial, engine_of(plan, run_trial), show_cost)


def _modules(plan: Plan) -> list[str]:
    """Return the modules that the sweep's trials import, besides what all runs do."""
    return modules_of_run(plan.sample, {axis.key.partition(".")[0] for axis in plan.axes})


def engine_of(plan: Plan, run_trial: RunTrial) -> Engine:
    """Return what `sweep.engine` names; SweepError where it can't be had here."""
    runtime = plan.sample.runtime
    if plan.config.engine is EngineName.ray:
        return RayTasks(plan, run_trial, _modules(plan))
    if plan.config.engine is EngineName.slurm:
        return Slurm(plan, run_trial)
    return Workers(run_trial, plan.config.n_jobs, runtime.num_processes, uses_gpus=runtime.device is not Device.cpu)


def sweep(request: SweepRequest, config: Any, context: Any) -> int:
    """Run a sweep as Hydra's sweeper, with what Hydra sets one up with, and return its exit code."""
    engine = request.engine
    try:
        if not is_own_launcher(config):
            if (name := request.plan.config.engine) is not EngineName.local:
                raise SweepError(f"sweep.engine = {name} runs trials without hydra/launcher: leave one of them out")
            engine = Launched(config, context, request.plan, request.run_trial)
        request.code = lead(request.plan, request.stop, engine, request.show_cost)
    except TowlineError as error:  # Hydra would show where it came from
        report(f"\n{error}")
        request.code = error.exit_code
    except OSError as error:
        what = "The disk is full" if is_disk_full(error) else f"The operating system refused a file: {error}"
        report(f"\n{what}: {request.plan.folder}. The same command continues once that is fixed.")
        request.code = 1
    finally:
        request.engine.close()
    return request.code


def lead(plan: Plan, stop: StopRequest, engine: Engine, show_cost: ShowCost | None = None) -> int:
    """Lead a sweep to its end, from the beginning or from where it was stopped; return the exit code.

    SweepError or RunFolderError say why the folder can't be used; Interrupted: stopped before it began.
    """
    console, record = Console(), SweepFolder(plan.folder)
    if plan.config.dry_run:
        return _dry_run(plan, record, console, show_cost)
    _show_space(plan, console)
    if plan.changed_conf:
        console.warn(
            f"conf/ has changed since this sweep began ({', '.join(plan.changed_conf[:5])}); it continues with what it "
            "began with. Another sweep.name begins with what is there now; so does force=true, which removes the sweep."
        )
    stop.set_time_limit(plan.config.max_seconds, "sweep.max_seconds")
    with stop.deferred():  # a stop is passed on to the trials
        return _run_trials(plan, record, stop, engine, console)


def _show_space(plan: Plan, console: Console) -> None:
    console.label("sweep", f"{plan.name} → {plan.folder}")
    for key, text in plan.space.items():
        console.label("", visible(f"{key}={text}", is_line=True))


def _run_trials(plan: Plan, record: SweepFolder, stop: StopRequest, engine: Engine, console: Console) -> int:
    """Hold the sweep's folder and run what is left to run in it; return the exit code."""
    with ExitStack() as until_the_end:
        until_the_end.enter_context(hold(plan.folder))
        display = until_the_end.enter_context(ProgressTable(plan.name, plan.config.metrics))
        record.refuse_other()  # before anything is written
        if not plan.force:
            record.read()
        _reclaim(record, display, stop)
        engine.open()
        if plan.force:
            record.clear()
        trials, todo = _trials(plan, record)
        kept = [] if plan.is_listed else trials  # those that are listed were composed, and looked at, just now
        if found := [problem for trial in kept for problem in plan.code_problems(trial.config, is_kept=True)]:
            raise refuse(found)
        keep_options(record.conf, plan.line.roots)
        plan.compose_from(kept_roots(record.conf))
        record.write_trials(trials)
        state = SweepState(plan, record, trials, todo)
        units = list(units_of(state))
        mirror = until_the_end.enter_context(
            closing(Mirror(plan.config, plan.name, plan.folder, plan.axes, units, console.warn))
        )
        study = Study(plan.config, plan.axes, units, mirror.note, earlier_units(plan.config, plan.folder))
        controller = SweepController(state, study, engine, stop, display)
        _warn_of_damage(state.statuses, console)
        controller.write("RUNNING")
        exports = until_the_end.enter_context(open_sweep_tracking(plan.sample.tracking, plan.folder, console))
        exports.connect()  # before trials open the store
        leaderboard.import_what_draws()  # while the fork server imports, and not when all are waiting for the table
        controller.notify = exports.notify
        try:
            why = controller.run()
        except KeyboardInterrupt:
            why = "Ctrl-C, at once"
        code, ending = _outcome(controller, why, stop)
        _report_results(state, display, console)
        controller.write(ending)
    _close(plan, controller, why, console)
    return code


def _reclaim(record: SweepFolder, display: ProgressTable, stop: StopRequest) -> None:
    """Ask trials that an earlier start left running to stop, and wait; RunFolderError names one that does not end."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    announced: set[int] = set()
    while held := list(record.held(record.numbers())):
        if not announced:
            (record.folder / STOP_FILE).touch()  # processes of this machine know by themselves that their sweep died
        for number, by_whom in held:
            if number not in announced:
                display.say(f"trial {number}  waits: {by_whom}")
                announced.add(number)
        if stop.asked():
            raise Interrupted(stop.asked())
        if time.monotonic() > deadline:
            raise RunFolderError(f"trial {held[0][0]} is still running: {held[0][1]}")
        time.sleep(POLL_SECONDS * 5)
    withdraw(record.folder)


def _warn_of_damage(statuses: Mapping[int, TrialStatus], console: Console) -> None:
    for number, status in sorted(statuses.items()):
        if status.warning:
            console.warn(f"trial {number}: {status.warning}")


def _dry_run(plan: Plan, record: SweepFolder, console: Console, show_cost: ShowCost | None) -> int:
    """Show what would run and what it takes, and write nothing of the sweep."""
    trials, todo = _trials(plan, record)
    numbers = [trial.number for trial in trials]
    held = {number for number, _ in record.held(numbers)}
    statuses = {n: record.status(n, plan.config.metrics, is_running=n in held) for n in numbers}
    _warn_of_damage(statuses, console)
    if plan.force:
        statuses = {number: dataclasses.replace(one, state="WAITING", values=()) for number, one in statuses.items()}
    _show_space(plan, console)
    statuses |= early_replicates(trials, statuses)
    to_run = {number for number in todo if not statuses[number].is_over}
    listing(trials, statuses, to_run if len(to_run) < len(trials) else (), console)
    if plan.is_listed:
        jobs = f", {plan.config.n_jobs} at a time" if plan.config.n_jobs > 1 else ""
        planned = f"{plural(len(trials), 'trial')}, {len(to_run)} to run{jobs}"
    else:
        each = f" of {plan.num_replicates} trials" if plan.num_replicates > 1 else ""
        settings = plural(plan.config.n_trials or 0, "setting")
        planned = f"{settings}{each}, proposed by {plan.config.sampler.name} as results come in"
    if show_cost is not None and (left := [trial for trial in trials if trial.number in to_run] or _first(plan)):
        num_left = len(to_run) if plan.is_listed else (plan.config.n_trials or 0) * plan.num_replicates - len(trials)
        show_cost(plan, left, max(len(to_run), num_left), console)
    console.say(f"{planned}. Nothing was run or written.")
    return 0


def _first(plan: Plan) -> list[Trial]:
    """Return a trial as it may be proposed; none where all are known."""
    return [] if plan.is_listed else plan.unit(next(probes(plan.axes)), 0, 0)[0][:1]


def _trials(plan: Plan, record: SweepFolder) -> tuple[list[Trial], list[int]]:
    """Return the folder's trials and the plan's, each configuration once, and the numbers of those in the plan."""
    recorded = [] if plan.force else record.trials()
    record.check_places(recorded)
    if not plan.is_listed:
        return recorded, [trial.number for trial in recorded]
    merged = {trial.identity: trial for trial in recorded}
    units = {one.unit: merged[one.identity].unit for one in reversed(plan.trials) if one.identity in merged}
    first_unit = max((trial.unit for trial in recorded), default=-1) + 1
    new_units = dict.fromkeys(planned.unit for planned in plan.trials if planned.unit not in units)
    units |= {unit: number for number, unit in enumerate(new_units, first_unit)}
    for planned in plan.trials:
        known = merged.get(planned.identity)
        number = len(merged) if known is None else known.number
        merged[planned.identity] = dataclasses.replace(planned, number=number, unit=units[planned.unit])
    return list(merged.values()), [merged[planned.identity].number for planned in plan.trials]


def _outcome(controller: SweepController, why: str, stop: StopRequest) -> tuple[int, str]:
    """Return the exit code and the sweep's state."""
    states = {controller.state.statuses[number].state for number in controller.state.todo}
    if controller.is_complete:
        return 0, "FINISHED"
    if controller.fault:
        return 1, "FAILED"
    if stop.name or why.startswith("Ctrl-C"):
        return Interrupted.exit_code, "PREEMPTED"
    if "FAILED" in states or controller.has_only_refusals:
        return 1, "FAILED"
    return (Interrupted.exit_code, "PREEMPTED") if states & UNENDED else (0, "FINISHED")


def _report_results(state: SweepState, display: ProgressTable, console: Console) -> None:
    """Rank the settings; write and show the leaderboard."""
    plan, trials = state.plan, list(state.trials.values())
    found = rank_trials(plan.folder, trials, state.statuses, plan.name, plan.settings)
    found.write()
    if state.history:
        history = [as_tuple(point["value"]) for point in state.history]
        drawn = {f"{figure.key}.png": figure for figure in figures(found.rows, found.goals, history)}
        for name, figure in drawn.items():
            write_png(figure, plan.folder / "plots" / name)
        for file in (plan.folder / "plots").glob("*.png"):  # of other metrics, by which it was ranked before
            if file.name not in drawn and file.name.startswith(("pareto", "settings", "history")):
                file.unlink()
    display.show_results(lambda width: leaderboard.table(found.rows, found.title, width))
    console.say(found.conclusion)


def _close(plan: Plan, controller: SweepController, why: str, console: Console) -> None:
    """Print how the sweep ended, what failed, and what to do."""
    state = controller.state
    states = ((trial, state.statuses[number]) for number, trial in sorted(state.trials.items()) if number in state.todo)
    failed = [(trial, status) for trial, status in states if status.state == "FAILED"]
    if failed:
        console.say(f"\n{len(failed)} of {plural(len(state.trials), 'trial')} failed:")
        failures(failed, console)
        console.say("The same command tries them again, and leaves what is done as it is.")
    if controller.has_only_refusals:
        console.say(f"\nNothing that was proposed can be run; the last: {controller.refusal}")
    if why and not controller.is_complete:
        console.say(f"\nStopped: {why}. {controller.summary()}. The same command continues.")
    console.say()
    console.label("sweep", controller.summary())
    console.label("numbers", str(plan.folder / "leaderboard.md"))
    console.label("look at it", f"python -m src.report dir={shlex.quote(str(plan.folder))}")
