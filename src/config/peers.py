"""What arguments of other trainers are called here: hints and docs/coming_from.md are made of it.

peers.yaml has a table for each trainer: each name has a key of Towline's, or says why there is none.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from src.config.quoting import shell_override

TABLES = Path(__file__).with_name("peers.yaml")
YamlLoader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # reads every scalar as a text
LONGEST_NAME = 100  # characters of an option that is suggested as something else
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")


@dataclass(frozen=True)
class Counterpart:
    """What an argument of another trainer is here."""

    key: str = ""  # a key, or a group whose option is chosen; '' where there is none
    values: Mapping[str, str] = field(default_factory=dict)  # their values that are written otherwise here, as texts
    is_same: bool = False  # whether their other values are values of `key` too, where it takes them
    is_list: bool = False  # whether a text, or texts with commas between them, are a list here
    note: str = ""  # what else differs; or why there is no counterpart
    instead_of: Mapping[str, str] = field(default_factory=dict)
    """Choices that it does not go with: GROUP=OPTION, and what to choose in its place."""

    def value(self, given: Any) -> tuple[Any, bool]:
        """Return a value of theirs as it is here, and whether that can be said."""
        text = value_text(given)
        if text in self.values:
            ours = self.values[text]
            return ({"null": None, "true": True, "false": False, "[]": []}.get(ours, ours), True)
        if self.is_list and isinstance(given, str):
            return [part.strip() for part in given.split(",")], self.is_same
        return given, self.is_same


def value_text(value: Any) -> str:
    """Return a value as the tables have it: as in YAML; a list of one as what is in it."""
    if isinstance(value, list) and len(value) == 1:
        return value_text(value[0])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


@dataclass(frozen=True)
class Peer:
    """Another trainer: its title and what is said of it in docs/coming_from.md, and its arguments."""

    title: str
    about: str
    table: Mapping[str, Counterpart]


@cache
def all_peers() -> tuple[Peer, ...]:
    """Return all trainers, in the order in which a name is looked up."""
    trainers = yaml.load(TABLES.read_text(encoding="utf-8"), YamlLoader)["trainers"]
    return tuple(Peer(trainer["title"], trainer["about"], dict(_table(trainer))) for trainer in trainers)


def _table(trainer: Mapping[str, Any]) -> Iterator[tuple[str, Counterpart]]:
    for names, entry in trainer["arguments"].items():
        given: dict[str, Any] = {"key": entry} if isinstance(entry, str) else dict(entry)
        is_same, is_list = "only" not in given, given.pop("is_list", None) is not None
        values = given.pop("values" if is_same else "only", {})
        here = Counterpart(values=values, is_same=is_same, is_list=is_list, **given)
        yield from ((name, here) for name in names.split())
    for because, names in trainer["none"].items():
        yield from ((name, Counterpart(note=because)) for name in names.split())


@cache
def by_name() -> dict[str, list[Counterpart]]:
    """Return what the arguments of all trainers are here, by the joined words of the name."""
    found: dict[str, list[Counterpart]] = {}
    for peer in all_peers():
        for name, here in peer.table.items():
            found.setdefault(_joined(name), []).append(here)
    return found


def find(name: str) -> list[Counterpart]:
    """Return what an argument of that name is here, by each trainer that has it, however its words are joined."""
    return by_name().get(_joined(name), [])


def options_of(group: str) -> dict[str, str]:
    """Return what other trainers call the options of a group, each with the option's name; no switches."""
    found: dict[str, set[str]] = {}
    for here in chain(*by_name().values()):
        for theirs, ours in here.values.items() if here.key == group else ():
            found.setdefault(theirs, set()).add(ours)
    return {theirs: ours.pop() for theirs, ours in found.items() if len(ours) == 1 and theirs not in ("true", "false")}


def option_hint(group: str, given: str, near: str = "") -> str:
    """Return what to choose in place of an option that a group does not have; '' where that can't be said.

    `near` is an option of a similar name, '' for none.
    """
    ours, is_name = options_of(group), "/" in given or not near
    if better := ours.get(given) or ours.get(given.lower()):
        return f"; did you mean {group}={better}?"
    if len(given) > LONGEST_NAME:
        return ""
    if group == "deepspeed" and given.lower().endswith(".json"):
        near = f"deepspeed=file {shell_override('deepspeed.config_file', given)}"
    elif group == "model" and is_name:
        near = f"model=causal_lm {shell_override('model.checkpoint', given)}"
    elif group == "data" and given.lower().endswith(DATA_FILES):
        near = f"data=prompt_completion {shell_override('data.train_files', [given])}"
    elif group == "data" and is_name:
        near = f"data=prompt_completion {shell_override('data.dataset_name', given)}"
    if near:
        return f"; did you mean {near}?"
    return f"; {find('report_to')[0].note}" if group == "tracking" else ""


def flag_hint(message: str) -> str:
    """Return what to write in place of the flags that a message of argparse's names; '' where it names none."""
    if found := re.search(r"argument (--\w+).*: ignored explicit argument (.*)", message):
        topic = f": --help {found[2].strip(chr(39))}" if found[1] == "--help" else ""
        return f"; there is no = after {found[1]}{topic}"
    given = re.findall(r"(?<!\S)--([\w.-]+)", message) if message.startswith("unrecognized arguments") else []
    keys = sorted({next((here.key for here in find(name) if here.key), name) for name in given})
    return f"; keys are written without dashes: {' '.join(f'{key}=VALUE' for key in keys)}" if keys else ""


def _joined(name: str) -> str:
    """Return a name without what joins its words and without capitals: learningRate and learning-rate are one."""
    return name.lstrip("-").replace("_", "").replace("-", "").lower()
