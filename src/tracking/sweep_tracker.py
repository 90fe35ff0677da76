"""Delivery of a sweep: its folder is the truth, exporters deliver it in a thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.config.schema import TrackingConfig
from src.tracking.console import Console
from src.tracking.export_thread import END_OF_RUN, ExportThread
from src.tracking.exporters import SWEEP_EXPORTERS
from src.tracking.mlflow_state import tracked_before
from src.tracking.tracker import start_exporters, sync_command


@contextmanager
def open_sweep_tracking(config: TrackingConfig, folder: Path, console: Console) -> Iterator[ExportThread]:
    """Follow a sweep to its end, however it ends, in a folder that is held and has its sweep.json.

    What sweep.json says when the block is left is how the sweep ended.
    """
    is_exported = config.type in SWEEP_EXPORTERS
    exporters = [SWEEP_EXPORTERS[config.type](config, folder, warn=console.warn)] if is_exported else []
    exports = start_exporters(exporters, folder, before=tracked_before(folder), warn=console.warn)
    try:
        yield exports
    finally:
        for left in exports.close(END_OF_RUN, console.working):
            console.warn(
                f"{left}.\nEverything is in {folder}; to deliver it later, repeat the same command, or "
                f"{sync_command(folder)}"
            )
