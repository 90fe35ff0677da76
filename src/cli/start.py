"""From an admitted job to its summary: whether anything is left to do, in how many processes, in which folder.

What can be refused without torch is refused here, before src.run imports it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from src.checkpoint.compatibility import compare_configs
from src.checkpoint.locate import asks_for_more_steps, check_best, check_extendable, how_to_extend
from src.cli.processes import run_as_many
from src.config.frozen import CONFIG, config_hash, is_finished, read_config, read_starts
from src.config.job import Job
from src.runtime.collector import collect_from_here
from src.runtime.launch import is_launched, place_of
from src.runtime.signals import StopRequest
from src.tracking.console import Console
from src.tracking.folder_start import Start
from src.tracking.lock import hold
from src.tracking.step_logs import metrics_at
from src.tracking.tracker import Tracker, deliver_pending, open_tracking
from src.training.resume import ResumePoint, find_resume_point


def start_job(job: Job, stop: StopRequest) -> int:
    """Run what is left to do of a job, in as many processes as it asks for; return the exit code.

    Raises:
        TowlineError, Interrupted, Pruned: see src.run.run.
    """
    if finished_before(job):
        return 0
    if is_launched(job.config.runtime):
        return run_as_many(job, stop)
    run_job(job, stop)
    return 0


def run_job(job: Job, stop: StopRequest) -> dict[str, float]:
    """Run a job to its end in this process, from the beginning or a checkpoint, and return its summary.

    Raises:
        TowlineError, Interrupted, Pruned: see src.run.run.
    """
    stop.check()
    stop.set_time_limit(job.config.training.max_seconds)
    with open_run(job) as (found, tracker):
        from src.run import run  # here: torch takes seconds, and a folder in use is refused at once

        collect_from_here()
        return run(job, found, tracker, stop)


@contextmanager
def open_run(job: Job) -> Iterator[tuple[ResumePoint, Tracker]]:
    """Hold the run's folder, find the checkpoint to resume from, and track the run; in the first process only.

    Raises:
        RunFolderError: where the folder is in use, or holds another run.
        CheckpointError, ConfigError: where the run can't resume from what is in the folder.
    """
    config, run_dir, console = job.config, job.run_dir, Console()
    if (place := place_of()) is not None and not place.is_main:
        yield ResumePoint(), Tracker(console)
        return
    console.label("run", f"{config.name} → {run_dir}")
    with nullcontext() if job.is_held else hold(run_dir):
        found = find_resume_point(config.checkpoint, job.frozen, run_dir, force=config.force)
        if found.is_own:
            check_best(config.checkpoint, run_dir, found.state, metrics_at(run_dir, found.step))
        with open_tracking(config.tracking, run_dir, job.frozen, console, start_of(job, found)) as tracker:
            if found.checkpoint is not None:
                tracker.show_overview({"resumed": f"after step {found.step}, from {found.checkpoint}"})
            tracker.warn(*found.warnings)
            yield found, tracker


def start_of(job: Job, found: ResumePoint) -> Start:
    """Return what the run's folder notes of a start: its step, and which keys differ from the folder's config.yaml."""
    config, frozen = job.config, job.frozen
    is_there = not config.force and os.path.lexists(job.run_dir / CONFIG)
    first = read_config(job.run_dir) if is_there else frozen
    changes = [] if found.step is None else compare_configs(first, frozen)
    return Start(
        step=found.step,
        changed={change.key: change.now for change in changes if change.key not in ("force", "rerun")},
        may_begin_again=config.checkpoint.resume != "never",
        is_own=found.is_own,
        force=config.force,
        journal=found.own_state.get("journal", {}),
        allow_changed=config.checkpoint.allow_changed,
    )


def finished_before(job: Job) -> bool:
    """Leave the folder of a finished run as it is, unless more steps are asked for; deliver what the tracker lacks.

    Raises:
        RunFolderError, CheckpointError: where more steps are asked for, and the run can't resume.
    """
    config, run_dir = job.config, job.run_dir
    if config.force or not is_finished(run_dir):
        return False
    if asks_for_more_steps(config.training, run_dir):
        check_extendable(config.checkpoint, run_dir)
        return False
    console = Console()
    console.label(
        "run",
        f"{run_dir} is finished and left as it is; {how_to_extend(config.training, run_dir)} (force=true "
        "removes it and starts again)",
    )
    if config_hash(job.frozen) not in {start["config_hash"] for start in read_starts(run_dir)}:
        console.warn(
            "the configuration given here is not the one that this run was made with (its config.yaml); for another "
            "run choose another hydra.run.dir"
        )
    deliver_pending(config.tracking, run_dir, console)
    return True
