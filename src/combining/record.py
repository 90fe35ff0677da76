"""The folder of an ensemble: where it is, what decided it, and what it says once it is finished."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.checkpoint.exported import MODEL
from src.combining.members import Member
from src.config.files import expand
from src.config.frozen import CONFIG
from src.config.places import remove_tree
from src.config.schema import EnsembleConfig
from src.data.sources import file_hash, hash_of
from src.errors import RunFolderError
from src.tracking.console import Console
from src.tracking.ensemble_files import ENSEMBLES, RECORD, read_record
from src.tracking.lock import LOCK
from src.tracking.run_folder import FILES
from src.util import write_json

NOT_DECIDING = ("output", "top")
MEMBERS, PREDICTIONS = "members", "predictions"
"""In the folder of an ensemble, what is predicted with each member, and by the ensemble."""


def decided_by(members: Sequence[Member]) -> dict[str, Any]:
    """Return what decides an ensemble, as plain values by name."""
    section: EnsembleConfig = members[0].job.entry_section
    data = members[0].job.config.data
    sets = data.validation_sets() | data.test_sets()
    keys = {key: value for key, value in asdict(section).items() if key not in NOT_DECIDING}
    return {
        **{f"ensemble.{key}": value for key, value in (keys | {"method": section.method.value}).items()},
        "members": [member.decided_by() for member in members],
        "files": {name: [file_hash(file) for file in expand(files)] for name, files in sets.items()},
    }


def folder_of(members: Sequence[Member], sweep: Path | None) -> Path:
    """Return the folder of an ensemble: ensemble.output, or one in the sweep's folder or in outputs/."""
    section: EnsembleConfig = members[0].job.entry_section
    if section.output is not None:
        return Path(section.output)
    name = f"{section.method.value}-{hash_of(decided_by(members))[:8]}"
    return (Path("outputs") if sweep is None else sweep) / ENSEMBLES / name


@dataclass(frozen=True)
class MemberScores:
    """A member with its scores on the rows that none has seen; `is_in`: whether the ensemble is made of it."""

    member: Member
    scores: Mapping[str, float]
    is_in: bool = True

    def as_dict(self) -> dict[str, Any]:
        run = str(self.member.run_dir.resolve())
        return {"name": self.member.name, "run": run, "is_in": self.is_in, "scores": dict(self.scores)}


@dataclass(frozen=True)
class Outcome:
    """What an ensemble scores, and what its members do; `rows` has how many were scored, and left out why, by set."""

    scores: Mapping[str, float]
    members: Sequence[MemberScores]
    rows: Mapping[str, Mapping[str, int]]


def read_finished(folder: Path, decided: Mapping[str, Any], *, force: bool) -> dict[str, Any]:
    """Return what a folder, which is held, says of this ensemble; empty where it is not finished there.

    With `force` it never is. RunFolderError where the folder holds another ensemble, a run, or anything else. Nothing
    is changed.
    """
    record = read_record(folder)
    if not record:
        _check_unused(folder)
        return {}
    changed = _changed(record["decided_by"] or decided, decided)
    is_worth_keeping = any((folder / name).exists() for name in (MODEL, MEMBERS, PREDICTIONS))
    if force or (changed and not is_worth_keeping):
        return {}
    if changed:
        lines = "\n  ".join([f"{folder} holds an ensemble that something else decided:", *changed])
        raise RunFolderError(f"{lines}\nensemble.output=DIR puts this one elsewhere; force=true makes it anew")
    is_whole_run = (folder / CONFIG).is_file() or not (folder / MODEL).exists()
    return record if record["is_finished"] and is_worth_keeping and is_whole_run else {}


def _check_unused(folder: Path) -> None:
    """Raise RunFolderError where a folder without a record holds anything: an ensemble's is its own to remove."""
    if os.path.lexists(folder / CONFIG):
        raise RunFolderError(f"{folder} holds a run; choose another ensemble.output")
    if found := sorted(set(os.listdir(folder)) - {LOCK, f".{RECORD}.part"}):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = f"{', '.join(found[:3])}{more}"
        raise RunFolderError(f"{folder} is no ensemble's folder, but holds {names}; choose another ensemble.output")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each name whose value has changed."""
    hashed = {"members": "other runs, or other settings of theirs", "files": "rows of other content"}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name}   {hashed.get(name, f'{before.get(name)} there, {now.get(name)} now')}" for name in names]


def begin(folder: Path, decided: Mapping[str, Any], *, force: bool) -> bool:
    """Record in a folder what decides its ensemble, before anything else is written; return whether that was so.

    What is there of another one, or of this one with `force`, is removed.
    """
    record = read_record(folder)
    was_begun = bool(record) and not force and not _changed(record["decided_by"], decided)
    if record and not was_begun:
        write_json(folder / RECORD, record | {"is_finished": False, "decided_by": {}})  # a kill leaves no half of it
        for name in (*FILES, MEMBERS):
            remove_tree(folder / name)
    _write(folder, decided, Outcome({}, (), {}), is_finished=False)
    return was_begun


def finish(folder: Path, decided: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Record that an ensemble is finished, last of all, with its scores; return what is recorded."""
    return _write(folder, decided, outcome, is_finished=True)


def show(record: Mapping[str, Any], console: Console) -> None:
    """Show the scores of a finished ensemble beside those of its members."""
    for name, value in record["scores"].items():
        scores = [member["scores"].get(name) for member in record["members"]]
        known = [score for score in scores if score is not None]
        ends = f"   its members {min(known):.4f} to {max(known):.4f}" if known else ""
        console.label("", f"{name} {value:.4f}{ends}")


def _write(folder: Path, decided: Mapping[str, Any], outcome: Outcome, *, is_finished: bool) -> dict[str, Any]:
    content = {
        "method": decided["ensemble.method"],
        "is_finished": is_finished,
        "scores": dict(outcome.scores),
        "members": [one.as_dict() for one in outcome.members],
        "rows": outcome.rows,
        "decided_by": decided,
    }
    write_json(folder / RECORD, content)
    return content
