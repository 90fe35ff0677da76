"""The gate: nothing is loaded, written or started before the whole configuration has been found good.

`admit` composes once, checks every key against the schema, applies the rules across sections, and either returns the
typed config or raises one ConfigError with all problems: key, value, what is allowed, where it was set.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from src import secrets
from src.config import command_line as arguments
from src.config import deepspeed, frozen, plugins, rules
from src.config.command_line import CommandLine, is_group, read_command_line, value_text
from src.config.compose import compose, warn_of_broken_options
from src.config.composed import Composed, where_set
from src.config.files import unusable
from src.config.formats import declare_frozen
from src.config.hints import Situation, with_hints
from src.config.hydra_keys import asks_for_sweep, describes_a_sweep, hydra_problems
from src.config.identity import new_identity
from src.config.incomplete import without_missing
from src.config.job import Job, Request
from src.config.keys import is_read_by, known_keys
from src.config.output_folders import meeting_problems, output_problems, run_dir_problems
from src.config.plugins import Unregistered
from src.config.problems import COMMAND_LINE, Problem, refuse
from src.config.schema import ENTRY_SECTIONS, SECTIONS, RunConfig, SweepConfig
from src.config.sections import Parsed, parse_section, parse_sections
from src.errors import report
from src.util import in_words


def admit(argv: Sequence[str], entry: str | None = None) -> Request:
    """Check everything a command line asks for, but the points of a sweep: see src.sweep.plan.

    `entry` names the section that an entry has for itself, which looks at one run only. ConfigError lists all problems.
    """
    new_identity()
    line = read_command_line(argv)
    flags = line.flags
    if entry is not None and (flags.multirun or flags.cfg):
        line.problems.append(Problem("-m, --cfg", f"python -m src.{entry} looks at one run", has_value=False))
        raise refuse(line.problems)
    if line.asks_hydra_only:
        shown = compose(line.shown, line)
        if line.problems or shown.problems:
            raise refuse([*line.problems, *located_problems(shown, line)])
        warn_of_broken_options(line)
        return Request(line, shown=shown)
    if (folder := line.value_of("rerun")) is not None:
        if reason := unusable(str(folder)):
            raise refuse([*line.problems, Problem.on_command_line("rerun", reason, str(folder))])
        if flags.multirun or flags.cfg:
            line.problems.append(Problem.on_command_line("rerun", "not together with -m or --cfg", folder))
        return Request(line, _admit(frozen.read_frozen(Path(str(folder)), line), line, entry))
    if flags.multirun and flags.cfg:
        reason = "one of them: --cfg shows one run's configuration, sweep.dry_run=true the trials of a sweep"
        raise refuse([*line.problems, Problem("-m, --cfg", reason, has_value=False)])
    if flags.multirun:
        return Request(line)
    composed = compose(line.forced, line)
    if entry is None and asks_for_sweep(composed) and not flags.cfg:
        flags.multirun = True
        line.problems = [problem for problem in line.problems if not isinstance(problem, arguments.SeveralValues)]
        return Request(line)
    job = _admit(composed, line, entry)
    warn_of_broken_options(line)
    if entry is not None and (found := [key for key, _, _ in describes_a_sweep(composed)]):
        verb = "describes" if len(found) == 1 else "describe"
        report(f"warning: {in_words(found)} {verb} a sweep; {entry} looks at the run without what it varies.")
    return Request(line, shown=composed) if flags.cfg else Request(line, job)


def _admit(composed: Composed, line: CommandLine, entry: str | None) -> Job:
    """Return the job of a composed configuration; ConfigError lists all problems, those of the command line too."""
    job, problems = check_composed(composed, line, entry)
    if job is None or line.problems:
        raise refuse([*line.problems, *problems])
    return job


def admit_finished(argv: Sequence[str], entry: str) -> Job:
    """Return the job of an entry that uses a finished run, `run=DIR`, its `run_dir`; ConfigError lists all problems.

    Evaluation takes a run's configuration too, of a model that no run has trained.
    """
    line = read_command_line(argv)
    if entry == "evaluate" and line.value_of("run") is None:
        request = admit(argv, entry)
        assert request.run is not None  # flags are refused
        return request.run
    line.problems += arguments.flags_that_are_not_taken(line, entry)
    run = line.value_of("run")
    if run in (None, ""):
        line.problems.append(Problem("run", "needs a value: the folder of a finished run", has_value=False))
    elif reason := unusable(str(run)):
        line.problems.append(Problem.on_command_line("run", reason, str(run)))
    if "run" in {problem.key for problem in line.problems}:
        raise refuse([*line.problems, *_unread(line, entry)])
    return jobs_of_finished([Path(str(run))], line, entry)[0]


def admit_members(argv: Sequence[str], trials_of: Callable[[Path], Sequence[Path]]) -> list[Job]:
    """Return a job for each member of an ensemble, `runs=[DIR,…]` or `dir=SWEEP`; ConfigError lists all problems.

    `trials_of` returns the folders of a sweep's finished trials.
    """
    line = read_command_line(argv)
    line.problems += arguments.flags_that_are_not_taken(line, "ensemble")
    runs, sweep = line.value_of("runs"), line.value_of("dir")
    if (runs is None) == (sweep is None):
        reason = "one of them: the folders of finished runs, or that of a sweep"
        line.problems.append(Problem("runs=[DIR,…], dir=SWEEP", reason, has_value=False))
    elif runs is not None and not (isinstance(runs, list) and runs and all(isinstance(one, str) for one in runs)):
        line.problems.append(Problem.on_command_line("runs", "not a list of folders: runs=[DIR,…]", runs))
    given = runs if isinstance(runs, list) else [sweep]
    key = "dir" if runs is None else "runs"
    line.problems += [Problem.on_command_line(key, reason, one) for one in given if (reason := unusable(str(one)))]
    if line.problems:
        raise refuse([*line.problems, *_unread(line, "ensemble")])
    folders = [Path(one) for one in given] if key == "runs" else trials_of(Path(str(sweep)))
    return jobs_of_finished(folders, line, "ensemble", key)


def jobs_of_finished(folders: Sequence[Path], line: CommandLine, entry: str, key: str = "run") -> list[Job]:
    """Return a job for each folder of a finished run, which `key` named; ConfigError lists all problems, each once."""
    problems, jobs = [*line.problems, *_unread(line, entry)], list[Job]()
    for folder in folders:
        job, found = check_composed(frozen.read_finished(folder, line, entry, key), line, entry)
        jobs += [] if job is None else [job]
        problems += [problem for problem in found if problem not in problems]
    if problems or len(jobs) < len(folders):
        raise refuse(problems)
    return jobs


def _unread(line: CommandLine, entry: str) -> Iterator[Problem]:
    """Yield a problem for each override of an entry that is a good key elsewhere, and would change nothing here."""
    known = {*known_keys(), *SECTIONS}
    for override in line.overrides:
        key = override.key_or_group
        if is_group(override, line.roots) or is_read_by(entry, key):
            continue
        if key.startswith("hydra.") or any(key == name or key.startswith(f"{name}.") for name in known):
            reason = f"python -m src.{entry} does not read it"
            yield Problem.on_command_line(key, reason, value_text(override))


def parse_stored(sections: dict[str, Any]) -> RunConfig:
    """Return the typed config of plain containers that were admitted before: a frozen config, a point of a sweep.

    ConfigError says why they are not a good configuration after all.
    """
    missing: list[tuple[str, str]] = []
    sections = secrets.reveal({key: value for key, value in sections.items() if key != "sweep"}, missing)
    declare_frozen(sections.get("data"))
    frozen.add_later_keys(sections)
    plugins.require(sections.get(plugins.KEY))
    parsed, problems = parse_sections(sections)
    problems += list(_across(parsed, [*rules.RULES["run"], *rules.RULES["training"]]))
    # a tracker is the first process's; but what a model is trained on must not be the words that stand for it
    problems += [Problem(key, reason, has_value=False) for key, reason in missing if not secrets.is_secret_key(key)]
    if problems:
        raise refuse(list(with_hints(problems, Situation(sections, {}))))
    return _assemble(parsed)


def check_composed(composed: Composed, line: CommandLine, entry: str | None = None) -> tuple[Job | None, list[Problem]]:
    """Check a composed configuration against schema, rules and file system; return its job, or all problems."""
    if not composed.sections:
        return None, composed.problems
    # a section whose option is unknown, or whose file can't be read, is reported once, not twice
    reported = {problem.key for problem in line.problems} | composed.unresolved
    if deepspeed.KEY in {problem.key for problem in composed.problems}:
        reported.add("deepspeed")
    sections = {key: value for key, value in composed.sections.items() if key not in reported}
    own = _own_section(sections, composed, entry)
    sweep = _sweep_section(sections, line, composed, entry)
    parsed, problems = parse_sections(sections)
    problems += [*own.problems, *sweep.problems, *hydra_problems(composed, line)]
    problems = [problem for problem in problems if problem.key not in reported]
    if entry is not None and composed.is_finished:
        problems += _across(parsed, rules.RULES[entry])
    else:
        trained = [] if entry == "evaluate" else rules.RULES["training"]
        problems += _across(parsed, [*rules.RULES["run"], *trained])
        problems += meeting_problems(parsed, line)
        problems += run_dir_problems(composed, line)
    if entry is not None:
        problems += output_problems(own.value, composed.run_dir, entry)
    earlier = (*composed.problems, *line.problems)
    located = _located(problems, composed, line, entry)
    if not (located or earlier):
        reason = "takes a value that is missing"
        located = [Problem(key, reason, has_value=False) for key in sorted(composed.unresolved)]
    if names := plugins.not_imported(composed.sections.get(plugins.KEY)):
        # only where nothing else is wrong is a plugin's code run; then its names are known, and all is checked again
        if all(isinstance(problem, Unregistered) for problem in (*located, *earlier)):
            where = _where(plugins.KEY, line, composed)
            failed = [problem.placed(where) for problem in plugins.import_plugins(names)]
            return (None, failed) if failed else check_composed(composed, line, entry)
        located = [problem for problem in located if not isinstance(problem, Unregistered)]
    if located or earlier:
        return None, located_problems(composed, line, but=_of_deepspeed_file(composed)) + located
    stored = {
        key: value for key, value in composed.stored.items() if key != "sweep" and (key != entry or key in SECTIONS)
    }
    job = Job(_assemble(parsed), stored, composed.run_dir, own.value, composed.is_finished, sweep=sweep.value)
    return job, []


def _of_deepspeed_file(composed: Composed) -> list[Problem]:
    """Return the problems of keys that a user's DeepSpeed file has, which are explained as those of any other key."""
    return [p for p in composed.problems if p.key.startswith("deepspeed.") and p.key not in composed.unresolved]


