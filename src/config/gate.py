"""The gate: nothing is loaded, written or started before the whole configuration has been found good. No torch here.

`admit` composes once, holds every key against the schema, applies the rules across sections, and either gives the
typed config or raises one ConfigError that tells all problems: key, value, what is allowed, where it was set.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from src import secrets
from src.config import compose as composing
from src.config import deepspeed, frozen, groups, plugins, rules
from src.config import schema as schema_module
from src.config.compose import CommandLine, Composed, SeveralValues
from src.config.files import unusable
from src.config.formats import declare_frozen
from src.config.hints import Situation, UnknownKey, explained
from src.config.hydra_keys import asks_for_sweep, describes_a_sweep, hydra_problems
from src.config.keys import is_read_by_predict, known_keys
from src.config.options import read_option, shown
from src.config.plugins import Unregistered
from src.config.problems import Problem, refuse
from src.config.quoting import escaped
from src.config.schema import (
    ENTRY_SECTIONS,
    SECTIONS,
    Check,
    Keys,
    PredictConfig,
    RunConfig,
    RuntimeConfig,
    SweepConfig,
    TopLevelConfig,
)
from src.config.schema.evaluation import RegisteredCheck
from src.config.values import convert, described
from src.errors import DamagedFileError, report
from src.registry import Registry

MOST_LACKING = 5
"""Keys that are told of those that a file lacks."""


@dataclass
class Job:
    """A configuration that passed: typed, as plain containers to freeze, and where the run's folder will be."""

    config: RunConfig
    frozen: dict[str, Any]
    run_dir: Path
    own: Any = None
    """The section that the entry alone reads, where it has one."""
    is_held: bool = False
    """Whether the process that started this one holds the run's folder."""
    sweep: SweepConfig | None = None
    """What makes a sweep of it, with -m."""
    trial: Mapping[str, Any] | None = None
    """Of a run in a sweep that may end it early: where to ask, see src.sweep.pruning."""


@dataclass
class Request:
    """What the command line asks for: one run that was admitted, a sweep (-m), or something that Hydra's main does."""

    line: CommandLine
    run: Job | None = None
    shown: Composed | None = None
    """What --help and --cfg show the values of."""


class Missing(Problem):
    """A key or a section that a configuration does not have."""


@dataclass
class _Parsed:
    """A section's typed object, where it could be built, and the problems met on the way."""

    value: Any = None
    problems: list[Problem] = field(default_factory=list)


def admit(argv: Sequence[str], entry: str | None = None) -> Request:
    """Check everything a command line asks for, but the points of a sweep: see src.sweep.plan.

    Args:
        entry: the name of the section that this entry has for itself; it looks at one run only.
    Raises:
        ConfigError: with all problems together.
    """
    composing.new_identity()
    line = composing.read_command_line(argv)
    if entry is not None and (line.flags.multirun or line.flags.cfg):
        line.problems.append(Problem("-m, --cfg", f"python -m src.{entry} looks at one run", has_value=False))
        raise refuse(line.problems)
    if line.asks_hydra_only:
        shown = composing.compose(line.shown, line)
        if line.problems or shown.problems:
            raise refuse([*line.problems, *located_problems(shown, line)])
        composing.warn_of_broken_options(line)
        return Request(line, shown=shown)
    rerun = line.value_of("rerun")
    if rerun is not None:
        if reason := unusable(str(rerun)):
            raise refuse([*line.problems, Problem("rerun", reason, str(rerun), True, composing.COMMAND_LINE)])
        if line.flags.multirun or line.flags.cfg:
            line.problems.append(Problem("rerun", "not together with -m or --cfg", rerun, True, composing.COMMAND_LINE))
        admitted, problems = check(frozen.read_frozen(Path(str(rerun)), line), line, entry)
        if problems or line.problems:
            raise refuse([*line.problems, *problems])
        return Request(line, admitted)
    if line.flags.multirun and line.flags.cfg:
        reason = "one of them: --cfg shows one run's configuration, sweep.dry_run=true the trials of a sweep"
        raise refuse([*line.problems, Problem("-m, --cfg", reason, has_value=False)])
    if line.flags.multirun:
        return Request(line)
    composed = composing.compose(line.forced, line)
    if entry is None and asks_for_sweep(composed) and not line.flags.cfg:
        line.flags.multirun = True
        line.problems = [problem for problem in line.problems if not isinstance(problem, SeveralValues)]
        return Request(line)
    admitted, problems = check(composed, line, entry)
    if problems or line.problems:
        raise refuse([*line.problems, *problems])
    composing.warn_of_broken_options(line)
    if entry is not None and (found := [key for key, _, _ in describes_a_sweep(composed)]):
        verb = "describes" if len(found) == 1 else "describe"
        report(f"warning: {' and '.join(found)} {verb} a sweep; {entry} looks at the run without what it varies.")
    return Request(line, shown=composed) if line.flags.cfg else Request(line, admitted)


