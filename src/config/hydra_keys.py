"""Keys of Hydra's own section: what Towline obeys, and what it refuses with the way that works."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, Node, OmegaConf

from src.config.command_line import CommandLine, value_text
from src.config.composed import Composed
from src.config.hydra_hints import LAUNCHER, LOOKED_AT, OBEYED
from src.config.merging import has_content
from src.config.options import CONF, read_option
from src.config.problems import Problem
from src.config.resolving import UNRESOLVED, hydra_resolved, unresolved

SWEEPER_PARAMS = "hydra.sweeper.params"
NOT_READ = "nothing here reads it, so it would change nothing: leave it out"
WHY_NOT_READ = {
    "hydra.output_subdir": "a run's folder has its configuration in config.yaml, whatever this says: leave it out",
    "hydra.job.env_set": "nothing here reads it: set the variable in front of the command, NAME=VALUE python -m …",
}
READ_BY_EVERY_SWEEPER = ("name", "params", "max_points")
"""Keys of the section `sweep` that are read by any sweeper, or refused."""
OWN_SWEEPER = "towline"
SUBDIR = "${hydra:job.num}"
"""Hydra's default, and the only layout of a sweep's folder that is supported."""


def asks_for_sweep(composed: Composed) -> bool:
    """Return whether a file says `hydra.mode: MULTIRUN`, which is the same as -m."""
    return composed.hydra is not None and _name(composed.hydra.hydra._get_node("mode")) == "MULTIRUN"


def sweeper_params(composed: Composed) -> dict[str, Any]:
    """Return what `hydra.sweeper.params` varies, in a file or on the command line."""
    if composed.hydra is None or _params_node(composed.hydra) is None:
        return {}
    with hydra_resolved(composed.hydra), suppress(*UNRESOLVED):  # a problem of `params_problems`
        given = composed.hydra.hydra.sweeper.params
        found: Any = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else {}
        return dict(found or {})
    return {}


def _params_node(cfg: DictConfig) -> Any:
    """Return the node of `hydra.sweeper.params`; None where there is none, or a null."""
    sweeper = cfg.hydra._get_node("sweeper")
    given = sweeper._get_node("params") if isinstance(sweeper, DictConfig) and "params" in sweeper else None
    return None if isinstance(given, Node) and given._is_none() else given


def params_problems(composed: Composed) -> list[Problem]:
    """Return what is wrong with `hydra.sweeper.params` as a whole."""
    if composed.hydra is None or (given := _params_node(composed.hydra)) is None:
        return []
    sweeper = composed.hydra.hydra._get_node("sweeper")
    with hydra_resolved(composed.hydra):
        try:
            OmegaConf.to_container(sweeper, resolve=True)
        except UNRESOLVED as error:
            return list(unresolved(sweeper, {"params": error}).values())
    if isinstance(given, DictConfig):
        return []
    return [
        Problem(SWEEPER_PARAMS, "not a mapping from a key to its values, as they are written after KEY=", str(given))
    ]


def hydra_problems(composed: Composed, line: CommandLine) -> Iterator[Problem]:
    """Yield what is asked of Hydra and would not happen, with what to type instead."""
    if composed.hydra is None:
        return
    section: Any = OmegaConf.to_container(composed.hydra.hydra)
    for name in ("launcher", "sweeper"):
        if not isinstance(section[name], dict):
            reason = f"is chosen by its name, hydra/{name}=NAME, and has keys of its own, hydra.{name}.KEY"
            yield Problem(f"hydra.{name}", reason, section[name])
    if "${" in str(section["mode"]):
        yield Problem("hydra.mode", "RUN or MULTIRUN, and no interpolation", section["mode"])
    is_sweep, is_own = line.flags.multirun, is_own_sweeper(composed)
    if is_sweep and _name(section["mode"]) == "RUN":
        yield Problem("hydra.mode", "says one run, and -m a sweep: leave one of them out", "RUN")
    if section["job"]["chdir"]:
        reason = "files are found from where the command was given: leave it out, or `cd` there first"
        yield Problem("hydra.job.chdir", reason, section["job"]["chdir"])
    yield from params_problems(composed)
    if section["searchpath"]:
        reason = "options of your own are found by --config-dir DIR, or by hydra.searchpath on the command line"
        yield Problem("hydra.searchpath", reason, section["searchpath"])
    if not is_sweep and line.value_of("hydra/sweeper") is not None:
        yield Problem("hydra/sweeper", "runs a sweep: add -m", line.value_of("hydra/sweeper"))
    if not is_sweep or is_own:
        yield from _not_read(composed, line)
    if is_sweep and is_own and (subdir := section["sweep"]["subdir"]) != SUBDIR:
        yield Problem("hydra.sweep.subdir", "a sweep's trials are in folders 0, 1, …: leave it out", subdir)
    if is_sweep and not is_own and (params := composed.sections.get("sweep", {}).get("params")):
        reason = "is read by Towline's own sweeper; give the values on the command line, or leave hydra/sweeper out"
        yield Problem("sweep.params", reason, params)
    if is_sweep and not is_own:
        yield from _own_sweepers(composed)


def describes_a_sweep(composed: Composed) -> Iterator[tuple[str, Any, str]]:
    """Yield what describes a sweep in a configuration: the key, its value, and what takes it out again."""
    given = composed.sections.get("sweep")
    if isinstance(given, dict) and given.get("params"):
        yield "sweep.params", given["params"], "sweep.params=null"
    if (option := composed.choices.get("sweep", "none")) != "none":
        yield "sweep", option, "sweep=none"
    if params := sweeper_params(composed):
        yield SWEEPER_PARAMS, params, f"{SWEEPER_PARAMS}=null"


def _own_sweepers(composed: Composed) -> Iterator[Problem]:
    """Yield the keys of the section sweep that another sweeper does not read."""
    given = composed.sections.get("sweep")
    usual = read_option(CONF / "sweep" / "_keys.yaml")
    for key, value in given.items() if isinstance(given, dict) else ():
        if key in usual and key not in READ_BY_EVERY_SWEEPER and value != usual[key]:
            reason = f"is read by Towline's own sweeper, and hydra/sweeper={composed.choices['hydra/sweeper']} runs "
            yield Problem(f"sweep.{key}", f"{reason}this sweep: leave one of them out", value)


def _not_read(composed: Composed, line: CommandLine) -> Iterator[Problem]:
    """Yield the keys of Hydra's own section that change nothing here."""
    for override in line.overrides:
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")) and not _is_obeyed(key) and override.value():
            yield Problem.on_command_line(key, _why_not_read(key), value_text(override))
    for file in composed.files:
        if file.file != CONF / "config.yaml" and (file.package or "hydra") == "hydra":
            content = read_option(file.file)
            section = content if file.package else content.get("hydra")
            for key, value in _leaves(section, "hydra"):
                if value and not _is_obeyed(key):
                    yield Problem(key, _why_not_read(key), value)
    for group in ("hydra/job_logging", "hydra/hydra_logging"):
        if (option := composed.choices.get(group, "none")) not in ("none", "default") and line.value_of(group) is None:
            yield Problem(group, NOT_READ, option)
    node = composed.hydra.hydra._get_node("launcher") if composed.hydra is not None else None
    given: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) and has_content(node) else {}
    launcher, store = composed.choices.get("hydra/launcher", ""), ConfigStore.instance()
    if f"{launcher}.yaml" in store.list("hydra/launcher"):
        known = [str(key) for key in store.load(f"hydra/launcher/{launcher}.yaml").node]
        for key, value in given.items():
            if key not in known:
                yield Problem(f"{LAUNCHER}{key}", f"hydra/launcher={launcher} has no {key}", value)


def _is_obeyed(key: str) -> bool:
    return any(f"{key}.".startswith(f"{one}.") for one in (*OBEYED, *LOOKED_AT))


def _why_not_read(key: str) -> str:
    return next((why for one, why in WHY_NOT_READ.items() if f"{key}.".startswith(f"{one}.")), NOT_READ)


def _leaves(section: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in a section by their dotted keys."""
    if isinstance(section, Mapping):
        for name, inner in section.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, section


def is_own_sweeper(composed: Composed) -> bool:
    """Return whether a sweep is run by Towline, and not by another sweeper of Hydra's (hydra/sweeper=…)."""
    return composed.choices.get("hydra/sweeper", OWN_SWEEPER) == OWN_SWEEPER


def _name(mode: Any) -> str | None:
    """Return the name of an enum's member, or of what is used as one."""
    return None if mode is None else str(getattr(mode, "name", mode)).rpartition(".")[2]
