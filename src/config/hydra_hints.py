"""What an unknown key or option of Hydra's own section should have been."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import conf
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig

from src.config.keys import all_keys
from src.config.options import option_files
from src.util import did_you_mean, in_words, nearest

HYDRAS = Path(conf.__file__).parent
"""The folder of Hydra's own options."""
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


def unknown_group_option(group: str, option: str, roots: Sequence[Path]) -> str:
    """Return why there is no such option of a group of Hydra's, with those that there are; '' where there is."""
    store, places = ConfigStore.instance(), [*roots, HYDRAS]
    found = {file.relative_to(place).with_suffix("") for place in places for file in option_files(place / "hydra")}
    found |= {
        Path("hydra", one, name.removesuffix(".yaml"))
        for one in store.list("hydra")
        if store.get_type(f"hydra/{one}") is ObjectType.GROUP
        for name in store.list(f"hydra/{one}")
    }
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

    Args:
        value: as it was typed.
        cfg: what the other overrides are composed to.
    """
    parts, depth = key.split("."), 0
    node: Any = cfg
    while isinstance(node, DictConfig) and not node._is_none() and depth < len(parts) and parts[depth] in node:
        node, depth = node._get_node(parts[depth]), depth + 1
    if depth == len(parts) or not isinstance(node, DictConfig) or node._is_none():
        return ""
    parent = ".".join(parts[:depth])
    known = [one for one in map(str, node) if one != "_target_" and _is_read(f"{parent}.{one}")]
    near = nearest(parts[depth], known)
    is_plugins = parts[1:2] in (["launcher"], ["sweeper"]) and depth == 2
    chosen = cfg.hydra.runtime.choices.get(f"hydra/{parts[1]}") if is_plugins else ""
    name = ".".join(parts[depth:])
    begin = f"hydra/{parts[1]}={chosen} has no {name}" if is_plugins else f"{parent} has no {parts[depth]}"
    if key.startswith(LAUNCHER) and (having := _launchers_with(name)):
        remedy = f"choose hydra/launcher={in_words(having, 'or')}"
    elif near:
        remedy = f"did you mean {'.'.join([parent, near, *parts[depth + 1 :]])}?"
    elif is_plugins and (own := all_keys().get(f"sweep.{name}")):
        remedy = f"did you mean {own.name}={value}?"
    else:
        remedy = f"it has {', '.join(known)}" if known else "it has no keys"
    instead = INSTEAD.get(f"hydra/{parts[1]}", "") if is_plugins and remedy == "it has no keys" else ""
    return f"{begin}; {remedy}{f'; {instead}' if instead else ''}"


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
