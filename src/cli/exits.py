"""How a command ends: each way becomes an exit code, with last words that name what to do.

0: done. 1: it went wrong. 2: the user can fix it. 75: it was stopped, and the same command resumes it.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from src import errors
from src.config.job import Job
from src.config.quoting import shell_override
from src.errors import Interrupted, Pruned, TowlineError, report
from src.runtime.launch import has_lost_a_peer
from src.runtime.signals import StopRequest
from src.terminal import columns_of, wrapped


def guarded_run(job: Job, stop: StopRequest) -> int:
    """Run a job, and return the exit code for whichever way it ends."""
    run_dir = job.run_dir
    errors.show_libraries_visibly()
    try:
        from src.cli.start import start_job

        return start_job(job, stop)
    except TowlineError as error:
        report(f"\n{error}")
        return error.exit_code
    except Pruned as reason:
        print(wrapped(errors.visible(f"\nEnded early: {reason}"), columns_of(sys.stdout)))
        return Pruned.exit_code
    except (Interrupted, KeyboardInterrupt) as reason:
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}. {_how_to_resume(run_dir)}")
        return Interrupted.exit_code
    except OSError as error:
        what = "\nThe disk is full" if errors.is_disk_full(error) else "\nThe operating system refused a file"
        if error.errno is None and not errors.is_disk_full(error):  # a library's own, which has no number
            report(traceback.format_exc(), wraps=False)
            what = "A file could not be used"
        report(f"{what}: {error}. {_how_to_resume(run_dir)}")
    except Exception as error:
        if has_lost_a_peer(error):  # the parent process reports which one, and why
            report("\nAnother process of this run has ended, so this one can't continue.")
        else:
            report(traceback.format_exc(), wraps=False)
            report(f"Internal error (please report it), or out of memory. {_how_to_resume(run_dir)}")
    return 1


def guarded(action: Callable[[], int], *, when_stopped: str = "", when_full: str = "") -> int:
    """Do what an entry other than src.run was asked for, and return the exit code for whichever way it ends.

    `when_stopped` is said of what is done by then, `when_full` where the same command resumes once there is room.
    """
    try:
        return action()
    except TowlineError as error:
        is_first = isinstance(error, errors.ConfigError)  # nothing was shown so far
        report(error if is_first else f"\n{error}")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as reason:
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}. {when_stopped}".rstrip())
        return Interrupted.exit_code
    except OSError as error:
        if when_full and errors.is_disk_full(error):
            report(f"\nThe disk is full: {error.strerror or error}. {when_full}")
            return 1
        report(f"\n{error.filename or 'a file'} can't be written or read: {error.strerror or error}")
        return TowlineError.exit_code


def guarded_in_folder(job: Job, action: Callable[[], int], said: str) -> int:
    """Do what an entry continues where it was stopped; return the exit code. `said` names what is done by then, and its
    folder.
    """
    again = "the same command without force=true" if job.config.force else "the same command"
    return guarded(
        action,
        when_stopped=f"{said}: {again} resumes there.",
        when_full=f"{said}: make room, and the same command resumes there.",
    )


def _how_to_resume(run_dir: Path) -> str:
    from src.checkpoint.manifest import newest_resumable
    from src.config.places import CHECKPOINTS
    from src.tracking.run_folder import resume_command

    if not run_dir.is_dir():
        return f"{run_dir} is not there any more: it was moved or removed. What was saved is where it was moved to."
    try:
        step = newest_resumable(run_dir / CHECKPOINTS)
    except (OSError, TowlineError) as error:
        return f"What was saved in {run_dir} can't be read now: {error}"
    if step is None:
        return f"Nothing was saved yet; what was logged is in {run_dir}"
    here = shell_override("hydra.run.dir", str(run_dir))
    return f"Step {step} is saved: {resume_command(run_dir)}, or the same command with {here}"
