"""Files that Towline writes and reads back: each is read completely, or refused by name.

A file may be damaged in any way when it is read again: cut, overwritten, another file, no file at all. One reader
checks its kind before it is opened, its size before it is read, and its content before it is used. What it refuses is
never removed or overwritten.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import xxhash
import yaml

from src.errors import DamagedFileError, one_line

LARGEST_BYTES = 1 << 28  # of a file that is read at once; those that Towline writes are a thousand times smaller
LARGEST_YAML_BYTES = 1 << 22
CHUNK_BYTES = 1 << 22
MOST_YAML_VALUES = 200_000
"""The limit of values in a YAML file with its aliases expanded: a few lines of them can stand for billions."""
TAG = "tag:yaml.org,2002:"  # the prefix of the names of YAML's own types
PLAIN_KINDS: Mapping[type[yaml.Node], Collection[str]] = {
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
    yaml.SequenceNode: ("seq",),
    yaml.MappingNode: ("map",),
}
"""YAML's types that JSON has too, by the kind of node."""
MOST_DIGITS = 308  # of an integer: a float can have as many
DEEPEST = 100  # nested lists and mappings

Types = type | tuple[type, ...]
NUMBER = (int, float)
OPTIONAL_TEXT = (str, type(None))


class LogLine(NamedTuple):
    """A line of a file that grows: its content, and its bytes with the end of the line."""

    content: dict[str, Any]
    raw: bytes


def read_json(
    file: Path, keys: Mapping[str, Types] | None = None, *, optional: Collection[str] = (), remedy: str = ""
) -> dict[str, Any]:
    """Return the object in a JSON file; DamagedFileError names the file, what is wrong with it, and the remedy.

    Args:
        keys: the types of its keys; other keys may hold anything.
        optional: keys that may be missing.
    Raises:
        FileNotFoundError: where there is no such file.
    """
    try:
        content = parse(read_bytes(file))
        check_keys(content, keys or {}, optional)
    except ValueError as error:
        raise damaged(file, str(error), remedy) from error
    return content


def read_yaml(file: Path, remedy: str = "") -> dict[str, Any]:
    """Return the mapping in a YAML file, of types that JSON has too: its keys are texts, and no value is a date.

    Aliases that refer to themselves or multiply are refused. Raises as `read_json`.
    """
    try:
        return _parse_yaml(read_bytes(file, LARGEST_YAML_BYTES).decode())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise damaged(file, f"{place}{problem}", remedy) from error
    except (ValueError, TypeError) as error:  # TypeError: a key that can't be one
        raise damaged(file, one_line(error, 200), remedy) from error
    except RecursionError as error:
        raise damaged(file, f"values are nested more than {DEEPEST} deep", remedy) from error


def _parse_yaml(text: str) -> dict[str, Any]:
    """Return the mapping in YAML text; raises what `read_yaml` explains."""
    node = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("no mapping of keys to values")
    counts: dict[yaml.Node, int | None] = {}
    count_values(node, counts)
    for one in counts:
        _check_kind(one)
    content: dict[str, Any] = yaml.SafeLoader("").construct_document(node)
    return content


_parse_part = lru_cache(maxsize=10_000)(_parse_yaml)
_PARTS = re.compile(r"^(?=[A-Za-z_]\w*:)", re.MULTILINE)


def read_similar_yaml(file: Path, remedy: str = "") -> dict[str, Any]:
    """Return what `read_yaml` does, fast for many files that have most of their sections in common.

    The sections may be shared with other files: they are not to be changed.
    """
    with suppress(yaml.YAMLError, ValueError, TypeError, RecursionError):  # a part refers to another, or is damaged
        before, *parts = _PARTS.split(read_bytes(file, LARGEST_YAML_BYTES).decode())
        if parts and not before:
            return {key: value for part in parts for key, value in _parse_part(part).items()}
    return read_yaml(file, remedy)


def read_lines(
    file: Path, check: Callable[[dict[str, Any], dict[str, Any] | None], None] | None = None, *, remedy: str = ""
) -> list[LogLine]:
    """Return the lines of a file that grows, without a last one that was not finished; [] where there is no file.

    Args:
        check: called with a line and the one before it; raises ValueError where it does not belong to this file.
        remedy: what DamagedFileError, which names file and line, says to do; `{number}` stands for the line's number.
    """
    try:
        *complete, _incomplete = read_bytes(file, None).split(b"\n")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise damaged(file, str(error), "Nothing was changed: restore it from a copy") from error
    lines: list[LogLine] = []
    for number, raw in enumerate(complete, 1):
        try:
            content = parse(raw)
            if check is not None:
                check(content, lines[-1].content if lines else None)
        except ValueError as error:
            raise damaged(file, f"line {number}: {error}", remedy.replace("{number}", str(number))) from error
        lines.append(LogLine(content, raw + b"\n"))
    return lines


def read_bytes(file: Path, most: int | None = LARGEST_BYTES) -> bytes:
    """Return the content of a plain file; ValueError where it is none, can't be read, or has more than `most` bytes.

    FileNotFoundError where there is no such file.
    """
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever, a device may have no end
            raise ValueError("not a plain file")
        if most is not None and found.st_size > most:
            raise ValueError(f"{found.st_size:,} bytes, where {most:,} are the most")
        return file.read_bytes()
    except FileNotFoundError:
        if file.is_symlink():
            raise ValueError("a dangling link") from None
        raise
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror}") from error


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; [] where there is none, ValueError where it can't be read."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise ValueError("a dangling link") from None
        return []
    except OSError as error:
        raise ValueError(str(error.strerror)) from error


