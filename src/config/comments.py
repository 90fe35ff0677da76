"""Reads the comments of an option file: about the option, and about its keys."""

import re
from collections.abc import Iterator

import yaml

from src.config.options import YamlLoader

_PACKAGE = re.compile(r"\s*#\s*@\s*package\s+(\S+)\s*$")
_DIRECTIVE = re.compile(r"\s*#\s*@")


def package(text: str) -> str | None:
    """Return where a file's header puts its keys, as Hydra reads it; None where it has none, or too late."""
    for line in text.splitlines():
        if line.strip():
            if not _DIRECTIVE.match(line):
                return None
            if found := _PACKAGE.match(line):
                return found[1]
    return None


def written_package(text: str) -> str | None:
    """Return what the first `# @package` line of a file names, also where Hydra does not see it."""
    return next((found[1] for line in text.splitlines() if (found := _PACKAGE.match(line))), None)


def about(text: str) -> list[str]:
    """Return the comment at the head of a file, line by line: when to choose the option."""
    lines: list[str] = []
    for line in text.splitlines():
        if _DIRECTIVE.match(line) or (not lines and not line.strip()):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def of_keys(text: str) -> dict[str, str]:
    """Return the comment of each key that has one, by its dotted name.

    It follows the value, continued below in the same column, or stands in lines of its own right above the key.
    """
    node = yaml.compose(text, YamlLoader)
    lines = text.splitlines()
    return dict(_comments(node, lines, "", _head_ends(lines))) if isinstance(node, yaml.MappingNode) else {}


def _comments(node: yaml.MappingNode, lines: list[str], prefix: str, first: int) -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        dotted = f"{prefix}{key.value}"
        if comment := _after(key, value, lines) or _above(key, lines, first):
            yield dotted, comment
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _comments(value, lines, f"{dotted}.", first)


def _head_ends(lines: list[str]) -> int:
    """Return the number of the first line that is neither blank nor a comment."""
    return next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines))


def _after(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    is_long = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
    number, column = key.end_mark.line, key.end_mark.column
    if not is_block and not is_long:
        number, column = value.end_mark.line, value.end_mark.column
    if number >= len(lines):
        return ""
    found = re.search(r"(?:^|\s)#", lines[number][column:])
    if found is None or (not is_block and not is_long and lines[number][column : column + found.start()].strip()):
        return ""
    column += found.end() - 1
    said = [lines[number][column:]]
    for line in lines[number + 1 :]:
        if len(line) <= column or line[column] != "#" or line[:column].strip():
            break
        said.append(line)
    return " ".join(one.strip().lstrip("#").strip() for one in said)


def _above(key: yaml.Node, lines: list[str], first: int) -> str:
    said: list[str] = []
    for number in range(key.start_mark.line - 1, first, -1):
        line = lines[number]
        if line.find("#") != key.start_mark.column or line[: key.start_mark.column].strip():
            break
        said.insert(0, line.strip().lstrip("#").strip())
    return " ".join(said)
