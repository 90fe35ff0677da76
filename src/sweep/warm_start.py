"""What a sweep's sampler begins with: the results of another sweep, kept in this one's folder, so that they stay."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean

from src.errors import SweepError
from src.records import NUMBER, Types, check_keys, read_lines
from src.sweep.folder import SweepFolder
from src.sweep.plan import Plan
from src.sweep.study import Unit
from src.util import write_atomically

FILE = "warm_start.jsonl"
KEYS: Mapping[str, Types] = {"overrides": list, "value": NUMBER}


def earlier_units(plan: Plan) -> list[Unit]:
    """Return the settings of `sweep.warm_start` and their results at the first start, numbered -1, -2, ….

    SweepError: it is no sweep's folder, or nothing in it has a value of this sweep's metric.
    """
    if plan.config.warm_start is None:
        return []
    file = plan.folder / FILE
    if not file.exists():
        found = list(_results(Path(plan.config.warm_start), plan.config.metric))
        if not found:
            reason = f"no trial there has finished with a value of {plan.config.metric}"
            raise SweepError(f"sweep.warm_start = {plan.config.warm_start}: {reason}")
        write_atomically(file, "".join(json.dumps(one) + "\n" for one in found))
    remedy = "Remove it, and it is made of sweep.warm_start again."
    lines = [line.content for line in read_lines(file, lambda line, _: check_keys(line, KEYS), remedy=remedy)]
    return [
        Unit(-number, tuple(line["overrides"]), "FINISHED", line["value"]) for number, line in enumerate(lines, start=1)
    ]


def _results(folder: Path, metric: str) -> Iterator[dict[str, object]]:
    """Yield the overrides and the mean value of each finished setting of a sweep."""
    record, of_setting = SweepFolder(folder), dict[str, list[tuple[tuple[str, ...], float]]]()
    if not record.read():
        raise SweepError(f"sweep.warm_start = {folder}: there is no sweep")
    for trial in record.trials():
        if (value := record.status(trial.number, metric).value) is not None:
            of_setting.setdefault(trial.setting, []).append((trial.overrides, value))
    for found in of_setting.values():
        yield {"overrides": list(found[0][0]), "value": mean(value for _, value in found)}