def admit_prediction(argv: Sequence[str]) -> Job:
    """Check a command line that generates with a finished run, `run=DIR`; `run_dir` is then that folder.

    Raises:
        ConfigError: with all problems together.
    """
    line = composing.read_command_line(argv)
    for flag in line.argv:
        if flag.startswith("-"):
            line.problems.append(Problem(flag, "python -m src.predict takes KEY=VALUE, and --help", has_value=False))
    run = line.value_of("run")
    if run in (None, ""):
        line.problems.append(Problem("run", "needs a value: the folder of a finished run", has_value=False))
    elif reason := unusable(str(run)):
        line.problems.append(Problem("run", reason, str(run), True, composing.COMMAND_LINE))
    if run in (None, "") or "run" in {problem.key for problem in line.problems}:
        raise refuse([*line.problems, *_unread(line)])
    admitted, problems = check(frozen.read_finished(Path(str(run)), line), line, "predict")
    problems = [*line.problems, *problems, *_unread(line)]
    if admitted is None or problems:
        raise refuse(problems)
    return admitted


def _unread(line: CommandLine) -> Iterator[Problem]:
    """Tell the overrides of src.predict that are good keys elsewhere, and would change nothing here."""
    known = {*known_keys(), *SECTIONS}
    for override in line.overrides:
        key = override.key_or_group
        if composing.is_group(override, line.roots) or is_read_by_predict(key):
            continue
        if key.startswith("hydra.") or any(key == name or key.startswith(f"{name}.") for name in known):
            reason = "python -m src.predict does not read it"
            yield Problem(key, reason, composing.value_text(override), True, composing.COMMAND_LINE)


def parse(sections: dict[str, Any]) -> RunConfig:
    """Turn plain containers that were admitted before (a frozen config, a point of a sweep) into the typed config.

    Raises:
        ConfigError: where they are not a good configuration after all.
    """
    missing: list[tuple[str, str]] = []
    sections = secrets.reveal({key: value for key, value in sections.items() if key != "sweep"}, missing)
    declare_frozen(sections.get("data"))
    plugins.require(sections.get(plugins.KEY))
    parsed, problems = _parse_sections(sections)
    problems += list(_across(parsed))
    # a tracker is the first process's; but what a model is trained on must not be the words that stand for it
    problems += [Problem(key, reason, has_value=False) for key, reason in missing if not secrets.is_secret_key(key)]
    if problems:
        raise refuse(list(explained(problems, Situation(sections, {}))))
    return _assemble(parsed)


