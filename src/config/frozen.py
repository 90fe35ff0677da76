"""A run's frozen configuration: how it is identified, read back, and repeated with changes."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import OmegaConf

from src import records, secrets
from src.config import trust
from src.config.command_line import CommandLine, is_group
from src.config.compose import COMPOSITION_ERRORS, compose, problem_of
from src.config.composed import Composed
from src.config.deepspeed import KEY as DEEPSPEED_FILE
from src.config.formats import declare_frozen
from src.config.hydra_keys import hydra_problems
from src.config.merging import make_room
from src.config.places import CHECKPOINTS, MANIFEST, STATE, folder_of, steps_in
from src.config.problems import Problem
from src.config.quoting import escaped, override_value, shell_override
from src.config.quoting import override as override_text
from src.config.resolving import resolve_sections
from src.config.schema import LATER_KEYS
from src.errors import DamagedFileError
from src.records import OPTIONAL_TEXT, Types, damaged, read_bytes, read_json

CONFIG, STARTS, STATUS, PROVENANCE = "config.yaml", "starts.jsonl", "status.json", "provenance.json"
PRECISION = "mixed_precision"  # in provenance.json: what training.mixed_precision meant, where it was auto
SWEEP = "sweep.json"
"""In the folder of a sweep, which holds the folders of its trials."""
START_KEYS: Mapping[str, Types] = {"time": str, "command": list, "config_hash": str}
STATUS_KEYS: Mapping[str, Types] = {"state": str, "step": int}
"""What status.json always has."""
MORE_STATUS_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("cause", "how_to_go_on", "started", "ended", "updated", "host", "boot_id"), OPTIONAL_TEXT),
    **dict.fromkeys(("pid", "num_steps", "steps_per_epoch"), (int, NoneType)),
    **dict.fromkeys(("journal", "model", "base"), (dict, NoneType)),
    "tracker_run_id": OPTIONAL_TEXT,
}
"""What it may have; `journal`, `model` and `base` have size and checksum of files, by name."""
STATUS_REMEDY = "Move it away: the same command then resumes from the last checkpoint, and writes it anew."
TIMES = ("started", "ended", "updated")
STATES = ("RUNNING", "FINISHED", "FAILED", "PREEMPTED", "PRUNED")
UNHASHED_SECTIONS = ("name", "force", "rerun", "tracking")
"""Sections and keys at the top that say nothing about what is computed."""
UNHASHED_KEYS = {"checkpoint": ("resume", "allow_changed"), "deepspeed": ("config_file", "sha256")}
"""Keys of other sections that say how to run, and nothing about what is computed."""
LENGTH = ("num_train_epochs", "max_train_steps", "early_stopping_patience", "early_stopping_threshold")
"""Keys of training that say how long a run is."""


def add_later_keys(sections: dict[str, Any]) -> None:
    """Add to a frozen configuration, in place, the keys that its version did not have, as if they were not there."""
    for section, later in LATER_KEYS.items():
        if isinstance(given := sections.get(section), dict):
            sections[section] = later | given


def config_hash(frozen: Mapping[str, Any]) -> str:
    """Return a hash of what a configuration computes: without names, folders and tracking. 16 hex digits."""
    computed = {key: value for key, value in frozen.items() if key not in UNHASHED_SECTIONS}
    for section, unhashed in UNHASHED_KEYS.items():
        if isinstance(given := computed.get(section), Mapping):
            computed[section] = {key: value for key, value in given.items() if key not in unhashed}
    for section, later in LATER_KEYS.items():
        if isinstance(given := computed.get(section), Mapping):
            kept = {key: value for key, value in given.items() if key not in later or value != later[key]}
            computed[section] = kept
    return hashlib.sha256(json.dumps(computed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of starts.jsonl, one for each start of a folder's run; DamagedFileError names a damaged one."""
    remedy = f"Remove that line (sed -i '{{number}}d' {STARTS}): the run needs no more than that one of them is right."
    lines = records.read_lines(folder / STARTS, lambda line, _: records.check_keys(line, START_KEYS), remedy=remedy)
    return [line.content for line in lines]


