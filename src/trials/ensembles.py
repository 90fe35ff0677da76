"""The ensembles in a sweep's folder, as rows of its leaderboard."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DamagedFileError, report
from src.records import NUMBER
from src.tracking.ensemble_files import ENSEMBLES, RECORD, read_record


@dataclass(frozen=True)
class EnsembleRow:
    """An ensemble, as a leaderboard shows it: scores of it and of its members, by the names of metrics."""

    folder: str
    method: str
    members: tuple[str, ...]
    scores: Mapping[str, float]
    of_members: tuple[Mapping[str, float], ...]

    def beside_members(self, metric: str) -> str:
        """Return its score beside those of its members, by a metric, or the first that it has."""
        name = metric if metric in self.scores else next(iter(self.scores), None)
        if name is None:
            return f"an ensemble of {len(self.members)}, without a score"
        text = f"an ensemble of {len(self.members)}: {name} {self.scores[name]:.4g}"
        known = [scores[name] for scores in self.of_members if name in scores]
        if not known or len(known) < len(self.of_members):
            return text
        return f"{text}, its members {min(known):.4g} to {max(known):.4g}"


def read_ensembles(sweep: Path) -> list[EnsembleRow]:
    """Return the finished ensembles in a sweep's folder; one whose record is damaged is reported, and left out."""
    found = []
    for file in sorted((sweep / ENSEMBLES).glob(f"*/{RECORD}")):
        try:
            record = read_record(file.parent)
        except DamagedFileError as error:
            report(f"warning: the leaderboard leaves out an ensemble: {error}")
            continue
        if record.get("is_finished"):
            members = [member for member in record["members"] if member["is_in"]]
            names, scores = (
                tuple(str(one["name"]) for one in members),
                tuple(_numbers(one["scores"]) for one in members),
            )
            found.append(EnsembleRow(file.parent.name, record["method"], names, _numbers(record["scores"]), scores))
    return found


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, NUMBER)}
