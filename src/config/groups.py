"""What the options of a group hold and say, as their files have it: for hints, help and reference."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from src.config import comments
from src.config.keys import Key
from src.config.options import GLOBAL_GROUPS, OptionFileError, is_hidden, option_text, options, read_option, shown
from src.util import merged, value_at

GLOBAL = "_global_"
_ABSENT = object()


@dataclass(frozen=True)
class Option:
    """An option file: the values that it sets for its own group, what it builds on, and its comments."""

    group: str
    name: str
    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    """Its own values: of its group, or of all sections for a group whose options reach into others."""
    parents: tuple[str, ...] = ()  # options of its own group that it builds on
    choices: dict[str, str] = field(default_factory=dict)  # what it chooses in other groups
    about: tuple[str, ...] = ()  # the lines at its head: when to choose it
    comments: dict[str, str] = field(default_factory=dict)  # what is said of its keys, by their names within `values`
    top_keys: tuple[str, ...] = ()  # the keys at the top of the file
    package: str | None = None  # where its header puts its keys; None for the group's own section
    written_package: str | None = None  # what it says of that anywhere, also where Hydra does not look


def read(group: str, name: str, roots: tuple[Path, ...]) -> Option | None:
    """Return an option of a group (its name may begin with '_') from the first folder that has it; None where none has.

    OptionFileError says why its file can't be read.
    """
    files = (root / group / f"{name}.yaml" for root in roots)
    file = next(filter(os.path.lexists, files), None)
    return None if file is None else _read(group, name, file, option_text(file))


@lru_cache(maxsize=1_000)
def _read(group: str, name: str, file: Path, text: str) -> Option:
    """Read an option file once, as long as its text stays what it is."""
    content = dict(read_option(file))
    parents, choices = defaults_of(content.pop("defaults", None))
    top_keys = tuple(map(str, content))
    said, package = comments.of_keys(text), comments.package(text)
    if package == GLOBAL and group not in GLOBAL_GROUPS:  # as qlora, which chooses in another group too
        own = content.get(group)
        content = own if isinstance(own, dict) else {}
        said = {key.removeprefix(f"{group}."): words for key, words in said.items() if key.startswith(f"{group}.")}
    about, written = tuple(comments.about(text)), comments.written_package(text)
    return Option(group, name, file, content, parents, choices, about, said, top_keys, package, written)


def defaults_of(given: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the options of its own group that a defaults list names, and its choices in other groups."""
    parents: list[str] = []
    choices: dict[str, str] = {}
    for entry in given if isinstance(given, list) else []:
        if isinstance(entry, str) and entry != "_self_":
            parents.append(entry.partition("@")[0])
        for group, option in entry.items() if isinstance(entry, dict) else ():
            name = str(group).removeprefix("override").removeprefix("optional").strip().lstrip("/")
            choices[name] = str(option)
    return tuple(parents), choices


def lineage(group: str, name: str, roots: tuple[Path, ...], builders: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield an option and all that it builds on within its group, the nearest first.

    OptionFileError is raised where a file can't be read, or an option builds on itself; `builders` build on this one.
    """
    if (found := read(group, name, roots)) is None:
        return
    if name in builders:
        raise OptionFileError(f"{shown(found.file)}: builds on itself")
    yield found
    for parent in reversed(found.parents):
        inside = _in_group(group, parent, PurePath(name).parent, roots)
        yield from lineage(group, inside, roots, (*builders, name))


def _in_group(group: str, name: str, folder: PurePath, roots: tuple[Path, ...]) -> str:
    """Return the name within its group of an option that another one builds on, which may be in a folder of its own."""
    if name.startswith("/"):
        return name.strip("/").removeprefix(f"{group}/")
    nearest = (folder / name).as_posix()
    return nearest if any(os.path.lexists(root / group / f"{nearest}.yaml") for root in roots) else name


def values_of(group: str, name: str, roots: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of an option with those of the options that it builds on."""
    return merged(*(option.values for option in reversed(list(lineage(group, name, roots)))))


def readable(group: str, roots: Sequence[Path]) -> list[str]:
    """Return the names of a group's options whose files, and those they build on, can be read."""
    names = []
    for name in options(group, roots):
        try:
            list(lineage(group, name, tuple(roots)))
        except OptionFileError:
            continue
        names.append(name)
    return names


def with_key(key: Key, roots: Sequence[Path]) -> list[str]:
    """Return the options of a key's group that have the key; all of them where the group has one form."""
    names = readable(key.section, roots)
    if not key.types:
        return names
    return [name for name in names if values_of(key.section, name, tuple(roots)).get("type") in key.types]


def setting(key: Key, roots: Sequence[Path]) -> dict[str, Any]:
    """Return the value of a key in each option that sets it, by the option."""
    name, there = key.name.removeprefix(f"{key.section}."), tuple(roots)
    values = {option: value_at(values_of(key.section, option, there), name, _ABSENT) for option in with_key(key, roots)}
    return {option: value for option, value in values.items() if value is not _ABSENT}


def first_with_key(key: Key, roots: Sequence[Path]) -> list[str]:
    """Return those options that set a key and build on no other option that does."""
    names = list(setting(key, roots)) or with_key(key, roots)
    above = {name: {option.name for option in lineage(key.section, name, tuple(roots))} - {name} for name in names}
    return [name for name in names if not above[name] & set(names)]


def groups(roots: Sequence[Path]) -> list[str]:
    """Return the names of all groups."""
    found = {name for root in roots for name in os.listdir(root) if os.path.isdir(root / name)}
    return sorted(name for name in found if not is_hidden(name))