def read_status(folder: Path) -> dict[str, Any]:
    """Return what status.json of a folder says; empty where there is none; DamagedFileError where it can't be read."""
    file, keys = folder / STATUS, {**STATUS_KEYS, **MORE_STATUS_KEYS}
    try:
        status = read_json(file, keys, optional=MORE_STATUS_KEYS, remedy=STATUS_REMEDY)
    except FileNotFoundError:
        return {}
    if status["state"] not in STATES or status["step"] < 0:
        reason = f"state {status['state']}, step {status['step']}, where state is one of {', '.join(STATES)}"
        raise damaged(file, reason, STATUS_REMEDY)
    for key in ("journal", "model", "base"):
        for name, digest in (status.get(key) or {}).items():
            if not records.is_digest(digest):
                raise damaged(file, f"{key} has no size and checksum of {name}", STATUS_REMEDY)
    records.check_times(file, status, TIMES, STATUS_REMEDY)
    return status


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run.

    DamagedFileError is raised where status.json can't be read, or says FINISHED of other step logs than the folder has.
    """
    status = read_status(folder)
    if status.get("state") != "FINISHED":
        return False
    for name, digest in (status.get("journal") or {}).items():
        try:
            content = read_bytes(folder / name, None)
        except FileNotFoundError:
            content = b""
        except ValueError as error:
            raise damaged(folder / name, str(error), "Restore it from a copy.") from error
        if not records.begins_with(content, digest):
            reason = f"it says FINISHED, and {name} does not begin with the {digest['num_bytes']:,} bytes it had then"
            remedy = f"Restore whichever is not this run's; or move {STATUS} away, and the same command resumes."
            raise damaged(folder / STATUS, reason, remedy)
    return True


def read_config(folder: Path, read: Callable[[Path, str], dict[str, Any]] = records.read_yaml) -> dict[str, Any]:
    """Return the configuration that a run's folder was begun with, as it is stored; `read` reads the file.

    FileNotFoundError is raised where there is none, DamagedFileError where it can't be read, or is not the one that a
    start wrote down.
    """
    file = folder / CONFIG
    remedy = "Restore it; or move it away, and give the run's own command again, which writes it anew."
    sections = read(file, remedy)
    starts = read_starts(folder)
    if starts and config_hash(sections) not in {start["config_hash"] for start in starts}:
        reason = f"it is not the configuration that this run was started with, by the hash in {STARTS}"
        raise damaged(file, reason, f"Changes belong on the command line (SECTION.KEY=VALUE). {remedy}")
    return sections


def read_frozen(folder: Path, line: CommandLine) -> Composed:
    """Return the frozen config of a run's folder with the command line's dotted overrides on top (`rerun=DIR`)."""
    sections, problems = frozen_sections(folder, "rerun", "no run to repeat there")
    if problems:
        return Composed(problems=problems)
    given = line.value_of("hydra.run.dir")
    if given is not None and Path(str(given)).resolve() == folder.resolve():
        sections = _as_it_last_was(folder, sections)
        add_later_keys(sections)
    problems += _code_problems(folder, sections, line)
    if (file := line.value_of(DEEPSPEED_FILE)) is not None:
        reason = "read where a run begins (deepspeed=file); of one that is repeated change single keys: deepspeed.KEY=…"
        problems.append(Problem.on_command_line(DEEPSPEED_FILE, reason, file))
    changed, refused = _overridden(sections | {"rerun": str(folder), "force": False}, line, "a rerun")
    hydra_overrides = [o.input_line or "" for o in line.overrides if o.key_or_group.startswith("hydra.")]
    base = compose(
        [f"++{override_text('name', str(changed.get('name')))}", *hydra_overrides], CommandLine(line.flags, line.argv)
    )
    composed = Composed({}, base.run_dir, {}, [*base.problems, *problems, *refused], unresolved=base.unresolved)
    composed.problems += hydra_problems(base, line)
    _resolve(changed, composed)
    return composed


def read_finished(folder: Path, line: CommandLine, entry: str, key: str = "run") -> Composed:
    """Return a finished run's frozen config with the command line's dotted overrides on top, for an entry that uses it.

    `key` named the folder. Of a run whose checkpoint is asked for (`export.checkpoint`) any state is good. The tracker,
    which nothing is sent to, is dropped.
    """
    sections, problems = frozen_sections(folder, key, "no run there")
    if problems:
        return Composed({}, folder, {}, problems)
    if line.value_of("export.checkpoint") is None and (reason := _unfinished(folder)):
        saved = "; export.checkpoint=last takes what it has saved" if entry == "export" else ""
        problems.append(Problem.on_command_line(key, f"{reason}{saved}", str(folder)))
    _settle_precision(folder, sections)
    problems += _code_problems(folder, sections, line)
    if isinstance(sections.get("data"), dict):
        sections["data"] |= _rows_of_others(sections["data"], line, entry)
    of_run = {"rerun": None, "force": False, "tracking": {"type": "none"}}
    clash = {entry: sections[entry]} if entry in sections else {}  # the run's section of the same name
    changed, refused = _overridden(
        sections | of_run | {entry: {}}, line, "a run", own=("runs", "dir") if entry == "ensemble" else ("run",)
    )
    composed = Composed({}, folder, {}, [*problems, *refused], is_finished=True)
    _resolve(changed, composed)
    composed.own = composed.sections.pop(entry, None)
    composed.stored.pop(entry, None)
    for known in (composed.sections, composed.stored):
        known |= clash if known else {}
    return composed


def _settle_precision(folder: Path, sections: dict[str, Any]) -> None:
    """Have a finished run's `auto` be the precision that it was trained in, in place."""
    training = sections.get("training")
    if isinstance(training, dict) and training.get("mixed_precision") == "auto":
        with suppress(FileNotFoundError, DamagedFileError):  # auto is then what this device computes
            noted = read_json(folder / PROVENANCE, {PRECISION: str}, remedy="")
            sections["training"] = training | {"mixed_precision": noted[PRECISION]}


