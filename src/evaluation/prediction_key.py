"""The key of predictions: the configuration, weights and tokenizer that decide them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.checkpoint.exported import ADAPTER, MAY_CHANGE, weight_files
from src.config.keys import all_keys
from src.config.schema import RunConfig
from src.data.sources import file_hash

SAMPLING = ("temperature", "top_k", "top_p")


def prediction_key(config: RunConfig, frozen: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Return what decides the predictions of any set, as plain values by name.

    The seed decides only where words are drawn, the size of the batches nothing.
    """
    generation, data = dict(frozen["generation"]), frozen["data"]
    drawn: dict[str, Any] = {"seed": config.seed}
    if not config.generation.do_sample:
        drawn = {}
        generation = {key: value for key, value in generation.items() if key not in SAMPLING}
    data_keys = {key.leaf for key in all_keys().values() if key.section == "data" and key.shapes_rows} | {"limit"}
    data_keys.remove("max_target_length")  # an answer takes no room
    files = [file for file in sorted(model.rglob("*")) if file.is_file() and file.name not in MAY_CHANGE]
    base = weight_files(config.model.checkpoint) if (model / ADAPTER).exists() else []
    weights = [file for file in base if file.suffix == ".safetensors"]
    return {
        **{f"generation.{key}": value for key, value in generation.items()},
        **{f"data.{key}": value for key, value in data.items() if key in data_keys},
        **{f"tokens.{key}": frozen["tokens"][key] for key in ("thought_open", "thought_close")},
        **drawn,
        "model.dtype": config.model.dtype.value,
        "training.mixed_precision": config.training.mixed_precision.value,
        "model": {str(file.relative_to(model)): file_hash(str(file)) for file in files},
        "base": {file.name: file_hash(str(file)) for file in weights},
    }
