"""What a start finds in a run's folder: whether it may begin there, and which old files it removes first."""

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.config.frozen import CONFIG, STARTS, STATUS, read_starts, read_status
from src.config.places import CHECKPOINTS
from src.errors import RunFolderError
from src.records import damaged
from src.tracking.step_logs import METRICS, STEP_LOGS, compare_logs, read_step_log

PROVENANCE, DATA_REPORT, SUMMARY = "provenance.json", "data_report.json", "summary.json"
FOLDERS = (CHECKPOINTS, "model", "predictions")
FILES = (
    CONFIG,
    "deepspeed.json",
    STARTS,
    STATUS,
    *STEP_LOGS,
    DATA_REPORT,
    PROVENANCE,
    SUMMARY,
    "tracking.json",
    *FOLDERS,
)
"""What a run's folder holds; `force=true` removes these, and what other trackers remember (`tracking-*.json`)."""


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins.

    Args:
        step: the step of the checkpoint that it resumes from; None: it starts from scratch.
        changed: keys of the configuration that differ from that checkpoint's, with their new values.
        may_begin_again: whether a run that was stopped before its first checkpoint may be started again.
        is_own: whether the checkpoint is this run's, not another one's.
        journal: what the step logs began with when the checkpoint was saved, see `RunFolder.journal_before`.
    """

    step: int | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)
    may_begin_again: bool = True
    is_own: bool = True
    force: bool = False
    journal: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    allow_changed: bool = False


def make_room(path: Path, config_hash: str, start: Start) -> list[str]:
    """Remove what an earlier start left and this one can't use; return warnings.

    Raises:
        RunFolderError: where that would cost what somebody may want.
        DamagedFileError: where what the run resumes with can't be read.
    """
    found = [name for name in FILES if os.path.lexists(path / name)]
    if not found:
        return []
    if STATUS not in found and not {CONFIG, STARTS} <= set(found):
        raise RunFolderError(f"{path} is no run's folder, but holds {', '.join(found)}; choose another hydra.run.dir")
    states = [file.name for file in path.glob("tracking-*.json")]
    if start.force:
        _remove(path, [*found, *states])
        return []
    for name in found:
        is_folder = name in FOLDERS
        if not ((path / name).is_dir() if is_folder else (path / name).is_file()):
            kind = "folder" if is_folder else "plain file"
            raise damaged(path / name, f"it is no {kind}", "Move it away: the same command writes it anew")
    status = read_status(path)
    step = status.get("step", 1)  # not known: it may have trained
    is_same = last_config_hash(path) == config_hash
    if start.step is not None and (start.is_own or is_same):
        return check_step_logs(path, status, start)
    if not start.may_begin_again or (step and not is_same):
        other = "it was made with another configuration (its config.yaml)"
        why = other if start.may_begin_again else "checkpoint.resume=never"
        raise RunFolderError(
            f"{path} holds a run that did not finish ({ending(status)}), and {why}.\n"
            f"Resume it as it was ({resume_command(path)}), or choose another hydra.run.dir; force=true removes what "
            f"is there ({', '.join(found)}) and starts again."
        )
    if not is_same:  # it failed before it trained, and its configuration was fixed since
        _remove(path, [name for name in (*found, *states) if name != STARTS])
        return []
    return [*check_step_logs(path, status, start), *_warn_of_repeat(path)]


def check_step_logs(path: Path, status: Mapping[str, Any], start: Start) -> list[str]:
    """Check that the step logs are as they were written, before a run resumes with them; return warnings.

    Raises:
        DamagedFileError: naming the file, where checkpoint.allow_changed does not allow it.
    """
    found = compare_logs(path, start.journal, status.get("journal") or {}, start.step)
    if found and not start.allow_changed:
        raise found[0]
    return [str(error) for error in found]


def _warn_of_repeat(path: Path) -> list[str]:
    """Return a warning where a run without a checkpoint has logged steps, which will be repeated."""
    lines = read_step_log(path, METRICS)
    if not lines:
        return []
    return [
        f"there is no checkpoint in {path / CHECKPOINTS}, so the run begins again: what was logged up to step "
        f"{lines[-1].content['step']} is removed, and those steps are repeated"
    ]


def last_config_hash(path: Path) -> str | None:
    """Return the configuration's hash of the last start in a folder; None where there is none.

    Raises:
        DamagedFileError: naming the line of starts.jsonl that can't be read.
    """
    starts = read_starts(path)
    return starts[-1]["config_hash"] if starts else None


def ending(status: Mapping[str, Any]) -> str:
    """Return how a run ended that no process is training."""
    state = status.get("state", "RUNNING")  # nobody holds the folder: what was running has died
    how = f"{'killed' if state == 'RUNNING' else state} at step {status.get('step', 0)}"
    return how + (f", {status['cause'].splitlines()[0]}" if status.get("cause") else "")


def resume_command(path: Path) -> str:
    """Return the command that resumes a run."""
    return f"make resume run={shlex.quote(str(path))}"


def _remove(path: Path, names: Iterable[str]) -> None:
    for name in sorted(names, key=lambda name: name == STATUS):  # last: it is what makes the folder a run's
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink()