def check_plain(file: Path, remedy: str = "") -> None:
    """Raise DamagedFileError where a file is a pipe, a folder, a dangling link, or can't be looked at."""
    try:
        reason = "" if stat.S_ISREG(os.stat(file).st_mode) else "not a plain file"
    except FileNotFoundError:
        reason = "a dangling link" if file.is_symlink() else ""
    except OSError as error:
        reason = f"it can't be read: {error.strerror}"
    if reason:
        raise damaged(file, reason, remedy)


def check_keys(content: Mapping[str, Any], keys: Mapping[str, Types], optional: Collection[str] = ()) -> None:
    """Raise ValueError naming the first key that an object lacks, or that has a value of another type."""
    for key, types in keys.items():
        if key not in content:
            if key not in optional:
                raise ValueError(f"{key} is missing")
        elif not _is_of(content[key], types):
            raise ValueError(f"{key} can't be {_short(content[key])}")


def check_times(file: Path, content: Mapping[str, Any], keys: Collection[str], remedy: str = "") -> None:
    """Raise DamagedFileError naming the first of these keys that has a value which is no time, as `is_time`."""
    for key in keys:
        if content.get(key) is not None and not is_time(content[key]):
            raise damaged(file, f"{key} can't be {_short(content[key])}, which is no time", remedy)


def is_time(value: Any) -> bool:
    """Return whether a value is a time as text: ISO 8601, since 1970."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).timestamp() >= 0
    except (ValueError, OverflowError, OSError):
        return False


def damaged(file: Path, reason: str, remedy: str) -> DamagedFileError:
    """Return the error for a file that can't be used."""
    return DamagedFileError(f"{file} is damaged: {reason}.{f' {remedy}' if remedy else ''}")


class Digest:
    """Size and hash of a file that grows, updated as it is written."""

    def __init__(self, content: bytes = b"") -> None:
        self.num_bytes = 0
        self._hash = xxhash.xxh3_128()
        self.add(content)

    def add(self, content: bytes) -> None:
        self.num_bytes += len(content)
        self._hash.update(content)

    def as_dict(self) -> dict[str, Any]:
        return {"num_bytes": self.num_bytes, "xxh3_128": self._hash.hexdigest()}


def file_digest(file: Path) -> dict[str, Any]:
    """Return size and checksum of a file's content, as `Digest.as_dict`."""
    digest = Digest()
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.add(chunk)
    return digest.as_dict()


def begins_with(content: bytes, digest: object) -> bool:
    """Return whether a file's first bytes have this digest; False where it is no digest."""
    return is_digest(digest) and Digest(content[: digest["num_bytes"]]).as_dict() == dict(digest)


def is_digest(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a digest, as `Digest.as_dict`."""
    if not isinstance(value, Mapping) or value.keys() != {"num_bytes", "xxh3_128"}:
        return False
    return _is_of(value["xxh3_128"], str) and _is_of(value["num_bytes"], int) and value["num_bytes"] >= 0


def parse(raw: bytes) -> dict[str, Any]:
    """Return the object in JSON text; ValueError where there is none."""
    try:
        content = json.loads(raw.decode(), parse_constant=_no_number, parse_float=_float, parse_int=_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"no text: byte {error.start} is {raw[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg}, at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError(f"values are nested more than {DEEPEST} deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"no JSON object but {_short(content)}")
    _check_depth(content)
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number that can be read")


def _float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def _int(digits: str) -> int:
    return int(digits) if len(digits) <= MOST_DIGITS else int(_no_number(f"{digits[:20]}…"))


def _check_depth(node: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"values are nested more than {DEEPEST} deep")
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, dict | list):
                _check_depth(value, depth + 1)


def count_values(node: yaml.Node, counts: dict[yaml.Node, int | None] | None = None, depth: int = 0) -> int:
    """Return how many values a YAML node has with its aliases expanded.

    ValueError where it contains itself, is nested too deep, or has too many.

    Args:
        counts: of each node within, filled here in the order of the text; None while a node is being counted.
    """
    counts = {} if counts is None else counts
    if node in counts:
        known = counts[node]
        if known is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an anchor that holds itself")
        return known
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1}: values are nested more than {DEEPEST} deep")
    counts[node] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [one for pair in node.value for one in pair]
    count = 1 + sum(count_values(one, counts, depth + 1) for one in inner)
    if count > MOST_YAML_VALUES:
        raise ValueError(
            f"line {node.start_mark.line + 1}: more than {MOST_YAML_VALUES:,} values, with those that aliases stand for"
        )
    counts[node] = count
    return count


def _check_kind(node: yaml.Node) -> None:
    """Raise ValueError where a YAML node is no value that JSON has too, or has a key that is no text."""
    if not _is_plain(node):
        shown = _short(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        raise ValueError(f"line {node.start_mark.line + 1}: {shown} can't be of the kind {node.tag.removeprefix(TAG)}")
    keys = (key for key, _ in node.value) if isinstance(node, yaml.MappingNode) else ()
    if other := next((key for key in keys if key.tag != f"{TAG}str"), None):
        raise ValueError(f"line {other.start_mark.line + 1}: a key that is no text")


def _is_plain(node: yaml.Node) -> bool:
    """Return whether a YAML value has a type that JSON has, and can be read as that type."""
    if node.tag.removeprefix(TAG) not in PLAIN_KINDS[type(node)]:
        return False
    if not isinstance(node, yaml.ScalarNode) or node.tag == f"{TAG}str":
        return True
    try:
        yaml.SafeLoader("").construct_object(node)
    except (ValueError, LookupError, ArithmeticError):
        return False
    return True


def _is_of(value: Any, types: Types) -> bool:
    allowed = types if isinstance(types, tuple) else (types,)
    return isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"
