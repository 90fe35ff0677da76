"""Copies of option files: what a sweep was composed of, so that editing conf/ meanwhile changes nothing in it."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from src import records, secrets
from src.config.options import option_files
from src.records import Digest, damaged, read_bytes, read_json
from src.util import write_json

MANIFEST = "manifest.json"  # in the folder of kept options: size and checksum of each


def keep_options(place: Path, roots: Sequence[Path]) -> None:
    """Keep the options of these folders in a place, unless they are those that are kept there."""
    if list(roots) == kept_roots(place):
        return
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    digests = {}
    for number, root in enumerate(roots):
        (part / str(number)).mkdir(parents=True)
        for name, content in _contents(root).items():
            file, kept = part / str(number) / name, _without_secrets(content)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(kept)
            digests[f"{number}/{name}"] = Digest(kept).as_dict()
    write_json(part / MANIFEST, {"files": digests})
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)


def check_kept(place: Path) -> None:
    """Check the kept options by checksums (an earlier version wrote none); DamagedFileError names what differs."""
    try:
        kept = read_json(place / MANIFEST, {"files": dict}, remedy=_remedy(place))["files"]
    except FileNotFoundError:
        return
    found = {
        f"{root.name}/{name}": Digest(content).as_dict()
        for root in kept_roots(place)
        for name, content in _contents(root).items()
    }
    if others := sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name)):
        raise damaged(place, f"not as it was written: {', '.join(others[:5])}", _remedy(place))


def kept_roots(place: Path) -> list[Path]:
    """Return the kept options, one folder a root; DamagedFileError where they can't be looked into."""
    try:
        return [place.resolve() / name for name in sorted(filter(str.isdecimal, records.names_in(place)), key=int)]
    except ValueError as error:
        raise damaged(place, f"it can't be looked into: {error}", _remedy(place)) from error


def differing(kept: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """Return the option files of `roots` that are others now than those that were kept, without credentials."""
    if len(kept) != len(roots):
        return [str(root) for root in roots]
    found = []
    for before, now in (map(_contents, pair) for pair in zip(kept, roots, strict=True)):
        names = sorted(before.keys() | now.keys())
        found += [name for name in names if name not in now or before.get(name) != _without_secrets(now[name])]
    return found


def _contents(root: Path) -> dict[str, bytes]:
    """Return what the option files in a folder hold, by their names in it; those that can't be read are left out."""
    found = {}
    for file in option_files(root):
        with suppress(OSError, ValueError):  # it was a warning when the command was checked, or nothing can choose it
            found[str(file.relative_to(root))] = read_bytes(file, records.LARGEST_YAML_BYTES)
    return found


def _without_secrets(content: bytes) -> bytes:
    """Mask credentials of URLs in a file's content; they come back as those of a frozen configuration do."""
    return secrets.without_credentials(content.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _remedy(place: Path) -> str:
    return f"Restore it from a copy; or move {place} away: the same command is then composed of conf/ as it is"
