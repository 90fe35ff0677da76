"""How a record becomes a prompt and a completion: a pure function a format, and the forms a thought can take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from src.config.schema import PLACEHOLDER, DataConfig, RunConfig


@dataclass(frozen=True)
class Example:
    """A prompt, the completion that is learned, and the same completion without thoughts, to compare answers with."""

    prompt: str
    completion: str
    reference: str


class BadRow(Exception):
    """A record that doesn't have what its format needs; the message says what."""


@dataclass(frozen=True)
class ThoughtForm:
    """How thoughts are found in the data and how they are written for the model.

    `pattern` finds a thought, its first group is the thought itself; with `tags` it is written between them, without
    it is left out.
    """

    pattern: re.Pattern[str] | None
    tags: tuple[str, str] | None

    def keep(self, text: str) -> str:
        """Write every thought between the tags."""
        if self.pattern is None or self.tags is None:
            return self.drop(text)
        opened, closed = self.tags
        return self.pattern.sub(lambda match: f"{opened}{match.group(1) or ''}{closed}", text)

    def drop(self, text: str) -> str:
        """Leave every thought out."""
        return text if self.pattern is None else self.pattern.sub("", text)


def thought_form(config: RunConfig) -> ThoughtForm:
    """Take the form of thoughts from data and tokens."""
    pattern = config.data.thought_pattern
    return ThoughtForm(re.compile(pattern, re.DOTALL) if pattern is not None else None, config.thought_tags)


def prompt_completion(fields: dict[str, Any], data: DataConfig, thoughts: ThoughtForm) -> Example:
    """Two texts: `columns` names their fields, the templates put words around them.

    Raises:
        BadRow: where a field is missing, no text, or the completion is empty.
    """
    parts = {role: _text(fields, column, role) for role, column in data.columns.items()}
    prompt = fill(data.prompt_template, parts) if data.prompt_template is not None else parts["prompt"]
    if not parts["completion"]:
        raise BadRow(f"{data.columns['completion']!r} is empty: nothing to learn")

    def completion(text: str) -> str:
        filled = parts | {"completion": text}
        return fill(data.completion_template, filled) if data.completion_template is not None else text

    return Example(
        prompt=prompt,
        completion=completion(thoughts.keep(parts["completion"])),
        reference=completion(thoughts.drop(parts["completion"])),
    )


def _text(fields: dict[str, Any], column: str, role: str) -> str:
    if column not in fields:
        there = ", ".join(map(repr, fields)) or "none"
        raise BadRow(f"no field {column!r}; there are {there} (name yours with data.columns.{role}=FIELD)")
    value = fields[column]
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {'null' if value is None else type(value).__name__}, not a text")
    return value


def fill(template: str, parts: dict[str, str]) -> str:
    """Put the parts in place of {their names}; braces in the parts themselves mean nothing."""
    return PLACEHOLDER.sub(lambda match: parts[match.group(1)], template)


FORMATS: dict[str, Callable[[dict[str, Any], DataConfig, ThoughtForm], Example]] = {
    "prompt_completion": prompt_completion,
}
