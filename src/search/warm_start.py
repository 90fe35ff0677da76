"""What a sweep's sampler begins with: the results of another sweep, kept in this one's folder, so that they stay."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from src.config.schema import SweepConfig
from src.errors import SweepError
from src.records import NUMBER, Types, check_keys, read_lines
from src.search.study import Unit
from src.trials.folder import SweepFolder
from src.util import as_tuple, in_words, one_or_list, write_atomically

FILE = "warm_start.jsonl"
KEYS: Mapping[str, Types] = {
    "overrides": list,
    "value": (*NUMBER, list),
    "metric": (str, list),
    "source": str,  # what the value is of, and the sweep that it is from
}


def earlier_units(config: SweepConfig, sweep: Path) -> list[Unit]:
    """Return the settings of `sweep.warm_start` and their results at the first start, numbered -1, -2, ….

    Where this sweep's metrics, or that folder, have changed since, they are read anew.
    SweepError: it is no sweep's folder, or nothing in it has a value of this sweep's metric.
    """
    if config.warm_start is None:
        return []
    file = sweep / FILE
    origin = {"metric": one_or_list(config.metrics), "source": str(Path(config.warm_start).resolve())}
    lines = []
    if file.exists():
        remedy = "Remove it, and it is made of sweep.warm_start again."
        lines = [line.content for line in read_lines(file, lambda line, _: check_keys(line, KEYS), remedy=remedy)]
    if not lines or any(line[key] != value for line in lines for key, value in origin.items()):
        lines = [{**one, **origin} for one in _results(Path(config.warm_start), config.metrics)]
        if not lines:
            reason = f"no trial there has finished with a value of {in_words(config.metrics)}"
            raise SweepError(f"sweep.warm_start = {config.warm_start}: {reason}")
        write_atomically(file, "".join(json.dumps(one) + "\n" for one in lines))
    return [
        Unit(-number, tuple(line["overrides"]), "FINISHED", as_tuple(line["value"]))
        for number, line in enumerate(lines, start=1)
    ]


def _results(folder: Path, metrics: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the overrides and the mean value of each finished setting of a sweep; of several metrics a list."""
    record, of_setting = SweepFolder(folder), dict[str, list[tuple[tuple[str, ...], tuple[float, ...]]]]()
    if not record.read():
        raise SweepError(f"sweep.warm_start = {folder}: there is no sweep")
    for trial in record.trials():
        if values := record.status(trial.number, metrics).values:
            of_setting.setdefault(trial.setting, []).append((trial.overrides, values))
    for found in of_setting.values():
        means = tuple(map(mean, zip(*(values for _, values in found), strict=True)))
        yield {"overrides": list(found[0][0]), "value": one_or_list(means)}
