"""Hydra's side of a configuration: the command line and conf/ become plain containers, or problems. No torch here.

Every override of a single key is composed as `++key=value`, so that an unknown key survives composition and the gate
can report all of them together; Hydra by itself stops at the first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import version
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf._utils import _DEFAULT_MARKER_
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers.oc import env as environment_variable

from src import secrets
from src.config import mistyped
from src.config.deepspeed import read_deepspeed_file
from src.config.files import unusable
from src.config.formats import declare_options, fill_mixture
from src.config.hydra_hints import unknown_group_option, unknown_key
from src.config.merging import BASE, Loader, Merged, has_content, make_room
from src.config.options import (
    CONF,
    PROJECT_ROOT,
    OptionFileError,
    Place,
    broken_options,
    find_key,
    is_hidden,
    option_files,
    shown,
    unfit_folder,
)
from src.config.peers import flag_hint, option_hint
from src.config.problems import Problem, refuse
from src.config.quoting import escaped, in_url
from src.config.quoting import override as override_text
from src.config.source import install
from src.errors import report

COMMAND_LINE = "command line"
REPLACED_WHOLE = ("data.validation_files", "data.test_files", "data.mixture", "data.columns", "sweep.params")
"""Keys whose value on the command line takes the place of the whole list or mapping."""
OPTIONAL_GROUPS = ("experiment",)
PRIMARY = "--config-name"
"""The flag that names the file which a configuration begins with."""

HOW_NOT_WHAT = (
    *("name", "tracking", "sweep.name", "sweep.n_trials", "sweep.n_jobs", "sweep.max_seconds", "sweep.dry_run"),
    *("sweep.fail_fast", "sweep.max_retries", "sweep.max_points", "sweep.storage", "force"),
)
"""Keys of a sweep's command that change how it is done, or how long it goes on, and not what it compares."""

VARIED_BY_HYDRA = ("hydra.sweeper.params", "hydra/sweeper")
"""Keys of Hydra's own section that say what a sweep compares, or who runs it."""
MOST_NESTED = 20
"""Levels of a key or of a value: more than any has, and few enough for all that read them."""
COMPOSITION_ERRORS = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError),
    *(OSError, ValueError, TypeError, AttributeError),
)
"""What Hydra and OmegaConf raise for mistakes in overrides and options; some are Python's own."""

NONE_WHERE_EMPTY = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Variables that count as not set where they are empty, as MLflow reads them."""
UNRESOLVED = (OmegaConfBaseException, RecursionError)
"""What OmegaConf raises for an interpolation that can't be resolved."""