def check(composed: Composed, line: CommandLine, entry: str | None = None) -> tuple[Job | None, list[Problem]]:
    """Hold a composed configuration against schema, rules and file system."""
    if not composed.sections:
        return None, composed.problems
    refused = {problem.key for problem in line.problems}  # a section whose option is unknown is told once, not twice
    if deepspeed.KEY in {problem.key for problem in composed.problems}:  # its file can't be read
        refused.add("deepspeed")
    refused |= composed.failed
    sections = {key: value for key, value in composed.sections.items() if key not in refused}
    own = _own_section(sections, entry)
    sweep = _sweep_section(sections, line, composed, entry)
    of_hydra = [] if entry == "predict" else list(hydra_problems(composed, line))
    parsed, problems = _parse_sections(sections)
    problems = [p for p in [*problems, *own.problems, *sweep.problems, *of_hydra] if p.key not in refused]
    if entry == "predict":
        problems += _across(parsed, rules.PREDICT_RULES)
        problems += _output_problems(own.value, composed.run_dir)
    else:
        problems += _across(parsed)
        problems += _meeting_problems(parsed, line)
        problems += _run_dir_problems(composed, line)
    of_file = [one for one in composed.problems if one.key.startswith("deepspeed.") and one.key not in composed.failed]
    # told once: without its value a key is nothing else
    unresolved = {problem.key for problem in composed.problems if problem not in of_file} | composed.failed
    reads = is_read_by_predict if entry == "predict" else lambda key: True
    situation = Situation(composed.sections, composed.choices, line.roots, line.flags.multirun, reads)
    problems = list(_without_missing([p for p in problems if p.key not in unresolved], line, composed))
    located = [
        problem if problem.where else dataclasses.replace(problem, where=_where(problem.key, line, composed))
        for problem in explained([*of_file, *problems], situation)
        if problem.key not in unresolved
    ]
    if composed.failed and not (located or composed.problems or line.problems):
        located = [Problem(key, "takes a value that is missing", has_value=False) for key in sorted(composed.failed)]
    if names := plugins.not_imported(composed.sections.get(plugins.KEY)):
        if all(isinstance(problem, Unregistered) for problem in (*located, *composed.problems, *line.problems)):
            where = _where(plugins.KEY, line, composed)
            failed = [dataclasses.replace(problem, where=where) for problem in plugins.import_plugins(names)]
            return (None, failed) if failed else check(composed, line, entry)
        located = [problem for problem in located if not isinstance(problem, Unregistered)]
    if located or composed.problems or line.problems:
        return None, located_problems(composed, line, but=of_file) + located
    stored = {key: value for key, value in composed.stored.items() if key not in (entry, "sweep")}
    return Job(_assemble(parsed), stored, composed.run_dir, own.value, sweep=sweep.value), []


def _without_missing(problems: Sequence[Problem], line: CommandLine, composed: Composed) -> Iterator[Problem]:
    """Yield the problems, with what files that build on nothing lack told as that, one problem a file."""
    told = set[Path]()
    for problem in problems:
        file = _lacking(problem.key, line, composed) if isinstance(problem, Missing) else None
        if file is None:
            yield problem
        elif file not in told:
            told.add(file)
            lacks = [one.key for one in problems if isinstance(one, Missing)]
            lacks = [key for key in lacks if _lacking(key, line, composed) == file]
            listed = f"{', '.join(lacks[:MOST_LACKING])}{' …' if len(lacks) > MOST_LACKING else ''}"
            is_primary = file == composing.primary_file(line)
            base = composing.BASE if is_primary else _nearest_option(file, problem.key.partition(".")[0])
            reason = f"builds on nothing, and lacks {listed}; have it build on another: `defaults: [{base}, _self_]`"
            key = composing.PRIMARY if is_primary else problem.key.partition(".")[0]
            yield Problem(key, reason, file.stem, where=str(shown(file)))


def _lacking(key: str, line: CommandLine, composed: Composed) -> Path | None:
    """Return the file that builds on nothing, to which a key is missing; None where there is none."""
    files = [one.file for one in composed.files]
    if not files or key.partition(".")[0] in ENTRY_SECTIONS:
        return None
    primary, section = composing.primary_file(line), key.partition(".")[0]
    if composing.CONF / f"{composing.BASE}.yaml" not in files:
        return primary
    own = [one.file for one in composed.files if one.package == section]
    return own[0] if len(own) == 1 and "." in key and not own[0].is_relative_to(composing.CONF) else None


