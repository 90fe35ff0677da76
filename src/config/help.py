"""What `--help` prints, in 80 columns: all groups and keys; one group, section or key; or an entry's own keys.

Values are those of the command line that asks, so `--help experiment=…` shows what that chooses.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from src import terminal
from src.config import groups, peers, reference
from src.config.command_line import CommandLine, read_command_line
from src.config.compose import compose
from src.config.composed import Composed, where_set
from src.config.groups import Option
from src.config.keys import Key, all_keys, keys_of_entry, source_keys
from src.config.options import GLOBAL_GROUPS, KeyPosition, OptionFileError, options, shown
from src.config.problems import Problem, refuse, shortened
from src.config.schema import ENTRY_SECTIONS, Check, Keys
from src.errors import show, visible
from src.util import nearest, value_at

WIDTH = 80
LEFT = 34
"""Columns of keys and their values, before what they mean."""
NOTHING: Any = object()
YamlDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

USAGE = (
    ("python -m src.run GROUP=OPTION … SECTION.KEY=VALUE …", "one run"),
    ("python -m src.run -m KEY=A,B …", "a sweep: several runs"),
    ("python -m src.run rerun=DIR SECTION.KEY=VALUE …", "a run's folder again"),
    ("python -m src.run --cfg job …", "the configuration, no run"),
    ("python -m src.run --help optimizer", "one group or section"),
    ("python -m src.run --help optimizer.lr", "one key"),
)
OVERVIEW = "Towline: a few YAML choices become a fine-tune that is tracked, repeatable and comparable."
MORE = "Every group and key: python -m src.run --help. One of them: --help optimizer, --help optimizer.lr."
ELSEWHERE = (
    "Before: python -m src.preflight. After: src.predict, src.evaluate, src.export, src.benchmark, src.ensemble, "
    "src.report, src.ui, src.sync. Each with --help. Every key: docs/configuration.md."
)


class Page:
    """The choices and values to show, and the folders whose options are listed."""

    def __init__(self, composed: Composed, line: CommandLine) -> None:
        self.composed, self.line, self.roots = composed, line, line.roots

    def chosen(self, group: str) -> str:
        """Return a group's option; '' for none."""
        option = self.composed.choices.get(group, "")
        return "" if option == "None" else option

    def value(self, key: Key) -> Any:
        """Return a key's value now; NOTHING where what was chosen has no such key."""
        if key.entry:
            return reference.defaults(key)[""]
        return value_at(self.composed.stored, key.name, NOTHING)

    def overview(self) -> Iterator[str]:
        """Yield the lines of all groups and keys."""
        yield from wrapped(OVERVIEW)
        yield ""
        for command, does in USAGE:
            yield f"{command:<54} {does}"
        yield from ("", "== Groups (GROUP=OPTION): what is chosen, and what else there is ==", "")
        for group in groups.groups(self.roots):
            if known := options(group, self.roots):
                chosen = self.chosen(group)
                others = [name for name in known if name != chosen]
                yield from wrapped(f"{group}: {chosen or 'null'} ({', '.join(others)})", hanging=4)
        yield from ("", "== Keys (SECTION.KEY=VALUE): their values now, and what they mean ==", "")
        for section in reference.sections():
            keys = [key for key in choosable(section) if not key.entry and self.value(key) is not NOTHING]
            if not keys and section in ENTRY_SECTIONS:
                continue
            if section:
                yield f"{section}:" if keys else f"{section}: no keys with {self.chosen(section)}, see --help {section}"
            for key in keys:
                yield from self.short(key)
        yield ""
        yield from wrapped(ELSEWHERE)

    def short(self, key: Key) -> Iterator[str]:
        """Yield a key with its value, and its meaning next to it."""
        indent = "  " if key.section else ""
        name = f"{indent}{reference.name_in(key)}: "
        left = name + shortened(shown_value(self.value(key)), WIDTH - len(name))
        said = wrapped(reference.meaning(key, self.roots, self.chosen(key.section)), columns=WIDTH - LEFT)
        if len(left) < LEFT and said:
            left = f"{left:<{LEFT}}{said.pop(0)}"
        yield left
        yield from (f"{'':<{LEFT}}{line}" for line in said)

    def group(self, name: str) -> Iterator[str]:
        """Yield a group's options, and the keys of the section of that name."""
        chosen = self.chosen(name)
        yield f"{name}: {chosen or 'none'} is chosen; choose with {name}=OPTION"
        for option in options(name, self.roots):
            yield from ("", f"  {option}")
            try:
                (found, *_) = list(groups.lineage(name, option, tuple(self.roots)))
            except OptionFileError as error:
                yield from wrapped(f"can't be read: {error}", indent=6)
                continue
            for paragraph in paragraphs(found.about):
                yield from wrapped(paragraph, indent=6)
            if found.parents or found.choices or name in GLOBAL_GROUPS:
                yield from wrapped(self.sets(found), indent=6, hanging=2)
        if keys := choosable(name):
            yield ""
            yield from self.keys(name, keys)

    def sets(self, option: Option) -> str:
        """Return what an option builds on and sets, in one line."""
        public = reference.public_parents(option)
        given = [f"{key}: {shortened(shown_value(value), 60)}" for key, value in reference.changes(option).items()]
        parts = [*([f"as {', '.join(public)}"] if public else []), *([f"sets {'; '.join(given)}"] if given else [])]
        said = ", and ".join(parts) or "sets nothing"
        return f"{said[0].upper()}{said[1:]}"

    def keys(self, section: str, keys: Sequence[Key]) -> Iterator[str]:
        yield f"Keys ({section}.KEY=VALUE):"
        for key in keys:
            yield ""
            yield from self.long(key)

    def long(self, key: Key) -> Iterator[str]:
        """Yield all there is to know of a key."""
        value, by_option = self.value(key), reference.defaults(key, self.roots)
        now = "" if value is NOTHING else f": {shortened(shown_value(value), WIDTH)}"
        yield from wrapped(f"{key.name}{now}", indent=2, hanging=4)
        yield from wrapped(reference.meaning(key, self.roots), indent=6)
        for option, said in reference.remarks(key, self.roots).items():
            yield from wrapped(f"With {option}: {said}", indent=6, hanging=2)
        yield from wrapped(f"Allowed: {key.allowed}", indent=6, hanging=2)
        yield from wrapped(f"Default: {default_text(by_option)}", indent=6, hanging=2)
        if key.types and (having := groups.with_key(key, self.roots)) != options(key.section, self.roots):
            yield from wrapped(f"A key of {key.section}={', '.join(having)}", indent=6, hanging=2)
        if key.inner:
            for allowed, inner in inner_keys(key.inner).items():
                yield from wrapped(f"In it, {allowed}: {', '.join(inner)}", indent=6, hanging=2)
        if key.info.each:
            yield from wrapped(f"Each may have {', '.join(key.leaf for key in source_keys())}", indent=6, hanging=2)

    def topic(self, name: str) -> Iterator[str]:
        """Yield what there is to know of a group, section, key or key's last part; LookupError where there is none."""
        known = all_keys()
        inside = [key for key in known.values() if key.name.startswith(f"{name}.")]
        if reference.is_group(name, self.roots):
            yield from self.group(name)
        elif name in known:
            yield from self.long(known[name])
            if not known[name].entry and self.value(known[name]) is not NOTHING:
                place = where_set(name, self.line, self.composed)
                yield from wrapped(f"Set by {shown(place.file) if isinstance(place, KeyPosition) else place}", indent=6)
        elif inside:
            yield from self.keys(name, inside)
        elif found := [key for key in known.values() if key.leaf == name]:
            for key in found:
                yield from self.long(key)
        elif theirs := next((here.key for here in peers.find(name) if here.key), ""):
            yield from (f"{name} of other trainers is {theirs} here.", "")
            yield from self.topic(theirs)
        else:
            raise LookupError(name)

    def unknown(self, name: str) -> Problem:
        """Return that there is no such group, section or key, and what was probably meant."""
        known = (*groups.groups(self.roots), *reference.sections()[1:])
        leaves = {key.leaf: key.name for key in reversed(all_keys().values())}  # the first key of a name is meant
        near = nearest(name, dict.fromkeys((*known, *all_keys())))
        near = near or leaves.get(nearest(name.rpartition(".")[2], leaves), "")
        reason = f"did you mean {near}?" if near else f"groups and sections are {', '.join(dict.fromkeys(known))}"
        return Problem(name, f"no group, section or key; {reason}", has_value=False, where="--help")


