"""Hydra's side of a configuration: the command line and conf/ become plain containers, or problems. No torch here.

Every override of a single key is composed as `++key=value`, so that an unknown key survives composition and the gate
can report all of them together; Hydra by itself stops at the first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf._utils import _DEFAULT_MARKER_
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers.oc import env as environment_variable

from src.config import secrets
from src.config.formats import PROJECT_ROOT, fill_mixture
from src.config.problems import Problem

CONF = PROJECT_ROOT / "conf"
COMMAND_LINE = "command line"
LIST_OR_MAPPING = ("data.validation_files", "data.test_files", "data.mixture", "data.columns")
OPTIONAL_GROUPS = ("experiment",)
GLOBAL_GROUPS = ("debug", "experiment")  # their options reach into other sections; the later wins over the earlier

HOW_NOT_WHAT = (
    *("name", "tracking", "sweep.name", "sweep.n_trials", "sweep.n_jobs", "sweep.max_seconds", "sweep.dry_run"),
    *("sweep.fail_fast", "sweep.max_retries", "sweep.storage", "force"),
)
"""Keys of a sweep's command that change how it is done, or how long it goes on, and not what it compares."""

_is_storing: ContextVar[bool] = ContextVar("is_storing", default=False)
_identity = {"start_time": "", "uid": "", "sweep_id": ""}
OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT_ROOT), replace=True)
OmegaConf.register_new_resolver("start_time", lambda: _identity["start_time"], replace=True)
OmegaConf.register_new_resolver("uid", lambda: _identity["uid"], replace=True)
OmegaConf.register_new_resolver("sweep_id", lambda: _identity["sweep_id"], replace=True)


def new_identity() -> None:
    """Give the next run folder a name of its own: seconds alone would collide."""
    _identity["start_time"] = datetime.now().strftime("%Y%m%d-%H%M%S")
    _identity["uid"] = uuid.uuid4().hex[:6]


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
        varied = [override for override in self.overrides if override.is_sweep_override()]
        if self.asks_hydra_only:  # it shows one configuration
            return [*flags, *(text for o in self.overrides if o not in varied for text in forced(o, self.roots))]
        return [*flags, *self.forced]

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
            and not override.key_or_group.startswith(("hydra.", "hydra/"))
        )
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


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Take the arguments apart with Hydra's own parsers; each unreadable override is a problem of its own."""
    flags = get_args_parser().parse_intermixed_args(list(argv))
    line = CommandLine(flags=flags, argv=list(argv))
    if flags.config_path:
        reason = "conf/ is the configuration; add options of your own with --config-dir DIR"
        line.problems.append(Problem("--config-path", reason, flags.config_path, True, COMMAND_LINE))
    if flags.config_dir:
        line.roots.append(Path(flags.config_dir).resolve())
        if not line.roots[-1].is_dir():
            line.problems.append(Problem("--config-dir", "no such folder", flags.config_dir, True, COMMAND_LINE))
    parser = OverridesParser.create()
    for text in flags.overrides:
        try:
            line.overrides += parser.parse_overrides([text])
        except HydraException:
            key, _, value = text.partition("=")
            reason = (
                "not KEY=VALUE"
                if "=" not in text
                else f"can't be read; a value with '=', ',' or spaces needs quotes of its own: '{key}=\"{value}\"'"
            )
            line.problems.append(Problem(key, reason, value, "=" in text, COMMAND_LINE))
    for override in line.overrides:
        if override.is_sweep_override() and not flags.multirun:
            reason = "several values are a sweep: add -m; or quote a value that has commas, or write a list [a,b]"
            line.problems.append(Problem(override.key_or_group, reason, value_text(override), True, COMMAND_LINE))
        elif is_group(override, line.roots):
            line.problems += _unknown_options(override, line.roots)
    _identity["sweep_id"] = line.sweep_id
    return line


def value_text(override: Override) -> str:
    return (override.input_line or "").partition("=")[2]


def is_group(override: Override, roots: Sequence[Path]) -> bool:
    """Whether an override chooses an option of a group, rather than the value of a key."""
    return any((root / override.key_or_group).is_dir() for root in roots)


def options(group: str, roots: Sequence[Path]) -> list[str]:
    """Give a group's options; a file whose name begins with '_' is only built on."""
    return sorted({file.stem for root in roots for file in (root / group).glob("[!_]*.yaml")})