def _nearest_option(file: Path, group: str) -> str:
    """Return the option of a group that has the most of the keys in a file; of several, the one chosen by default."""
    usual = groups.defaults_of(read_option(composing.CONF / f"{composing.BASE}.yaml").get("defaults"))[1].get(group)
    given, roots = set(read_option(file)), (composing.CONF,)

    def likeness(name: str) -> tuple[int, bool]:
        return len(given & set(groups.values_of(group, name, roots))), name == usual

    return max(groups.readable(group, roots), key=likeness)


def located_problems(composed: Composed, line: CommandLine, but: Sequence[Problem] = ()) -> list[Problem]:
    """Return what went wrong when a configuration was composed, with where it was set."""
    return [
        dataclasses.replace(one, where=_where(one.key, line, composed)) if composed.hydra and not one.where else one
        for one in composed.problems
        if one not in but
    ]


def _where(key: str, line: CommandLine, composed: Composed) -> str:
    where = composing.where_set(key, line, composed)
    file = deepspeed.file_behind(key, composed.sections.get("deepspeed"))
    return file if file and where != composing.COMMAND_LINE else str(where)


def _assemble(parsed: dict[str, _Parsed]) -> RunConfig:
    top = dataclasses.asdict(parsed[""].value)
    return RunConfig(**top, **{name: part.value for name, part in parsed.items() if name})


def _own_section(sections: dict[str, Any], entry: str | None) -> _Parsed:
    """Take the entry's own section out and parse it; its defaults stand in the schema."""
    if entry is None:
        return _Parsed()
    schema, given = ENTRY_SECTIONS[entry], sections.pop(entry, {})
    defaults = dataclasses.asdict(schema())
    return _parse(schema, defaults | given if isinstance(given, dict) else given, entry)


def sweep_of(composed: Composed) -> tuple[SweepConfig | None, list[Problem]]:
    """Take the sweep's own section from a composed configuration, whatever the others hold."""
    parsed = _parse(SweepConfig, composed.sections.get("sweep", {}), "sweep")
    return parsed.value, list(explained(parsed.problems, Situation(composed.sections, composed.choices, is_sweep=True)))


def _sweep_section(sections: dict[str, Any], line: CommandLine, composed: Composed, entry: str | None) -> _Parsed:
    """Take the sweep section out and parse it; without -m nothing may ask for one, but a file of another entry's."""
    given = sections.pop("sweep", None)
    if line.flags.multirun or line.flags.cfg or not isinstance(given, dict | None):
        return _parse(SweepConfig, given, "sweep")
    found = list(describes_a_sweep(composed))
    asked = [o for o in line.overrides if f"{o.key_or_group}.".startswith("sweep.") and not _asks_for_none(o)]
    reason = "is read by a sweep only: add -m" if entry is None else f"python -m src.{entry} looks at one run"
    problems = [Problem(o.key_or_group, reason, composing.value_text(o), True, composing.COMMAND_LINE) for o in asked]
    if not asked and entry is None:  # a file asks
        one_run = " ".join(without for _, _, without in found)
        reason = f"describes a sweep: give the same command with -m; or for one run without it {one_run}"
        problems += [Problem(key, reason, value) for key, value, _ in found[:1]]
    return _Parsed(None, problems)


def _asks_for_none(override: Override) -> bool:
    """Return whether an override takes out what a file has of a sweep."""
    return (override.key_or_group, override.value()) in (
        ("sweep", "none"),
        ("sweep.params", None),
        ("sweep.params", {}),
    )


