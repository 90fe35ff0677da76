"""Hydra's side of a configuration: the command line and conf/ become plain containers, or problems."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import version
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import secrets
from src.config.command_line import MOST_NESTED, PRIMARY, CommandLine, is_group
from src.config.composed import Composed
from src.config.hydra_keys import unknown_group_option, unknown_key
from src.config.merging import BASE, HYDRA, Loader, Merged, copies_of, copy_of
from src.config.options import OptionFileError, broken_options, option_files
from src.config.problems import COMMAND_LINE, Problem
from src.config.resolving import UNRESOLVED, hydra_resolved, resolve_sections, unresolved
from src.config.source import FileConfigSource, install
from src.errors import report

COMPOSITION_ERRORS = (
    *(OptionFileError, HydraException, OmegaConfBaseException, yaml.YAMLError),
    *(OSError, ValueError, TypeError, AttributeError, RecursionError),
)
"""What Hydra and OmegaConf raise for mistakes in overrides and options; some are Python's own."""


def compose(overrides: Sequence[str], line: CommandLine, *, resolve: bool = True) -> Composed:
    """Compose conf/ with these overrides; Hydra's own complaints come back as problems."""
    refused = {problem.key for problem in line.problems}
    if PRIMARY in refused:
        return Composed()
    usable = [text for text in overrides if text.lstrip("+~").partition("=")[0] not in refused]
    try:
        cfg, files = _composed(usable, line)
    except (OptionFileError, RecursionError) as error:
        return Composed(problems=[problem_of(error)])
    except COMPOSITION_ERRORS as error:
        if len(overrides) < 2:
            return Composed(problems=_problems_of(overrides, line) or [problem_of(error)])
        return _without_culprits(overrides, line, error)
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items()}
    composed = Composed(choices=choices, hydra=cfg, files=files)
    with hydra_resolved(cfg):
        folder = cfg.hydra._get_node("sweep" if line.flags.multirun else "run")
        try:
            composed.run_dir = Path(str(folder.dir))
        except UNRESOLVED as error:
            composed.unresolved.add(str(folder._get_full_key("dir")))
            composed.problems += unresolved(folder, {"dir": error}).values()
    whole = copy_of(cfg)
    OmegaConf.set_struct(whole, False)
    del whole[HYDRA]
    if resolve:
        resolve_sections(whole, composed)
    else:
        composed.sections = cast(dict[str, Any], OmegaConf.to_container(whole))
    return composed


def _composed(overrides: Sequence[str], line: CommandLine) -> tuple[DictConfig, tuple[Merged, ...]]:
    """Return what Hydra composes of these overrides, its own section included, unresolved; and the files of it.

    What the files make of the options that are chosen is composed once for all values that come on top.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chosen: list[Override] = []
    values: list[Override] = []
    for one in parsed:
        (chosen if _chooses(one, line) else values).append(one)
    install()
    files = tuple((file, *_stamp(file)) for root in line.roots for file in option_files(root))
    merge = _merged.__wrapped__ if FileConfigSource.hides_credentials else _merged  # variables are set while it reads
    name = line.flags.config_name or BASE
    new_copy, merged = merge(name, tuple(line.roots), tuple(str(one.input_line) for one in chosen), files)
    cfg = new_copy()
    Loader.set_values(cfg, values)
    given = [one for one in line.overrides if not one.is_hydra_override() and not one.is_sweep_override()]
    for override in given:
        override.input_line = secrets.without_credentials(override.input_line or "")
    form = cfg.hydra.job.config.override_dirname
    cfg.hydra.overrides.hydra = [str(one.input_line) for one in parsed if one.is_hydra_override()]
    cfg.hydra.overrides.task = [str(one.input_line) for one in given]  # as they were typed, not as they are forced
    cfg.hydra.job.override_dirname = get_overrides_dirname(given, form.exclude_keys, form.item_sep, form.kv_sep)
    return cfg, merged


def _chooses(override: Override, line: CommandLine) -> bool:
    """Return whether an override has a say in which files are merged; all others set values in what they make.

    A job without a name gets one as soon as they are merged.
    """
    key = override.key_or_group
    return key.startswith("hydra/") or key in ("hydra.searchpath", "hydra.job.name") or is_group(override, line.roots)


def _stamp(file: Path) -> tuple[int, ...]:
    """Return what changes with a file."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _merged(
    name: str, roots: tuple[Path, ...], chosen: tuple[str, ...], _files: tuple[tuple[Any, ...], ...]
) -> tuple[Callable[[], DictConfig], tuple[Merged, ...]]:
    """Return copies of what the option files under some folders make together, and which they are, as long as none
    changes.
    """
    version.setbase("1.3")
    path = create_config_search_path(str(roots[0]))
    for root in roots[1:]:
        path.prepend("command-line", f"file://{root}", SearchPathQuery(provider="schema", path=None))
    main = GlobalHydra.instance()
    before, main.hydra = main.hydra, None  # Hydra's own main may be at work, as it is when a sweep proposes points
    try:
        loader = Loader(path)
        main.hydra = Hydra("towline", loader)
        cfg = loader.load_configuration(name, list(chosen), RunMode.RUN, from_shell=False)
    finally:
        main.hydra = before
    return copies_of(cfg), loader.files


