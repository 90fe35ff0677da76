"""What a sweep knows of its tracker: the folder is the truth, MLflow follows by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.config.schema import MlflowConfig, TrackingConfig
from src.tracking.console import Console
from src.tracking.mirror import Mirror
from src.tracking.mlflow_sweep import SweepDelivery


class SweepTracker:
    """Built by `open_sweep_tracking`. Without a mirror it does nothing."""

    def __init__(self, mirror: Mirror | None) -> None:
        self._mirror = mirror

    def ready(self) -> None:
        """Have the store be there before trials open it; a server that is slow or gone is waited for a second."""
        if self._mirror:
            self._mirror.connect()

    def poke(self) -> None:
        """Say that the folder or a trial's changed; returns at once."""
        if self._mirror:
            self._mirror.poke()


@contextmanager
def open_sweep_tracking(config: TrackingConfig, folder: Path, console: Console) -> Iterator[SweepTracker]:
    """Follow a sweep to its end, however it ends, in a folder that is held and has its sweep.json.

    What sweep.json says when the block is left is how the sweep ended.
    """
    mirror = Mirror(SweepDelivery(config, folder)) if isinstance(config, MlflowConfig) else None
    try:
        yield SweepTracker(mirror)
    finally:
        if mirror and (undelivered := mirror.close()):
            console.warn(
                f"MLflow at {mirror.uri}: {undelivered}.\n"
                f"Everything is in {folder}; to deliver it later, give the same command again"
            )
