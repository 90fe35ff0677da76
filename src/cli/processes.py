"""One command, several processes: the parent freezes the job and holds its folder, the others run it."""

import json
import sys
from contextlib import nullcontext

from src.config.job import Job
from src.errors import Interrupted, TrainingError
from src.runtime.collector import collect_from_here
from src.runtime.launch import launch
from src.runtime.signals import StopRequest

FROZEN = "--frozen"  # precedes the file of a frozen job and the run's folder: this process is one of several


def run_as_many(job: Job, stop: StopRequest) -> int:
    """Run a job in several processes, with the configuration as it was composed here; return their exit code.

    TowlineError is raised where the folder or its checkpoints can't be used, or a process ended in failure.
    """
    from src.tracking.lock import hold
    from src.tracking.run_folder import note_end
    from src.training.resume import find_resume_point

    collect_from_here()
    config, run_dir = job.config, job.run_dir
    is_first = config.runtime.machine_rank == 0
    with hold(run_dir) if is_first else nullcontext() as lock:
        find_resume_point(config.checkpoint, job.frozen, run_dir, force=config.force)  # refused before anything starts
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run_dir / f".frozen-{config.runtime.machine_rank}.json"
        file.write_text(json.dumps({"config": job.frozen, "trial": job.trial}), encoding="utf-8")
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