def _unknown_options(override: Override, roots: Sequence[Path]) -> Iterator[Problem]:
    group = override.key_or_group
    known = options(group, roots)
    if isinstance(override.value(), Glob):
        if not override.value().filter(known):
            yield Problem(group, f"matches none of {', '.join(known)}", value_text(override), True, COMMAND_LINE)
        return
    if override.is_sweep_override() and not override.is_discrete_sweep():
        yield Problem(group, "options are named: A,B,C or glob(…)", value_text(override), True, COMMAND_LINE)
        return
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        for option in value if isinstance(value, list) else [value]:
            if (option is None and group not in OPTIONAL_GROUPS) or (option is not None and str(option) not in known):
                near = get_close_matches(str(option), known, n=1)
                reason = f"no such option; one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
                yield Problem(group, reason, option, True, COMMAND_LINE)


def forced(override: Override, roots: Sequence[Path], text: str | None = None) -> list[str]:
    """Give the overrides that set a key whether conf/ shows it or not; a list or mapping is replaced whole.

    Args:
        text: one value of a sweep, as KEY=VALUE; None: the override as it was given.
    """
    text = override.input_line or "" if text is None else text
    if is_group(override, roots) or override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/")):
        return [text]
    cleared = [f"++{override.key_or_group}=null"] if override.key_or_group in LIST_OR_MAPPING else []
    return [*cleared, "++" + text.lstrip("+")]


def values_of(override: Override, roots: Sequence[Path]) -> list[str]:
    """Give each value of a discrete sweep as KEY=VALUE."""
    key = override.key_or_group
    if isinstance(override.value(), Glob):
        return [f"{key}={option}" for option in override.value().filter(options(key, roots))]
    if isinstance(override.value(), RangeSweep) and not override.value().step:
        return []
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


class Points:
    """Composes the points of a sweep. What they have in common is composed once for each choice of groups.

    Args:
        fixed: overrides that all points have, forced.
    """

    def __init__(self, fixed: Sequence[str], line: CommandLine) -> None:
        self._fixed, self._line = list(fixed), line
        self._bases: dict[tuple[str, ...], Composed] = {}

    def moved(self, line: CommandLine) -> Points:
        """Compose the same of other options."""
        return Points(self._fixed, line)

    def compose(self, own: Sequence[str]) -> Composed:
        """Compose a point of its own overrides, forced."""
        groups = tuple(text for text in own if not text.startswith("++"))
        if groups not in self._bases:
            self._bases[groups] = compose([*self._fixed, *groups], self._line, resolve=False)
        base = self._bases[groups]
        if base.problems:
            return compose([*self._fixed, *own], self._line)
        composed = Composed({}, base.run_dir, base.choices)
        whole = OmegaConf.create(copy.deepcopy(base.sections))
        for text in own:
            if text.startswith("++"):
                override = _parsed(text)
                try:
                    OmegaConf.update(whole, override.key_or_group, override.value(), merge=True, force_add=True)
                except OmegaConfBaseException as error:
                    composed.problems.append(problem_of(error, override.key_or_group))
        if not composed.problems:
            resolve_sections(whole, composed)
        return composed


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def compose(overrides: Sequence[str], line: CommandLine, *, resolve: bool = True) -> Composed:
    """Compose conf/ with these overrides; Hydra's own complaints come back as problems."""
    refused = {problem.key for problem in line.problems}
    usable = [text for text in overrides if text.lstrip("+~").partition("=")[0] not in refused]
    if len(line.roots) > 1 and line.roots[-1].is_dir():
        usable.append(f"hydra.searchpath=[file://{line.roots[-1]}]")
    try:
        with (
            _beside_hydra(),
            initialize_config_dir(config_dir=str(line.roots[0]), version_base="1.3", job_name="towline"),
        ):
            cfg = hydra_compose(line.flags.config_name or "config", overrides=usable, return_hydra_config=True)
            run_dir = Path(cfg.hydra.sweep.dir if line.flags.multirun else cfg.hydra.run.dir)
            choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items()}
            sections: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if len(overrides) < 2:
            key = overrides[0].lstrip("+~").partition("=")[0] if overrides else ""
            return Composed({}, Path(), {}, [problem_of(error, key)])
        return _without_culprits(overrides, line, error)
    composed = Composed({}, run_dir, choices)
    if resolve:
        resolve_sections(OmegaConf.create(sections), composed)
    else:
        composed.sections = sections
    return composed