def warn_of_broken_options(line: CommandLine) -> None:
    """Print a warning that names the option files that can't be read; what was composed did without them."""
    if broken := list(broken_options(line.roots)):
        report(f"warning: {'; '.join(broken)}. Nothing here needs {'it' if len(broken) == 1 else 'them'}.")


def _without_culprits(overrides: Sequence[str], line: CommandLine, error: Exception) -> Composed:
    """Find the overrides that can't be composed with the chosen options, and compose the others: all are reported."""
    groups = [text for text in overrides if "/" in text.partition("=")[0] or not text.startswith(("+", "~", "hydra."))]
    alone = {text: _problems_of([text], line) for text in groups}
    chosen = [text for text, problems in alone.items() if not problems]
    alone |= {text: _problems_of([*chosen, text], line) for text in overrides if text not in groups}
    usable = [text for text, problems in alone.items() if not problems]
    if len(usable) == len(overrides):  # each is good by itself: they don't go together
        return Composed(problems=[problem_of(error)])
    composed = compose(usable, line)
    composed.problems[:0] = [one.placed(COMMAND_LINE) for problems in alone.values() for one in problems]
    return composed


def _problems_of(overrides: Sequence[str], line: CommandLine) -> list[Problem]:
    """Return why these overrides can't be composed; the last of them is to blame. A command finds it out once."""
    asked = (*overrides, *map(str, line.roots))
    if asked not in line.tried:
        line.tried[asked] = _found_problems(overrides, line)
    return line.tried[asked]


def _found_problems(overrides: Sequence[str], line: CommandLine) -> list[Problem]:
    try:
        _composed(overrides, line)
    except OptionFileError as error:
        return [problem_of(error)]
    except COMPOSITION_ERRORS as error:
        *others, last = overrides or [""]
        problem = problem_of(error, last.lstrip("+~").partition("=")[0])
        reason = _unknown_to_hydra(last, others, line)
        return [dataclasses.replace(problem, reason=reason or problem.reason)]
    return []


def _unknown_to_hydra(text: str, others: Sequence[str], line: CommandLine) -> str:
    """Return why Hydra has no such key or option of its own; '' where it has, or where it is none of Hydra's."""
    key, _, value = text.lstrip("+~").partition("=")
    if key.startswith("hydra/"):
        return unknown_group_option(key, value, line.roots)
    return unknown_key(key, value, _composed(others, line)[0]) if key.startswith("hydra.") else ""


def problem_of(error: Exception, key: str = "") -> Problem:
    """Return an error of Hydra or OmegaConf as a problem of the key that it names, or of `key`."""
    if isinstance(error, OptionFileError):
        return Problem("conf", str(error), has_value=False)
    if isinstance(error, RecursionError):
        reason = f"an option that builds on itself, or values nested deeper than {MOST_NESTED} levels"
        return Problem(key or "conf", reason, has_value=False)
    causes = [str(one).strip() for one in (error, error.__cause__) if one is not None]
    causes = [text for text in causes if text and not text.startswith("Error merging override")] or causes
    text = "; ".join(" ".join(cause.split("\n")[0].split()).rstrip(".") for cause in causes)
    return Problem(key or getattr(error, "full_key", None) or "conf", text, has_value=False)
