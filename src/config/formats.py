"""What formats of data there are: each is declared by its own option file, conf/data/<format>.yaml.

The option's `columns` name the parts of a row that the format takes; a source of a mixture that has a format of its own
starts from that option's settings.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from src.config.groups import lineage
from src.config.options import CONF, OptionFileError, options

BELONGS_TO_FORMAT = (
    *("columns", "prompt_template", "completion_template", "system_prompt", "supervised_turns", "clean_dialogue"),
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
    return _options(CONF).get(name, ({}, ""))[1] or _broken_own.get(name, "")


def declare_options(root: Path) -> None:
    """Know the formats that options of data in a folder of the user's declare, as those in conf/ do."""
    for name, (given, broken) in _options(root).items():
        if broken:
            _broken_own[name] = broken
        elif given.get("format") == name and isinstance(given.get("columns"), dict):
            _own[name] = given


def declare_frozen(data: Any) -> None:
    """Know the formats of a frozen configuration: they were declared where it was composed."""
    for given in (data, *mixed_sources(data)):
        if isinstance(given, dict) and isinstance(given.get("columns"), dict) and given["columns"]:
            _own.setdefault(str(given.get("format")), given)


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    return {name: given for name, (given, _) in _options(CONF).items() if given.get("format") == name}


@cache
def _options(root: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the settings of each option of data in a folder of options, or why they can't be read."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for name in options("data", [root]):
        if "/" in name:
            continue
        try:
            from_the_base = reversed(list(lineage("data", name, (root, CONF))))
            found[name] = {key: value for option in from_the_base for key, value in option.values.items()}, ""
        except OptionFileError as error:
            found[name] = {}, str(error)
    return found


def roles(format_name: str) -> tuple[str, ...]:
    """Return the parts of a row that a format takes, in order: the first is the prompt, the last the target."""
    return tuple(declared_formats()[format_name]["columns"])


def fill_mixture(data: Any) -> None:
    """Add to each source of a mixture with a format of its own that format's settings, where it has none itself."""
    for source in mixed_sources(data):
        settings = declared_formats().get(str(source.get("format")), {})
        for key in BELONGS_TO_FORMAT:
            if key in settings:
                source.setdefault(key, settings[key])


def mixed_sources(data: Any) -> Iterator[dict[Any, Any]]:
    """Yield the mappings of a mixture's sources, whatever else there may be in their place."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    yield from (one for one in mixture.values() if isinstance(one, dict)) if isinstance(mixture, dict) else ()
