"""What a sweep varies: axes, each with its values or an interval, and the points that they span. No Optuna here."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from src.config.command_line import (
    OPTIONAL_GROUPS,
    CommandLine,
    forced,
    is_group,
    num_values,
    read_override,
    value_text,
    values_of,
)
from src.config.keys import all_keys, is_whole_number
from src.config.options import options
from src.config.points import Assignment
from src.config.problems import COMMAND_LINE, Problem
from src.config.quoting import label
from src.config.schema import MOST_INT

SWEEP_FILE = "sweep.params"
REPLICATED = ("seed", "data.fold")  # keys in which the trials of one setting differ


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high, both included; whole ones, or on a log scale."""

    low: float
    high: float
    is_log: bool
    is_int: bool


@dataclass(frozen=True)
class Axis:
    """A key that is varied: over `num_values` values, or over an interval."""

    override: Override  # what is varied; where a file lists the values, the key alone counts
    roots: tuple[Path, ...]
    num_values: float = 0
    """Counted, not written out: a range may be longer than the memory; `math.inf` where it never ends."""
    interval: Interval | None = None
    where: str = ""
    listed: Mapping[str, Any] | None = None  # the values as a file lists them, by KEY=VALUE
    when: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Values of other axes, as KEY=VALUE by their key, with which it is varied; with others it keeps its default."""

    @cached_property
    def values(self) -> tuple[str, ...]:
        """The values, each as KEY=VALUE; of an interval there are none."""
        if self.listed is not None:
            return tuple(self.listed)
        return () if self.interval else tuple(values_of(self.override, self.roots))

    def problem(self, reason: str) -> Problem:
        """Return what is wrong with what is varied."""
        return Problem(self.key, reason, self.text, where=self.where or COMMAND_LINE)

    def forced(self, text: str) -> list[str | Assignment]:
        """Return what sets one of the values, given as KEY=VALUE."""
        if self.listed is not None and text in self.listed and not is_group(self.override, self.roots):
            return [Assignment(self.key, self.listed[text])]
        return list(forced(self.override, self.roots, text))

    def is_varied(self, chosen: Collection[str]) -> bool:
        """Return whether a point has a value of it, given the values of the axes before it, each as KEY=VALUE."""
        return all(not values.isdisjoint(chosen) for values in self.when.values())

    @property
    def key(self) -> str:
        return self.override.key_or_group

    @property
    def text(self) -> str:
        """What is varied, as it is written after KEY=, and with what."""
        written = value_text(self.override)
        if self.listed is not None:
            written = ",".join(text.partition("=")[2] for text in self.listed)
        conditions = [" or ".join(sorted(values)) for values in self.when.values()]
        return f"{written} with {', '.join(conditions)}" if conditions else written

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that represent all of them where they can't all be checked, each as KEY=VALUE."""
        if self.interval is None:
            return self.values
        return tuple(self.at(number) for number in (self.interval.low, self.interval.high))

    def at(self, number: float) -> str:
        """Return a number of the interval as KEY=VALUE."""
        assert self.interval is not None
        return f"{self.key}={int(number) if self.interval.is_int else repr(float(number))}"


def axes_of(
    line: CommandLine, params: Mapping[str, Mapping[str, Any]], problems: list[Problem]
) -> tuple[list[Axis], list[str | Assignment]]:
    """Return what is varied, by the command line and by params, and the overrides that all points have, forced.

    The command line goes before params: a key that it sets, varied or not, is its own. `params` has each key's values,
    by where they are written: a list as they are, or a text as after KEY= on the command line.
    """
    refused = {problem.key for problem in line.problems}
    typed = [override for override in line.overrides if override.key_or_group not in refused]
    named = [override.key_or_group for override in typed]
    problems += [
        Problem(key, "given twice, and it is varied", has_value=False, where=COMMAND_LINE)
        for key in dict.fromkeys(override.key_or_group for override in typed if override.is_sweep_override())
        if named.count(key) > 1
    ]
    axes: list[Axis] = []
    fixed: list[str | Assignment] = []

    def take(override: Override, source: str) -> None:
        if override.is_sweep_override():
            axes.append(_axis(override, line, source))
        else:
            fixed.extend(forced(override, line.roots))

    for source, key, value in ((source, *item) for source, given in params.items() for item in given.items()):
        override = _override_of(key, value, line)
        if isinstance(override, str):
            problems.append(Problem(f"{source}.{key}", override, value))
        elif override.key_or_group in named:
            continue
        elif sum(key in other for other in params.values()) > 1:
            problems.append(Problem(key, f"is in {' and in '.join(params)}: one of them", has_value=False))
        elif isinstance(value, str):
            take(override, source)
        elif isinstance(value, list) and len(value) > 1:
            listed = {label(override.key_or_group, one): one for one in value}
            axes.append(Axis(override, tuple(line.roots), len(listed), None, source, listed))
        elif is_group(override, line.roots) and not isinstance(value, dict):
            fixed += forced(override, line.roots, f"{key}={value[0] if isinstance(value, list) else value}")
        else:
            fixed.append(Assignment(override.key_or_group, value[0] if isinstance(value, list) else value))
    for override in typed:
        take(override, "")
    problems += [axis.problem(reason) for axis in axes if (reason := _unfit(axis))]
    return [axis for axis in axes if not _unfit(axis)], fixed