_is_storing: ContextVar[bool] = ContextVar("is_storing", default=False)
_identity = {"start_time": "", "uid": "", "sweep_id": ""}
OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("project_url", lambda: in_url(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("start_time", lambda: _identity["start_time"], replace=True)
OmegaConf.register_new_resolver("uid", lambda: _identity["uid"], replace=True)
OmegaConf.register_new_resolver("sweep_id", lambda: _identity["sweep_id"], replace=True)


_TAKES_MISSING = re.compile(r"Missing mandatory value: (?!hydra\.)")
"""What OmegaConf says of a value that takes a missing one, of which the gate tells that it needs a value."""
_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)")
_INTERPOLATED = re.compile(r"(?<!\\)\$\{\s*([A-Za-z_][\w.]*)\s*\}")
"""What a text takes from another key."""


def new_identity() -> None:
    """Give the next run folder a name of its own: seconds alone would collide."""
    _identity["start_time"] = datetime.now().strftime("%Y%m%d-%H%M%S")
    _identity["uid"] = uuid.uuid4().hex[:6]


class SeveralValues(Problem):
    """Several values for a key, which only a sweep can have."""


@dataclass
class CommandLine:
    """The arguments of an entry, taken apart.

    `forced` are the overrides as they are composed: keys with `++`, groups and Hydra's own keys as given.
    """

    flags: argparse.Namespace
    argv: list[str]
    overrides: list[Override] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    roots: list[Path] = field(default_factory=lambda: [CONF])
    topics: list[str] = field(default_factory=list)
    """Groups, sections and keys that --help is asked about."""

    @property
    def asks_hydra_only(self) -> bool:
        """Whether Hydra answers by itself (help, version, completion) and there is nothing to check."""
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.shell_completion or flags.info)

    @property
    def forced(self) -> list[str]:
        return [text for override in self.overrides for text in forced(override, self.roots)]

    @property
    def hydra_argv(self) -> list[str]:
        """The same arguments for Hydra's own main: flags first, then the overrides with every key forced."""
        flags = [argument for argument in self.argv if argument not in self.flags.overrides]
        if self.flags.multirun and not {"-m", "--multirun"} & set(flags):
            flags.append("-m")
        given = 1 if self.flags.config_dir else 0
        more = [override_text("hydra.searchpath", [f"file://{one}" for one in self.roots[1 + given :]])]
        return [
            *flags,
            *(more if len(self.roots) > 1 + given else []),
            *(self.shown if self.asks_hydra_only else self.forced),
        ]

    @property
    def shown(self) -> list[str]:
        """The overrides of the one configuration that Hydra shows: without what is varied."""
        fixed = [override for override in self.overrides if not override.is_sweep_override()]
        if self.flags.hydra_help:  # which composes Hydra's own section alone
            fixed = [override for override in fixed if override.is_hydra_override()]
        return [text for override in fixed for text in forced(override, self.roots)]

    def value_of(self, key: str) -> Any:
        """Give the value that the command line sets for a key, or None."""
        return next((o.value() for o in reversed(self.overrides) if o.key_or_group == key), None)

    @property
    def sweep_id(self) -> str:
        """Give a hash of what the command compares, in whatever order it is written. 8 hex digits."""
        texts = sorted(
            override.input_line or ""
            for override in self.overrides
            if not any(f"{override.key_or_group}.".startswith(f"{key}.") for key in HOW_NOT_WHAT)
            and not (override.is_hydra_override() and override.key_or_group not in VARIED_BY_HYDRA)
        )
        given = 2 if self.flags.config_dir else 1
        texts += [f"hydra.searchpath={root}" for root in self.roots[given:]]
        texts += [f"--{name}={given}" for name in ("config_dir", "config_name") if (given := getattr(self.flags, name))]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


