"""Small functions that every room uses: words for messages, and files that are written whole. No torch here."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def nearest(word: object, known: Iterable[str]) -> str:
    """Return the known word that is spelled most like another one; '' where none is."""
    return next(iter(get_close_matches(str(word), list(known), n=1)), "")


def did_you_mean(word: object, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """Return `; did you mean …?` with the nearest known word, as `written` in the message; '' where none is near."""
    near = nearest(word, known)
    return f"; did you mean {written(near)}?" if near else ""


def listed(lines: Sequence[str], *, most: int = 10) -> str:
    """Join the first `most` lines, indented, and say how many more there are."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def in_words(names: Iterable[str], last: str = "and") -> str:
    """Return names as an enumeration: a, b and c."""
    *before, end = list(names) or [""]
    return f"{', '.join(before)} {last} {end}" if before else end


def as_tuple(one_or_several: Any) -> tuple[Any, ...]:
    """Return the items of a list or tuple, or what is neither as the only item."""
    return tuple(one_or_several) if isinstance(one_or_several, list | tuple) else (one_or_several,)


def one_or_list(items: Sequence[Any]) -> Any:
    """Return the only item by itself, or all as a list: what `as_tuple` takes."""
    return items[0] if len(items) == 1 else list(items)


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun: 1 row, 1,024 rows; `nouns` is the plural where it is not the noun and an s."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def human_bytes(count: float) -> str:
    """Return a size in binary units: 512 B, 2.8 MiB, 14.0 GiB."""
    units = ["TiB", "GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count:.0f} B"
    while round(count) >= 1024 and units:
        count, unit = count / 1024, units.pop()
    return f"{count:.1f} {unit}"


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings on top of one another, key by key, the last one uppermost."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = result.get(key)
            result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def value_at(node: Any, key: str, default: Any = None) -> Any:
    """Return the value at a dotted key in nested mappings; the default where there is none."""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node


def load_json(path: Path) -> Any:
    """Return the content of a JSON file that was checked already; records.read_json checks one."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def replaced_when_written(path: Path) -> Iterator[Path]:
    """Yield a file to write; it takes the path's place when the block ends, so that nobody reads half of it.

    Only one process may write a path at a time: the holder of its folder's lock.
    """
    part = path.with_name(f".{path.name}.part")
    yield part
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replaced_when_written(path) as part, open(part, "w", encoding="utf-8", opener=_open_at_once) as file:
        file.write(text)


def storable(text: str) -> str:
    """Return a text that UTF-8 can hold: half of a pair of surrogates is written out, as `\\ud800`."""
    return text.encode(errors="backslashreplace").decode()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe is no place to write to: an error, not a wait


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object atomically, as `json_text`."""
    write_atomically(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return an object as the text of a file; numbers that JSON can't hold become null."""
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(node: Any) -> Any:
    """Return the values with null in place of numbers that JSON can't hold: inf and nan."""
    if isinstance(node, Mapping):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    if isinstance(node, float) and not math.isfinite(node):
        return None
    return node
