"""A tracker of one's own: a class that takes lines of metrics, and a YAML in conf/tracking/. See docs/extending.md."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.config.frozen import read_status
from src.errors import DamagedFileError
from src.records import read_json
from src.tracking.exporters import FolderExporter, Warn
from src.tracking.late_metrics import late_metrics

LINES_AT_ONCE = 100


class LineExporter(FolderExporter):
    """Hands lines of metrics.jsonl to `write`, in order; what was delivered is remembered in tracking-NAME.json.

    A subclass is registered by `@EXPORTERS.register(NAME)` and implements `write`, and where that can be done
    `rewind_to`, by which nothing is there twice. Whatever these raise costs a warning; they are called again later.

    Args:
        config: the `tracking` section, with its keys as attributes.
        folder: the run's folder.
    """

    def __init__(self, config: Any, folder: Path, *, is_over: bool = False, warn: Warn, name: str = "") -> None:
        self.config = config
        self.name = name or str(config.type)
        super().__init__(folder, state_file(self.name), is_over=is_over, warn=warn)
        self._is_rewound = False

    @abstractmethod
    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines that are new, each with its `step` and metrics by name.

        What is measured of a run after its end, as by src.benchmark, is one more line of its last step.
        """

    def rewind_to(self, step: int) -> None:
        """Discard what was written of later steps: they are repeated. Called before the first `write` of a process."""

    def close(self, state: str) -> None:
        """Record how the run ended: FINISHED, FAILED, PREEMPTED, PRUNED or KILLED. It may be resumed later."""

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def is_connected(self) -> bool:
        return self._is_rewound

    @property
    def pending(self) -> str:
        try:
            left = len(self._metrics()) - self._num_delivered
        except DamagedFileError:
            return "lines of metrics"
        return f"{left:,} lines of metrics" if left > 0 else "how the run ended, or lines of metrics,"

    @property
    def progress(self) -> str:
        return f"{self._num_delivered:,} lines of metrics"

    def _load_state(self) -> dict[str, Any]:
        try:
            found = read_json(self._state_file, {"lines": int})
            return found | {"lines": max(0, found["lines"])}
        except FileNotFoundError:
            pass
        except DamagedFileError as error:
            self._set_aside(error, f"All lines are written to {self.name} again.")
        return {"lines": 0}

    def rewind(self, num_kept: int, cut: Sequence[Mapping[str, Any]]) -> None:
        self._save_state(lines=min(self._num_delivered, num_kept), ended=None)

    def deliver(self) -> Iterator[None]:
        if not self._is_rewound:  # what was written and not remembered, as the process died, is written again
            self._save_state(lines=min(self._num_delivered, len(self._metrics())))
            last = self._metrics()[self._num_delivered - 1]["step"] if self._num_delivered else 0
            self.activity.call(self.rewind_to, last)
            self._is_rewound = True
        while some := self._metrics()[self._num_delivered : self._num_delivered + LINES_AT_ONCE]:
            self.activity.call(self.write, some)
            self._save_state(lines=self._num_delivered + len(some))
            self.activity.note_delivered("lines", self._num_delivered)
            yield
        status = read_status(self.folder)
        state = status.get("state")
        if state == "FINISHED" and (late := late_metrics(self.folder)):
            self._deliver_once("late", lambda: self.activity.call(self.write, [{"step": status["step"]} | late]), late)
        if state == "RUNNING" and self._is_over:
            state = "KILLED"
        if state not in (None, "RUNNING") and len(self._metrics()) == self._num_delivered:
            self._deliver_once("ended", lambda: self.activity.call(self.close, state), state)


def state_file(name: str) -> str:
    """Return the file's name in which such a tracker remembers what was delivered."""
    return f"tracking-{name}.json"
