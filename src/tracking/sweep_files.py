"""What a sweep's folder records: sweep.json, the lines of trials.jsonl, and whose run a trial's folder holds.

Read by the sweep and by its exporters. No torch here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.config.frozen import CONFIG, STARTS, SWEEP, config_hash, read_config, read_starts, read_status
from src.records import NUMBER, Digest, Types, check_keys, damaged, read_json

CHECKSUM = "checksum"
SWEEP_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("name", "state", "started", "updated"), str),
    **dict.fromkeys(("space", "sweep", "counts"), dict),
    "history": list,
}
POINT_KEYS: Mapping[str, Types] = {
    "trial": int,
    **dict.fromkeys(("value", "best"), (*NUMBER, type(None))),
    "elapsed_seconds": NUMBER,
}
"""Keys of an entry of `history`: a trial that finished, in the order in which they did."""


def read_sweep(folder: Path, more: Mapping[str, Types] | None = None, remedy: str = "") -> dict[str, Any]:
    """Return what sweep.json of a folder says, as `read_json`; `more` has the types of further keys."""
    content = read_json(folder / SWEEP, {**SWEEP_KEYS, **(more or {})}, remedy=remedy)
    counts, where = content["counts"], ""
    try:
        for number, point in enumerate(content["history"], 1):
            where = f"history, entry {number}: "
            if not isinstance(point, dict):
                raise ValueError(f"no object but {json.dumps(point)[:40]}")
            for one in _by_metric(point, content["sweep"].get("metric")):
                check_keys(one, POINT_KEYS)
        where = "counts: "
        check_keys(counts, dict.fromkeys(counts, int))
        where = ""
        check_keys(content, {"signatures": list}, optional=("signatures",))
    except ValueError as error:
        raise damaged(folder / SWEEP, f"{where}{error}", remedy) from error
    return content


def _by_metric(point: dict[str, Any], metrics: Any) -> list[dict[str, Any]]:
    """Return an entry of the history by each of several metrics; by one as it is."""
    if not isinstance(metrics, list):
        return [point]
    both = [point.get(name) for name in ("value", "best")]
    if not all(isinstance(of, list) and len(of) == len(metrics) for of in both):
        raise ValueError(f"value and best are not of {len(metrics)} metrics")
    return [point | {"value": value, "best": best} for value, best in zip(*both, strict=True)]


def with_checksum(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of trials.jsonl with a checksum of all that it says."""
    return {**line, CHECKSUM: _checksum(line)}


def check_checksum(line: Mapping[str, Any]) -> None:
    """Raise ValueError where a line of trials.jsonl is not as it was written; an earlier version's has no checksum."""
    if CHECKSUM in line and line[CHECKSUM] != _checksum({key: line[key] for key in line if key != CHECKSUM}):
        raise ValueError("it does not have the checksum that it was written with")


def _checksum(line: Mapping[str, Any]) -> str:
    return str(Digest(json.dumps(line, sort_keys=True).encode()).as_dict()["xxh3_128"])


def identity_of(config: Mapping[str, Any]) -> str:
    """Return a hash of what a configuration computes: without paths and tracking. 16 hex digits."""
    data = config.get("data")
    if isinstance(data, Mapping):
        data = {key: value for key, value in data.items() if key != "cache_dir"}
    return config_hash({**config, "data": data})


def holds_another(folder: Path, config: Mapping[str, Any]) -> str:
    """Return why a folder is not that of a trial with this frozen configuration; '' where it is, or holds no run yet.

    DamagedFileError where a file that says so can't be read.
    """
    starts = read_starts(folder)
    if starts and starts[-1]["config_hash"] == config_hash(config):
        return ""
    try:
        found = read_config(folder)  # where paths were others, so is the hash of a start
    except FileNotFoundError:
        if starts:
            return f"{STARTS} says that it holds another run"
        is_over = read_status(folder).get("state") in ("FINISHED", "PRUNED")
        return f"neither {STARTS} nor {CONFIG} says whose run it holds" if is_over else ""
    return "" if identity_of(found) == identity_of(config) else f"{CONFIG} says that it holds another run"
