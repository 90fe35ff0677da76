"""Writing what is exported: weights in the form that is asked for, with a card, a Modelfile and a record."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.config.frozen import read_config
from src.config.job import Job
from src.config.schema import Dtype, ExportConfig, ModelType
from src.data.dataset import build_encoder
from src.errors import DiskFullError
from src.exporting.folder import output_of, write_record
from src.exporting.modelfile import modelfile
from src.exporting.weights import TrainedWeights
from src.model.card import model_card
from src.model.export import Form, export
from src.tracking.console import Console
from src.tracking.run_folder import DATA_REPORT, PROVENANCE
from src.tracking.step_logs import METRICS, read_step_log
from src.util import human_bytes, load_json


def write_result(job: Job, weights: TrainedWeights, source: dict[str, Any], console: Console) -> None:
    """Write the folder of an export, checked, in place of an earlier one.

    DiskFullError says before anything is written that there is no room; ExportError, that what was written is not what
    was trained.
    """
    own, config = job.entry_section, replace(job.config, export=ExportConfig(merge=job.entry_section.merge))
    output = output_of(job)
    form = Form(own.dtype, own.padding, is_required=True)
    if own.merge:
        _check_room(output, weights.model, own.dtype)
    merging = weights.adapter is not None and own.merge
    writing = f"{'merging the adapter, ' if merging else ''}writing {'whole weights' if own.merge else 'the adapter'}"

    def complete(folder: Path) -> None:
        if own.merge and config.model.type is ModelType.causal_lm:
            text = modelfile(config, weights.tokenizer, build_encoder(config, weights.tokenizer))
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        write_record(folder, source)

    card, adapter_card = (_card(job, weights, merge=merge) for merge in (own.merge, False))
    what = (weights.model, weights.adapter, weights.tokenizer, output, config)
    with console.work(writing):
        warnings = export(*what, card, adapter_card, form, complete)
    for warning in warnings:
        console.warn(warning)


def _check_room(output: Path, model: Any, dtype: Dtype) -> None:
    """Raise DiskFullError where the weights would not fit on the disk."""
    width = None if dtype is Dtype.auto else 4 if dtype is Dtype.float32 else 2
    needed = sum(parameter.numel() * (width or parameter.element_size()) for parameter in model.parameters())
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise DiskFullError(f"{output.parent} has {human_bytes(free)} free, and the weights take {human_bytes(needed)}")


def _card(job: Job, weights: TrainedWeights, *, merge: bool) -> str:
    """Return the model card: of what the run measured at the step of the weights."""
    own, run_dir = job.entry_section, job.run_dir
    frozen = read_config(run_dir) | {"export": {"merge": merge}}
    about = [] if weights.step is None else [f"These are the weights after step {weights.step:,}."]
    if own.dtype is not Dtype.auto:
        about.append(f"They are written in {own.dtype.value}; what was measured was measured before.")
    files = {name: load_json(run_dir / name) for name in (DATA_REPORT, PROVENANCE) if (run_dir / name).exists()}
    metrics: dict[str, float] = {}
    for line in read_step_log(run_dir, METRICS):
        if weights.step is None or line.content["step"] <= weights.step:
            metrics |= {name: value for name, value in line.content.items() if isinstance(value, int | float)}
    has_modelfile = merge and job.config.model.type is ModelType.causal_lm
    data, provenance = files.get(DATA_REPORT, {}), files.get(PROVENANCE, {})
    said, ids = " ".join(about), weights.token_ids
    return model_card(frozen, data, metrics, provenance, ids, about=said, has_modelfile=has_modelfile)