@dataclass
class Composed:
    """A composed configuration: plain sections, the run's folder, and what each group chose."""

    sections: dict[str, Any]
    run_dir: Path
    choices: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)
    """The sections as files may have them: without secrets."""
    hydra: DictConfig | None = None
    """All that Hydra composed, its own section included; None of a frozen configuration."""
    files: tuple[Merged, ...] = ()
    """What Hydra composed it of, the later over the earlier; empty of a frozen configuration."""
    failed: set[str] = field(default_factory=set)
    """Keys that could not be resolved, of a section the outermost ones; `problems` says why."""

    @property
    def has_run_dir(self) -> bool:
        """Whether it could be made out where the run's folder will be."""
        return not self.failed & {"hydra.run.dir", "hydra.sweep.dir"}


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Take the arguments apart with Hydra's own parsers; each unreadable override is a problem of its own.

    Raises:
        ConfigError: where the flags can't be made out.
    """
    flags = _read_flags(argv)
    line = CommandLine(flags=flags, argv=list(argv))
    if flags.config_path:
        reason = "conf/ is the configuration; add options of your own with --config-dir DIR"
        line.problems.append(Problem("--config-path", reason, flags.config_path, True, COMMAND_LINE))
    if flags.run and flags.multirun:
        line.problems.append(Problem("--run, -m", "one run, or a sweep: one of them", has_value=False))
    if flags.experimental_rerun:
        reason = "a run is repeated from its folder: rerun=DIR, with changes of single keys behind it"
        line.problems.append(Problem("--experimental-rerun", reason, flags.experimental_rerun, True, COMMAND_LINE))
    for flag in ("package", "resolve"):
        if getattr(flags, flag) and not flags.cfg and not flags.help:
            line.problems.append(
                Problem(f"--{flag}", "says how --cfg shows a configuration: add --cfg job", has_value=False)
            )
    if flags.config_dir:
        if reason := unusable(flags.config_dir) or unfit_folder(Path(flags.config_dir)):
            line.problems.append(Problem("--config-dir", reason, flags.config_dir, True, COMMAND_LINE))
        else:
            line.roots.append(Path(flags.config_dir).resolve())
    for text in flags.overrides:
        if flags.help and "=" not in text:
            line.topics.append(text.removesuffix("."))
            continue
        read = read_override(text)
        if isinstance(read, Problem):
            line.problems.append(read)
        elif read.key_or_group == "hydra.searchpath":
            _add_roots(read, line)
        else:
            line.overrides.append(read)
    if line.value_of("hydra.mode") == "MULTIRUN":
        flags.multirun = True
    for root in line.roots[1:]:
        declare_options(root / "data")
    for override in line.overrides:
        if override.is_sweep_override() and not flags.multirun:
            text = value_text(override)
            reason = mistyped.several(override, text, is_group=is_group(override, line.roots))
            line.problems.append(SeveralValues(override.key_or_group, reason, text, True, COMMAND_LINE))
        if is_group(override, line.roots) and not override.key_or_group.startswith("hydra/"):  # told by Hydra
            line.problems += _unknown_options(override, line.roots)
    parts = Path(flags.config_name or "").parts
    if flags.config_name and (parts[0] == "/" or ".." in parts or not os.path.lexists(primary_file(line))):
        known = sorted({file.stem for root in line.roots for file in root.glob("*.yaml") if not is_hidden(file.name)})
        near = get_close_matches(flags.config_name, known, n=1)
        reason = f"no such file in conf/ or --config-dir; one of {', '.join(known)}"
        reason += f"; did you mean {near[0]}?" if near else ""
        line.problems.append(Problem(PRIMARY, reason, flags.config_name, True, COMMAND_LINE))
    _identity["sweep_id"] = line.sweep_id
    return line


def _add_roots(override: Override, line: CommandLine) -> None:
    """Take folders of options from `hydra.searchpath=[…]`, as --config-dir gives one."""
    given = override.value()
    for place in given if isinstance(given, list) else [given]:
        folder = str(place).removeprefix("file://")
        reason = "no such folder" if "://" in folder else unusable(folder) or unfit_folder(Path(folder))
        if reason:
            reason += "; a list of folders: hydra.searchpath=[file:///DIR], or --config-dir DIR"
            line.problems.append(Problem("hydra.searchpath", reason, str(place), True, COMMAND_LINE))
        else:
            line.roots.append(Path(folder).resolve())


def _read_flags(argv: Sequence[str]) -> argparse.Namespace:
    def refuse_flags(message: str) -> NoReturn:
        raise refuse([Problem("command line", f"{message}{flag_hint(message)}", has_value=False)])

    parser = get_args_parser()
    parser.error = refuse_flags
    return parser.parse_intermixed_args(list(argv))


def read_override(text: str) -> Override | Problem:
    """Parse one override, or return what is wrong with it."""
    key, sign, value = text.partition("=")

    def wrong(reason: str) -> Problem:
        return Problem(key, reason, value, bool(sign), COMMAND_LINE)

    if any("\ud800" <= character <= "\udfff" for character in text):
        return wrong("not text in UTF-8")
    if key.count(".") + key.count("/") + key.count("[") > MOST_NESTED:
        return wrong(f"a key of more than {MOST_NESTED} parts")
    if not key.strip("+~ "):
        return wrong("not KEY=VALUE in one word")
    secrets.without_credentials(text)  # what is in it is known from here on
    if key in mistyped.FOLDERS and value and os.path.isdir(value):
        text = override_text(key, value)  # whatever its name has in it: there is such a folder
    try:
        override = OverridesParser.create().parse_override(text)
    except RecursionError:
        return wrong(f"nested deeper than {MOST_NESTED} levels")
    except (HydraException, ValueError):  # the latter of numbers with thousands of digits
        if not sign:
            return wrong("not KEY=VALUE in one word")
        return wrong(mistyped.unreadable(key, value))
    given = override.value()
    if _is_nested_deeper(given.list if isinstance(given, ChoiceSweep) else given, MOST_NESTED):
        return wrong(f"nested deeper than {MOST_NESTED} levels")
    if reason := mistyped.unusable_text(key, given):
        return wrong(reason)
    return override


def _is_nested_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and mappings, or the interpolations of a text, are nested deeper than so many levels."""
    if isinstance(value, str):
        return value.count("${") > levels
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_nested_deeper(one, levels - 1) for one in inner))


