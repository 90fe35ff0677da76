"""Conditions of a sweep: with which values of other axes each axis is varied (`sweep.when`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import QuotedString

from src.config.axes import REPLICATED, Axis, is_ever_varied
from src.config.command_line import read_override
from src.config.problems import Problem
from src.util import in_words

MOST_OPTIONS = 100  # values of a key that others depend on


def with_conditions(
    axes: Sequence[Axis], fixed: Mapping[str, str], when: Mapping[str, Any], problems: list[Problem], *, is_typed: bool
) -> list[Axis]:
    """Return axes with the conditions of `sweep.when`, each behind those that it depends on; adds what is wrong.

    `fixed` are keys that all points have one value of, as KEY=VALUE. Unless `when` is of the command line too
    (`is_typed`), a command may set or vary otherwise what a sweep file varies: a key whose condition then never holds
    is not varied.
    """
    by_key = {axis.key: axis for axis in axes}
    if found := list(_condition_problems(by_key, fixed, when, is_typed=is_typed)):
        problems += found
        return list(axes)
    _place_conditions(by_key, fixed, when)
    ordered: list[Axis] = []
    while left := [axis for axis in by_key.values() if axis not in ordered]:
        placed = {axis.key for axis in ordered}
        ready = next((axis for axis in left if axis.when.keys() <= placed), None)
        if ready is None:
            names = in_words(axis.key for axis in left)
            problems.append(Problem("sweep.when", f"{names} depend on each other in a circle", has_value=False))
            return list(axes)
        ordered.append(ready)
    never = [axis.key for axis in ordered if not is_ever_varied(axis, ordered)]
    problems += [Problem(f"sweep.when.{key}", "no point meets all of it", when[key]) for key in never]
    return ordered


def _place_conditions(axes: dict[str, Axis], fixed: Mapping[str, str], when: Mapping[str, Any]) -> None:
    """Give axes their conditions; leave out those that no point varies, and what depends on these."""
    left_out: list[str] = []
    for key, conditions in when.items():
        if key not in axes:
            continue
        allowed = {other: _texts(axes.get(other), fixed.get(other), given) for other, given in conditions.items()}
        if all(allowed.values()):
            axes[key] = replace(axes[key], when={other: texts for other, texts in allowed.items() if other in axes})
        else:
            left_out.append(key)
    while left_out:
        gone = left_out.pop()
        axes.pop(gone, None)
        left_out += [key for key, axis in axes.items() if gone in axis.when]


def _several(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _texts(axis: Axis | None, fixed: str | None, given: Any) -> frozenset[str]:
    """Return those of an axis' values, or of a key's only one, each as KEY=VALUE, that are one of the given values."""
    known = axis.values if axis is not None else [fixed or ""]
    wanted = [_plain(one) for one in _several(given)]
    return frozenset(text for text in known if _plain(text.partition("=")[2]) in wanted)


def _plain(value: Any) -> Any:
    """Return what a value means, given as it is or as it was written: true is True, 1.0 is 1, 1e-6 a number."""
    if isinstance(value, str):
        read = read_override(f"key={value}")
        value = value if isinstance(read, Problem) else read.value()
    value = value.text if isinstance(value, QuotedString) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else json.dumps(value, sort_keys=True, default=str)


def _condition_problems(
    axes: Mapping[str, Axis], fixed: Mapping[str, str], when: Mapping[str, Any], *, is_typed: bool
) -> Iterator[Problem]:
    for key, conditions in when.items():
        where = f"sweep.when.{key}"
        if key in REPLICATED or not (key in axes or key in fixed):
            varied = in_words(one for one in axes if one not in REPLICATED)
            yield Problem(where, f"not varied from setting to setting; what is: {varied or 'nothing'}", has_value=False)
        elif not isinstance(conditions, dict):
            yield Problem(where, "a mapping from another varied key to a value of it, or a list of values", conditions)
        else:
            others = {other: given for other, given in conditions.items() if other == key or other not in fixed}
            for other, given in others.items():
                if reason := _unfit_condition(axes.get(other) if other != key else None, other, given, is_typed):
                    yield Problem(f"{where}.{other}", f"{reason} (~sweep.when leaves all conditions out)", given)


def _unfit_condition(axis: Axis | None, other: str, given: Any, is_typed: bool) -> str:
    if other in REPLICATED:
        return "a replicate, of which every setting has all: nothing can depend on it"
    if axis is None:
        return "not varied, so nothing can depend on it"
    if axis.interval or axis.num_values > MOST_OPTIONS:
        return f"only keys of a few listed values, at most {MOST_OPTIONS}, can be depended on"
    if all(_texts(axis, None, one) for one in _several(given)) or not (axis.where or is_typed):
        return ""
    return f"not one of its values: {', '.join(text.partition('=')[2] for text in axis.values)}"
