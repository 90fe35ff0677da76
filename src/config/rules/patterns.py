"""Regular expressions of `data` and `adapter` can be compiled."""

import re

from src.config.problems import Problem
from src.config.rules.data import sources
from src.config.rules.rule import Problems, applies_to
from src.config.schema import AdapterConfig, DataConfig, LoraConfig
from src.config.schema.fields import READING_ROWS
from src.errors import ConfigError
from src.patterns import Pattern


@applies_to("run", *READING_ROWS)
def patterns_are_regular_expressions(data: DataConfig) -> Problems:
    patterns = {f"{key}.thought_pattern": source.thought_pattern for key, source in sources(data)}
    for key, pattern in (patterns | {"data.answer_pattern": data.answer_pattern}).items():
        if pattern is None:
            continue
        if reason := _no_regular_expression(pattern):
            yield Problem(key, reason, pattern)
            continue
        compiled = re.compile(pattern)
        if compiled.groups < 1:
            yield Problem(key, "needs a group: (…) around what it is looking for", pattern)
        elif key.endswith("thought_pattern"):
            yield from _problems_of_thoughts(key, compiled)
        try:
            Pattern(key, pattern)
        except ConfigError as error:  # of the engine that applies it to rows
            yield Problem(key, str(error).partition(" is no ")[2] or str(error), pattern)


def _problems_of_thoughts(key: str, compiled: re.Pattern[str]) -> Problems:
    if compiled.groups > 1 and "thought" not in compiled.groupindex:
        reason = f"has {compiled.groups} groups, one of which is the thought: write the others as (?:…)"
        yield Problem(key, f"{reason}, or name that one, (?P<thought>…)", compiled.pattern)
    if compiled.search("") is not None:
        yield Problem(key, "can match nothing, and would find a thought before every character", compiled.pattern)


@applies_to("run")
def adapter_patterns_are_regular_expressions(adapter: AdapterConfig) -> Problems:
    if not isinstance(adapter, LoraConfig):
        return
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(adapter, key), str) and (reason := _no_regular_expression(pattern)):
            yield Problem(f"adapter.{key}", reason, pattern)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(adapter, key).items():
            if reason := _no_regular_expression(pattern):
                yield Problem(f"adapter.{key}.{pattern}", reason, value)


def _no_regular_expression(pattern: str) -> str:
    """Return why a text is no regular expression; '' where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"not a regular expression: {error}"
    except OverflowError:
        return "not a regular expression: a repetition of more than 2**32 - 2 times"
    except RecursionError:
        return "not a regular expression: its groups are nested too deep"
    return ""