def _located(problems: list[Problem], composed: Composed, line: CommandLine, entry: str | None) -> list[Problem]:
    """Return problems with hints and with where each key was set; one is enough for a key without a value."""
    of_file = _of_deepspeed_file(composed)
    unresolved = {problem.key for problem in composed.problems if problem not in of_file} | composed.unresolved
    reads = partial(is_read_by, entry) if composed.is_finished and entry is not None else lambda key: True
    situation = Situation(composed.sections, composed.choices, line.roots, line.flags.multirun, reads)
    problems = list(without_missing([p for p in problems if p.key not in unresolved], line, composed))
    return [
        problem.placed(_where(problem.key, line, composed))
        for problem in with_hints([*of_file, *problems], situation)
        if problem.key not in unresolved
    ]


def located_problems(composed: Composed, line: CommandLine, but: Sequence[Problem] = ()) -> list[Problem]:
    """Return what went wrong when a configuration was composed, with where it was set."""
    return [
        problem.placed(_where(problem.key, line, composed) if composed.hydra else "")
        for problem in composed.problems
        if problem not in but
    ]


def _where(key: str, line: CommandLine, composed: Composed) -> str:
    where = where_set(key, line, composed)
    file = deepspeed.file_that_set(key, composed.sections.get("deepspeed"))
    return file if file and where != COMMAND_LINE else str(where)