def _parse_sections(sections: dict[str, Any]) -> tuple[dict[str, _Parsed], list[Problem]]:
    """Parse every section by its own; '' is the top level."""
    parsed = {"": _parse(TopLevelConfig, {k: v for k, v in sections.items() if k not in SECTIONS}, "")}
    for name, schema in SECTIONS.items():
        if name not in sections:
            parsed[name] = _Parsed(None, [Missing(name, "this section is missing", has_value=False)])
            continue
        given = sections[name]
        if isinstance(given, dict) and isinstance(schema, dict):
            kind = given.get("type")
            if not isinstance(kind, str) or kind not in schema:
                choose = f"; choose with {name}=…"
                problem = Problem(f"{name}.type", f"not one of {', '.join(schema)}{choose}", kind)
                if "type" not in given:
                    problem = Missing(problem.key, problem.reason)
                elif isinstance(schema, Registry):
                    problem = Unregistered(problem.key, schema.why_unknown(kind, choose), kind)
                parsed[name] = _Parsed(None, [problem])
                continue
            schema = schema[kind]
        parsed[name] = _parse(schema, given, name)
    return parsed, [problem for part in parsed.values() for problem in part.problems]


def _parse(schema: Any, given: Any, prefix: str) -> _Parsed:
    """Hold one mapping against one dataclass, key by key, so that every problem is found."""
    parsed = _Parsed()
    if not isinstance(given, dict):
        below = "; its keys have to be indented below it" if given is None else ""
        parsed.problems.append(Problem(prefix, f"a section of keys, not a value{below}", given))
        return parsed
    hints = typing.get_type_hints(schema)
    rules_of = {one.name: one.metadata for one in dataclasses.fields(schema)}
    typed = OmegaConf.structured(schema)
    values = {}
    complete = True
    for key, value in given.items():
        if key not in hints:
            parsed.problems.append(UnknownKey(_dotted(prefix, key), "unknown key", value, siblings=tuple(hints)))
            continue
        part = _parse_value(typed, key, hints[key], rules_of[key].get("check"), value, prefix)
        if (each := rules_of[key].get("each")) and not part.problems and value is not None:
            part = _parse_each(getattr(schema_module, each), value, _dotted(prefix, key))
        if (inner := rules_of[key].get("inner")) and isinstance(value, dict):
            part.problems += _check_inner(inner, value, _dotted(prefix, key))
        parsed.problems += part.problems
        complete = complete and not part.problems
        values[key] = part.value
    for key in hints.keys() - given.keys():
        parsed.problems.append(Missing(_dotted(prefix, key), "is missing", has_value=False))
        complete = False
    if complete:
        parsed.value = schema(**values)
    return parsed


def _parse_each(schema: Any, given: dict[str, dict[Any, Any]], prefix: str) -> _Parsed:
    """Hold each value of a mapping against a dataclass whose keys may all be left out, and stay so."""
    parsed = _Parsed({})
    for name, one in given.items():
        defaults = dict.fromkeys(typing.get_type_hints(schema))
        part = _parse(schema, defaults | one, _dotted(prefix, name))
        parsed.problems += part.problems
        if part.value is not None and not part.problems:
            parsed.value[name] = {key: getattr(part.value, key) for key in one}
    return parsed


def _check_inner(known: Keys, given: dict[Any, Any], prefix: str) -> list[Problem]:
    """Hold a mapping of another library's against the keys that it may have."""
    problems = []
    for key, value in given.items():
        dotted = _dotted(prefix, key)
        rule = known.get(key) if isinstance(key, str) else None
        if rule is None:
            near = get_close_matches(str(key), known, n=1)
            reason = f"not a key of DeepSpeed's{f'; did you mean {near[0]}?' if near else ''}"
            problems.append(Problem(dotted, reason, value))
        elif isinstance(rule, Check):
            problems += [Problem(dotted, reason, value)] if (reason := rule.reason(value)) else []
        elif isinstance(value, dict):
            problems += _check_inner(rule, value, dotted)
        elif value is not None:
            problems.append(Problem(dotted, "not a mapping of DeepSpeed's keys, or null", value))
    return problems


