"""What each key means, may be and is by default, from the schema and the files of conf/."""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from src.config import comments, groups
from src.config.groups import Option
from src.config.keys import Key, all_keys
from src.config.options import CONF, GLOBAL_GROUPS, OptionFileError, read_option

TOP = CONF / "config.yaml"
Roots = Sequence[Path]


@cache
def _top() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of conf/config.yaml, and what it says of them."""
    return read_option(TOP), comments.of_keys(TOP.read_text(encoding="utf-8"))


@cache
def default_choices() -> dict[str, str]:
    """Return the option of each group that conf/config.yaml chooses; null for none."""
    choices = groups.defaults_of(_top()[0].get("defaults"))[1]
    return {group: option for group, option in choices.items() if "/" not in group}


def is_group(name: str, roots: Roots = (CONF,)) -> bool:
    return name in groups.groups(roots)


def sections() -> list[str]:
    """Return the names of all sections, in the order of the documentation; '' is the top level."""
    return list(dict.fromkeys(key.section for key in all_keys().values()))


def keys_of(section: str) -> list[Key]:
    return [key for key in all_keys().values() if key.section == section]


def name_in(key: Key) -> str:
    """Return a key's name within its section."""
    return key.name.removeprefix(f"{key.section}.")


def meaning(key: Key, roots: Roots = (CONF,), chosen: str = "") -> str:
    """Return what a key means in general, and with the chosen option.

    The general text is, in this order, the comment in conf/config.yaml or in the option that this file chooses, the
    text in the schema, or the comment in another option of conf/.
    """
    if key.entry:
        return key.info.text
    if not is_group(key.section, roots):
        return _top()[1].get(key.name) or key.info.text
    general = _own(key, default_choices().get(key.section, ""), roots) or key.info.text
    for option in [] if general else [*groups.readable(key.section, [CONF]), *groups.readable(key.section, roots)]:
        general = general or _own(key, option, roots)
    own = _own(key, chosen, roots)
    return "; ".join(dict.fromkeys(said for said in (general, own) if said))


def remarks(key: Key, roots: Roots = (CONF,)) -> dict[str, str]:
    """Return what options say of a key beyond its general text, by the option."""
    if not is_group(key.section, roots):
        return {}
    general = meaning(key, roots)
    own = {option: _own(key, option, roots) for option in groups.with_key(key, roots)}
    return {option: said for option, said in own.items() if said and said not in general}


def _own(key: Key, option: str, roots: Roots) -> str:
    """Return what an option's file says of a key, or the nearest one that it builds on."""
    try:
        lineage = list(groups.lineage(key.section, option, tuple(roots))) if option else []
    except OptionFileError:  # reported when the option is read
        return ""
    return next((said for one in lineage if (said := one.comments.get(name_in(key)))), "")


def defaults(key: Key, roots: Roots = (CONF,)) -> dict[str, Any]:
    """Return the value of a key in each option that sets it; under '' where its section has no options."""
    if is_group(key.section, roots):
        return groups.setting(key, roots)
    section = _top()[0].get(key.section, {}) if key.section else _top()[0]
    if name_in(key) in section and not key.entry:
        return {"": section[name_in(key)]}
    value = getattr(key.owner(), key.leaf)
    return {"": value.value if isinstance(value, Enum) else value}


def changes(option: Option) -> dict[str, Any]:
    """Return what an option sets by itself, key by key; what it chooses in other groups comes first."""
    in_group = "" if option.group in GLOBAL_GROUPS else f"{option.group}."
    return option.choices | dict(_key_by_key(option.values, in_group))


def _key_by_key(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and dotted not in all_keys():
            yield from _key_by_key(value, f"{dotted}.")
        else:
            yield dotted, value


def public_parents(option: Option) -> list[str]:
    """Return the options of its group that an option builds on and that can be chosen themselves."""
    return [name.removeprefix(f"/{option.group}/") for name in option.parents if not name.startswith("_")]
