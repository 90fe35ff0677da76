"""Exported models compared with what was written: status.json has size and checksum of each file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.config.frozen import STATUS, read_status
from src.config.schema import RunConfig
from src.records import check_plain, damaged, file_digest

MODEL, BASE = "model", "base"  # keys of status.json with checksums of files
MAY_CHANGE = ("README.md", "generation_config.json")
"""Files of model/ that people edit, and that change no weight and no token."""
ADAPTER = "adapter_config.json"
BASE_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json", ".py")
"""Suffixes of the files that decide a model's weights or what it computes, besides config.json."""


def exported_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of the files of an exported model, by their paths in its folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in MAY_CHANGE)
    return {str(file.relative_to(folder)): file_digest(file) for file in files}


def weight_files(checkpoint: str) -> list[Path]:
    """Return the files of a local model that decide its weights or what it computes; none of a model on a hub.

    DamagedFileError names one that is no plain file.
    """
    base = Path(checkpoint)
    there = sorted(base.iterdir()) if base.is_dir() else []
    files = [file for file in there if file.name == "config.json" or file.name.endswith(BASE_SUFFIXES)]
    for file in files:
        check_plain(file)
    return files


def base_digests(checkpoint: str) -> dict[str, dict[str, Any]] | None:
    """Return size and checksum of each file of the local model that an adapter is trained on; None of one on a hub."""
    return {file.name: file_digest(file) for file in weight_files(checkpoint)} or None


def check_exported(run_dir: Path, checkpoint: str | None = None) -> None:
    """Check that a finished run's exported model is as it was written; an earlier version kept no checksums.

    So is `checkpoint`, the model that the run's adapter is to be loaded on: it must be the one that it was trained on.
    DamagedFileError names the first file that is not.
    """
    folder, status = run_dir / MODEL, read_status(run_dir)
    again = "Restore it from a copy; or export it again: move status.json away, and start the run's command."
    for file in sorted(folder.rglob("*")):
        if not file.is_dir():
            check_plain(file, again)
    if isinstance(written := status.get(MODEL), dict):
        try:
            there = exported_digests(folder)
        except OSError as error:
            remedy = "Make it readable, or restore it from a copy."
            raise damaged(Path(error.filename or folder), f"it can't be read: {error.strerror}", remedy) from error
        _compare(folder, there, written, "it is not what the run exported", again)
    if checkpoint is not None and (folder / ADAPTER).exists() and isinstance(written := status.get(BASE), dict):
        reason = f"it is not what the adapter in {folder} was trained on"
        remedy = "Restore it from a copy: on other weights the adapter says something else."
        _compare(Path(checkpoint), base_digests(checkpoint) or {}, written, reason, remedy)


def _compare(folder: Path, there: Mapping[str, Any], written: Mapping[str, Any], reason: str, remedy: str) -> None:
    """Raise a DamagedFileError for the first file with another size or checksum than was noted."""
    for name in sorted(written):
        if name not in there:
            raise damaged(folder / name, "it is missing", remedy)
        if there[name] != written[name]:
            raise damaged(folder / name, f"{reason}, by the checksum in status.json", remedy)


def init_from_folder(config: RunConfig) -> Path | None:
    """Return the folder of the model that `init_from` names; None where it names a checkpoint, or is not set.

    DamagedFileError says that its files are not those that its run exported.
    """
    if config.init_from is None:
        return None
    start = Path(config.init_from)
    names = ("config.json", ADAPTER)
    if (start / MODEL).is_dir() and (start / STATUS).exists():
        check_exported(start)
    return next((place for place in (start / MODEL, start) if any((place / name).exists() for name in names)), None)


def with_init_from_model(config: RunConfig) -> RunConfig:
    """Return the configuration with the whole model of `init_from` (see init_from_folder) as its checkpoint, if any."""
    folder = init_from_folder(config)
    if folder is None or (folder / ADAPTER).exists():
        return config
    return replace(config, model=config.model.pretrained_at(folder))


def with_base_model(run_dir: Path, config: RunConfig) -> RunConfig:
    """Return the configuration that loads what a run exported; an adapter needs the model that its run started with."""
    return with_init_from_model(config) if (run_dir / MODEL / ADAPTER).exists() else config
