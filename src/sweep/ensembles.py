"""What ensembles leave in their folders, and the rows of a sweep's leaderboard that those in its folder are.

`ensemble.json` says what decides an ensemble as soon as it is begun, and its scores once it is finished. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DamagedFileError, report
from src.records import NUMBER, Types, check_keys, damaged, read_json

ENSEMBLES, RECORD = "ensembles", "ensemble.json"
RECORD_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("decided_by", "scores", "rows"), dict),
    "method": str,
    "is_finished": bool,
    "members": list,
}
MEMBER_KEYS: Mapping[str, Types] = {"name": str, "run": str, "is_in": bool, "scores": dict}
REMEDY = "Restore it; or move the ensemble's folder away: the same command makes it anew."


@dataclass(frozen=True)
class EnsembleRow:
    """An ensemble, as a leaderboard shows it: scores of it and of its members, by the names of metrics."""

    folder: str
    method: str
    members: tuple[str, ...]
    scores: Mapping[str, float]
    of_members: tuple[Mapping[str, float], ...]

    def score(self, metric: str) -> tuple[str, float | None]:
        """Return the metric that the leaderboard is by, or the first there is, with its value; None without any."""
        name = metric if metric in self.scores else next(iter(self.scores), metric)
        return name, self.scores.get(name)

    def range_of_members(self, name: str) -> tuple[float, float] | None:
        """Return the least and the greatest score of a member; None where one has none."""
        values = [scores.get(name) for scores in self.of_members]
        known = [value for value in values if value is not None]
        return (min(known), max(known)) if known and len(known) == len(values) else None


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ensemble.json of a folder says; empty where there is none. DamagedFileError: it can't be read."""
    try:
        record = read_json(folder / RECORD, RECORD_KEYS, remedy=REMEDY)
        for member in record["members"]:
            check_keys(member if isinstance(member, dict) else {}, MEMBER_KEYS)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise damaged(folder / RECORD, f"a member's {error}", REMEDY) from error
    return record


def members_in(folder: Path) -> list[Path]:
    """Return the folders of the runs that an ensemble's folder is made of; none of another folder."""
    return [Path(member["run"]) for member in read_record(folder).get("members", [])]


def read_ensembles(sweep: Path) -> list[EnsembleRow]:
    """Return the finished ensembles in a sweep's folder; one whose record is damaged is reported, and left out."""
    records = {}
    for file in sorted((sweep / ENSEMBLES).glob(f"*/{RECORD}")):
        try:
            records[file.parent.name] = read_record(file.parent)
        except DamagedFileError as error:
            report(f"warning: the leaderboard leaves out an ensemble: {error}")
    return [
        EnsembleRow(
            name,
            record["method"],
            tuple(str(member["name"]) for member in record["members"] if member["is_in"]),
            _numbers(record["scores"]),
            tuple(_numbers(member["scores"]) for member in record["members"] if member["is_in"]),
        )
        for name, record in records.items()
        if record.get("is_finished")
    ]


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, NUMBER)}