def value_text(override: Override) -> str:
    return (override.input_line or "").partition("=")[2]


def is_group(override: Override, roots: Sequence[Path]) -> bool:
    """Whether an override chooses an option of a group, rather than the value of a key."""
    return any(os.path.isdir(root / override.key_or_group) for root in roots)


def options(group: str, roots: Sequence[Path]) -> list[str]:
    """Return a group's options, those in folders of its own included (`mine/a`).

    A file or folder whose name begins with '_' is only built on, and one whose name begins with '.' is none.
    """
    found = set()
    for root in roots:
        for file in option_files(root / group):
            name = file.relative_to(root / group).with_suffix("")
            if not any(part.startswith("_") for part in name.parts):
                found.add(name.as_posix())
    return sorted(found)


def matching(pattern: Glob, names: Sequence[str]) -> list[str]:
    """Return the options that a glob means: in the folder that it names, not in folders below."""
    depths = {given.count("/") for given in pattern.include}
    return [name for name in pattern.filter(list(names)) if name.count("/") in depths]


def _unknown_options(override: Override, roots: Sequence[Path]) -> Iterator[Problem]:
    group = override.key_or_group
    known = options(group, roots)
    if isinstance(override.value(), Glob):
        if not matching(override.value(), known):
            yield Problem(group, f"matches none of {', '.join(known)}", value_text(override), True, COMMAND_LINE)
        return
    if isinstance(override.value(), RangeSweep | IntervalSweep):
        yield Problem(group, "options are named: A,B,C or glob(…)", value_text(override), True, COMMAND_LINE)
        return
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        for option in value if isinstance(value, list) else [value]:
            if (option is None and group not in OPTIONAL_GROUPS) or (option is not None and str(option) not in known):
                near = get_close_matches(str(option), known, n=1)
                meant = "" if option is None else option_hint(group, str(option), near[0] if near else "")
                reason = f"no such option; one of {', '.join(known)}{meant}"
                yield Problem(group, reason, option, True, COMMAND_LINE)


def forced(override: Override, roots: Sequence[Path], text: str | None = None) -> list[str]:
    """Give the overrides that set a key whether conf/ shows it or not; some are replaced whole.

    Args:
        text: one value of a sweep, as KEY=VALUE; None: the override as it was given.
    """
    text = override.input_line or "" if text is None else text
    if override.key_or_group in OPTIONAL_GROUPS and text.partition("=")[2] == "null":
        return [f"~{override.key_or_group}"]
    if is_group(override, roots) or override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/")):
        return [text]
    cleared = [f"++{override.key_or_group}=null"] if override.key_or_group in REPLACED_WHOLE else []
    return [*cleared, "++" + text.lstrip("+")]


def num_values(override: Override, roots: Sequence[Path]) -> float:
    """Count the values of a discrete sweep without writing them out; infinite where they never end."""
    sweep = override.value()
    if not isinstance(sweep, RangeSweep):
        return len(values_of(override, roots))
    start, stop, step = sweep.start or 0, sweep.stop or 0, sweep.step
    if not all(isinstance(end, int) or math.isfinite(end) for end in (start, stop, step)):
        return math.inf
    if not step:
        return 0
    return max(0, math.ceil((Fraction(stop) - Fraction(start)) / Fraction(step)))


def values_of(override: Override, roots: Sequence[Path]) -> list[str]:
    """Return each value of a discrete sweep as KEY=VALUE, each once; see `num_values` for how many there are."""
    key = override.key_or_group
    if isinstance(override.value(), Glob):
        return [f"{key}={option}" for option in matching(override.value(), options(key, roots))]
    return list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))