def _assemble(parsed: dict[str, Parsed]) -> RunConfig:
    top = dataclasses.asdict(parsed["top"].value)
    return RunConfig(**top, **{name: part.value for name, part in parsed.items() if name != "top"})


def _own_section(sections: dict[str, Any], composed: Composed, entry: str | None) -> Parsed:
    """Parse the section that only this entry has, and remove it; its defaults are in the schema."""
    if entry is None:
        return Parsed()
    schema = ENTRY_SECTIONS[entry]
    given = composed.own if composed.is_finished else sections.pop(entry, {})
    defaults = dataclasses.asdict(schema())
    return parse_section(schema, defaults | given if isinstance(given, dict) else given, entry)


def sweep_of(composed: Composed) -> tuple[SweepConfig | None, list[Problem]]:
    """Return the sweep section of a composed configuration, typed, whatever is wrong with the others."""
    parsed = parse_section(SweepConfig, composed.sections.get("sweep", {}), "sweep")
    situation = Situation(composed.sections, composed.choices, is_sweep=True)
    return parsed.value, list(with_hints(parsed.problems, situation))


def _sweep_section(sections: dict[str, Any], line: CommandLine, composed: Composed, entry: str | None) -> Parsed:
    """Parse the sweep section and remove it; without -m only the files of another entry's command may have one."""
    given = sections.pop("sweep", None)
    if line.flags.multirun or line.flags.cfg or not isinstance(given, dict | None):
        return parse_section(SweepConfig, given, "sweep")
    found = list(describes_a_sweep(composed))
    asked = [o for o in line.overrides if f"{o.key_or_group}.".startswith("sweep.") and not _asks_for_none(o)]
    reason = "is read by a sweep only: add -m" if entry is None else f"python -m src.{entry} looks at one run"
    problems = [Problem.on_command_line(o.key_or_group, reason, value_text(o)) for o in asked]
    if not asked and entry is None:  # a file asks
        one_run = " ".join(without for _, _, without in found)
        reason = f"describes a sweep: give the same command with -m; or for one run without it {one_run}"
        problems += [Problem(key, reason, value) for key, value, _ in found[:1]]
    return Parsed(None, problems)


def _asks_for_none(override: Override) -> bool:
    """Return whether an override takes out what a file has of a sweep."""
    given = override.key_or_group, override.value()
    return given in (("sweep", "none"), ("sweep.params", None), ("sweep.params", {}))


def _across(parsed: dict[str, Parsed], rules_of_entry: Sequence[Callable[..., Iterator[Problem]]]) -> Iterator[Problem]:
    """Apply each rule whose sections are all good; a rule's parameters name the sections it reads."""
    good = {name: part.value for name, part in parsed.items() if part.value is not None}
    for rule in rules_of_entry:
        if (needed := inspect.signature(rule).parameters).keys() <= good.keys():
            yield from rule(**{name: good[name] for name in needed})
