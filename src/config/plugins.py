"""Modules of the user's that register what src does not have: `plugins: [my_module]`.

They are imported once everything that can be checked without them has been found good, and by every process of a run.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from src.config import keys
from src.config.options import PROJECT_ROOT
from src.config.problems import Problem, refuse
from src.util import did_you_mean

KEY = "plugins"


class Unregistered(Problem):
    """A name that nothing has registered so far, but a plugin may."""


@dataclass(frozen=True)
class Plugin:
    """A module that was imported; the SHA-256 is of its file, of a package of all its Python files."""

    file: str
    sha256: str


_imported: dict[str, Plugin] = {}
"""Imported modules by their names in the configuration."""


def not_imported(names: Any) -> list[str]:
    """Return the plugins that a configuration names and this process has not imported; none of what are no names."""
    given = [str(name) for name in names if not isinstance(name, list | dict)] if isinstance(names, list) else []
    return [name for name in given if name not in _imported]


def import_plugins(names: Iterable[str]) -> list[Problem]:
    """Import plugins, each once, and return why some can't be."""
    problems = []
    for name in names:
        try:
            module = _imported_module(name)
            if getattr(module, "__file__", None) is None:
                raise ImportError("no file of Python's: a folder needs __init__.py")
            _imported[name] = Plugin(str(module.__file__), _sha256(module))
        except (Exception, SystemExit) as error:
            problems.append(Problem(KEY, _why(name, error), name))
    keys.all_keys.cache_clear()  # there may be keys that were registered
    return problems


def require(names: Any) -> None:
    """Import the plugins of a configuration that was admitted before; ConfigError where one can't be imported now."""
    if problems := import_plugins(not_imported(names)):
        raise refuse(problems)


def imported(sections: Mapping[str, Any]) -> dict[str, Plugin]:
    """Return the plugins of a configuration, all of which have been imported, by name."""
    return {name: _imported[name] for name in map(str, sections.get(KEY) or ())}


def names() -> list[str]:
    """Return all that this process has imported."""
    return list(_imported)


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return what says whether a plugin is the one it was, as other libraries' versions do."""
    return {f"plugin {name}": _imported[name].sha256[:16] for name in names}


def _imported_module(name: str) -> ModuleType:
    """Import a module by its name, or a .py file by its path: from the current folder, else the project's root."""
    folders = [Path.cwd(), PROJECT_ROOT]
    if name.endswith(".py"):
        if not (files := [folder / name for folder in folders if (folder / name).is_file()]):
            raise ModuleNotFoundError(name=name)
        return _from_file(files[0].resolve())
    first = [str(folder) for folder in dict.fromkeys(folders)]
    sys.path[:] = [*first, *(place for place in sys.path if place not in first)]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _from_file(file: Path) -> ModuleType:
    there = sys.modules.get(file.stem)
    if there is not None and Path(str(getattr(there, "__file__", ""))).resolve() != file:
        raise ImportError(f"another module is named {file.stem}; rename the file")
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look up the names of their types there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def _sha256(module: ModuleType) -> str:
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]
    return hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()


def _why(name: str, error: BaseException) -> str:
    """Return why a plugin can't be imported, with the line that failed: its own, not one of Python's or ours."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        files = [file for folder in (Path.cwd(), PROJECT_ROOT) for file in folder.glob("*.py")]
        there = [file.name if name.endswith(".py") else file.stem for file in files]
        return f"no such module in {Path.cwd()}, in {PROJECT_ROOT} or installed{did_you_mean(name, there)}"
    if isinstance(error, SyntaxError):
        return f"can't be imported: {error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    not_its_own = (str(PROJECT_ROOT / "src"), "<")
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(not_its_own)]
    places = [f"{one.filename}:{one.lineno}" for one in frames if "importlib" not in one.filename]
    return f"can't be imported: {': '.join([*places[-1:], type(error).__name__, *filter(None, [str(error)])])}"
