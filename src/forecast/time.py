"""How long a run will take at least, from its operations and the speed of this device's matrix products."""

from typing import NamedTuple


class TimeItem(NamedTuple):
    """Seconds of a part of a run (None: unknown), without loading and export, and how they were computed."""

    name: str
    seconds: float | None
    is_lower_bound: bool
    how: str


def counted_time(name: str, flops: float | None, flops_per_second: float, unknown: str = "") -> TimeItem:
    """Forecast from below: counted operations at the full speed of this device's matrix products, see
    matmul_flops_per_second, and nothing else; `unknown` says why they can't be counted where `flops` is None.
    """
    if flops is None:
        return TimeItem(name, None, True, f"unknown: {unknown}")
    how = f"{flops:.3g} FLOP counted, at the {flops_per_second:.3g} FLOP/s of this device's matrix products"
    return TimeItem(name, flops / flops_per_second, True, how)


def measured_time(name: str, seconds_each: float, count: int, what: str) -> TimeItem:
    """Forecast from one that was really computed, of the mean size."""
    return TimeItem(name, seconds_each * count, False, f"{count:,} {what} x {seconds_each:.3g} s, as measured")
