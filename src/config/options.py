"""Option files of conf/ and of users' own folders: where they are, what one holds, which can't be read. No torch here.

A folder may hold anything beside options: pipes, links to what is not there, files that nobody may read, and YAML that
would end the process of whoever parses it. One walk finds option files and one reader opens them, so that what nobody
chose costs a warning at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from src.records import LARGEST_YAML_BYTES, MOST_YAML_VALUES, count_values, read_bytes

GLOBAL_GROUPS = ("debug", "experiment")
"""Groups whose options reach into other sections; the later wins over the earlier."""
PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONF = PROJECT_ROOT / "conf"
DEEPEST = 50
"""Levels that the values of a file may be nested: more than any has, and few enough for all that read them."""
LONGEST_LINE = 80
"""Characters that are shown of a line."""
MOST_ENTRIES = 50_000
"""Files and folders that a folder of options may hold, those in its folders included."""
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built in


class OptionFileError(Exception):
    """An option file can't be read; the message says which, where and why."""


def shown(file: Path) -> str:
    """Return a file's path as a message tells it: from the project's root where it is in there."""
    return os.path.relpath(file, PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else str(file)


class _Loader(YamlLoader):
    """YAML's loader, which knows at which node it is."""

    at: yaml.Node | None = None

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        self.at = node
        return super().construct_object(node, deep)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is none of options: editors and other programs name theirs so."""
    return name.startswith(".")


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each file and folder in a folder and below, and whether it is a folder; nothing that is hidden.

    Links are followed, but not in a circle; a folder that can't be listed is passed over.
    """
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        place, above = waiting.pop()
        try:
            found = os.stat(place)
            with os.scandir(place) as listed:
                entries = list(listed)
        except OSError:
            continue
        itself = (found.st_dev, found.st_ino)
        if itself in above:
            continue
        for entry in entries:
            if not is_hidden(entry.name):
                is_folder = entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))
                yield Path(entry), is_folder
                if is_folder:
                    waiting.append((Path(entry), above | {itself}))


def option_files(folder: Path) -> list[Path]:
    """Return the option files in a folder and below, sorted, whether they can be read or not."""
    return sorted(place for place, is_folder in _entries(folder) if place.suffix == ".yaml" and not is_folder)


def unfit_folder(folder: Path) -> str:
    """Return why a folder can't be one of options; '' where it can."""
    if not os.path.isdir(folder):
        return "no such folder"
    try:
        os.listdir(folder)
    except OSError as error:
        return f"it can't be listed: {error.strerror}"
    if next(islice(_entries(folder), MOST_ENTRIES, None), None) is not None:
        return f"more than {MOST_ENTRIES:,} files and folders; options need a folder of their own"
    return ""


def read_option(file: Path) -> dict[str, Any]:
    """Return the keys that an option file holds; an empty one has none.

    Raises:
        OptionFileError: naming file, line and column, and showing the line.
    """
    text = option_text(file)
    loader = _Loader(text)
    try:
        return loader.get_single_data() or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        assert mark is not None
        raise _located(file, text, mark.line, mark.column, str(error.problem)) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # a tag that a value is not of
        assert loader.at is not None
        tag = loader.at.tag.rpartition(":")[2]
        reason = "a whole number with too many digits" if "digits" in str(error) else f"no value of !!{tag}"
        raise _at(loader.at, file, text, reason) from error
    finally:
        loader.dispose()


def parents_of(content: Mapping[str, Any], file: Path, group: str) -> Iterator[Path]:
    """Yield the files that an option of a group builds on, as far as they belong to that group.

    Args:
        content: what the option's file holds.
    """
    inside = next((one for one in file.parents if one.name == Path(group).name), file.parent)
    root = inside.parents[len(Path(group).parts) - 1]
    entries = content.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, str) or not (name := entry.partition("@")[0]) or name == "_self_":
            continue
        parent = root / f"{name.strip('/')}.yaml" if name.startswith("/") else file.parent / f"{name}.yaml"
        if parent.is_relative_to(root / group) and parent != file:
            yield parent