@dataclass(frozen=True)
class Assignment:
    """A key's value as a file has it, which no grammar has to read."""

    key: str
    value: Any

    def apply(self, whole: DictConfig) -> None:
        """Set the key as the command line would."""
        if self.key in REPLACED_WHOLE:
            OmegaConf.update(whole, self.key, None, force_add=True)
        OmegaConf.update(whole, self.key, escaped(self.value), merge=True, force_add=True)


class Points:
    """Composes the points of a sweep. What they have in common is composed once for each choice of groups.

    Args:
        fixed: overrides that all points have, forced.
    """

    def __init__(self, fixed: Sequence[str | Assignment], line: CommandLine) -> None:
        self._fixed, self._line = list(fixed), line
        self._bases: dict[tuple[str, ...], Composed] = {}

    def moved(self, line: CommandLine) -> Points:
        """Compose the same of other options."""
        return Points(self._fixed, line)

    def compose(self, own: Sequence[str | Assignment]) -> Composed:
        """Compose a point of its own overrides, forced."""
        texts = [text for text in self._fixed if isinstance(text, str)]
        groups = tuple(text for text in own if isinstance(text, str) and not text.startswith("++"))
        if groups not in self._bases:
            self._bases[groups] = compose([*texts, *groups], self._line, resolve=False)
        base = self._bases[groups]
        if base.problems:
            return compose([*texts, *(text for text in own if isinstance(text, str))], self._line)
        composed = Composed({}, base.run_dir, base.choices, hydra=base.hydra, files=base.files)
        whole = OmegaConf.create(copy.deepcopy(base.sections))
        files = [one for one in self._fixed if isinstance(one, Assignment)]
        for one in [*files, *(texts if files else []), *own]:  # the command line's once more: it goes before files
            if isinstance(one, str) and not one.startswith("++"):
                continue
            key = one.key if isinstance(one, Assignment) else _parsed(one).key_or_group
            make_room(whole, key, one.value if isinstance(one, Assignment) else _parsed(one).value())
            try:
                if isinstance(one, Assignment):
                    one.apply(whole)
                else:
                    OmegaConf.update(whole, key, _parsed(one).value(), merge=True, force_add=True)
            except COMPOSITION_ERRORS as error:
                composed.problems.append(problem_of(error, key))
        if not composed.problems:
            resolve_sections(whole, composed)
        return composed


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def compose(overrides: Sequence[str], line: CommandLine, *, resolve: bool = True) -> Composed:
    """Compose conf/ with these overrides; Hydra's own complaints come back as problems."""
    refused = {problem.key for problem in line.problems}
    if PRIMARY in refused:
        return Composed({}, Path(), {})
    usable = [text for text in overrides if text.lstrip("+~").partition("=")[0] not in refused]
    try:
        cfg, files = _composed(usable, line)
    except RecursionError:
        reason = f"an option that builds on itself, or values nested deeper than {MOST_NESTED} levels"
        return Composed({}, Path(), {}, [Problem("conf", reason, has_value=False)])
    except OptionFileError as error:
        return Composed({}, Path(), {}, [Problem("conf", str(error), has_value=False)])
    except COMPOSITION_ERRORS as error:
        if len(overrides) < 2:
            return Composed({}, Path(), {}, _problems_of(overrides, line) or [problem_of(error)])
        return _without_culprits(overrides, line, error)
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items()}
    composed = Composed({}, Path(), choices, hydra=cfg, files=files)
    with hydra_resolved(cfg):
        folder = cfg.hydra._get_node("sweep" if line.flags.multirun else "run")
        try:
            composed.run_dir = Path(str(folder.dir))
        except UNRESOLVED as error:
            composed.failed.add(str(folder._get_full_key("dir")))
            composed.problems += unresolved(folder, {"dir": error}).values()
    sections: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]))
    if resolve:
        resolve_sections(OmegaConf.create(sections), composed)
    else:
        composed.sections = sections
    return composed


