"""Option files of conf/ and of users' own folders: where they are, what one holds, which can't be read.

A folder may hold anything besides options: pipes, links to what is not there, files that nobody may read, and YAML that
would end the process of whoever parses it. One walk finds option files and one reader opens them, so that what nobody
chose costs a warning at most.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from src.records import LARGEST_YAML_BYTES, MOST_YAML_VALUES, PLAIN_KINDS, TAG, count_values, read_bytes

GLOBAL_GROUPS = ("debug", "experiment")
"""Groups whose options reach into other sections; the later wins over the earlier."""
PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONF = PROJECT_ROOT / "conf"
DEEPEST = 50
"""Levels that the values of a file may be nested: more than any has, and few enough for all that read them."""
LONGEST_LINE = 80
"""Characters that are shown of a line."""
MERGE = f"{TAG}merge"
"""The kind of `<<`, which takes the keys of other mappings in."""
MOST_ENTRIES = 50_000
"""Files and folders that a folder of options may hold, those in its folders included."""
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built in
_CONSTRUCTOR = yaml.constructor.SafeConstructor()


class OptionFileError(Exception):
    """An option file can't be read; the message says which, where and why."""


def shown(file: Path) -> str:
    """Return a file's path as messages show it: from the project's root where it is in there."""
    return os.path.relpath(file, PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else str(file)


class _Loader(YamlLoader):
    """YAML's loader, which takes the same texts for numbers as OmegaConf does, and none for a time."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers


@dataclass(frozen=True)
class KeyPosition:
    """Where a key stands in a file, from line 1, and its value as it is written there; None of a list or mapping."""

    file: Path
    line: int
    value: str | None

    def __str__(self) -> str:
        return f"{shown(self.file)}, line {self.line}"


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


def options(group: str, roots: Sequence[Path]) -> list[str]:
    """Return a group's options, those in folders of its own included (`mine/a`).

    A file or folder whose name begins with '_' is only built on, and one whose name begins with '.' is none.
    """
    files = [file.relative_to(root / group) for root in roots for file in option_files(root / group)]
    names = {file.with_suffix("").as_posix() for file in files if not any(part.startswith("_") for part in file.parts)}
    return sorted(names)


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

    OptionFileError names file, line and column, and shows the line.
    """
    text, node = _read(file)
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:  # of what `<<` merges in
        raise _marked(file, text, error) from error
    finally:
        loader.dispose()


def find_key(file: Path, parts: Sequence[str]) -> KeyPosition | None:
    """Return where a file has the key at the end of a way through its mappings; None where it has none.

    OptionFileError says why the file can't be read.
    """
    if (found := _descend(_read(file)[1], parts)) is None:
        return None
    key, value = found
    return KeyPosition(file, key.start_mark.line + 1, value.value if isinstance(value, yaml.ScalarNode) else None)


def error_at(file: Path, parts: Sequence[str], reason: str) -> OptionFileError:
    """Return the error of a key in a file that can be read; of the whole file, where it has no such key."""
    text, node = _read(file)
    found = _descend(node, parts)
    return OptionFileError(f"{shown(file)}: {reason}") if found is None else _at(found[0], file, text, reason)


def error_in_defaults(file: Path, number: int, reason: str) -> OptionFileError:
    """Return the error of an entry of a file's `defaults`, counted from 0."""
    text, node = _read(file)
    found = _descend(node, ["defaults"])
    assert found is not None
    return _at(found[1].value[number], file, text, reason)


def error_of_text(file: Path, reason_of: Callable[[str], str]) -> OptionFileError | None:
    """Return the error of the first value in a file that is a text with something wrong; None where none is."""
    text, node = _read(file)
    waiting: list[yaml.Node] = [node]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, yaml.MappingNode):
            waiting += [value for _, value in reversed(inner.value)]
        elif isinstance(inner, yaml.SequenceNode):
            waiting += reversed(inner.value)
        elif inner.tag == f"{TAG}str" and (reason := reason_of(inner.value)):
            return _at(inner, file, text, reason)
    return None


