"""What formats of data there are: each is declared by its own option file, conf/data/<format>.yaml. No torch here.

The option's `columns` name the parts of a row that the format takes; a source of a mixture that has a format of its own
starts from that option's settings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

PROJECT_ROOT = Path(__file__).resolve().parents[2]
OPTIONS = PROJECT_ROOT / "conf" / "data"
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
    """Give every format's own settings, by its name."""
    settings = {file.stem: _option(file) for file in sorted(OPTIONS.glob("[!_]*.yaml"))}
    return {name: given for name, given in settings.items() if given.get("format") == name}


@cache
def roles(format_name: str) -> tuple[str, ...]:
    """Give the parts of a row that a format takes, in their order: the first is prompted, the last is learned."""
    return tuple(declared_formats()[format_name]["columns"])


def fill_mixture(data: Any) -> None:
    """Give each source of a mixture that has a format of its own that format's settings, where it has none itself."""
    mixture = data.get("mixture") if isinstance(data, dict) else None
    for source in mixture.values() if isinstance(mixture, dict) else []:
        if isinstance(source, dict) and str(source.get("format")) in declared_formats():
            settings = declared_formats()[source["format"]]
            for key in BELONGS_TO_FORMAT:
                source.setdefault(key, settings[key])


def _option(file: Path) -> dict[str, Any]:
    """Read an option file with the options of its own group that it builds on."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for parent in content.pop("defaults", []):
        if parent != "_self_":
            merged |= _option(file.with_name(f"{parent}.yaml"))
    return merged | content
