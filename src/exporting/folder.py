"""The folder of an export, and what it says of itself: from which weights it was made, in which form."""

from pathlib import Path
from typing import Any

from src.checkpoint.exported import MODEL, exported_digests, weight_files
from src.config.frozen import config_hash, read_config
from src.config.job import Job
from src.config.places import MANIFEST, remove_tree
from src.config.schema import Dtype
from src.errors import RunFolderError
from src.records import file_digest, read_json
from src.util import in_words, write_json

RECORD = "export.json"
MAY_BE_EDITED = ("Modelfile",)
REMEDY = "Remove the folder, and give the command again."


def output_of(job: Job) -> Path:
    """Return the folder to write: export.output, or one in export/ of the run's folder, named after what it holds."""
    own, folder = job.entry_section, job.entry_section.folder(job.run_dir)
    if own.output is not None:
        return Path(folder)
    kind, form = "merged" if own.merge else "adapter", "" if own.padding else "unpadded"
    return Path(folder, "-".join(filter(None, (kind, _dtype(job).value, form, own.checkpoint))))


def _dtype(job: Job) -> Dtype:
    """Return the type of the weights that are written; `auto` where only the model on a hub knows."""
    for dtype in (job.entry_section.dtype, job.config.model.dtype):
        if dtype is not Dtype.auto:
            return Dtype(dtype)
    for folder in (job.run_dir / MODEL, Path(job.config.model.checkpoint)):
        if (folder / "config.json").is_file():
            stored = read_json(folder / "config.json").get("dtype")
            return Dtype(stored) if stored in set(Dtype) else Dtype.auto
    return Dtype.auto


def source_of(job: Job, place: Path) -> dict[str, Any]:
    """Return what decides an export: the run's configuration, the weights at `place`, and the form."""
    own = job.entry_section
    files = [place / MANIFEST] if own.checkpoint is not None else [*weight_files(str(place)), *place.glob("*.json")]
    weights = {file.name: file_digest(file)["xxh3_128"] for file in sorted(set(files))}
    form = {"merge": own.merge, "dtype": own.dtype.value, "padding": own.padding}
    which = {"checkpoint": place.name} if own.checkpoint is not None else {}
    return {"config_hash": config_hash(read_config(job.run_dir)), **which, "weights": weights, "form": form}


def is_exported(output: Path, source: dict[str, Any], *, force: bool) -> bool:
    """Return whether a folder holds this export already, whatever else has been put there.

    RunFolderError says that it holds something else: another export is replaced with `force` only, other files never.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        record = read_json(output / RECORD, {"source": dict, "files": dict}, remedy=REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            f"{output} holds something that is no export; it is left as it is. Choose another export.output"
        ) from None
    there = {name: digest for name, digest in exported_digests(output).items() if name != RECORD}
    if force and (others := there.keys() - record["files"].keys()):
        raise RunFolderError(f"{output} holds files that are not of the export; move them away: {in_words(others)}")
    if force:
        return False
    if record["source"] != source:
        raise RunFolderError(
            f"{output} holds an export of other weights, or in another form; force=true replaces it, "
            "export.output=DIR writes elsewhere"
        )
    written = {name: digest for name, digest in record["files"].items() if name not in MAY_BE_EDITED}
    if changed := sorted(name for name, digest in written.items() if there.get(name) != digest):
        raise RunFolderError(
            f"{output} holds this export, but not as it was written: {in_words(changed)}; force=true writes it anew"
        )
    return True


def write_record(folder: Path, source: dict[str, Any]) -> None:
    """Write what an export was made from, and size and checksum of its files."""
    write_json(folder / RECORD, {"source": source, "files": exported_digests(folder)})


def remove_unfinished(output: Path) -> bool:
    """Remove what an earlier command that was killed has left of an export; return whether there was any."""
    left = [place for place in output.parent.glob(f".{output.name}.part") if place.exists()]
    for place in left:
        remove_tree(place)
    return bool(left)
