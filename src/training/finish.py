"""The end of a run: what was trained becomes model/, with its card."""

from collections.abc import Mapping
from typing import Any

from src.checkpoint.exported import exported_digests
from src.config.job import Job
from src.data.dataset import Data
from src.model.card import model_card
from src.model.export import export
from src.runtime.session import Runtime
from src.runtime.sharding import gather_on_cpu, unsharded_models
from src.tracking.tracker import Tracker
from src.training.assembly import Assembled
from src.training.state import TrainState


def export_trained(
    job: Job,
    state: TrainState,
    built: Assembled,
    data: Data,
    provenance: Mapping[str, Any],
    runtime: Runtime,
    tracker: Tracker,
) -> dict[str, Any] | None:
    """Write model/, and return size and checksum of each of its files; None where another process writes it.

    Args:
        provenance: the run's provenance.
    Raises:
        ExportError: where what was written does not load as what was trained.
    """
    if job.config.data.streaming:
        tracker.write_file("data_report.json", data.report())  # what was read is known only now
    of_run = (data.report(), tracker.latest, provenance, built.new_tokens.ids)
    card = model_card(job.frozen, *of_run)
    adapter_card = model_card(job.frozen | {"export": {"merge": False}}, *of_run)
    gather_on_cpu(state.model, keeps=runtime.is_main)
    if not runtime.is_main:
        return None
    folder = job.run_dir / "model"
    with unsharded_models():
        tracker.warn(*export(state.model, built.adapter, built.tokenizer, folder, job.config, card, adapter_card))
    return exported_digests(folder)
