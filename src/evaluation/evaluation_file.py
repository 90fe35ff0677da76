"""evaluation.json: the metrics of every set that was evaluated into a folder, its rows and its comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src import records
from src.evaluation.comparison import Comparison
from src.util import finite, write_json

NAME = "evaluation.json"
PARTS = ("metrics", "rows", "comparisons", "against")


class EvaluationFile:
    """The file in a folder that this process holds; DamagedFileError where what is there can't be read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        remedy = "Restore it; or move it away: it is written anew, with the sets that are evaluated then"
        try:
            self._content = records.read_json(self.path, dict.fromkeys(PARTS, dict), remedy=remedy)
        except FileNotFoundError:
            self._content = {part: {} for part in PARTS}

    def put(
        self,
        name: str,
        metrics: Mapping[str, float],
        rows: Mapping[str, Any],
        comparisons: Sequence[Comparison],
        against: Sequence[Comparison] | None,
    ) -> None:
        """Write what was found of a set, in place of what is there of it; other sets stay.

        Without `against`, what it was compared with before stays too, as long as its metrics are the same.
        """
        before = self._content["metrics"]
        if against is not None:
            compared = [asdict(one) for one in against]
        elif all(before.get(key) == value for key, value in finite(dict(metrics)).items()):
            compared = self._content["against"].get(name, [])
        else:
            compared = []
        others = {key: value for key, value in before.items() if not key.startswith(f"evaluate/{name}/")}
        content = {
            "metrics": others | dict(metrics),
            "rows": self._content["rows"] | {name: dict(rows)},
            "comparisons": self._content["comparisons"] | {name: [asdict(one) for one in comparisons]},
            "against": self._content["against"] | {name: compared},
        }
        if finite(content) != self._content:
            write_json(self.path, content)
        self._content = finite(content)
