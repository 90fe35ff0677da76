"""What formats of data there are: each is declared by its own option file, conf/data/<format>.yaml.

The option's `columns` name the parts of a row that the format takes; a source of a mixture that has a format of its own
starts from that option's settings.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

from src.config.options import CONF, OptionFileError, option_files, parents_of, read_option, shown

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


_own: dict[str, dict[str, Any]] = {}
"""Settings of formats that a user declares, in options of their own or in the frozen configuration of a run."""
_broken_own: dict[str, str] = {}


def declared_formats() -> dict[str, dict[str, Any]]:
    """Return every format's own settings, by its name; without those whose files can't be read."""
    return _built_in() | {name: given for name, given in _own.items() if name not in _built_in()}


def broken_format(name: str) -> str:
    """Return why the file that declares a format can't be read; '' where it can, or there is none."""
    return _options(OPTIONS).get(name, ({}, ""))[1] or _broken_own.get(name, "")


def declare_options(folder: Path) -> None:
    """Know the formats that options in a folder of the user's declare, as those in conf/data do."""
    for name, (given, broken) in _options(folder).items():
        if broken:
            _broken_own[name] = broken
        elif given.get("format") == name and isinstance(given.get("columns"), dict):
            _own[name] = given


def declare_frozen(data: Any) -> None:
    """Know the formats of a frozen configuration: they were declared where it was composed."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    sources = [data, *mixture.values()] if isinstance(mixture, dict) else [data]
    for given in sources:
        if isinstance(given, dict) and isinstance(given.get("columns"), dict) and given["columns"]:
            _own.setdefault(str(given.get("format")), given)


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    return {name: given for name, (given, _) in _options(OPTIONS).items() if given.get("format") == name}


@cache
def _options(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the settings of each option of data in a folder, or why they can't be read."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for file in option_files(folder):
        if file.parent != folder or file.name.startswith("_"):
            continue
        try:
            found[file.stem] = _option(file), ""
        except OptionFileError as error:
            found[file.stem] = {}, str(error)
    return found


def roles(format_name: str) -> tuple[str, ...]:
    """Return the parts of a row that a format takes, in order: the first is the prompt, the last the target."""
    return tuple(declared_formats()[format_name]["columns"])


def fill_mixture(data: Any) -> None:
    """Add to each source of a mixture with a format of its own that format's settings, where it has none itself."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    for source in mixture.values() if isinstance(mixture, dict) else []:
        name = source.get("format") if isinstance(source, dict) else None
        if isinstance(name, str) and (settings := declared_formats().get(name)):
            for key in BELONGS_TO_FORMAT:
                if key in settings:
                    source.setdefault(key, settings[key])


def _option(file: Path, builders: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what an option file holds, with the options of its own group that it builds on."""
    if file in builders:
        raise OptionFileError(f"{shown(file)}: builds on itself")
    content = read_option(file)
    merged = dict[str, Any]()
    for parent in parents_of(content, file, OPTIONS.name):
        place = parent if os.path.lexists(parent) else OPTIONS / parent.name
        merged |= _option(place, (*builders, file))
    content.pop("defaults", None)
    return merged | content
