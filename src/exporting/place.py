"""Where the weights lie that are to be exported. No torch here, so that a refusal costs nothing."""

from pathlib import Path

from src.checkpoint.exported import ADAPTER, MODEL, check_exported, with_base_model
from src.checkpoint.locate import find_weights
from src.config.job import Job
from src.errors import ModelError
from src.tracking.step_logs import METRICS, read_step_log


def place_of_weights(job: Job) -> Path:
    """Return where the weights that are asked for lie: a run's model/, model/adapter/ or one of its checkpoints.

    They are compared with what the run wrote: DamagedFileError or CheckpointError names what is missing or damaged.
    """
    own, run_dir = job.entry_section, job.run_dir
    if own.checkpoint is not None:
        lines = [line.content for line in read_step_log(run_dir, METRICS)]
        return find_weights(run_dir, own.checkpoint, job.config.checkpoint, lines)
    folder = run_dir / MODEL
    check_exported(run_dir, with_base_model(run_dir, job.config).model.checkpoint)
    if own.merge:
        return folder
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER).exists():
            return place
    raise ModelError(f"export.merge=false writes an adapter, and {folder} holds whole weights alone")