def help_of_run(composed: Composed, line: CommandLine) -> int:
    """Print what `python -m src.run --help …` asks for and return the exit code; ConfigError says what there is not."""
    page = Page(composed, line)
    found, problems = [], []
    for name in line.topics:
        try:
            found.append("\n".join(page.topic(name)))
        except LookupError:
            problems.append(page.unknown(name))
    if problems:
        raise refuse(problems)
    show("\n\n".join(found or ["\n".join(page.overview())]))
    return 0


def help_of_entry(entry: str, about: str | None, arguments: Sequence[str]) -> int:
    """Print what another entry does and its own keys, or the topics that it is asked for; return the exit code.

    `about` is the docstring of the entry. ConfigError says which arguments can't be read, or ask for what there is not.
    """
    line = read_command_line(arguments)
    if line.problems:
        raise refuse(line.problems)
    if line.topics:
        composed = compose(line.shown, line)
        if composed.problems:
            raise refuse(composed.problems)
        return help_of_run(composed, line)
    page = Page(Composed(), line)
    own = keys_of_entry(entry)
    lines = [*(["", f"{entry}:"] if own else []), *(line for key in own for line in page.short(key))]
    show("\n".join([*reflowed(about or ""), *lines, "", *wrapped(MORE)]))
    return 0


