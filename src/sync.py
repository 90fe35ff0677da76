"""Bring trackers what they lack of runs and sweeps: `python -m src.sync run=DIR KEY=VALUE …`.

DIR is the folder of a run or a sweep, of one that finished, failed, was stopped or killed: anything that no process
uses. run=[A,B] takes several, as does run=… given again. A sweep is brought with all its trials.

Each folder's own config.yaml says which trackers; a secret that was not stored in it comes from the environment. Keys:
  tracking.uri=…              another MLflow store; what of the folder is not there is delivered anew
  tracking.experiment_name=…  where a new run begins, if the folder has none in the store that can be written to

What a store has is looked at first, so a store that was emptied or restored from a copy gets what it lacks, and nothing
twice. It waits as long as calls bring something new; Ctrl-C ends it, and the same command resumes there.

Exit code 0 where all is delivered, 1 where something is left (it is said what, and why), 2 where the user
has to fix something first: a damaged file of the folder (all else is delivered), or an address, credentials, a store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import secrets
from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.command_line import CommandLine, flags_that_are_not_taken, read_command_line
from src.config.files import unusable
from src.config.frozen import CONFIG, STARTS, STATUS, SWEEP, read_config
from src.config.problems import Problem, refuse
from src.config.rules.within import tracker_can_be_reached_by_some_scheme
from src.config.schema import TRACKERS, TrackingConfig
from src.config.sections import parse_section
from src.errors import DamagedFileError, RunFolderError, report
from src.util import in_words

if TYPE_CHECKING:
    from src.tracking.console import Console

KEYS = ("tracking.uri", "tracking.experiment_name")


@dataclass(frozen=True)
class Source:
    """A folder, and where it is delivered to."""

    folder: Path
    is_sweep: bool
    trackers: list[TrackingConfig]


def sync(source: Source, console: Console) -> tuple[int, str]:
    """Deliver what is missing of a folder; return the exit code, and the signal that ended it or ''.

    RunFolderError is raised where a process uses the folder, or it can't be locked.
    """
    from src.tracking.export_thread import UNTIL_DELIVERED
    from src.tracking.exporters import EXPORTERS, SWEEP_EXPORTERS, exporters_of
    from src.tracking.lock import hold
    from src.tracking.tracker import start_exporters

    kinds = SWEEP_EXPORTERS if source.is_sweep else EXPORTERS
    with hold(source.folder):
        exporters = exporters_of(source.trackers, source.folder, kinds=kinds, is_over=True, warn=console.warn)
        for one in exporters:
            console.label("sync", f"{source.folder} → {one.name}, {one.where}")
        exports, code, missed = start_exporters(exporters, source.folder, warn=console.warn), 0, set()
        for left in exports.close(UNTIL_DELIVERED, console.working):
            then = "Once that is fixed, the" if left.needs_user_action else "The"
            console.warn(f"{source.folder}: {left}. {then} same command resumes there")
            code = max(code, 2 if left.needs_user_action else 1)
            missed.add(left.tracker)
        for one in exporters:
            if f"{one.name} at {one.where}" not in missed:
                run_id = f", as run {one.run_id}" if one.run_id else ""
                console.label("delivered", f"{one.progress}{run_id}")
        return code, exports.ended_by


def admit_sync(argv: Sequence[str]) -> list[Source]:
    """Check a command line; return what is to be delivered where, or raise ConfigError with all problems together."""
    line = read_command_line(argv)
    problems = [*line.problems, *_unread(line)]
    if not (folders := _folders(line)):
        problems.append(Problem("run", "needs a value: the folder of a run or a sweep", has_value=False))
    sources: list[Source] = []
    for folder in folders:
        try:
            sources += _sources(folder, line)
        except _Refused as reason:
            problems += reason.args
    if problems:
        raise refuse(problems)
    return sources


class _Refused(Exception):
    """A folder can't be delivered; the arguments are the problems."""


def _unread(line: CommandLine) -> Iterator[Problem]:
    yield from flags_that_are_not_taken(line, "sync")
    for override in line.overrides:
        key = override.key_or_group
        if key not in ("run", *KEYS):
            yield Problem(key, f"not read here; there are {in_words(['run', *KEYS])}", has_value=False)


def _folders(line: CommandLine) -> list[Path]:
    """Return the folders that run=… names, each once."""
    given: list[str] = []
    for override in line.overrides:
        if override.key_or_group == "run":
            value = override.value()
            given += map(str, value) if isinstance(value, list) else _split(str(value or ""))
    return list(dict.fromkeys(Path(folder) for folder in given if folder))