def _override_of(key: str, value: Any, line: CommandLine) -> Override | str:
    """Return a key of params as an override, or why it, or an option among its values, is none."""
    override = read_override(f"{key}={value if isinstance(value, str) else 'null'}")
    if isinstance(override, Problem):
        return "can't be read; values are written as after KEY= on the command line, or as a list"
    name = override.key_or_group
    if is_sweeps_own(name):
        return "is the sweep's own: it is a key next to params, or on the command line"
    if value == []:
        return "there is no value in it"
    if isinstance(value, dict):
        varied = _varied_in(name, value)
        return f"what is varied in a section stands by its own key: write {'; '.join(varied)}" if varied else override
    if not is_group(override, line.roots):
        return override
    known = options(name, line.roots)
    given: Sequence[Any] = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        given = _options_in(override, line)
    allowed = [*known, None] if name in OPTIONAL_GROUPS else known
    return override if given and all(one in allowed for one in given) else f"no such option; one of {', '.join(known)}"


def _varied_in(section: str, values: Mapping[Any, Any]) -> list[str]:
    """Return the keys of a section's mapping that are given several values, as they have to be written."""
    found: list[str] = []
    for name, value in values.items():
        key = f"{section}.{name}"
        known = all_keys().get(key)
        if known is None:
            found += _varied_in(key, value) if isinstance(value, dict) else []
        elif not known.accepts(value):
            read = read_override(f"{key}={value}") if isinstance(value, str) else None
            is_text = isinstance(read, Override) and read.is_sweep_override()
            if is_text or (isinstance(value, list) and value and all(map(known.accepts, value))):
                found.append(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return found


def is_sweeps_own(key: str) -> bool:
    """Return whether a key says how a sweep is done, so that it can't differ from trial to trial."""
    return key.startswith(("hydra.", "hydra/", "sweep.")) or key in ("sweep", "hydra")


def _options_in(override: Override, line: CommandLine) -> list[str]:
    """Return the options that an override names; none where it has numbers."""
    if isinstance(override.value(), RangeSweep | IntervalSweep):
        return []
    texts = values_of(override, line.roots) if override.is_sweep_override() else [override.input_line or ""]
    return [text.partition("=")[2] for text in texts]


def _axis(override: Override, line: CommandLine, where: str) -> Axis:
    """Return what an override varies."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high = (0.0 if end is None else end for end in (sweep.start, sweep.end))
        is_int = all(isinstance(end, int) or end.is_integer() for end in (low, high)) and (
            (isinstance(low, int) and isinstance(high, int)) or is_whole_number(override.key_or_group)
        )
        low, high = (int(low), int(high)) if is_int else (low, high)
        return Axis(override, tuple(line.roots), 0, Interval(low, high, "log" in sweep.tags, is_int), where)
    return Axis(override, tuple(line.roots), num_values(override, line.roots), None, where)


def _unfit(axis: Axis) -> str:
    if is_sweeps_own(axis.key):
        return "is the sweep's own: one value, not several"
    if (interval := axis.interval) is None:
        return "" if axis.num_values else "there is no value in it"
    if any(abs(end) > MOST_INT for end in (interval.low, interval.high) if isinstance(end, int)):
        return "numbers that do not fit in 64 bits"
    if not (math.isfinite(interval.low) and math.isfinite(interval.high) and interval.low < interval.high):
        return "an interval goes from a lower to a higher number"
    return "a log scale needs numbers above 0" if interval.is_log and interval.low <= 0 else ""


def _branches(
    axes: Sequence[Axis], named: Collection[str], chosen: tuple[str, ...] = (), count: int = 1
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield points, and how many each stands for: values that are not `named` by a condition are one."""
    if not axes:
        yield chosen, count
        return
    axis, rest = axes[0], axes[1:]
    if not axis.is_varied(chosen):
        yield from _branches(rest, named, chosen, count)
        return
    others = [text for text in axis.values if text not in named]
    for text in [text for text in axis.values if text in named]:
        yield from _branches(rest, named, (*chosen, text), count)
    if others:
        yield from _branches(rest, named, (*chosen, others[0]), count * len(others))


def _parents(axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the points of the axes that others depend on, as `_branches`."""
    keys = {key for axis in axes for key in axis.when}
    named = {text for axis in axes for texts in axis.when.values() for text in texts}
    return _branches([axis for axis in axes if axis.key in keys], named)


def is_ever_varied(axis: Axis, axes: Sequence[Axis]) -> bool:
    """Return whether any of the points that axes span has a value of an axis of theirs."""
    return any(axis.is_varied(point) for point, _ in _parents(axes))


def size(axes: Sequence[Axis]) -> int | None:
    """Count the points that axes span, without writing them out; None where one is an interval or never ends."""
    if any(axis.interval or axis.num_values == math.inf for axis in axes):
        return None
    keys = {key for axis in axes for key in axis.when}
    others = [axis for axis in axes if axis.key not in keys]
    return sum(
        count * math.prod(int(axis.num_values) for axis in others if axis.is_varied(point))
        for point, count in _parents(axes)
    )


def points(axes: Sequence[Axis], chosen: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every combination of values, the last axis fastest, as Hydra's own sweeper does.

    `chosen` are values of axes before these.
    """
    if not axes:
        yield chosen
        return
    for value in [(text,) for text in axes[0].ends] if axes[0].is_varied(chosen) else [()]:
        yield from points(axes[1:], chosen + value)


def probes(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    """Yield points in which every value occurs: each axis in turn, the others at their first as far as may be."""
    seen = set[tuple[str, ...]]()
    for axis in axes:
        base = next(point for point, _ in _parents(axes) if axis.is_varied(point))
        for end in axis.ends:
            point: tuple[str, ...] = ()
            for one in axes:
                wanted = next((text for text in (end, *base) if text in one.ends), one.ends[0])
                point += (wanted,) if one.is_varied(point) else ()
            if point not in seen:
                seen.add(point)
                yield point
