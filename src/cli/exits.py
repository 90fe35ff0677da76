"""How a command ends: each way becomes an exit code, with last words that name what to do.

0: done. 1: it went wrong. 2: the user can fix it. 75: it was stopped, and the same command resumes it.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from src.config.job import Job
from src.config.quoting import shell_override
from src.errors import (
    ConfigError,
    Interrupted,
    Pruned,
    TowlineError,
    is_disk_full,
    report,
    show_libraries_visibly,
    visible,
)
from src.runtime.launch import has_lost_a_peer
from src.runtime.signals import StopRequest
from src.terminal import columns_of, wrapped


def guarded_run(job: Job, stop: StopRequest) -> int:
    """Run a job, and return the exit code for whichever way it ends."""
    run_dir = job.run_dir
    show_libraries_visibly()
    try:
        from src.cli.start import start_job

        return start_job(job, stop)
    except TowlineError as error:
        report(f"\n{error}")
        return error.exit_code
    except Pruned as reason:
        print(wrapped(visible(f"\nEnded early: {reason}"), columns_of(sys.stdout)))
        return Pruned.exit_code
    except (Interrupted, KeyboardInterrupt) as reason:
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}. {_how_to_resume(run_dir)}")
        return Interrupted.exit_code
    except OSError as error:
        if error.errno is None and not is_disk_full(error):  # a library's own
            report(traceback.format_exc(), wraps=False)
        report(f"{_what_failed(error)} {_how_to_resume(run_dir)}")
    except Exception as error:
        if has_lost_a_peer(error):  # the parent process reports which one, and why
            report("\nAnother process of this run has ended, so this one can't continue.")
        else:
            report(traceback.format_exc(), wraps=False)
            report(f"Internal error (please report it), or out of memory. {_how_to_resume(run_dir)}")
    return 1


def guarded(action: Callable[[], int], *, when_stopped: str = "", when_full: str = "") -> int:
    """Do what an entry other than src.run was asked for, and return the exit code for whichever way it ends.

    Args:
        when_stopped: what to say of what is done by then.
        when_full: what to say of a full disk, where the same command resumes once there is room.
    """
    try:
        return action()
    except ConfigError as error:  # nothing was shown so far
        report(error)
        return error.exit_code
    except TowlineError as error:
        report(f"\n{error}")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as reason:
        report(f"\nStopped by {str(reason) or 'Ctrl-C'}. {when_stopped}".rstrip())
        return Interrupted.exit_code
    except OSError as error:
        if when_full and is_disk_full(error):
            report(f"\nThe disk is full: {error.strerror or error}. {when_full}")
            return 1
        report(f"\n{error.filename or 'a file'} can't be written or read: {error.strerror or error}")
        return TowlineError.exit_code


def _what_failed(error: OSError) -> str:
    """Return what the operating system refused, or a library, whose own error has no number."""
    if is_disk_full(error):
        return f"\nThe disk is full: {error}."
    if error.errno is None:
        return f"A file could not be used: {error}."
    return f"\nThe operating system refused a file: {error}."


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