def _rows_of_others(data: Mapping[str, Any], line: CommandLine, entry: str) -> dict[str, Any]:
    """Return what an entry has of a run's `data` in another way than the run.

    Files that it does not read may be gone. Where validation files are given, no rows are held out of train.
    """
    if entry not in ("evaluate", "ensemble"):  # a limit of rows was for training
        return {"train_files": None, "validation_files": None, "limit": None}
    if line.value_of("data.validation_files") is not None:
        return {"num_folds": None, "fold": None, "group_column": None, "validation_fraction": 0.0} | _no_train(data)
    is_held_out = data.get("num_folds") or (data.get("validation_fraction") and not data.get("validation_files"))
    return {} if is_held_out else _no_train(data)


def _no_train(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what leaves the train files out, from which no rows are held out; beside a hub's rows they decide."""
    return {} if data.get("dataset_name") else {"train_files": None}


def frozen_sections(folder: Path, key: str, nothing: str) -> tuple[dict[str, Any], list[Problem]]:
    """Read a run's frozen config; `nothing` says of the key that named the folder what is not there."""
    try:
        sections = read_config(folder)
        add_later_keys(sections)
        declare_frozen(sections.get("data"))
        return sections, []
    except FileNotFoundError:
        reason = f"{nothing}: {f'it has no {CONFIG}' if folder.is_dir() else 'no such folder'}"
    except DamagedFileError as error:
        reason = f"{nothing}: {error}"
    return {}, [Problem.on_command_line(key, reason, str(folder))]


def _as_it_last_was(folder: Path, first: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that a run resumes with: its newest checkpoint's, or its first where there is none.

    Its length is what its last start asked for, which may not be in a checkpoint yet.
    """
    sections = _of_newest_checkpoint(folder, first)
    starts, status = read_starts(folder), read_status(folder)
    if status.get("state") == "FINISHED" or not starts or not isinstance(changed := starts[-1].get("changed"), dict):
        return sections
    length = {key: changed.get(f"training.{key}", first["training"][key]) for key in LENGTH}
    return sections | {"training": sections["training"] | length}


def _of_newest_checkpoint(folder: Path, first: dict[str, Any]) -> dict[str, Any]:
    saved = folder / CHECKPOINTS
    for state in (folder_of(saved, step) / STATE for step in reversed(steps_in(saved))):
        try:
            listed = read_json(state.with_name(MANIFEST), {"files": dict})["files"]
            if records.Digest(read_bytes(state)).as_dict()["xxh3_128"] != listed[state.name]["xxh3_128"]:
                continue
            sections = read_json(state, {"config": dict})["config"]
        except (OSError, ValueError, LookupError, TypeError, DamagedFileError):
            continue  # damaged: reported when the checkpoints are looked at
        return sections | {"checkpoint": sections["checkpoint"] | {"resume": "auto", "allow_changed": False}}
    return first


def _unfinished(folder: Path) -> str | None:
    """Return why a run cannot be used; None where it is finished and has a model."""
    try:
        status = read_status(folder)
    except DamagedFileError as error:
        return f"not a finished run: {error}"
    if not status:
        return "not a finished run: it has no status.json"
    if status["state"] != "FINISHED":
        so_far = f"this run is not finished: it is {status['state']} at step {status['step']}"
        return f"{so_far}; to finish it: make resume run={shlex.quote(str(folder))}"
    return None if (folder / "model").is_dir() else "its result is gone: there is no model/ in it"


def _code_problems(folder: Path, sections: Mapping[str, Any], line: CommandLine) -> list[Problem]:
    return code_problems(folder, sections, line, (start.get("signature") for start in read_starts(folder)))


def code_problems(
    folder: Path, sections: Mapping[str, Any], line: CommandLine, signatures: Iterable[Any]
) -> list[Problem]:
    """Return a problem for each key that would run code on the word of somebody else's folder.

    `signatures` are those in the folder, of the configurations that were started there.
    """
    asked = {key: value for key, value in trust.code_keys(sections).items() if line.value_of(key) is None}
    if not asked or trust.is_signed(folder, sections, signatures):
        return []
    problems = []
    for key, value in asked.items():
        does = "runs code" if key == "plugins" else "lets the checkpoint run code"
        say_so = f"where you trust it, say so yourself: {shell_override(key, value)}"
        reason = f"{does}, and this folder was not started here by you; {say_so}"
        problems.append(Problem(key, reason, override_value(value), where="frozen config"))
    return problems


def _overridden(
    sections: dict[str, Any], line: CommandLine, who: str, own: Sequence[str] = ()
) -> tuple[dict[Any, Any], list[Problem]]:
    """Put the dotted overrides on top of frozen sections; those of groups are refused.

    `who` keeps its options, for the message; `own` are keys of the entry that are none of the configuration.
    """
    cfg, problems = OmegaConf.create(escaped(sections)), []
    for override in line.overrides:
        key = override.key_or_group
        if key.startswith("hydra.") or key in own or override.is_sweep_override():
            continue
        if is_group(override, line.roots) or override.is_delete():
            reason = f"{who} keeps the options of its frozen config; change single keys (SECTION.KEY=VALUE)"
            problems.append(Problem.on_command_line(key, reason, override.value()))
            continue
        make_room(cfg, key, override.value())
        try:
            OmegaConf.update(cfg, key, override.value(), merge=False, force_add=True)
        except COMPOSITION_ERRORS as error:
            problems.append(problem_of(error, key))
    changed: Any = OmegaConf.to_container(cfg)
    return changed, problems


def _resolve(changed: dict[Any, Any], composed: Composed) -> None:
    """Resolve what the command line added, and put the secrets in that were not stored."""
    resolve_sections(OmegaConf.create(changed), composed)
    missing: list[tuple[str, str]] = []
    composed.sections = secrets.reveal(composed.sections, missing)
    composed.problems += [Problem(key, reason, has_value=False, where="frozen config") for key, reason in missing]
