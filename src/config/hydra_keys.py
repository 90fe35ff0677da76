"""Keys and options of Hydra's own section: what Towline obeys, what it refuses, and what was probably meant."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import conf
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, Node, OmegaConf

from src.config.command_line import CommandLine, value_text
from src.config.composed import Composed
from src.config.keys import all_keys
from src.config.options import CONF, option_files, read_option
from src.config.problems import Problem
from src.config.resolving import UNRESOLVED, hydra_resolved, unresolved
from src.util import did_you_mean, in_words, nearest

HYDRAS = Path(conf.__file__).parent  # the folder of Hydra's own options
LAUNCHER = "hydra.launcher."
OBEYED = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.mode", "hydra.searchpath", "hydra.sweeper", "hydra.launcher"),
    *("hydra.job.name", "hydra.job.config", "hydra/sweeper", "hydra/launcher"),
)
"""Keys and groups of Hydra's that do here what they do in Hydra."""
LOOKED_AT = ("hydra.job.chdir", "hydra.sweep.subdir")
"""Keys that are refused in words of their own, where they ask for another thing than happens."""
INSTEAD = {
    "hydra/launcher": "trials run several at a time by sweep.n_jobs=N",
    "hydra/sweeper": "settings are searched by sweep=tpe or sweep=asha",
}
"""Towline's own ways to do what plugins of Hydra are installed for."""
SWEEPER_PARAMS = "hydra.sweeper.params"
NOT_READ = "nothing here reads it, so it would change nothing: leave it out"
WHY_NOT_READ = {
    "hydra.output_subdir": "a run's folder has its configuration in config.yaml, whatever this says: leave it out",
    "hydra.job.env_set": "nothing here reads it: set the variable in front of the command, NAME=VALUE python -m …",
}
READ_BY_EVERY_SWEEPER = ("name", "params", "max_points")  # of the section `sweep`: read by any sweeper, or refused
OWN_SWEEPER = "towline"
SUBDIR = "${hydra:job.num}"  # Hydra's default, and the only layout of a sweep's folder that is supported


def asks_for_sweep(composed: Composed) -> bool:
    """Return whether a file says `hydra.mode: MULTIRUN`, which is the same as -m."""
    return composed.hydra is not None and _name(composed.hydra.hydra._get_node("mode")) == "MULTIRUN"


def sweeper_params(composed: Composed) -> dict[str, Any]:
    """Return what `hydra.sweeper.params` varies, in a file or on the command line."""
    if composed.hydra is None or _params_node(composed.hydra) is None:
        return {}
    with hydra_resolved(composed.hydra), suppress(*UNRESOLVED):  # a problem of `_params_problems`
        given = composed.hydra.hydra.sweeper.params
        found: Any = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else {}
        return dict(found or {})
    return {}


def _params_node(whole: DictConfig) -> Any:
    """Return the node of `hydra.sweeper.params`; None where there is none, or a null."""
    sweeper = whole.hydra._get_node("sweeper")
    given = sweeper._get_node("params") if isinstance(sweeper, DictConfig) and "params" in sweeper else None
    return None if isinstance(given, Node) and given._is_none() else given


def _params_problems(whole: DictConfig) -> list[Problem]:
    """Return what is wrong with `hydra.sweeper.params` as a whole."""
    if (given := _params_node(whole)) is None:
        return []
    sweeper = whole.hydra._get_node("sweeper")
    with hydra_resolved(whole):
        try:
            OmegaConf.to_container(sweeper, resolve=True)
        except UNRESOLVED as error:
            return list(unresolved(sweeper, {"params": error}).values())
    reason = "not a mapping from a key to its values, as they are written after KEY="
    return [] if isinstance(given, DictConfig) else [Problem(SWEEPER_PARAMS, reason, str(given))]


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
    yield from _params_problems(composed.hydra)
    if section["searchpath"]:
        reason = "options of your own are found by --config-dir DIR, or by hydra.searchpath on the command line"
        yield Problem("hydra.searchpath", reason, section["searchpath"])
    if not is_sweep and line.value_of("hydra/sweeper") is not None:
        yield Problem("hydra/sweeper", "runs a sweep: add -m", line.value_of("hydra/sweeper"))
    if not is_sweep or is_own:
        yield from _not_read(section, composed, line)
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


