"""The manifest of a checkpoint: its files with sizes and checksums, written last.

Checksums (XXH3, 128 bits) protect against damage, not against attack. The manifest is in one canonical form with a
checksum of its own, so that a changed byte in it is noticed too.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from src.config.places import MANIFEST, STATE, folder_of, step_of, steps_in
from src.errors import CheckpointError
from src.records import file_digest, parse, read_bytes
from src.util import load_json

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FORMAT = 1  # a manifest with a higher number was written by a later version of Towline
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Errors of opening what is not there: nothing, a link to nothing or to itself, or what can't be opened at all."""


class LaterVersionError(ValueError):
    """A manifest in a later format than this version knows."""


class Entry(NamedTuple):
    """A file as it should be."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint. Without the optimizer's state it holds weights only, and no run can resume from it.

    `is_save` is false where only weights were written, of an evaluation between two saves.
    """

    step: int
    files: Mapping[str, Entry]
    is_save: bool

    @property
    def is_resumable(self) -> bool:
        return OPTIMIZER in self.files

    def text(self) -> str:
        """Return the canonical form."""
        files = {name: entry._asdict() for name, entry in self.files.items()}
        listed: dict[str, Any] = {"format": FORMAT, "step": self.step, "is_save": self.is_save, "files": files}
        own = xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())
        return json.dumps(listed | {"xxh3_128": own}, indent=2) + "\n"


def entry_of(file: Path) -> Entry:
    """Return a file's entry as it is now."""
    return Entry(*file_digest(file).values())


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint; LaterVersionError or ValueError names what is wrong with it."""
    try:
        raw = read_bytes(checkpoint / MANIFEST)
        found = parse(raw)
        if found["format"] > FORMAT:  # whose form is not known
            version = f"format {found['format']}, known: {FORMAT}"
            raise LaterVersionError(f"{MANIFEST} is of a later version of Towline ({version})")
        files = {name: Entry(**entry) for name, entry in found["files"].items()}
        manifest = Manifest(found["step"], files, found["is_save"])
        if manifest.text().encode() != raw:
            raise ValueError("it is not as it was written")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except LaterVersionError:
        raise
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    return manifest


def problems_of(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with a checkpoint, file by file; every byte is read."""
    if os.path.lexists(checkpoint) and not checkpoint.is_dir():
        yield "it is a dangling link" if checkpoint.is_symlink() else "it is no folder"
        return
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        yield str(error)
        return
    if step_of(checkpoint) not in (None, manifest.step):
        yield f"{MANIFEST} is of step {manifest.step:,}"
    for name, entry in manifest.files.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if not file.is_file():  # a pipe would be waited for
                yield f"{name} is no plain file"
            elif size != entry.bytes:
                yield f"{name} has {size:,} bytes instead of {entry.bytes:,}"
            elif entry_of(file) != entry:
                yield f"{name} is damaged: its content does not have the checksum that it was written with"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} can't be read: {error.strerror}"


def check_undamaged(checkpoint: Path) -> None:
    """Check that every byte of a checkpoint is as it was written; CheckpointError names the files that are not."""
    if problems := list(problems_of(checkpoint)):
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}")


def read_state(checkpoint: Path) -> Any:
    """Return the object with all that a checkpoint, which was checked, holds besides its tensors."""
    return load_json(checkpoint / STATE)


def weights_checksum(checkpoint: Path) -> str:
    """Return the checksum of a checkpoint's weights, by its manifest; raises as `read_manifest`."""
    return read_manifest(checkpoint).files[WEIGHTS].xxh3_128


def refusal_of(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint the operating system refuses to open, and why; None where it refuses none.

    Such a checkpoint may be whole. What is missing, or no plain file, is not refused, see `problems_of`.
    """
    for place in (checkpoint, *(checkpoint / name for name in (MANIFEST, WEIGHTS, OPTIMIZER, STATE))):
        try:
            os.close(os.open(place, os.O_RDONLY | os.O_NONBLOCK))  # a pipe would be waited for
        except OSError as error:
            if error.errno not in ABSENT:
                return f"{place.name} can't be read: {error.strerror}"
    return None


def is_later(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written by a later version."""
    try:
        read_manifest(checkpoint)
    except ValueError as error:
        return isinstance(error, LaterVersionError)
    return False


def is_resumable(checkpoint: Path) -> bool:
    """Return whether a run can resume from a checkpoint, by its manifest alone."""
    try:
        return read_manifest(checkpoint).is_resumable
    except ValueError:
        return False


def newest_resumable(folder: Path) -> int | None:
    """Return the last step in a folder that a run can resume from, by the manifests alone."""
    return next((step for step in reversed(steps_in(folder)) if is_resumable(folder_of(folder, step))), None)