def _parse_value(typed: Any, key: str, hint: Any, check: Check | None, value: Any, prefix: str) -> _Parsed:
    dotted = _dotted(prefix, key)
    if value == "???":
        allowed = check.allowed if check else described(hint)
        return _Parsed(None, [Problem(dotted, f"needs a value: {allowed}", has_value=False)])
    if dataclasses.is_dataclass(hint):
        return _parse(hint, value, dotted)
    converted, reason = convert(typed, key, hint, check, escaped(value))
    kind_of = Unregistered if isinstance(check, RegisteredCheck) and converted is not None else Problem
    return _Parsed(None, [kind_of(dotted, reason, value)]) if reason else _Parsed(converted)


def _dotted(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _across(
    parsed: dict[str, _Parsed], those: Sequence[Callable[..., Iterator[Problem]]] = rules.RULES
) -> Iterator[Problem]:
    """Apply each rule whose sections are all good; a rule's parameters name the sections it reads."""
    good = {name or "top": part.value for name, part in parsed.items() if part.value is not None}
    for rule in those:
        needed = inspect.signature(rule).parameters
        if all(name in good for name in needed):
            yield from rule(**{name: good[name] for name in needed})


def _output_problems(own: PredictConfig | None, run_dir: Path) -> Iterator[Problem]:
    """Check that predictions can be written, and not among the files of a run."""
    if own is None:
        return
    output = own.folder(run_dir)
    if os.path.exists(output / "config.yaml"):
        yield Problem("predict.output", "a run's folder; predictions need one of their own", str(output))
    yield from _folder_problems(output, "predict.output", "the folder of the predictions")


def _meeting_problems(parsed: dict[str, _Parsed], line: CommandLine) -> Iterator[Problem]:
    """Several machines, each with this command, need one folder; the default one has the time in its name."""
    runtime = parsed["runtime"].value if "runtime" in parsed else None
    if isinstance(runtime, RuntimeConfig) and runtime.num_machines > 1 and line.value_of("hydra.run.dir") is None:
        reason = "several machines need one folder that all of them reach: give it"
        yield Problem("hydra.run.dir", reason, has_value=False, where=composing.COMMAND_LINE)


def _run_dir_problems(composed: Composed, line: CommandLine) -> Iterator[Problem]:
    key = "hydra.sweep.dir" if line.flags.multirun else "hydra.run.dir"
    if not composed.has_run_dir:
        return
    if reason := unusable(str(composed.run_dir)):
        yield Problem(key, f"can't be made: {reason}", str(composed.run_dir), where="the run's folder")
    elif not _is_left(composed, line):
        yield from _folder_problems(composed.run_dir, key)


def _is_left(composed: Composed, line: CommandLine) -> bool:
    """Return whether the folder holds a finished run, which is left as it is and needs no permission to write."""
    if line.flags.multirun or composed.sections.get("force"):
        return False
    try:
        return frozen.read_status(composed.run_dir).get("state") == "FINISHED"
    except DamagedFileError:  # told when the run begins
        return False


def _folder_problems(run_dir: Path, key: str, where: str = "the run's folder") -> Iterator[Problem]:
    """Check that a run's folder is there or can be made, without making it."""
    if run_dir.resolve() in (Path.cwd(), composing.PROJECT_ROOT):
        yield Problem(key, "a run needs a folder of its own", str(run_dir), where=where)
    for place in [run_dir, *run_dir.absolute().parents]:
        if os.path.exists(place):
            if not place.is_dir():
                yield Problem(key, f"can't be made: {place} is a file", str(run_dir), where=where)
            elif not os.access(place, os.W_OK | os.X_OK):
                yield Problem(key, f"can't be made: no permission to write in {place}", str(run_dir), where=where)
            return