def _not_read(section: Mapping[str, Any], composed: Composed, line: CommandLine) -> Iterator[Problem]:
    """Yield the keys of Hydra's own section that change nothing here."""
    for override in line.overrides:
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")) and override.value() and (reason := _why_not_read(key)):
            yield Problem.on_command_line(key, reason, value_text(override))
    for file in composed.files:
        if file.file != CONF / "config.yaml" and (file.package or "hydra") == "hydra":
            content = read_option(file.file)
            for key, value in _leaves(content if file.package else content.get("hydra"), "hydra"):
                if value and (reason := _why_not_read(key)):
                    yield Problem(key, reason, value)
    for group in ("hydra/job_logging", "hydra/hydra_logging"):
        if (option := composed.choices.get(group, "none")) not in ("none", "default") and line.value_of(group) is None:
            yield Problem(group, NOT_READ, option)
    given, launcher, store = section["launcher"], composed.choices.get("hydra/launcher", ""), ConfigStore.instance()
    if isinstance(given, dict) and f"{launcher}.yaml" in store.list("hydra/launcher"):
        known = list(store.load(f"hydra/launcher/{launcher}.yaml").node)
        for key in [key for key in given if key not in known]:
            yield Problem(f"{LAUNCHER}{key}", f"hydra/launcher={launcher} has no {key}", given[key])


def _why_not_read(key: str) -> str:
    """Return why a key of Hydra's own section changes nothing here; '' where it is read."""
    if any(f"{key}.".startswith(f"{one}.") for one in (*OBEYED, *LOOKED_AT)):
        return ""
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


def unknown_group_option(group: str, option: str, roots: Sequence[Path]) -> str:
    """Return why there is no such option of a group of Hydra's, with those that there are; '' where there is."""
    store, places = ConfigStore.instance(), [*roots, HYDRAS]
    found = {file.relative_to(place).with_suffix("") for place in places for file in option_files(place / "hydra")}
    for one in store.list("hydra"):
        if store.get_type(f"hydra/{one}") is ObjectType.GROUP:
            found |= {Path("hydra", one, name).with_suffix("") for name in store.list(f"hydra/{one}")}
    known = sorted(file.relative_to(group).as_posix() for file in found if file.is_relative_to(group))
    if not known:
        leaves = [one.removeprefix("hydra/") for one in OBEYED if "/" in one]
        meant = did_you_mean(group.removeprefix("hydra/"), leaves, lambda near: f"hydra/{near}")
        return f"no group of Hydra's{meant}"
    if option in known:
        return ""
    meant = did_you_mean(option, known)
    instead = f"; {INSTEAD[group]}" if group in INSTEAD and not meant else ""
    return f"no such option; one of {', '.join(known)}{meant}{instead}"


def unknown_key(key: str, value: str, cfg: DictConfig) -> str:
    """Return why Hydra's section has no such key, with what was meant; '' where it has.

    `value` is what was typed for it, `cfg` what the other overrides are composed to.
    """
    parts, depth = key.split("."), 0
    node: Any = cfg
    while isinstance(node, DictConfig) and not node._is_none() and depth < len(parts) and parts[depth] in node:
        node, depth = node._get_node(parts[depth]), depth + 1
    if depth == len(parts) or not isinstance(node, DictConfig) or node._is_none():
        return ""
    parent, name, group = ".".join(parts[:depth]), ".".join(parts[depth:]), "/".join(parts[:2])
    known = [one for one in map(str, node) if one != "_target_" and _is_read(f"{parent}.{one}")]
    is_plugins = group in INSTEAD and depth == 2
    chosen = cfg.hydra.runtime.choices.get(group) if is_plugins else ""
    begin = f"{group}={chosen} has no {name}" if is_plugins else f"{parent} has no {parts[depth]}"
    if key.startswith(LAUNCHER) and (having := _launchers_with(name)):
        return f"{begin}; choose hydra/launcher={in_words(having, 'or')}"
    if near := nearest(parts[depth], known):
        return f"{begin}; did you mean {'.'.join([parent, near, *parts[depth + 1 :]])}?"
    if is_plugins and (own := all_keys().get(f"sweep.{name}")):
        return f"{begin}; did you mean {own.name}={value}?"
    if known:
        return f"{begin}; it has {', '.join(known)}"
    return f"{begin}; it has no keys{f'; {INSTEAD[group]}' if is_plugins else ''}"


def _is_read(key: str) -> bool:
    """Return whether a key is read here, or one below it or above it."""
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in (*OBEYED, *LOOKED_AT))


def _launchers_with(name: str) -> list[str]:
    store = ConfigStore.instance()
    return [
        file.removesuffix(".yaml")
        for file in store.list("hydra/launcher")
        if name in store.load(f"hydra/launcher/{file}").node
    ]