def hydra_config(overrides: Sequence[str], line: CommandLine) -> DictConfig:
    """Have Hydra compose these overrides, and return all of it, the section `hydra` included, unresolved.

    Raises:
        OptionFileError: where a file can't be read.
        HydraException, OmegaConfBaseException, …: see COMPOSITION_ERRORS.
    """
    return _composed(overrides, line)[0]


def _composed(overrides: Sequence[str], line: CommandLine) -> tuple[DictConfig, tuple[Merged, ...]]:
    """Do what `hydra_config` does, and return what it was composed of too."""
    install()
    version.setbase("1.3")
    path = create_config_search_path(str(line.roots[0]))
    for root in line.roots[1:]:
        path.prepend("command-line", f"file://{root}", SearchPathQuery(provider="schema", path=None))
    main = GlobalHydra.instance()
    before, main.hydra = main.hydra, None  # Hydra's own main may be at work, as it is when a sweep proposes points
    try:
        loader = Loader(path)
        main.hydra = Hydra("towline", loader)
        cfg = loader.load_configuration(line.flags.config_name or BASE, list(overrides), RunMode.RUN, from_shell=False)
    finally:
        main.hydra = before
    given = [one for one in line.overrides if not one.is_hydra_override() and not one.is_sweep_override()]
    for override in given:
        override.input_line = secrets.without_credentials(override.input_line or "")
    form = cfg.hydra.job.config.override_dirname
    cfg.hydra.overrides.task = [str(one.input_line) for one in given]  # as they were typed, not as they are forced
    cfg.hydra.job.override_dirname = get_overrides_dirname(given, form.exclude_keys, form.item_sep, form.kv_sep)
    return cfg, loader.files


@contextmanager
def hydra_resolved(cfg: DictConfig | None) -> Iterator[None]:
    """Resolve `${hydra:…}` by what was composed."""
    known = HydraConfig.instance()
    before = known.cfg
    if cfg is not None:
        known.set_config(cfg)
    try:
        yield
    finally:
        known.cfg = before


def warn_of_broken_options(line: CommandLine) -> None:
    """Print a warning that names the option files that can't be read; what was composed did without them."""
    if broken := list(broken_options(line.roots)):
        report(f"warning: {'; '.join(broken)}. Nothing here needs {'it' if len(broken) == 1 else 'them'}.")


def _without_culprits(overrides: Sequence[str], line: CommandLine, error: Exception) -> Composed:
    """Find the overrides that can't be composed beside the chosen options, and compose the others.

    So all problems are told.
    """
    groups = [text for text in overrides if "/" in text.partition("=")[0] or not text.startswith(("+", "~", "hydra."))]
    alone = {text: _problems_of([text], line) for text in groups}
    chosen = [text for text, problems in alone.items() if not problems]
    alone |= {text: _problems_of([*chosen, text], line) for text in overrides if text not in groups}
    usable = [text for text, problems in alone.items() if not problems]
    if len(usable) == len(overrides):  # each is good by itself: they don't go together
        return Composed({}, Path(), {}, [problem_of(error)])
    composed = compose(usable, line)
    found = [dataclasses.replace(p, where=p.where or COMMAND_LINE) for problems in alone.values() for p in problems]
    composed.problems = [*found, *composed.problems]
    return composed


def _problems_of(overrides: Sequence[str], line: CommandLine) -> list[Problem]:
    """Return why these overrides can't be composed; the last of them is to blame."""
    try:
        hydra_config(overrides, line)
    except OptionFileError as error:
        return [Problem("conf", str(error), has_value=False)]
    except (*COMPOSITION_ERRORS, RecursionError) as error:
        key = overrides[-1].lstrip("+~").partition("=")[0] if overrides else ""
        problem = problem_of(error, key)
        if overrides and (reason := _unknown_to_hydra(overrides[-1], overrides[:-1], line)):
            problem = dataclasses.replace(problem, reason=reason)
        return [problem]
    return []