@contextmanager
def _beside_hydra() -> Iterator[None]:
    """Compose also while Hydra's own main is at work, which a sweep's proposals are; Hydra takes two for a mistake."""
    main = GlobalHydra.instance()
    before, main.hydra = main.hydra, None
    try:
        yield
    finally:
        main.hydra = before


def _without_culprits(overrides: Sequence[str], line: CommandLine, error: Exception) -> Composed:
    """Find the overrides that can't be composed even alone, and compose the others, so that all problems are told."""
    alone = {text: compose([text], line).problems for text in overrides}
    usable = [text for text, problems in alone.items() if not problems]
    if len(usable) == len(overrides):  # each is good by itself: they don't go together
        return Composed({}, Path(), {}, [problem_of(error)])
    composed = compose(usable, line)
    found = [dataclasses.replace(p, where=p.where or COMMAND_LINE) for problems in alone.values() for p in problems]
    composed.problems = [*found, *composed.problems]
    return composed


def resolve_sections(whole: DictConfig, composed: Composed) -> None:
    """Resolve `${…}` in every section; one that can't be resolved is a problem of its own."""
    reads_environment = "oc.env" in str(OmegaConf.to_container(whole))
    for key in whole:
        try:
            composed.sections[str(key)] = resolved = _resolved(whole, key)
            with _storing():
                composed.stored[str(key)] = secrets.masked(_resolved(whole, key) if reads_environment else resolved)
        except OmegaConfBaseException as error:
            if OmegaConf.is_missing(whole, key):
                composed.sections[str(key)] = "???"
            else:
                composed.problems.append(problem_of(error, str(key)))


def _resolved(whole: DictConfig, key: Any) -> Any:
    value: Any = whole._get_node(key)
    resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else whole[key]
    if key == "data":
        fill_mixture(resolved)
    return resolved


@contextmanager
def _storing() -> Iterator[None]:
    """Resolve what is to be stored: a secret of the environment stays the interpolation that it comes by."""
    before = _is_storing.set(True)
    try:
        yield
    finally:
        _is_storing.reset(before)


def _environment(key: str, default: Any = _DEFAULT_MARKER_, *, _node_: Node) -> str | None:
    """Resolve `${oc.env:KEY}` and `${oc.env:KEY,DEFAULT}`, as OmegaConf does, but for secrets that are to be stored."""
    value = environment_variable(key, default)
    if value is None or key not in os.environ:
        return value
    if secrets.is_secret_variable(key):
        secrets.know(value)
    if _is_storing.get() and secrets.is_stored_interpolation(_node_._get_full_key(None), key):
        return f"${{oc.env:{key}}}"
    return value


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def problem_of(error: Exception, key: str = "") -> Problem:
    causes = [str(one).strip() for one in (error, error.__cause__) if one is not None]
    text = "; ".join(" ".join(cause.split("\n")[0].split()).rstrip(".") for cause in causes)
    return Problem(key or getattr(error, "full_key", None) or "conf", text, has_value=False)


def where_set(key: str, line: CommandLine, choices: dict[str, str]) -> str:
    """Say which file or command line gave a key its value."""
    for override in line.overrides:
        given = override.key_or_group
        if is_group(override, line.roots):
            continue
        if key == given or key.startswith(given + ".") or given.startswith(key + "."):
            return COMMAND_LINE
    section = key.partition(".")[0]
    candidates = [(group, choices.get(group)) for group in GLOBAL_GROUPS] + [(section, choices.get(section))]
    for group, option in candidates:
        for root in line.roots:
            if option and (file := _defining_file(root / group / f"{option}.yaml", key, group)):
                return file
    return str((CONF / "config.yaml").relative_to(PROJECT_ROOT)) if choices else "frozen config"


def _defining_file(file: Path, key: str, group: str) -> str | None:
    """Give the option file that defines a key, following its defaults within the group."""
    if not file.is_file():
        return None
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    node: Any = content
    for part in key.split(".") if group in GLOBAL_GROUPS else key.split(".")[1:]:
        node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
    if node is not _ABSENT:
        return os.path.relpath(file, PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else str(file)
    for parent in content.get("defaults", []):
        if (
            isinstance(parent, str)
            and parent != "_self_"
            and (found := _defining_file(file.with_name(f"{parent}.yaml"), key, group))
        ):
            return found
    return None


_ABSENT = object()