def option_text(file: Path) -> str:
    """Return the text of an option file that is good YAML: a mapping, not nested too deep, and no key twice.

    Raises:
        OptionFileError: naming file, line and column, and showing the line.
    """
    text = ""
    try:
        text = read_bytes(file, LARGEST_YAML_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
        _check_size(file, text)
        node = yaml.compose(text, YamlLoader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n")
        column = error.start - error.object.rfind(b"\n", 0, error.start) - 1
        text = error.object.decode(errors="replace")
        raise _located(file, text, line, column, "not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        if mark is None:  # of a character that YAML does not allow
            position, found = getattr(error, "position", None), getattr(error, "reason", "")
            before = text[:position] if isinstance(position, int) else ""
            column = len(before) - before.rfind("\n") - 1
            raise _located(file, text, before.count("\n"), column, found or " ".join(str(error).split())) from error
        raise _located(
            file, text, mark.line, mark.column, _explained(reason or str(error), text[mark.index :])
        ) from error
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise OptionFileError(f"{shown(file)}: {reason}") from error
    if node is not None:
        _check(node, file, text)
    return text


def _check_size(file: Path, text: str) -> None:
    """Raise OptionFileError where values are nested too deep (parsed whole they overflow C's stack) or too many."""
    depth = num_values = 0
    for event in yaml.parse(text, YamlLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            depth += isinstance(event, yaml.CollectionStartEvent)
            num_values += 1
            if depth > DEEPEST or num_values > MOST_YAML_VALUES:
                reason = (
                    f"nested more than {DEEPEST} deep" if depth > DEEPEST else f"more than {num_values - 1:,} values"
                )
                mark = event.start_mark
                assert mark is not None
                raise _located(file, text, mark.line, mark.column, reason)


def _explained(reason: str, rest: str) -> str:
    """Return what is wrong in YAML's words, with what mostly mends it. `rest` is the file from there on."""
    if rest.startswith("\t"):
        return "a tab, where YAML indents with spaces"
    remedies = {
        "mapping values are not allowed": "a text with ': ' needs quotes, and keys of one level the same indentation",
        "that cannot start any token": "a text that begins with it needs quotes",
        "expected <block end>": "keys of one level need the same indentation",
        "did not find expected": "keys of one level need the same indentation, and brackets and quotes their ends",
        "could not find expected ':'": "a key needs ': ' behind it",
    }
    remedy = next((text for words, text in remedies.items() if words in reason), "")
    return f"{reason} ({remedy})" if remedy else reason


def _located(file: Path, text: str, line: int, column: int, reason: str) -> OptionFileError:
    """Return the error of a place in a file. `line` and `column` count from 0."""
    lines = text.split("\n")
    at = lines[line].strip() if line < len(lines) else ""
    seen = f", in the line: {at if len(at) <= LONGEST_LINE else at[:LONGEST_LINE] + '…'}" if at else ""
    return OptionFileError(f"{shown(file)}, line {line + 1}, column {column + 1}: {reason}{seen}")


def broken_options(roots: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with each option file that can't be read."""
    for root in roots:
        for file in option_files(root):
            try:
                read_option(file)
            except OptionFileError as error:
                yield str(error)


def _check(node: yaml.Node, file: Path, text: str) -> None:
    """Raise OptionFileError where a file holds no mapping, a key twice, or values that are nested too deep."""
    if not isinstance(node, yaml.MappingNode) and node.tag != "tag:yaml.org,2002:null":
        raise _at(node, file, text, "no keys with values (KEY: VALUE)")
    level = [node]
    for _ in range(DEEPEST):
        inner: list[yaml.Node] = []
        for one in level:
            if isinstance(one, yaml.MappingNode):
                _check_keys(one, file, text)
                inner += [value for _, value in one.value]
            elif isinstance(one, yaml.SequenceNode):
                inner += one.value
        level = list({id(one): one for one in inner}.values())  # aliases that multiply are looked at once
    if level:
        raise _at(level[0], file, text, f"nested more than {DEEPEST} deep")
    try:
        count_values(node)
    except ValueError as error:
        raise OptionFileError(f"{shown(file)}, {error}") from error


def _check_keys(node: yaml.MappingNode, file: Path, text: str) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise _at(key, file, text, f"the key {key.value} a second time")
            seen.add(key.value)


def _at(node: yaml.Node, file: Path, text: str, reason: str) -> OptionFileError:
    return _located(file, text, node.start_mark.line, node.start_mark.column, reason)
