"""Option files of conf/: what one holds, and which can't be read. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONF = PROJECT_ROOT / "conf"
DEEPEST = 50
"""Levels that the values of a file may be nested: more than any has, and few enough for all that read them."""
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built in


class OptionFileError(Exception):
    """An option file can't be read; the message says which, where and why."""


def shown(file: Path) -> str:
    """Return a file's path as a message tells it: from the project's root where it is in there."""
    return os.path.relpath(file, PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else str(file)


def read_option(file: Path) -> dict[str, Any]:
    """Return the keys that an option file holds; an empty one has none.

    Raises:
        OptionFileError: naming file, line and column.
    """
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, YamlLoader)
        if node is not None:
            _check(node, file)
        content = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise OptionFileError(placed(error, file)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise OptionFileError(f"{shown(file)}, line {line}, column {column}: not text in UTF-8") from error
    except RecursionError as error:
        raise OptionFileError(f"{shown(file)}: values are nested more than {DEEPEST} deep") from error
    except (OSError, ValueError) as error:  # ValueError: of a number with thousands of digits
        raise OptionFileError(f"{shown(file)}: {getattr(error, 'strerror', None) or error}") from error
    return content or {}


def placed(error: yaml.YAMLError, file: Path | None = None) -> str:
    """Return what a YAML error says in one line: file, line, column and what is wrong there.

    Args:
        file: that was read; None where the error knows.
    """
    mark = getattr(error, "problem_mark", None)
    name = file or Path(str(getattr(mark, "name", None) or getattr(error, "name", "conf")))
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or " ".join(str(error).split())
    return f"{shown(name)}{place}: {reason}"


def broken_options(roots: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with each option file that can't be read."""
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            try:
                read_option(file)
            except OptionFileError as error:
                yield str(error)


def _check(node: yaml.Node, file: Path) -> None:
    """Raise OptionFileError where a file holds no mapping, a key twice, or values that are nested too deep."""
    if not isinstance(node, yaml.MappingNode) and node.tag != "tag:yaml.org,2002:null":
        raise OptionFileError(f"{_place(node, file)}: no keys with values (KEY: VALUE)")
    level = [node]
    for _ in range(DEEPEST):
        inner: list[yaml.Node] = []
        for one in level:
            if isinstance(one, yaml.MappingNode):
                _check_keys(one, file)
                inner += [value for _, value in one.value]
            elif isinstance(one, yaml.SequenceNode):
                inner += one.value
        level = list({id(one): one for one in inner}.values())  # aliases that multiply are looked at once
    if level:
        raise OptionFileError(f"{_place(level[0], file)}: nested more than {DEEPEST} deep")


def _check_keys(node: yaml.MappingNode, file: Path) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise OptionFileError(f"{_place(key, file)}: the key {key.value} a second time")
            seen.add(key.value)


def _place(node: yaml.Node, file: Path) -> str:
    return f"{shown(file)}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
