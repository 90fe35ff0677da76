"""Sections of plain containers become the schema's dataclasses, or problems: all that there are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from src.config import schema as schema_module
from src.config.hints import UnknownKey
from src.config.plugins import Unregistered
from src.config.problems import Problem
from src.config.schema import SECTIONS, Check, Keys, TopLevelConfig
from src.config.schema.checks import RegisteredCheck
from src.config.schema.fields import later_default
from src.config.values import convert, described, hints_of
from src.registry import Registry
from src.util import did_you_mean


class Missing(Problem):
    """A key or a section that a configuration does not have."""


@dataclass
class Parsed:
    """A section's typed object, where it could be built, and the problems met on the way."""

    value: Any = None
    problems: list[Problem] = field(default_factory=list)


def parse_sections(sections: dict[str, Any]) -> tuple[dict[str, Parsed], list[Problem]]:
    """Parse every section by its own; `top` has the keys outside any section."""
    parsed = {"top": parse_section(TopLevelConfig, {k: v for k, v in sections.items() if k not in SECTIONS}, "")}
    for name, schema in SECTIONS.items():
        if name not in sections:
            parsed[name] = Parsed(None, [Missing(name, "this section is missing", has_value=False)])
            continue
        given = sections[name]
        if isinstance(given, dict) and isinstance(schema, dict):
            kind = given.get("type")
            if not isinstance(kind, str) or kind not in schema:
                parsed[name] = Parsed(None, [_unknown_type(name, schema, given)])
                continue
            schema = schema[kind]
        parsed[name] = parse_section(schema, given, name)
    return parsed, [problem for part in parsed.values() for problem in part.problems]


def _unknown_type(section: str, schema: Mapping[str, Any], given: Mapping[str, Any]) -> Problem:
    """Return the problem of a section whose `type` is missing, or names none of its dataclasses."""
    key, kind, choose = f"{section}.type", given.get("type"), f"; choose with {section}=…"
    if isinstance(schema, Registry) and isinstance(kind, str):
        return Unregistered(key, schema.why_unknown(kind, choose), kind)
    return (Problem if "type" in given else Missing)(key, f"not one of {', '.join(schema)}{choose}", kind)


def parse_section(schema: Any, given: Any, prefix: str) -> Parsed:
    """Hold one mapping against one dataclass, key by key, so that every problem is found."""
    parsed = Parsed()
    if not isinstance(given, dict):
        below = "; its keys have to be indented below it" if given is None else ""
        parsed.problems.append(Problem(prefix, f"a section of keys, not a value{below}", given))
        return parsed
    hints = hints_of(schema)
    rules_of = {one.name: one.metadata for one in dataclasses.fields(schema)}
    values = {}
    complete = True
    for key, value in given.items():
        if key not in hints:
            parsed.problems.append(UnknownKey(dotted(prefix, key), "unknown key", value, siblings=tuple(hints)))
            continue
        part = _parse_value(schema, key, hints[key], rules_of[key].get("check"), value, prefix)
        if (each := rules_of[key].get("each")) and not part.problems and value is not None:
            part = _parse_each(getattr(schema_module, each), value, dotted(prefix, key))
        if (form := rules_of[key].get("form")) and not part.problems and value is not None:
            part = parse_section(getattr(schema_module, form), value, dotted(prefix, key))
        if (inner := rules_of[key].get("inner")) and isinstance(value, dict):
            part.problems += _check_inner(inner, value, dotted(prefix, key))
        parsed.problems += part.problems
        complete = complete and not part.problems
        values[key] = part.value
    later = {one.name for one in dataclasses.fields(schema) if later_default(one) != MISSING}
    for key in (key for key in hints if key not in given and key not in later):
        parsed.problems.append(Missing(dotted(prefix, key), "is missing", has_value=False))
        complete = False
    if complete:
        parsed.value = schema(**values)
    return parsed


def _parse_each(schema: Any, given: dict[str, dict[Any, Any]], prefix: str) -> Parsed:
    """Hold each value of a mapping against a dataclass whose keys may all be left out, and stay so."""
    parsed = Parsed({})
    for name, one in given.items():
        defaults = dict.fromkeys(hints_of(schema))
        part = parse_section(schema, defaults | one, dotted(prefix, name))
        parsed.problems += part.problems
        if part.value is not None and not part.problems:
            parsed.value[name] = {key: getattr(part.value, key) for key in one}
    return parsed


def _check_inner(known: Keys, given: dict[Any, Any], prefix: str) -> list[Problem]:
    """Hold a mapping of another library's against the keys that it may have."""
    problems = []
    for key, value in given.items():
        full_key = dotted(prefix, key)
        rule = known.get(key) if isinstance(key, str) else None
        if rule is None:
            problems.append(Problem(full_key, f"not a key of DeepSpeed's{did_you_mean(key, known)}", value))
        elif isinstance(rule, Check):
            problems += [Problem(full_key, reason, value)] if (reason := rule.reason(value)) else []
        elif isinstance(value, dict):
            problems += _check_inner(rule, value, full_key)
        elif value is not None:
            problems.append(Problem(full_key, "not a mapping of DeepSpeed's keys, or null", value))
    return problems


def _parse_value(owner: Any, key: str, hint: Any, check: Check | None, value: Any, prefix: str) -> Parsed:
    full_key = dotted(prefix, key)
    if value == "???":
        allowed = check.allowed if check else described(hint)
        return Parsed(None, [Problem(full_key, f"needs a value: {allowed}", has_value=False)])
    if dataclasses.is_dataclass(hint):
        return parse_section(hint, value, full_key)
    converted, reason = convert(owner, key, hint, check, value)
    kind_of = Unregistered if isinstance(check, RegisteredCheck) and converted is not None else Problem
    return Parsed(None, [kind_of(full_key, reason, value)]) if reason else Parsed(converted)


def dotted(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
