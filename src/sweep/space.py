"""What a sweep varies: axes, each with its values or an interval, and the points that they span. No Optuna here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from src.config.compose import (
    COMMAND_LINE,
    CommandLine,
    forced,
    is_group,
    num_values,
    options,
    read_override,
    value_text,
    values_of,
)
from src.config.problems import Problem
from src.config.schema import MOST_INT

SWEEP_FILE = "sweep.params"


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

    override: Override
    roots: tuple[Path, ...]
    num_values: float = 0
    """Counted, not written out: a range may be longer than the memory; infinite where it never ends."""
    interval: Interval | None = None
    where: str = ""

    @cached_property
    def values(self) -> tuple[str, ...]:
        """The values, each as KEY=VALUE; of an interval there are none."""
        return () if self.interval else tuple(values_of(self.override, self.roots))

    @property
    def key(self) -> str:
        return self.override.key_or_group

    @property
    def text(self) -> str:
        """What is varied, as it is written behind KEY=."""
        return value_text(self.override)

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that stand for all of them where they can't all be looked at, each as KEY=VALUE."""
        if self.interval is None:
            return self.values
        return tuple(self.at(number) for number in (self.interval.low, self.interval.high))

    def at(self, number: float) -> str:
        """Give a number of the interval as KEY=VALUE."""
        assert self.interval is not None
        return f"{self.key}={int(number) if self.interval.is_int else repr(float(number))}"


def axes_of(line: CommandLine, params: Mapping[str, Any], problems: list[Problem]) -> tuple[list[Axis], list[str]]:
    """Give what is varied, by the command line and by an option's params, and the overrides that all points have.

    The command line goes before params: a key that it gives, varied or not, is its own.

    Returns: axes, and the fixed overrides, forced.
    """
    given = [override for override in line.overrides if override.key_or_group not in _refused(line)]
    named = [override.key_or_group for override in given]
    problems += [
        Problem(key, "given twice, and it is varied", has_value=False, where=COMMAND_LINE)
        for key in dict.fromkeys(override.key_or_group for override in given if override.is_sweep_override())
        if named.count(key) > 1
    ]
    own = [(override, SWEEP_FILE) for override in _parsed_params(line, params, problems) if _of(override) not in named]
    axes, fixed = [], []
    for override, where in [*own, *((override, "") for override in given)]:
        if not override.is_sweep_override():
            fixed += forced(override, line.roots)
        elif (axis := _axis(override, line, where, problems)) is not None:
            axes.append(axis)
    return axes, fixed


def _refused(line: CommandLine) -> set[str]:
    return {problem.key for problem in line.problems}


def _of(override: Override) -> str:
    return override.key_or_group


def _parsed_params(line: CommandLine, params: Mapping[str, Any], problems: list[Problem]) -> Iterator[Override]:
    for key, value in params.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        override = read_override(f"{key}={text}")
        if isinstance(override, Problem):
            reason = "can't be read; values are written as behind KEY= on the command line"
            problems.append(Problem(f"{SWEEP_FILE}.{key}", reason, text))
            continue
        if is_group(override, line.roots) and not _are_options(override, line):
            reason = f"no such option; one of {', '.join(options(key, line.roots))}"
            problems.append(Problem(f"{SWEEP_FILE}.{key}", reason, text))
            continue
        yield override


def _are_options(override: Override, line: CommandLine) -> bool:
    if isinstance(override.value(), RangeSweep | IntervalSweep):
        return False
    texts = values_of(override, line.roots) if override.is_sweep_override() else [override.input_line or ""]
    known = options(override.key_or_group, line.roots)
    return bool(texts) and all(text.partition("=")[2] in known for text in texts)


def _axis(override: Override, line: CommandLine, where: str, problems: list[Problem]) -> Axis | None:
    """Give what an override varies, or tell why it can't be varied."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high = (0.0 if end is None else end for end in (sweep.start, sweep.end))
        is_int = isinstance(low, int) and isinstance(high, int)
        axis = Axis(override, tuple(line.roots), 0, Interval(low, high, "log" in sweep.tags, is_int), where)
    else:
        axis = Axis(override, tuple(line.roots), num_values(override, line.roots), None, where)
    if reason := _unfit(axis):
        problems.append(Problem(axis.key, reason, axis.text, where=where or COMMAND_LINE))
        return None
    return axis


def _unfit(axis: Axis) -> str:
    if axis.key.startswith(("hydra.", "hydra/", "sweep.")) or axis.key == "sweep":
        return "is the sweep's own: one value, not several"
    if (interval := axis.interval) is None:
        return "" if axis.num_values else "there is no value in it"
    if any(abs(end) > MOST_INT for end in (interval.low, interval.high) if isinstance(end, int)):
        return "numbers that do not fit in 64 bits"
    if not (math.isfinite(interval.low) and math.isfinite(interval.high) and interval.low < interval.high):
        return "an interval goes from a lower to a higher number"
    return "a log scale needs numbers above 0" if interval.is_log and interval.low <= 0 else ""


def size(axes: Sequence[Axis]) -> int | None:
    """Count the points that axes span, without writing them out; None where one is an interval or never ends."""
    if any(axis.interval or math.isinf(axis.num_values) for axis in axes):
        return None
    return math.prod(int(axis.num_values) for axis in axes)


def points(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    """Give every combination of values, the last axis fastest, as Hydra's own sweeper does."""
    yield from itertools.product(*(axis.ends for axis in axes))