def choosable(section: str) -> list[Key]:
    """Return the keys of a section but for that which each option sets for itself."""
    return [key for key in reference.keys_of(section) if key.leaf != "type"]


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the second parts of pairs by the first, in order."""
    found: dict[str, list[str]] = {}
    for first, second in pairs:
        found.setdefault(first, []).append(second)
    return found


def by_value(by_option: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the options that have a key by the value that it has there, as YAML has it."""
    return grouped((shown_value(value), option) for option, value in by_option.items())


def default_text(by_option: Mapping[str, Any]) -> str:
    """Return a key's values by option, each once: 0.01 (adafactor), 0.1 (sgd)."""
    having = by_value(by_option)
    return ", ".join(f"{text} ({', '.join(names)})" if len(having) > 1 else text for text, names in having.items())


def inner_keys(known: Keys) -> dict[str, list[str]]:
    """Return the keys that another library's mapping may have, by what they may be."""
    return grouped(
        (rule.allowed if isinstance(rule, Check) else f"a mapping of {', '.join(rule)}", name)
        for name, rule in known.items()
    )


def shown_value(value: Any) -> str:
    """Return a value as YAML has it, in one line."""
    if value == "???":
        return "(needs a value)"
    text: str = yaml.dump(
        value, Dumper=YamlDumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.strip().removesuffix("...").strip()


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Return the lines at a file's head as paragraphs: one that begins with a word and a colon is one of its own."""
    joined: list[str] = []
    for line in lines:
        if joined and line and not re.match(r"[A-Z]\w*: |python -m ", line):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined


def wrapped(text: str, indent: int = 0, hanging: int = 0, columns: int = WIDTH) -> list[str]:
    """Return a text as lines of at most so many columns."""
    line = " " * indent + visible(text, is_line=True)
    return terminal.wrapped(line, columns, hang=indent + hanging).split("\n") if text else []


def reflowed(text: str) -> list[str]:
    """Return a docstring in lines of at most 80 columns; lines that begin a list or are indented stay lines."""
    blocks: list[tuple[int, int, str]] = []
    in_list = False
    for line in text.strip().splitlines():
        bare = line.strip()
        begins_list = bare.startswith("- ")
        is_item = begins_list or (line.startswith("  ") and not in_list)
        if not bare or is_item or not blocks or not blocks[-1][2]:
            blocks.append((len(line) - len(line.lstrip()), 2 if is_item else 0, bare))
            in_list = begins_list
        else:
            indent, hanging, said = blocks[-1]
            blocks[-1] = (indent, hanging, f"{said} {bare}")
    return [line for indent, hanging, said in blocks for line in wrapped(said, indent, hanging) or [""]]
