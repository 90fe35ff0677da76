"""Runs as the folders say that they are: found, and read fast enough for a thousand of them. No torch here."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from src.config.frozen import CONFIG, STARTS, STATUS, SWEEP, add_later_keys, read_config, read_status
from src.errors import DamagedFileError
from src.metrics import greater_is_better, has_direction
from src.records import read_json, read_similar_yaml
from src.tracking.lock import holder_of
from src.tracking.run_folder import SUMMARY
from src.tracking.step_logs import METRICS, read_step_log

PLACES = ("outputs", "multirun")
"""Where runs and sweeps are written unless the command says otherwise."""
DEEPEST = 4  # levels of folders below each of them in which runs are looked for
FACTS = {
    "folder": "the run's folder",
    "name": "its name",
    "state": "FINISHED, RUNNING, FAILED, PREEMPTED, PRUNED or DAMAGED",
    "started": "when it started, UTC",
    "ended": "when it ended",
    "step": "the last step",
    "metric": "the metric of its best checkpoint",
    "last": "that metric's last value",
    "best": "that metric's best value",
    "seconds": "seconds of training",
    "memory": "peak memory in bytes",
    "cause": "why it failed, or what is damaged",
}
"""What is known of every run besides its configuration and its metrics."""
NOT_COMPARED = ("name", "rerun", "force", "tracking", "data.cache_dir", "runtime.machine_rank", "checkpoint.resume")
"""Keys that say nothing about what a run computes."""


@dataclass
class Run:
    """What a run's folder says; what can't be read is empty, and said in `facts["cause"]`."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # by dotted keys
    metrics: dict[str, Any] = field(default_factory=dict)  # as summary.json has them

    def value(self, key: str) -> Any:
        """Return what is known under a name: a fact, a metric or a key of the configuration; None where nothing is."""
        return next((known[key] for known in (self.facts, self.metrics, self.config) if key in known), None)

    @property
    def keys(self) -> set[str]:
        """The names that `value` knows."""
        return {*self.facts, *self.metrics, *self.config}


def is_run(folder: Path) -> bool:
    """Return whether a folder is one of a run, damaged or not."""
    names = [os.path.lexists(folder / name) for name in (STATUS, CONFIG, STARTS)]
    return names[0] or all(names[1:])


def is_sweep(folder: Path) -> bool:
    return os.path.lexists(folder / SWEEP)


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Return the folders of runs in these places, sorted; no link to a folder is followed, no run is looked into."""
    return sorted({folder for place in places for folder in _runs_below(place, DEEPEST)}, key=_by_number)


def _runs_below(place: Path, levels: int) -> Iterator[Path]:
    if is_run(place):
        yield place
        return
    try:
        inner = [Path(entry.path) for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False)]
    except OSError:  # not there, or not ours to look into
        return
    for folder in inner if levels else ():
        yield from _runs_below(folder, levels - 1)


def _by_number(folder: Path) -> tuple[tuple[int, str], ...]:
    """Order folders by name, trials by number."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in folder.parts)


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one by dotted keys; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= dotted(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def read_run(folder: Path) -> Run:
    """Read what a run's folder says of it; of a damaged one what can be read, with the reason in its facts."""
    run, problems = Run(folder, {"folder": str(folder)}), list[str]()
    status = _read(lambda: read_status(folder), problems)
    try:
        sections = dict(read_config(folder, read_similar_yaml))
        add_later_keys(sections)
        run.config = dotted(sections)
    except FileNotFoundError:
        problems.append(f"{folder / CONFIG} is missing")
    except DamagedFileError as error:
        problems.append(str(error))
    state = status.get("state") or "DAMAGED"
    if state == "RUNNING" and not _is_held(folder):
        state, status["cause"] = "FAILED", f"killed at step {status['step']}"
    run.metrics = _metrics(folder, state, problems)
    metric = str(run.config.get("checkpoint.metric_for_best_model", "eval/validation/loss"))
    memory = run.metrics.get("peak_memory_bytes")
    run.facts |= {
        "name": run.config.get("name"),
        "state": "DAMAGED" if problems else state,
        **{key: status.get(key) for key in ("started", "ended", "step")},
        "metric": metric,
        "last": run.metrics.get(metric),
        "best": run.metrics.get(f"best/{metric}"),
        "seconds": run.metrics.get("train_seconds", run.metrics.get("perf/elapsed_seconds")),
        "memory": memory,
        "cause": "; ".join(problems) or status.get("cause"),
    }
    return run


def _is_held(folder: Path) -> bool:
    try:
        return bool(holder_of(folder))
    except OSError:  # a lock that is not ours to look at
        return True


def _read(read: Any, problems: list[str]) -> dict[str, Any]:
    try:
        return dict(read())
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        problems.append(str(error))
        return {}


def _metrics(folder: Path, state: str, problems: list[str]) -> dict[str, Any]:
    """Return the numbers of summary.json; of a run without one, the same names from its metrics so far."""
    try:
        if state == "FINISHED":
            return read_json(folder / SUMMARY)
    except (FileNotFoundError, DamagedFileError) as error:
        missing = f"{folder / SUMMARY} is missing"
        problems.append(str(error) if isinstance(error, DamagedFileError) else missing)
    try:
        lines = [line.content for line in read_step_log(folder, METRICS)]
    except DamagedFileError as error:
        problems.append(str(error))
        return {}
    return summary_of(lines)


def summary_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last value of every metric of these lines, and the best of those of evaluations as `best/…`."""
    last: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or value is None:
                continue
            last[name] = value
            if name.startswith("eval/") and has_direction(name):
                choose = max if greater_is_better(name) else min
                best[f"best/{name}"] = choose(best.get(f"best/{name}", value), value)
    return last | best


def is_compared(key: str) -> bool:
    """Return whether a dotted key says what a run computes."""
    return not any(f"{key}.".startswith(f"{one}.") for one in NOT_COMPARED)


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that not all of these dotted configurations have with one value, in their order.

    An empty configuration, of a folder that can't be read, is not compared.
    """
    first, *others = [config for config in configs if config] or [{}]
    keys = dict.fromkeys(key for config in (first, *others) for key in config)
    missing = object()
    return [
        key
        for key in filter(is_compared, keys)
        if any(not is_same(first.get(key, missing), one.get(key, missing)) for one in others)
    ]


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values of a configuration are the same: 1 and 1.0 are, 1 and true are not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def when(time: Any) -> str:
    """Return a time of status.json for people: 2026-11-30 02:59."""
    try:
        return datetime.fromisoformat(str(time)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