def _descend(node: yaml.Node, parts: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the nodes of a key and its value at the end of a way through mappings, those merged in included."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for length in range(1, len(parts) + 1):  # a key may be written with dots
        name, rest = ".".join(parts[:length]), parts[length:]
        for key, value in node.value:
            if key.value == name and (found := _descend(value, rest) if rest else (key, value)):
                return found
    for key, value in node.value:
        if key.tag == MERGE:
            inner = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if found := next(filter(None, (_descend(child, parts) for child in inner)), None):
                return found
    return None


def option_text(file: Path) -> str:
    """Return the text of an option file that is good YAML; OptionFileError is raised as by `read_option`."""
    return _read(file)[0]


def _read(file: Path) -> tuple[str, yaml.MappingNode]:
    """Return text and nodes of an option file that is good YAML; OptionFileError is raised as by `read_option`.

    That is a mapping with texts as keys, none of them twice, of values as JSON has them, not nested too deep.
    """
    try:
        found = file.stat()
    except (OSError, ValueError):
        return _parsed(file, 0, 0)  # which raises the reason
    return _parsed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=200)
def _parsed(file: Path, changed: int, size: int) -> tuple[str, yaml.MappingNode]:
    """Do what `_read` does, once for a file as long as it stays what it is."""
    text = ""
    try:
        text = read_bytes(file, LARGEST_YAML_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
        _check_size(file, text)
        node = yaml.compose(text, _Loader)
    except UnicodeDecodeError as error:
        *above, line = error.object[: error.start].split(b"\n")
        text = error.object.decode(errors="replace")
        raise _located(file, text, len(above), len(line), "not text in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        raise _marked(file, text, error) from error
    except yaml.YAMLError as error:  # of a character that YAML does not allow
        *lines_above, before = text[: getattr(error, "position", None) or 0].split("\n")
        reason = getattr(error, "reason", "") or " ".join(str(error).split())
        raise _located(file, text, len(lines_above), len(before), reason) from error
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise OptionFileError(f"{shown(file)}: {reason}") from error
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == f"{TAG}null"):
        return text, yaml.MappingNode(f"{TAG}map", [])
    if not isinstance(node, yaml.MappingNode):
        raise _at(node, file, text, "no keys with values (KEY: VALUE)")
    _check(node, file, text)
    return text, node


def _marked(file: Path, text: str, error: yaml.MarkedYAMLError) -> OptionFileError:
    """Return the error of what YAML can't parse; of what never ends, at its beginning."""
    mark, begins = error.problem_mark, error.context_mark
    assert mark is not None
    if begins is not None and not text[mark.index :].strip():
        opened = text[begins.index : begins.index + 1]
        words = f"{opened} without its end" if opened in ("[", "{", "'", '"') else str(error.problem)
        return _located(file, text, begins.line, begins.column, words)
    return _located(file, text, mark.line, mark.column, _explained(str(error.problem), text[mark.index :]))


def _check_size(file: Path, text: str) -> None:
    """Raise OptionFileError where values are nested too deep (parsed whole they overflow C's stack) or too many."""
    depth = num_values = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            depth += isinstance(event, yaml.CollectionStartEvent)
            num_values += 1
            if depth > DEEPEST or num_values > MOST_YAML_VALUES:
                too_many = f"more than {MOST_YAML_VALUES:,} values"
                reason = f"nested more than {DEEPEST} deep" if depth > DEEPEST else too_many
                mark = event.start_mark
                assert mark is not None
                raise _located(file, text, mark.line, mark.column, reason)


def _explained(reason: str, rest: str) -> str:
    """Return what is wrong in YAML's words, with what mostly fixes it. `rest` is the file from there on."""
    if rest.startswith("\t"):
        return "a tab, where YAML indents with spaces"
    remedies = {
        "mapping values are not allowed": "a text with ': ' needs quotes, and keys of one level the same indentation",
        "that cannot start any token": "a text that begins with it needs quotes",
        "expected <block end>": "keys of one level need the same indentation",
        "did not find expected": "keys of one level need the same indentation, and brackets and quotes their ends",
        "could not find expected ':'": "a key needs ': ' after it",
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


def _check(node: yaml.MappingNode, file: Path, text: str) -> None:
    """Raise OptionFileError where a file has a key or a value that there can't be."""
    level: list[yaml.Node] = [node]
    for _ in range(DEEPEST):
        inner: list[yaml.Node] = []
        for child in level:
            if reason := _unlike_its_tag(child):
                raise _at(child, file, text, reason)
            if isinstance(child, yaml.MappingNode):
                _check_keys(child, file, text)
                inner += [value for _, value in child.value]
            elif isinstance(child, yaml.SequenceNode):
                inner += child.value
        level = list({id(child): child for child in inner}.values())  # aliases that multiply are looked at once
    if level:
        raise _at(level[0], file, text, f"nested more than {DEEPEST} deep")
    try:
        count_values(node)
    except ValueError as error:
        raise OptionFileError(f"{shown(file)}, {error}") from error
    if (defaults := _descend(node, ["defaults"])) is not None:
        _check_defaults(defaults[1], file, text)


def _unlike_its_tag(node: yaml.Node) -> str:
    """Return why a value can't be what its tag says; '' where it can."""
    kind = node.tag.removeprefix(TAG)
    if kind not in PLAIN_KINDS[type(node)]:
        what = f"no value of {f'!!{kind}' if node.tag.startswith(TAG) else kind}"
        there_are = "a file has texts, numbers, true, false, null, lists and mappings; quotes make a text"
        return what if kind in PLAIN_KINDS[yaml.ScalarNode] else f"{what}: {there_are}"
    if isinstance(node, yaml.ScalarNode) and kind != "str":
        try:
            _CONSTRUCTOR.yaml_constructors[node.tag](_CONSTRUCTOR, node)
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            return "a whole number with too many digits" if "digits" in str(error) else f"no value of !!{kind}"
    return ""


def _check_keys(node: yaml.MappingNode, file: Path, text: str) -> None:
    seen = set()
    for key, _ in node.value:
        if key.tag == MERGE:
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise _at(key, file, text, "a list or mapping as a key, where keys are texts")
        if key.tag != f"{TAG}str":
            kind = key.tag.removeprefix(TAG)
            raise _at(key, file, text, f"a key that is no text, but what YAML calls {kind}: write '{key.value}'")
        if key.value in seen:
            raise _at(key, file, text, f"the key {key.value} a second time")
        seen.add(key.value)


def _check_defaults(node: yaml.Node, file: Path, text: str) -> None:
    """Raise OptionFileError where `defaults` is no list of options, whatever options there are."""
    if not isinstance(node, yaml.SequenceNode):
        raise _at(node, file, text, "defaults is a list, each entry of it `- NAME` or `- override /GROUP: OPTION`")
    seen, overriding = set[str](), ""
    for entry in node.value:
        if not _is_entry(entry):
            raise _at(entry, file, text, "an entry of defaults is `- NAME`, or `- override /GROUP: OPTION`")
        key = entry.value if isinstance(entry, yaml.ScalarNode) else entry.value[0][0].value
        if key == "_self_" and key in seen:
            raise _at(entry, file, text, "_self_ a second time")
        if "override" in key.split(" ")[:-1]:
            overriding = key
        elif overriding and key != "_self_":
            raise _at(entry, file, text, f"stands after `{overriding}`: entries with `override` come last")
        seen.add(key)


def _is_entry(node: yaml.Node) -> bool:
    """Return whether an entry of `defaults` is a name, or one group with the name of an option, several, or null."""
    if isinstance(node, yaml.ScalarNode):
        return node.tag == f"{TAG}str"
    if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
        return False
    value = node.value[0][1]
    names = value.value if isinstance(value, yaml.SequenceNode) else [value]
    allowed = (f"{TAG}str",) if isinstance(value, yaml.SequenceNode) else (f"{TAG}str", f"{TAG}null")
    return all(isinstance(name, yaml.ScalarNode) and name.tag in allowed for name in names)


def _at(node: yaml.Node, file: Path, text: str, reason: str) -> OptionFileError:
    return _located(file, text, node.start_mark.line, node.start_mark.column, reason)
