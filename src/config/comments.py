"""Reads the comments of an option file: about the option, and about its keys."""

import re
from collections.abc import Iterator
from itertools import dropwhile, takewhile

import yaml

from src.config.options import YamlLoader

_PACKAGE = re.compile(r"\s*#\s*@\s*package\s+(\S+)\s*$")
_DIRECTIVE = re.compile(r"\s*#\s*@")


def package(text: str) -> str | None:
    """Return where a file's header puts its keys, as Hydra reads it; None where it has none, or too late."""
    head = takewhile(lambda line: not line.strip() or _DIRECTIVE.match(line), text.splitlines())
    return written_package("\n".join(head))


def written_package(text: str) -> str | None:
    """Return what the first `# @package` line of a file names, also where Hydra does not see it."""
    return next((found[1] for line in text.splitlines() if (found := _PACKAGE.match(line))), None)


def about(text: str) -> list[str]:
    """Return the comment at the head of a file, line by line: when to choose the option."""
    lines = dropwhile(lambda line: not line.strip(), (one for one in text.splitlines() if not _DIRECTIVE.match(one)))
    return [line.lstrip("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]


def of_keys(text: str) -> dict[str, str]:
    """Return the comment of each key that has one, by its dotted name.

    It follows the value, continued below in the same column, or stands in lines of its own right above the key.
    """
    node = yaml.compose(text, YamlLoader)
    lines = text.splitlines()
    head_ends = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    return dict(_comments(node, lines, "", head_ends)) if isinstance(node, yaml.MappingNode) else {}


def _comments(node: yaml.MappingNode, lines: list[str], prefix: str, first: int) -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        dotted = f"{prefix}{key.value}"
        if comment := _after(key, value, lines) or _above(key, lines, first):
            yield dotted, comment
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _comments(value, lines, f"{dotted}.", first)


def _after(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    is_below = is_block or (isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"))
    end = key.end_mark if is_below else value.end_mark
    number, column = end.line, end.column
    found = re.search(r"(?:^|\s)#", lines[number][column:]) if number < len(lines) else None
    if found is None or (not is_below and lines[number][column : column + found.start()].strip()):
        return ""
    column += found.end() - 1
    below = takewhile(lambda line: line[column : column + 1] == "#" and not line[:column].strip(), lines[number + 1 :])
    return " ".join(one.strip().lstrip("#").strip() for one in (lines[number][column:], *below))


def _above(key: yaml.Node, lines: list[str], first: int) -> str:
    column, above = key.start_mark.column, lines[first + 1 : key.start_mark.line]
    said = takewhile(lambda line: line.find("#") == column and not line[:column].strip(), reversed(above))
    return " ".join(reversed([line.strip().lstrip("#").strip() for line in said]))
