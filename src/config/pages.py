"""Pages of docs/ that are made from the schema, conf/ and the tables of other trainers: `python -m src.config.pages`.

A test compares them with what would be made now; `make docs` writes them anew.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from src.config import groups, reference
from src.config.groups import Option
from src.config.help import by_value, grouped, inner_keys, paragraphs, shown_value
from src.config.keys import Key, source_keys
from src.config.options import CONF, GLOBAL_GROUPS, PROJECT_ROOT, options
from src.config.peers import Counterpart, all_peers
from src.config.schema import ENTRY_SECTIONS, SECTIONS
from src.markdown import code, inline, table

MADE = "<!-- Made by `make docs` from src/config and conf/. Changes belong there; a test compares. -->"
ABOUT_SECTIONS = {
    "": "Outside any section: `KEY=VALUE`.",
    "sweep": "Read with `-m` only; how several values are tried.",
    **{name: f"Read by `python -m src.{name}` alone." for name in ENTRY_SECTIONS if name not in SECTIONS},
}


def configuration() -> str:
    """Return docs/configuration.md: every group with its options, and every key."""
    lines = [
        MADE,
        "# Configuration",
        "",
        "Every group with its options (`GROUP=OPTION`) and every key (`SECTION.KEY=VALUE`): what it means, what it may "
        "be, and what it is unless you say otherwise, by option where options differ. `python -m src.run --help` shows "
        "the same with the values of your command, `--help optimizer` one group, `--help optimizer.lr` one key.",
        "",
        "Later wins over earlier: `conf/config.yaml`, the option of each group, `experiment=…`, `debug=…`, the command "
        "line. Options of your own go into a folder like `conf/`, given with `--config-dir DIR`.",
        "",
    ]
    for section in reference.sections():
        lines += [*_section(section), ""]
    for group in reversed(GLOBAL_GROUPS):
        lines += [f"## {group}", "", "Named changes to other sections.", "", *_options(group), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(section: str) -> Iterator[str]:
    yield from (f"## {section or 'Top level'}", "")
    if section in ABOUT_SECTIONS:
        yield from (ABOUT_SECTIONS[section], "")
    if reference.is_group(section):
        yield from (*_options(section), "")
    keys = reference.keys_of(section)
    yield table(["key", "meaning", "may be", "default"], [_row(key) for key in keys])
    for key in keys:
        if key.inner:
            yield from ("", f"Within `{key.name}`:", "")
            rows = [[", ".join(map(code, names)), inline(allowed)] for allowed, names in inner_keys(key.inner).items()]
            yield table(["keys", "may be"], rows)
        if key.info.each:
            yield from ("", f"A source of `{key.name}` may have, for itself (others as `data` has them):", "")
            yield table(["key", "meaning", "may be"], [_source_row(one) for one in source_keys()])


def _row(key: Key) -> list[str]:
    by_option = reference.defaults(key)
    said = [inline(reference.meaning(key))]
    said += [f"{code(option)}: {inline(remark)}" for option, remark in reference.remarks(key).items()]
    if key.types and (of_some := groups.with_key(key, [CONF])) != options(key.section, [CONF]):
        first, *others = of_some
        said.append(f"only with {', '.join([code(f'{key.section}={first}'), *map(code, others)])}")
    if key.entry in SECTIONS:
        said.append(f"only of `python -m src.{key.entry}`")
    having = by_value(by_option)
    default = [code(text) + (f": {', '.join(names)}" if len(having) > 1 else "") for text, names in having.items()]
    return [code(key.name), "<br>".join(said), inline(key.allowed), "<br>".join(default)]


def _source_row(key: Key) -> list[str]:
    whole = next((one for one in reference.keys_of("data") if one.leaf == key.leaf), None)
    meaning = key.info.text or (reference.meaning(whole) if whole else "")
    return [code(key.leaf), inline(meaning), inline(key.allowed)]


def _options(group: str) -> Iterator[str]:
    chosen = reference.default_choices().get(group)
    rows = []
    for name in options(group, [CONF]):
        option = groups.read(group, name, (CONF,))
        assert option is not None
        when = "<br>".join(map(inline, paragraphs(option.about)))
        rows.append([code(name) + (" (default)" if name == chosen else ""), when, _sets(option)])
    yield table([f"`{group}=`", "when", "sets"], rows)


def _sets(option: Option) -> str:
    """Return what an option builds on and what else it sets; one without a parent in its group sets all keys below."""
    public = reference.public_parents(option)
    is_shown = option.parents or option.choices or option.group in GLOBAL_GROUPS
    given = reference.changes(option) if is_shown else {}
    said = [f"as {', '.join(map(code, public))}"] if public else []
    return "<br>".join([*said, *(code(f"{name}: {shown_value(value)}") for name, value in given.items())])


def coming_from() -> str:
    """Return docs/coming_from.md: what arguments of other trainers are called here."""
    lines = [
        MADE,
        "# Coming from TRL, axolotl, LLaMA-Factory",
        "",
        "What you know by another name. The gate knows these names too: `python -m src.run learning_rate=1e-4` is "
        "refused with `optimizer.lr`, also within a section, and `--help learning_rate` shows what it means here. "
        "Values are the same unless stated otherwise. What a key may be is in [configuration.md]"
        "(configuration.md).",
        "",
    ]
    for peer in all_peers():
        lines += [f"## {peer.title}", "", peer.about, ""]
        lines += [table(["there", "here"], _counterparts(peer.table)), ""]
        if without := list(_without(peer.table)):
            lines += ["No counterpart:", "", *without, ""]
    return "\n".join(lines).rstrip() + "\n"


def _grouped(counterparts: Mapping[str, Counterpart], *, has_key: bool) -> Iterator[tuple[list[str], Counterpart]]:
    """Yield arguments that are the same here together."""
    found: list[tuple[list[str], Counterpart]] = []
    for name, here in counterparts.items():
        if bool(here.key) is has_key:
            same = next((names for names, one in found if one == here), None)
            if same is None:
                found.append(([name], here))
            else:
                same.append(name)
    yield from found


def _counterparts(counterparts: Mapping[str, Counterpart]) -> Iterator[list[str]]:
    for names, here in _grouped(counterparts, has_key=True):
        is_told = here.is_same or not here.values
        said = [code(f"{here.key}=…" if reference.is_group(here.key) else here.key)] if is_told else []
        for ours, theirs in grouped((ours, theirs) for theirs, ours in here.values.items()).items():
            said.append(f"{', '.join(map(code, theirs))}: {code(f'{here.key}={ours}')}")
        said += [f"where {code(chosen)}: with {code(better)}" for chosen, better in here.instead_of.items()]
        if here.note:
            said.append(_noted(here.note))
        yield [", ".join(map(code, names)), "<br>".join(said)]


def _without(counterparts: Mapping[str, Counterpart]) -> Iterator[str]:
    for names, here in _grouped(counterparts, has_key=False):
        yield f"- {', '.join(map(code, names))}: {_noted(here.note)}."


def _noted(note: str) -> str:
    """Return a note as Markdown; what it has between backticks is code already."""
    parts = note.split("`")
    return "".join(code(part) if number % 2 else _text(part) for number, part in enumerate(parts))


def _text(part: str) -> str:
    """Return a part of a sentence, with the blanks at its ends."""
    shown = inline(part)
    return f"{' ' * part.startswith(' ')}{shown}{' ' * (part.endswith(' ') and bool(shown))}"


PAGES = {"docs/configuration.md": configuration, "docs/coming_from.md": coming_from}
"""Where each page is, from the project's root, and what makes it."""


def main(argv: Sequence[str] = ()) -> int:
    """Write the pages that are not what they would be now."""
    for place, make in PAGES.items():
        file, content = Path(PROJECT_ROOT, place), make()
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            file.write_text(content, encoding="utf-8")
            print(f"written: {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