def _split(text: str) -> list[str]:
    """Return the folders of a list that came as a text, as from `make sync run=[A,B]`."""
    if text.startswith("[") and text.endswith("]") and not unusable(text) and not Path(text).exists():
        return [part.strip().strip("\"'") for part in text[1:-1].split(",")]
    return [text]


def _sources(folder: Path, line: CommandLine) -> list[Source]:
    """Return a folder with its trackers, and for those that know no sweeps each of its trials; raises as `_source`."""
    source = _source(folder, line)
    if not source.is_sweep:
        return [source]
    knowing = [one for one in source.trackers if one.type == "mlflow"]
    sources = [replace(source, trackers=knowing)] if knowing else []
    if len(knowing) < len(source.trackers):
        trials = (_source(one, line) for one in sorted(folder.iterdir()) if os.path.lexists(one / STATUS))
        sources += [replace(one, trackers=[of for of in one.trackers if of.type != "mlflow"]) for one in trials]
    return sources


def _source(folder: Path, line: CommandLine) -> Source:
    """Return a folder with its trackers; _Refused where it is no run's or sweep's, or a tracker can't be used."""
    from src.tracking.mlflow_sweep import sweep_tracking

    def refused(reason: object) -> _Refused:
        return _Refused(Problem.on_command_line("run", str(reason), str(folder)))

    if reason := unusable(str(folder)):
        raise refused(reason)
    is_sweep = os.path.lexists(folder / SWEEP)
    is_run = os.path.lexists(folder / STATUS) or all(os.path.lexists(folder / name) for name in (CONFIG, STARTS))
    if not is_sweep and not is_run:
        raise refused(f"no folder of a run or a sweep: it has neither {STATUS} nor {SWEEP}")
    try:
        sections = {"tracking": sweep_tracking(folder)} if is_sweep else read_config(folder)
    except FileNotFoundError as error:
        raise refused(f"{CONFIG} is missing in it") from error
    except DamagedFileError as error:
        raise refused(error) from error
    name, tracking = str(sections.get("name") or folder.name), sections.get("tracking")
    stored = tracking if isinstance(tracking, dict) else {}
    of_mlflow = {
        "experiment_name": "towline",
        "run_name": name,
        "tags": {},
        "log_model": False,
        "log_system_metrics": False,
    }
    given = {key.partition(".")[2]: str(value) for key in KEYS if (value := line.value_of(key)) is not None}
    if stored.get("type") == "mlflow":
        stored = of_mlflow | stored
    elif "uri" in given:
        stored = {key: stored.get(key, value) for key, value in of_mlflow.items()} | {"type": "mlflow"}
    kind = str(stored.get("type"))
    if kind not in TRACKERS or (kind == "none" and not stored.get("also")):
        raise refused("it has no tracker (tracking=none); to deliver it nevertheless set tracking.uri=…")
    return Source(folder, is_sweep, _trackers(stored | given, str(folder / CONFIG)))


def _trackers(stored: Mapping[str, Any], where: str) -> list[TrackingConfig]:
    """Return the trackers' settings with the secrets of the environment; _Refused where one is missing or unfit."""
    missing: list[tuple[str, str]] = []
    tracking = secrets.reveal({"tracking": dict(stored)}, missing)["tracking"]
    if missing:
        raise _Refused(*(Problem(key, reason, has_value=False, where=where) for key, reason in missing))
    parsed = parse_section(TRACKERS[tracking["type"]], tracking, "tracking")
    if problems := parsed.problems or list(tracker_can_be_reached_by_some_scheme(parsed.value)):
        raise _Refused(*(problem.placed(where) for problem in problems))
    return [one for one in parsed.value.trackers() if one.type != "none"]


def sync_all(sources: Sequence[Source]) -> int:
    """Deliver what is missing of each folder in turn; return the highest exit code."""
    from src.tracking.console import Console

    console, code = Console(), 0
    for source in sources:
        try:
            ended, signal = sync(source, console)
        except RunFolderError as error:
            report(error)
            ended, signal = error.exit_code, ""
        code = max(code, ended)
        if signal:
            break
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then deliver; return the exit code."""

    def deliver(arguments: list[str]) -> int:
        sources = admit_sync(arguments)
        return guarded(lambda: sync_all(sources), when_stopped="The same command resumes.")

    return answer("sync", __doc__, argv, deliver)


if __name__ == "__main__":
    as_command(main)
