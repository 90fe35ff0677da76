"""What all exporters share: they remember in the folder how far they have got, and read its files once as they are."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src import secrets
from src.errors import DamagedFileError, TowlineError, one_line
from src.records import LogLine
from src.tracking.exporters import Activity, DeliveryError, Exporter
from src.tracking.step_logs import METRICS, read_step_log
from src.util import write_json

MOST_CHARACTERS = 400


class FolderExporter(Exporter):
    """An exporter with a file in the folder that remembers what was delivered.

    So the rest can be delivered later, by another process, from the same files.

    Args:
        state_file: the name of that file.
        is_over: whether no process uses the folder, so that a run or sweep whose status says RUNNING was killed.
        warn: takes, once each, what is not as it should be and costs nothing.
    """

    def __init__(
        self,
        folder: Path,
        state_file: str,
        *,
        is_over: bool = False,
        warn: Callable[[str], None],
        activity: Activity | None = None,
    ) -> None:
        self.folder = folder
        self.activity = activity or Activity()
        self._state_file = folder / state_file
        self._is_over = is_over
        self._warn = warn
        self._warned: set[str] = set()
        self._files: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = {}
        self._state: dict[str, Any] = self._load_state()

    @abstractmethod
    def _load_state(self) -> dict[str, Any]:
        """Return what the state file says; where it says nothing that can be used, the state to start from."""

    def begin(self) -> None:
        self._save_state()

    def explain(self, error: Exception) -> DeliveryError:
        is_lasting = error.is_lasting if isinstance(error, DeliveryError) else isinstance(error, TowlineError)
        return DeliveryError(secrets.clean(one_line(error, MOST_CHARACTERS)), is_lasting=is_lasting)

    def warn_once(self, text: str) -> None:
        """Warn of something, unless that was done."""
        text = secrets.clean(text)
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def _save_state(self, **changes: Any) -> None:
        self.activity.check()
        self._state |= changes
        try:
            write_json(self._state_file, self._state)
        except OSError as error:
            lost = f"what {self.name} has is not remembered, and is looked up there the next time"
            self.warn_once(f"{self._state_file} can't be written ({error.strerror}): {lost}")

    def _deliver_once(self, what: str, do: Callable[[], None], version: Any = True) -> None:
        """Do what was not done yet for this version of what the folder holds."""
        if self._state.get(what) != version:
            do()
            self._save_state(**{what: version})

    def _set_aside(self, error: DamagedFileError, then: str) -> None:
        """Rename a damaged state file, and warn of it."""
        kept, number = self._state_file.with_name(f"{self._state_file.name}.damaged"), 2
        while os.path.lexists(kept):
            kept, number = self._state_file.with_name(f"{self._state_file.name}.damaged-{number}"), number + 1
        try:
            os.replace(self._state_file, kept)
            where = f" It is kept as {kept.name}."
        except OSError:
            where = ""
        self.warn_once(f"{error} {then}{where}")

    @property
    def _num_delivered(self) -> int:
        """How many lines of metrics were delivered."""
        return int(self._state.get("lines", 0))

    def _metrics(self) -> list[dict[str, Any]]:
        return self._lines(METRICS, read_step_log)

    def _lines(self, name: str, read: Callable[[Path, str], list[LogLine]]) -> list[dict[str, Any]]:
        """Return what the whole lines of a file that grows say."""
        try:
            status = os.stat(self.folder / name)
            version = (status.st_ino, status.st_size)
        except OSError:  # that it is not there, or can't be read, is for its reader to say
            version = (-1, -1)
        known, lines = self._files.get(name, ((0, 0), []))
        if known != version or version == (-1, -1):
            lines = [line.content for line in read(self.folder, name)]
            self._files[name] = (version, lines)
        return lines


def exhaust(turns: Iterator[None]) -> None:
    """Deliver in one turn."""
    for _ in turns:
        pass
