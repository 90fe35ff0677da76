"""Files of a run in MLflow. Where a server accepts them, it is checked afterwards that they are there.

Its answer to a file says nothing: MLflow's client counts any that is no error as success, such as the page of a login.
"""

import tempfile
from pathlib import Path
from typing import Any

from src.records import file_digest
from src.tracking.exporters import Activity, DeliveryError
from src.tracking.mlflow_calls import WatchedClient

SLOWEST_UPLOAD = 500_000
"""The slowest upload, in bytes per second, that is still waited for."""
READ_BACK_BYTES = 1 << 24
"""The largest file whose content is compared with one of the same name and size that is already stored."""
THROUGH_A_SERVER = ("mlflow-artifacts:", "http:", "https:")


class Artifacts:
    """The place for the files of a run.

    Args:
        uri: its address, which the store has assigned to the run.
        store: the address of the store.
        folder: the folder that is delivered.
        is_new: whether this process has begun the run, so that no file of an earlier one can be there.
    """

    def __init__(
        self, uri: str, store: str, activity: Activity, folder: Path, *, is_new: bool = False, calls_again: int = 0
    ) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

        place = get_artifact_repository(add_databricks_profile_info_to_artifact_uri(uri, store), tracking_uri=store)
        self._is_checked = uri.startswith(THROUGH_A_SERVER)
        self._place: Any = WatchedClient(place, activity, folder, calls_again=calls_again, is_server=self._is_checked)
        self._activity = activity
        self._folder = folder
        self._is_new = is_new
        self._delivered: set[str] = set()

    def upload(self, file: Path, parent: str | None = None) -> None:
        """Log a file; `parent` is the folder below the run's that it goes into.

        Raises:
            DeliveryError: where it was accepted and is not there.
        """
        name = f"{parent}/{file.name}" if parent else file.name
        size = file.stat().st_size
        self._activity.extra_seconds = size / SLOWEST_UPLOAD
        try:
            self._place.log_artifact(str(file), parent)
            if self._is_checked and not self._is_there(name, parent, file, size):
                raise DeliveryError(
                    f"{name} was accepted and is not there: what answers for artifacts may be no MLflow, but a page "
                    "or a proxy",
                    is_lasting=False,
                )
        finally:
            self._activity.extra_seconds = 0.0
        self._delivered.add(name)
        self._activity.note_delivered(str(self._folder), name, file_digest(file))

    def _is_there(self, name: str, parent: str | None, file: Path, size: int) -> bool:
        """Return whether a file is there with its size; and its content, where another one might have that size."""
        sizes = {one.path: one.file_size for one in self._place.list_artifacts(parent) if not one.is_dir}
        if name not in sizes or sizes[name] not in (None, size):
            return False
        if (self._is_new and name not in self._delivered) or size > READ_BACK_BYTES:
            return True
        with tempfile.TemporaryDirectory() as folder:
            return file_digest(Path(self._place.download_artifacts(name, folder))) == file_digest(file)