def _unknown_to_hydra(text: str, others: Sequence[str], line: CommandLine) -> str:
    """Return why Hydra has no such key or option of its own; '' where it has, or where it is none of Hydra's."""
    key, _, value = text.lstrip("+~").partition("=")
    if key.startswith("hydra/"):
        return unknown_group_option(key, value, line.roots)
    return unknown_key(key, value, hydra_config(others, line)) if key.startswith("hydra.") else ""


def resolve_sections(whole: DictConfig, composed: Composed) -> None:
    """Resolve `${…}` in every section; one that can't be resolved is a problem of its own."""
    with hydra_resolved(composed.hydra):
        _resolve_sections(whole, composed)
    secrets.hand_down(composed.sections, composed.stored, is_new=composed.hydra is not None)


def _resolve_sections(whole: DictConfig, composed: Composed) -> None:
    reads_environment = "oc.env" in str(OmegaConf.to_container(whole))
    failed: dict[str, Exception] = {}
    for key in whole:
        try:
            resolved = _resolved(whole, key)
            composed.sections[str(key)] = secrets.reveal({str(key): resolved}, [])[str(key)]
            with _storing():
                kept = secrets.placed(_resolved(whole, key), str(key)) if reads_environment else resolved
                composed.stored[str(key)] = secrets.masked(kept)
        except UNRESOLVED as error:
            if OmegaConf.is_missing(whole, key):
                composed.sections[str(key)] = "???"
            else:
                failed[str(key)] = error
    if failed:
        _leave_out(whole, failed, composed)
    if (stored := composed.stored.get("deepspeed")) is not None:
        composed.problems += read_deepspeed_file(composed.sections["deepspeed"], stored)


def _leave_out(whole: DictConfig, failed: Mapping[str, Exception], composed: Composed) -> None:
    """Report why sections can't be resolved, and take the rest of each, in which `???` stands for what can't be."""
    found = unresolved(whole, failed)
    composed.problems = _to_blame([*composed.problems, *found.values()])
    for section, _, rest in {key.partition("[")[0]: key.partition("[")[0].partition(".") for key in found}.values():
        child = rest.partition(".")[0]
        composed.failed.add(f"{section}.{child}" if child else section)
        if child:
            whole[section][child] = "???"
    for key in failed:
        if key not in composed.failed:
            composed.sections[key] = _resolved(whole, key)


def unresolved(whole: DictConfig, failed: Mapping[str, Exception]) -> dict[str, Problem]:
    """Return a problem for each value whose `${…}` can't be resolved, by its dotted key.

    Args:
        failed: the keys that hold such values, and what OmegaConf said of each.
    """
    found: dict[str, Problem] = {}
    for key, cause in failed.items():
        before, full_key = len(found), str(whole._get_full_key(key))
        for name, node in _values(whole._get_node(key), full_key):
            try:
                node._dereference_node()
            except UNRESOLVED as error:
                reason = f"can't be resolved: {_why_unresolved(error)}; where `${{` is text, write `\\${{`"
                found[name] = Problem(name, reason, str(node._value()))
        if len(found) == before:  # it is missing, or takes what can't be resolved from elsewhere
            is_missing = isinstance(cause, MissingMandatoryValue)
            reason = "needs a value" if is_missing else f"can't be resolved: {_why_unresolved(cause)}"
            found[full_key] = Problem(full_key, reason, has_value=False)
    return found


def _to_blame(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems without those of values that take from another one what can't be resolved, or is missing."""
    problems = [problem for problem in problems if not _TAKES_MISSING.search(problem.reason)]
    keys = [problem.key for problem in problems]

    def is_taken(problem: Problem) -> bool:
        sources = _INTERPOLATED.findall(str(problem.value))
        return any(one != problem.key and any(f"{key}.".startswith(f"{one}.") for key in keys) for one in sources)

    return [problem for problem in problems if not is_taken(problem)] or list(problems)


def _why_unresolved(error: Exception) -> str:
    text = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    if isinstance(error, RecursionError) or "Recursive interpolation" in text:
        return "it takes its value from itself"
    if "argument" in text:
        return "what stands before the colon needs other arguments behind it"
    if found := re.fullmatch(r"Interpolation key '(.*)' not found", text):
        return f"there is no key {found[1]}"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", text).strip("\"'")


