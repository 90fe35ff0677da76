"""From an admitted job to its summary: whether anything is left to do, in how many processes, in which folder.

What can be refused without torch is refused here, before src.run imports it.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from src.checkpoint.compatibility import compare_configs
from src.checkpoint.locate import asks_for_more_steps, check_best, check_extendable, how_to_extend
from src.config.frozen import CONFIG, config_hash, is_finished, read_config, read_starts
from src.config.job import FROZEN, Job
from src.config.schema import RunConfig
from src.errors import Interrupted, TrainingError
from src.runtime.collector import collect_from_here
from src.runtime.launch import is_launched, launch, place_of
from src.runtime.signals import StopRequest
from src.tracking.console import Console
from src.tracking.lock import hold
from src.tracking.run_folder import Start, note_end
from src.tracking.step_logs import METRICS, metrics_at, read_step_log
from src.tracking.tracker import Tracker, deliver_pending, open_tracking
from src.training.early_stopping import EarlyStopping
from src.training.resume import ResumePoint, find_resume_point


def start_job(job: Job, stop: StopRequest) -> int:
    """Run what is left to do of a job, in as many processes as it asks for; return the exit code, or raise as `run`."""
    if finished_before(job):
        return 0
    if is_launched(job.config.runtime):
        return run_as_many(job, stop)
    run_job(job, stop)
    return 0


def run_as_many(job: Job, stop: StopRequest) -> int:
    """Run a job in several processes, with the configuration as it was composed here; return their exit code.

    The parent freezes the job and holds its folder, the others run it. TowlineError is raised where the folder or its
    checkpoints can't be used, or a process ended in failure.
    """
    collect_from_here()
    config, run_dir = job.config, job.run_dir
    is_first = config.runtime.machine_rank == 0
    with hold(run_dir) if is_first else nullcontext() as lock:
        # what is refused is refused before any process starts
        found = find_resume_point(config.checkpoint, job.frozen, run_dir, force=config.force)
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run_dir / f".frozen-{config.runtime.machine_rank}.json"
        frozen = {"config": job.frozen, "chosen": dict(found.chosen), "trial": job.trial}
        file.write_text(json.dumps(frozen), encoding="utf-8")
        command = [sys.executable, "-m", "src.run", FROZEN, str(file), str(run_dir)]
        try:
            with stop.deferred():  # it is passed on
                return launch(config.runtime, command, run_dir, stop, [] if lock is None else [lock])
        except (TrainingError, Interrupted, KeyboardInterrupt) as reason:
            if is_first:
                note_end(run_dir, reason)
            raise
        finally:
            file.unlink()


def run_job(job: Job, stop: StopRequest) -> dict[str, float]:
    """Run a job to its end in this process, from the beginning or a checkpoint, and return its summary as run does."""
    stop.check()
    stop.set_time_limit(job.config.training.max_seconds)
    with open_run(job, stop) as (found, tracker):
        tracker.console.working("importing libraries")
        from src.run import run  # here: torch takes seconds, and a folder in use is refused at once

        collect_from_here()
        return run(job, found, tracker, stop)


@contextmanager
def open_run(job: Job, stop: StopRequest) -> Iterator[tuple[ResumePoint, Tracker]]:
    """Hold the run's folder, find the checkpoint to resume from, and track the run; in the first process only.

    RunFolderError says that the folder is in use or holds another run; CheckpointError and ConfigError, that the run
    can't resume from what is in it.
    """
    config, run_dir, console = job.config, job.run_dir, Console()
    if (place := place_of()) is not None and not place.is_main:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield ResumePoint(), Tracker(Console(nowhere))
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
            stop.follow_files(run_dir)
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


def stopped_early(config: RunConfig, run_dir: Path) -> bool:
    """Return whether early stopping, as it is asked for here, ends a run where it has ended."""
    return EarlyStopping(config, (line.content for line in read_step_log(run_dir, METRICS))).is_reached


def finished_before(job: Job) -> bool:
    """Leave the folder of a finished run as it is, unless more steps are asked for; deliver what the tracker lacks.

    RunFolderError or CheckpointError says why a run that is asked for more steps can't resume.
    """
    config, run_dir = job.config, job.run_dir
    if config.force or not is_finished(run_dir):
        return False
    if asks_for_more_steps(config.training, run_dir) and not stopped_early(config, run_dir):
        check_extendable(config.checkpoint, run_dir)
        return False
    console, extending = Console(), how_to_extend(config.training, run_dir)
    again = "(force=true removes it and starts again)"
    console.label("run", f"{run_dir} is finished and left as it is; {extending} {again}")
    if config_hash(job.frozen) not in {start["config_hash"] for start in read_starts(run_dir)}:
        console.warn(
            "the configuration given here is not the one that this run was made with (its config.yaml); for another "
            "run choose another hydra.run.dir"
        )
    deliver_pending(config.tracking, run_dir, console)
    return True
