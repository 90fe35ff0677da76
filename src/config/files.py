"""Which data files a list of patterns means, and what is wrong with a path or a list. No file is opened here."""

import errno
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TEXT_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "txt"}
KINDS = TEXT_KINDS | {f"{suffix}.gz": kind for suffix, kind in TEXT_KINDS.items()} | {".parquet": "parquet"}
"""How a file's name ends, and what is in it."""
KNOWN = f"{', '.join(TEXT_KINDS)} (each also as .gz) and .parquet"
MOST_NAME_BYTES = 255
"""The longest name that file systems take, in UTF-8."""
MOST_PATH_BYTES = 3800
"""The longest path that is taken: the operating system takes 4,095, and there are files in a folder."""


def unusable(path: str) -> str:
    """Return why there can't be a file or folder of that path, whether it is there now or not; '' where there can."""
    try:
        names = [len(name.encode()) for name in path.split("/")]
        if max(names) > MOST_NAME_BYTES:
            return f"a name in it has {max(names):,} bytes in UTF-8, and file systems take {MOST_NAME_BYTES}"
        if (length := sum(names) + len(names) - 1) > MOST_PATH_BYTES:
            return f"a path of {length:,} bytes in UTF-8, and at most {MOST_PATH_BYTES:,} can be worked with"
        os.stat(path)
    except FileNotFoundError:
        return ""
    except PermissionError:
        return f"no permission to look into {_nearest(path, os.path.isdir)}"
    except NotADirectoryError:
        return f"{_nearest(path, os.path.exists)} is a file, so nothing can be in it"
    except OSError as error:
        return "links that lead in a circle" if error.errno == errno.ELOOP else str(error.strerror)
    except UnicodeEncodeError:
        return "holds a character that can't be written in UTF-8"
    except ValueError:
        return "holds the character NUL, which no path can"
    return ""


def _nearest(path: str, test: Callable[[str], bool]) -> str:
    """Return the innermost folder of a path that passes a test; the path itself where none does."""
    return next(filter(test, map(str, Path(path).parents)), path)


def kind_of(file: str) -> str | None:
    """Return a file's kind by the end of its name, in capitals or not; None where nothing here reads it."""
    suffixes = Path(file.lower()).suffixes
    return KINDS.get("".join(suffixes[-2:])) or KINDS.get("".join(suffixes[-1:]))


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the files that patterns mean: each is a file, a glob, or a folder, of which all known kinds are taken.

    Patterns keep their order, the files of one pattern are sorted. A name that exists is that file, whatever
    characters it has. Hidden files and folders are taken only by name. What matches no file comes back as it is, and
    a file that comes twice comes back twice: problems_of reports both.
    """
    return [file for pattern in patterns for file in _matches(pattern) or [pattern]]


def _matches(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return _inside(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    return sorted({file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file)})


def _inside(folder: str) -> list[str]:
    found: list[str] = []
    not_listed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=not_listed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".") and kind_of(name)]
    return sorted([*found, *(str(error.filename) for error in not_listed)])


def problems_of(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each pattern that names no file, or one that is missing, of an unknown kind, or given before."""
    given: set[str] = set()
    for pattern in patterns:
        if reason := unusable(pattern):
            yield pattern, reason
            continue
        wrong: dict[str, list[str]] = {}
        for file in expand([pattern]):
            real = os.path.realpath(file)
            if (
                reason := unusable(file)
                or _missing(file, pattern)
                or ("" if kind_of(file) else f"not a kind that is read; these are {KNOWN}")
                or ("given twice" if real in given else "")
            ):
                wrong.setdefault(reason, []).append(file)
            given.add(real)
        for reason, files in wrong.items():
            if files == [pattern]:
                yield pattern, reason
            else:
                more = f" and {len(files) - 1} more" if len(files) > 1 else ""
                yield pattern, f"{files[0]}{more}: {reason}"


def _missing(file: str, pattern: str) -> str:
    if os.path.isfile(file):
        return ""
    if os.path.isdir(file):
        if not os.access(file, os.R_OK | os.X_OK):
            return "a folder that can't be listed: no permission"
        return f"a folder without data files; these are {KNOWN}"
    if os.path.exists(file):
        return "not a file that can be read twice"
    if file == pattern and glob.has_magic(file):
        return f"matches no file (looked in {Path.cwd()})"
    return f"no such file (looked in {Path.cwd()})"
