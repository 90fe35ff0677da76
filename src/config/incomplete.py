"""Files that build on nothing: what they lack is one problem a file, not one a key."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from src.config import groups
from src.config.command_line import PRIMARY, CommandLine, primary_file
from src.config.composed import Composed
from src.config.merging import BASE
from src.config.options import CONF, read_option, shown
from src.config.problems import Problem
from src.config.schema import ENTRY_SECTIONS, SECTIONS
from src.config.sections import Missing

MOST_LACKING = 5  # how many of the keys that a file lacks are named


def without_missing(problems: Sequence[Problem], line: CommandLine, composed: Composed) -> Iterator[Problem]:
    """Yield the problems; all keys that are missing because a file builds on nothing are one problem."""
    missing = [problem.key for problem in problems if isinstance(problem, Missing)]
    files = {key: file for key in missing if (file := _lacking(key, line, composed))}
    reported = set[Path]()
    for problem in problems:
        file = files.get(problem.key)
        if file is None:
            yield problem
        elif file not in reported:
            reported.add(file)
            section, is_primary = problem.key.partition(".")[0], file == primary_file(line)
            lacks = [key for key, one in files.items() if one == file]
            listed = f"{', '.join(lacks[:MOST_LACKING])}{' …' if len(lacks) > MOST_LACKING else ''}"
            base = BASE if is_primary else _nearest_option(file, section)
            reason = f"builds on nothing, and lacks {listed}; have it build on another: `defaults: [{base}, _self_]`"
            yield Problem(PRIMARY if is_primary else section, reason, file.stem, where=str(shown(file)))


def _lacking(key: str, line: CommandLine, composed: Composed) -> Path | None:
    """Return the file that builds on nothing, to which a key is missing; None where there is none."""
    files, section = [one.file for one in composed.files], key.partition(".")[0]
    if not files or (section in ENTRY_SECTIONS and section not in SECTIONS):
        return None
    if CONF / f"{BASE}.yaml" not in files:
        return primary_file(line)
    own = [one.file for one in composed.files if one.package == section]
    return own[0] if len(own) == 1 and "." in key and not own[0].is_relative_to(CONF) else None


def _nearest_option(file: Path, group: str) -> str:
    """Return the option of a group that has the most of the keys in a file; of several, the one chosen by default."""
    usual = groups.defaults_of(read_option(CONF / f"{BASE}.yaml").get("defaults"))[1].get(group)
    given, roots = set(read_option(file)), (CONF,)

    def likeness(name: str) -> tuple[int, bool]:
        return len(given & set(groups.values_of(group, name, roots))), name == usual

    return max(groups.readable(group, roots), key=likeness)
