"""What a sweep knows of its tracker: the folder is the truth, MLflow follows by itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.config.schema import MlflowConfig, TrackingConfig
from src.tracking.console import Console
from src.tracking.former import WAIT_SECONDS, end_all_of
from src.tracking.mirror import AT_THE_END, Mirror
from src.tracking.mlflow_mirror import tracked_before
from src.tracking.mlflow_sweep import SweepDelivery


class SweepTracker:
    """Built by `open_sweep_tracking`. Without a mirror it does nothing."""

    def __init__(self, mirror: Mirror | None) -> None:
        self._mirror = mirror

    def ready(self) -> None:
        """Have the store be there before trials open it; a server that is slow or gone is waited for a second."""
        if self._mirror:
            self._mirror.connect()

    def notify(self) -> None:
        """Say that the folder or a trial's changed; returns at once."""
        if self._mirror:
            self._mirror.notify()


@contextmanager
def open_sweep_tracking(config: TrackingConfig, folder: Path, console: Console) -> Iterator[SweepTracker]:
    """Follow a sweep to its end, however it ends, in a folder that is held and has its sweep.json.

    What sweep.json says when the block is left is how the sweep ended.
    """
    mirror = None
    if isinstance(config, MlflowConfig):
        mirror = Mirror(SweepDelivery(config, folder, tell=console.warn), tell=console.warn)
    wait = None if mirror else end_all_of(tracked_before(folder), folder, console.warn)
    try:
        yield SweepTracker(mirror)
    finally:
        if wait:
            wait(WAIT_SECONDS)
        if mirror and (undelivered := mirror.close(AT_THE_END, console.working)):
            console.warn(
                f"MLflow at {mirror.uri}: {undelivered}.\n"
                f"Everything is in {folder}; to deliver it later, give the same command again, or "
                f"make sync run={shlex.quote(str(folder))}"
            )
