"""What a trial of a sweep will take, forecast from its data and the shapes of its model, without weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from src.config.gate import parse_stored
from src.data.dataset import build_data
from src.data.tokenizer import load_tokenizer
from src.inspection.run_forecast import forecast_run
from src.inspection.sweep_cost import TrialCost
from src.model.build import empty_model
from src.model.embeddings import resize_and_initialise
from src.runtime.allocation import resident_bytes
from src.runtime.precision import device_of, with_precision
from src.tracking.console import Console


def forecast_trial(frozen: Mapping[str, Any], console: Console) -> TrialCost:
    """Forecast a trial by its frozen configuration; TowlineError says what its run would refuse."""
    config = with_precision(parse_stored(dict(frozen)))
    before = resident_bytes()
    tokenizer, new_tokens = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer, console.working)
    model = empty_model(config.model)
    initialised = resize_and_initialise(model, tokenizer, new_tokens, config.tokens, config.seed)
    ids = list(initialised.ids.values())
    found = forecast_run(config, model, tokenizer, ids, data, Path.cwd(), before, console, measure=False)
    seconds = [item.seconds for item in found.time]
    known = [value for value in seconds if value is not None]
    device = device_of(config)
    device_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return TrialCost(
        sum(known) if len(known) == len(seconds) else None,
        found.memory.total.bytes,
        found.disk.total.bytes,
        device_bytes,
    )
