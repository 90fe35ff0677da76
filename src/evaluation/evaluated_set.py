"""The files of one set's evaluation, and what decided them: `<view>.jsonl` has a line a row of each view."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.checkpoint.exported import MAY_CHANGE, init_from_folder
from src.config.keys import all_keys
from src.config.schema import DataConfig, RunConfig
from src.data.dataset import evaluated_sources
from src.data.paired import VIEWS
from src.data.sources import HubSource, file_hash, hash_of
from src.errors import RunFolderError
from src.evaluation.predicted_set import PredictionLog
from src.evaluation.predictions import generation_key, model_key
from src.evaluation.row_log import RowLog
from src.evaluation.scores import RowScore
from src.records import check_plain

FILES = "data.files"
"""What the record calls the hashes of the files that rows come from, or of the hub's splits, by their names."""


OTHER_NAMES = ("lock", "evaluation.json")
"""What no set can be called, because it is in the folder already."""


@dataclass(frozen=True)
class OwnThoughts:
    """One line: the ids of the thoughts that the model wrote for a row, tags included; null where it had no room.
    `num_cut` of them were closed because their budget was used up.
    """

    row: int
    source: str
    ids: list | None
    num_cut: int


class EvaluatedSet:
    """The files of one set, in a folder of its own within one that this process holds."""

    def __init__(self, output: Path, name: str, scored_by: Mapping[str, Any], generated_by: Mapping[str, Any]) -> None:
        self.name, self.folder = name, output / name
        self.hashes: Mapping[str, str] = scored_by[FILES]

        def named(file: str) -> dict[str, str]:
            return {"what": f"set {name}", "elsewhere": "another evaluate.output", "title": f"{name}/{file}"}

        def log(file: str, line: type, kind: str) -> RowLog:
            return RowLog(self.folder, file, line, scored_by, kind=kind, **named(file))

        self.views = {view: log(view, RowScore, "scores") for view in VIEWS}
        self.thoughts = log("own_thoughts", OwnThoughts, "thoughts")
        decided_by = {**scored_by, **generated_by}
        self.predictions = PredictionLog(self.folder, "predictions", decided_by, **named("predictions"))

    def logs(self) -> Iterator[RowLog]:
        yield from (*self.views.values(), self.thoughts, self.predictions)


def open_evaluated(
    output: Path, config: RunConfig, frozen: Mapping[str, Any], views: Any, names: list[str], model: Path | None
) -> dict[str, EvaluatedSet]:
    """Return the sets of these names with what the folder has of them; `model` is the folder of a run's model.

    RunFolderError names what decided otherwise what is there; DamagedFileError where that can't be read. Both are
    raised before anything is computed or removed.
    """
    common = {"evaluate.views": views, **_scoring_key(config, frozen, model)}
    generated_by = generation_key(config, frozen)
    sets, refused = {}, []
    for name in names:
        sets[name] = one = EvaluatedSet(output, name, {FILES: _hashes(config.data, name)} | common, generated_by)
        for log in one.logs():
            if differences := log.claim(force=config.force):
                there = f"{log.lines} holds what something else decided:"
                refused.append("\n  ".join([there, *differences]))
            else:
                log.check_unchanged()
    if refused:
        hint = "evaluate.output=DIR puts the new evaluation elsewhere; force=true removes these and starts them anew"
        raise RunFolderError("\n".join([*refused, hint]))
    return sets


def _hashes(data: DataConfig, name: str) -> dict[str, str]:
    """Return the hash of each file or split that a set's rows come from; how many of them are read is in the key."""
    hashes = dict[str, str]()
    for source in evaluated_sources(data, name):
        if isinstance(source, HubSource):
            rows = replace(source, limit=None).identity()  # a mixture may have one split in two configurations
            hashes[source.name] = hash_of(hashes.get(source.name), rows)
        else:
            hashes |= {file: file_hash(file) for file in source.files}
    return hashes


def _scoring_key(config: RunConfig, frozen: Mapping[str, Any], model: Path | None) -> dict[str, Any]:
    """Return what decides the scores of any set, as plain values by name; the size of the batches decides nothing."""
    data = {key.leaf for key in all_keys().values() if key.section == "data" and key.shapes_rows}
    selection = {"limit", "mixture", "validation_fraction", "num_folds", "fold", "group_column"}
    selection |= {"dataset_name", "dataset_config_name", "validation_split", "train_split", "revision"}
    return {
        **{f"data.{key}": value for key, value in frozen["data"].items() if key in data | selection},
        **{f"tokens.{key}": frozen["tokens"][key] for key in ("thought_open", "thought_close")},
        "evaluation.max_samples": config.evaluation.max_samples,
        "generation.max_thought_tokens": config.generation.max_thought_tokens,
        "seed": config.seed,
        **(model_key(config, model) if model is not None else _plain_model_key(config, frozen)),
    }


def _plain_model_key(config: RunConfig, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a model that no run has trained."""
    model, start = config.model, init_from_folder(config)
    return {
        "model.dtype": model.dtype.value,
        "training.mixed_precision": config.training.mixed_precision.value,
        **{f"model.{key}": frozen["model"][key] for key in ("checkpoint", "revision", "weights")},
        "tokens": frozen["tokens"],
        "quantization": frozen["quantization"],
        "init_from": config.init_from,
        "model": _file_hashes(Path(model.checkpoint)) | ({} if start is None else _file_hashes(start)),
    }


def _file_hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a model, by path: weights, settings, tokenizer, chat templates; {} of a hub's.

    Other folders in it, such as evaluations, are no part of the model.
    """
    there = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    files = [file for file in sorted(there) if not (file.is_dir() or file.name.startswith("."))]
    files = [file for file in files if file.name not in MAY_CHANGE]
    for file in files:
        check_plain(file)
    return {str(file): file_hash(str(file)) for file in files}
