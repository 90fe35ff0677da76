"""How a record becomes a prompt and a completion, or a chat: a pure function a format, in a file of its own.

A format is `conf/data/<name>.yaml`, whose `columns` name the parts of a row that it takes; where these are more than
texts, a function `read(fields, data)` that is registered under the format's name returns a Pair or a Chat, or raises
BadRow: in `src/data/formats/<name>.py`, or in a plugin.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from src.config.formats import roles
from src.config.schema import DataConfig
from src.registry import Registry


class BadRow(Exception):
    """A record that doesn't have what its format needs; the message says what."""


class Pair(NamedTuple):
    """The parts of a row by their role, in the format's order: the first is the prompt, the last is supervised.

    A format with one role has no prompt: all of it is supervised. `unread` names the row's fields that nothing reads.
    """

    parts: dict[str, str]
    was_cleaned: bool = False
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages in turn: role, content and, of the assistant's, `reasoning_content` where it thought something.

    `is_supervised` is what the row asks for, for each assistant's message; `unread` names the keys of the row and of
    its messages that hold something and that nothing reads.
    """

    messages: list[dict[str, str]]
    is_supervised: list[bool]
    unread: tuple[str, ...] = ()


Format = Callable[[dict[str, Any], DataConfig], Pair | Chat]

FORMATS = Registry[Format]("format")
"""`data.format` -> the function that reads its rows; a format without one takes texts."""


def load_format(name: str) -> Format:
    """Return a format's function; one that registers none reads texts."""
    if name not in FORMATS and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        importlib.import_module(f"{__name__}.{name}")
    return FORMATS.get(name, read_texts)


def read_texts(fields: dict[str, Any], data: DataConfig) -> Pair:
    """Return the texts that `data.columns` names; BadRow where one is missing or no text, or the last is empty."""
    parts = {role: text_field(fields, data.columns[role], role) for role in roles(data.format)}
    role = roles(data.format)[-1]
    if not parts[role]:
        raise BadRow(f"{data.columns[role]!r} is empty: nothing to train on")
    return Pair(parts, unread=tuple(unread_fields(fields, [*data.columns.values(), data.group_column or ""])))


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: null, a blank text, an empty list, or a struct of such values.

    Tables such as Parquet fill what a record lacks with these.
    """
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    return value is None or (isinstance(value, list | tuple) and not value)


def unread_fields(fields: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return the names of the fields that hold something and are not among those that are read."""
    return [name for name, value in fields.items() if name not in read and not is_blank(value)]


def text_field(fields: dict[str, Any], column: str, role: str) -> str:
    """Return one field, which must be a text; BadRow where it is missing or something else."""
    value = field(fields, column, f"data.columns.{role}")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {type_name(value)}, not a text")
    return value


def field(fields: dict[str, Any], column: str, key: str) -> Any:
    """Return one field; BadRow where it is missing. `key` is the one that names it."""
    if column in fields:
        return fields[column]
    there = ", ".join(map(repr, fields)) or "none"
    raise BadRow(f"no field {column!r}; there are {there} (name yours with {key}=FIELD)")


TYPE_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
TYPE_NAMES |= dict.fromkeys((int, float), "a number")


def type_name(value: Any) -> str:
    """Return the type of a value, in the words of the file rather than Python's."""
    return TYPE_NAMES.get(type(value), type(value).__name__)
