"""Conditions on one value, each with the words that an error uses for what is allowed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from src.config.files import unusable
from src.metrics import METRICS
from src.registry import Registry


@dataclass(frozen=True)
class Check:
    """A condition on one value, with the words that an error uses for what is allowed."""

    allowed: str
    holds: Callable[[Any], bool]

    def reason(self, value: Any) -> str:
        """Return why a value is refused; '' where it is not."""
        return "" if self.holds(value) else f"not {self.allowed}"


class PathCheck(Check):
    """A condition on a path: that there can be one, whether it is there now or not."""

    def reason(self, value: Any) -> str:
        return "" if value is None else unusable(value) or super().reason(value)


@dataclass(frozen=True)
class RegisteredCheck(Check):
    """A condition on a list of names: that each is registered, by src or by a plugin."""

    registry: Registry[Any]

    def reason(self, value: Any) -> str:
        return next((f"{one} is {why}" for one in value or () if (why := self.registry.why_unknown(one))), "")


Keys = Mapping[str, "Check | Keys"]
"""What a mapping of another library's may hold: a condition on each key's value, or the keys of a mapping in it."""
MOST_INT = 2**63 - 1
"""What torch, numpy, Arrow and SQLite count with."""
MOST_FLOAT32 = 3.4e38
"""What weights, losses and gradients are computed in."""


def is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_INT


def up_to(most: int, because: str) -> Check:
    """Return the condition of a whole number from 1 to a bound that no sensible value reaches; `because` says why."""
    allowed = f"a whole number of at least 1 and at most {most:,}: {because}"
    return Check(allowed, lambda v: v is None or (is_int(v) and 1 <= v <= most))


def in_float32(least: float, least_in_words: str) -> Check:
    """Return the condition of a number that is computed with in 32 bits, where others become 0 or infinite."""
    allowed = f"a number {least_in_words} and at most 3.4e38, the largest in 32 bits"
    return Check(allowed, lambda v: v is None or (is_number(v) and least <= v <= MOST_FLOAT32))


POSITIVE = Check("a number above 0", lambda v: v is None or (is_number(v) and v > 0))
NOT_NEGATIVE = Check("a number of at least 0", lambda v: v is None or (is_number(v) and v >= 0))
WEIGHT = Check(
    "a number above 0 and at most 3.4e38, the largest in 32 bits",
    lambda v: POSITIVE.holds(v) and (v is None or v <= MOST_FLOAT32),
)
WEIGHT_OR_ZERO = in_float32(0, "of at least 0")
AT_LEAST_ONE = Check("a whole number of at least 1", lambda v: v is None or (is_int(v) and v >= 1))
AT_LEAST_TWO = Check("a whole number of at least 2", lambda v: v is None or (is_int(v) and v >= 2))
COUNT = Check("a whole number of at least 0", lambda v: v is None or (is_int(v) and v >= 0))
FRACTION = Check("a number from 0 to 1", lambda v: v is None or (is_number(v) and 0 <= v <= 1))
BELOW_ONE = Check("a number from 0 to below 1", lambda v: v is None or (is_number(v) and 0 <= v < 1))
PROCESSES = up_to(1_024, "more processes than one machine has cores for")
BETAS = Check(
    "two numbers from 0 to below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(is_number(b) and 0 <= b < 1 for b in v),
)
STEPS_OR_EPOCH = Check(
    "a whole number of steps of at least 1, 'epoch', or null for never",
    lambda v: v is None or v == "epoch" or (is_int(v) and v >= 1),
)
STRINGS = Check("a list of texts", lambda v: isinstance(v, list) and all(isinstance(s, str) for s in v))
NOT_EMPTY = Check("a text that is not empty, or null", lambda v: v is None or bool(v))
SEED = Check("a whole number from 0 to 2**32 - 1", lambda v: is_int(v) and 0 <= v < 2**32)
PATH = PathCheck("a path that there can be", lambda v: True)
NAME = PathCheck(
    "a name without '/' that does not start with '.'", lambda v: bool(v) and "/" not in v and not v.startswith(".")
)
METRIC_NAMES = RegisteredCheck(
    f"a list (one of {', '.join(METRICS.names())} each)", lambda v: all(one in METRICS for one in v or ()), METRICS
)
