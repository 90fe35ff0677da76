"""A copy of a sweep's study for Optuna's own tools: written by a thread, never read. One that fails costs a warning."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from src.config.axes import Axis
from src.config.schema import SweepConfig
from src.errors import SweepError, one_line
from src.search.study import TrialWriter, Unit, optuna, spanning
from src.secrets import clean

FILE = "study.journal"  # in the sweep's folder, unless `sweep.storage` names another place
FOLDER = "towline.folder"
LAST_SECONDS = 10.0  # that the end of a sweep waits for what is not written yet
Warn = Callable[[str], None]


class Mirror:
    """Keeps a study in a storage as the sweep's units are, in a thread that nothing waits for but the sweep's end."""

    def __init__(
        self, config: SweepConfig, name: str, folder: Path, axes: Sequence[Axis], units: Sequence[Unit], warn: Warn
    ) -> None:
        self._config, self._name, self._folder, self._axes, self._warn = config, name, folder, axes, warn
        self._where = config.storage or str(folder / FILE)
        self._first, self._pending = units, {unit.number: unit for unit in units}
        self._changed, self._is_closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def note(self, unit: Unit) -> None:
        """Write what is known of a unit now; returns at once."""
        with self._changed:
            self._pending[unit.number] = unit
            self._changed.notify()

    def close(self) -> None:
        """Wait until all is written, but not for a storage that does not answer."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            self._fail("no answer")

    def _fail(self, reason: str) -> None:
        text = f"{self._where} has no copy of the study ({reason})"
        self._warn(clean(f"{text}. Nothing depends on it; the next start of the sweep writes it again"))

    def _work(self) -> None:
        try:
            writer = self._open()
            while units := self._next():
                for unit in units:
                    writer.write(unit)
        except Exception as error:  # whatever a database's driver raises
            self._fail(one_line(getattr(error.__cause__, "orig", None) or error))

    def _next(self) -> list[Unit]:
        """Wait for units that have changed; none where the sweep has ended and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_closing)
            units, self._pending = list(self._pending.values()), {}
        return units

    def _open(self) -> TrialWriter:
        """Open the storage, and begin the study there anew."""
        library, name = optuna(), self._name
        storage = open_storage(self._config.storage, self._folder)
        here = str(self._folder.resolve())
        if name in (known := {one.study_name: one.user_attrs.get(FOLDER) for one in storage.get_all_studies()}):
            if known[name] != here:
                raise SweepError(f"it has a study {name} already, of {known[name]}; choose another sweep.name")
            library.delete_study(study_name=name, storage=storage)
        study = library.create_study(study_name=name, storage=storage, directions=self._config.directions)
        study.set_user_attr(FOLDER, here)
        study.set_metric_names(list(self._config.metrics))
        return TrialWriter(study, spanning(self._axes, self._first))


def open_storage(url: str | None, folder: Path) -> Any:
    """Open the storage that a sweep's study is copied into: a file that is begun anew, or what its URL names."""
    storages = optuna().storages
    if url is not None:
        return storages.RDBStorage(url, engine_kwargs={} if url.startswith("sqlite:") else {"pool_pre_ping": True})
    file = folder / FILE
    file.unlink(missing_ok=True)
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(file)))