def _values(node: Any, key: str) -> Iterator[tuple[str, Node]]:
    """Yield each value in a node, unresolved, by its dotted key."""
    if isinstance(node, DictConfig | ListConfig) and has_content(node):
        inner: dict[str, Any] = {}
        if isinstance(node, DictConfig):
            inner = {f"{key}.{name!s}": node._get_node(name) for name in node}
        elif isinstance(node, ListConfig):
            inner = {f"{key}[{number}]": node._get_node(number) for number in range(len(node))}
        for name, one in inner.items():
            yield from _values(one, name)
    elif isinstance(node, Node) and node._is_interpolation():
        yield key, node


def _resolved(whole: DictConfig, key: Any) -> Any:
    value: Any = whole._get_node(key)
    resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else whole[key]
    if key == "data":
        fill_mixture(resolved)
        list_single_files(resolved)
    return resolved


def list_single_files(data: Any) -> None:
    """Put a list in the place of each single file, in place."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    sources = [one for one in mixture.values() if isinstance(one, dict)] if isinstance(mixture, dict) else []
    for given in (data, *sources) if isinstance(data, dict) else ():
        for key in ("train_files", "validation_files", "test_files"):
            if isinstance(files := given.get(key), str):
                given[key] = [files]
            elif isinstance(files, dict):
                given[key] = {name: [one] if isinstance(one, str) else one for name, one in files.items()}


@contextmanager
def _storing() -> Iterator[None]:
    """Resolve what is to be stored: a placeholder stands for each secret of the environment."""
    before = _is_storing.set(True)
    try:
        yield
    finally:
        _is_storing.reset(before)


def _environment(key: str, default: Any = _DEFAULT_MARKER_, *, _node_: Node) -> str | None:
    """Resolve `${oc.env:KEY}` and `${oc.env:KEY,DEFAULT}`, as OmegaConf does, but for secrets that are to be stored."""
    value = environment_variable(key, default)
    if value == "" and key in NONE_WHERE_EMPTY and default is not _DEFAULT_MARKER_:
        return None if default is None else str(default)
    if value is None or key not in os.environ:
        return value
    place = _node_._get_full_key(None)
    secrets.know_given(place, key, value)
    return secrets.placeholder(key) if _is_storing.get() and secrets.is_stored_interpolation(place, key) else value


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def problem_of(error: Exception, key: str = "") -> Problem:
    causes = [str(one).strip() for one in (error, error.__cause__) if one is not None]
    causes = [text for text in causes if text and not text.startswith("Error merging override")] or causes
    text = "; ".join(" ".join(cause.split("\n")[0].split()).rstrip(".") for cause in causes)
    return Problem(key or getattr(error, "full_key", None) or "conf", text, has_value=False)


def where_set(key: str, line: CommandLine, composed: Composed) -> str | Place:
    """Return where a key got its value: the place in a file, a file alone, the command line or the environment."""
    inside = key.partition("[")[0]
    for override in line.overrides:
        given = override.key_or_group
        if not is_group(override, line.roots) and (f"{inside}.".startswith(f"{given}.") or given.startswith(f"{key}.")):
            return COMMAND_LINE
    if not composed.files:
        return "frozen config"
    for one in reversed(composed.files):
        if (inner := one.within(inside)) and (place := find_key(one.file, inner)) is not None:
            variable = next((name for name in _VARIABLE.findall(place.value or "") if os.environ.get(name)), None)
            return place if variable is None else f"environment variable {variable}, by {place}"
    section = key.partition(".")[0]
    for one in reversed(composed.files):
        if (inner := one.within(section)) is not None and (not inner or find_key(one.file, inner) is not None):
            return shown(one.file)
    return shown(primary_file(line))


def primary_file(line: CommandLine) -> Path:
    """Return the file that a command's configuration begins with: conf/config.yaml, or that of -cn NAME."""
    name = f"{(line.flags.config_name or BASE).removesuffix('.yaml')}.yaml"
    return next((root / name for root in reversed(line.roots) if os.path.lexists(root / name)), CONF / name)
