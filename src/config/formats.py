"""What formats of data there are: each is declared by its own option file, conf/data/<format>.yaml. No torch here.

The option's `columns` name the parts of a row that the format takes; a source of a mixture that has a format of its own
starts from that option's settings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from src.config.options import CONF, OptionFileError, read_option, shown

OPTIONS = CONF / "data"
BELONGS_TO_FORMAT = (
    "columns",
    "prompt_template",
    "completion_template",
    "system_prompt",
    "supervised_turns",
    "clean_dialogue",
    "thought_pattern",
)


@cache
def declared_formats() -> dict[str, dict[str, Any]]:
    """Return every format's own settings, by its name; without those whose files can't be read."""
    return {name: given for name, (given, _) in _options().items() if given.get("format") == name}


def broken_format(name: str) -> str:
    """Return why the file that declares a format can't be read; '' where it can, or there is none."""
    return _options().get(name, ({}, ""))[1]


@cache
def _options() -> dict[str, tuple[dict[str, Any], str]]:
    """Return the settings of each option of data, or why they can't be read."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for file in sorted(OPTIONS.glob("[!_]*.yaml")):
        try:
            found[file.stem] = _option(file), ""
        except OptionFileError as error:
            found[file.stem] = {}, str(error)
    return found


@cache
def roles(format_name: str) -> tuple[str, ...]:
    """Give the parts of a row that a format takes, in their order: the first is prompted, the last is learned."""
    return tuple(declared_formats()[format_name]["columns"])


def fill_mixture(data: Any) -> None:
    """Give each source of a mixture that has a format of its own that format's settings, where it has none itself."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    for source in mixture.values() if isinstance(mixture, dict) else []:
        name = source.get("format") if isinstance(source, dict) else None
        if isinstance(name, str) and name in declared_formats():
            settings = declared_formats()[name]
            for key in BELONGS_TO_FORMAT:
                source.setdefault(key, settings[key])


def _option(file: Path, builders: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what an option file holds, with the options of its own group that it builds on."""
    if file in builders:
        raise OptionFileError(f"{shown(file)}: builds on itself")
    content = read_option(file)
    parents, merged = content.pop("defaults", []), dict[str, Any]()
    for parent in parents if isinstance(parents, list) else []:
        if isinstance(parent, str) and parent != "_self_":
            merged |= _option(file.with_name(f"{parent}.yaml"), (*builders, file))
    return merged | content
