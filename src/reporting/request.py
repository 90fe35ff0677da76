"""What a command line of `python -m src.report` asks for."""

import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.config.command_line import CommandLine, flags_that_are_not_taken, is_group, read_command_line
from src.config.files import unusable
from src.config.keys import all_keys
from src.config.problems import Problem, refuse
from src.config.schema import ReportConfig
from src.config.sections import parse_section
from src.reporting.runs import FACTS, is_run, is_sweep
from src.tracking.own_files import LONGEST_HEAD, PAGE, is_page
from src.util import did_you_mean, in_words

PLACES = ("dir", "dirs")
OF_TABLE = ("where", "columns", "csv")


@dataclass(frozen=True)
class Request:
    """The folders to look at, none for a table of all runs, and the section `report`."""

    folders: tuple[Path, ...]
    own: ReportConfig

    @property
    def output(self) -> Path:
        """The HTML page."""
        if self.own.output is not None:
            return Path(self.own.output)
        return self.folders[0] / PAGE if len(self.folders) == 1 else Path("comparison.html")


def read_request(argv: Sequence[str]) -> Request:
    """Check a command line; ConfigError lists all problems."""
    line = read_command_line(argv)
    problems = [*line.problems, *flags_that_are_not_taken(line, "report"), *_unread(line)]
    given = {key: line.value_of(f"report.{key}") for key in _own_keys() if line.value_of(f"report.{key}") is not None}
    parsed = parse_section(ReportConfig, dataclasses.asdict(ReportConfig()) | given, "report")
    problems += parsed.problems
    folders, wrong = _folders(line)
    problems += wrong
    if folders:
        reason = "says what the table of all runs has; dir and dirs make a page"
        problems += [Problem.on_command_line(f"report.{key}", reason, given[key]) for key in OF_TABLE if key in given]
    elif "output" in given and not wrong:
        reason = "is the page of dir=DIR or dirs=[A,B]; the table is written with report.csv=FILE"
        problems.append(Problem.on_command_line("report.output", reason, given["output"]))
    if not problems:
        request = Request(tuple(folders), parsed.value)
        problems += _unwritable(request)
    if problems:
        raise refuse(problems)
    return request


def _own_keys() -> list[str]:
    return [one.name for one in dataclasses.fields(ReportConfig)]


def _unread(line: CommandLine) -> Iterator[Problem]:
    """Yield a problem for each override that is no key of this entry."""
    own = [*PLACES, *(f"report.{key}" for key in _own_keys())]
    for override in line.overrides:
        key = override.key_or_group
        if key in own:
            continue
        if key in all_keys() or is_group(override, line.roots):
            reason = f"python -m src.report reads what runs have left; it takes {in_words(own)}"
        else:
            reason = f"unknown key{did_you_mean(key, own) or f'; there are {in_words(own)}'}"
        yield Problem.on_command_line(key, reason, (override.input_line or "").partition("=")[2])


def _folders(line: CommandLine) -> tuple[list[Path], list[Problem]]:
    """Return the folders that dir or dirs name, and what is wrong with them."""
    one, several = (line.value_of(key) for key in PLACES)
    if one is None and several is None:
        return [], []
    if one is not None and several is not None:
        return [], [Problem("dir, dirs", "one of them: one run or sweep, or several runs", has_value=False)]
    if several is None:
        return [Path(str(one))], list(_unfit("dir", str(one), may_be_sweep=True))
    is_list = isinstance(several, list) and len(several) > 1 and all(isinstance(name, str) for name in several)
    if not is_list:
        return [], [Problem.on_command_line("dirs", "not a list of two folders or more: dirs=[A,B]", several)]
    found = [problem for name in several for problem in _unfit("dirs", name, may_be_sweep=False)]
    if len({Path(name).resolve() for name in several}) < len(several):
        found.append(Problem.on_command_line("dirs", "names a folder twice", several))
    return [Path(name) for name in several], found


def _unfit(key: str, name: str, *, may_be_sweep: bool) -> Iterator[Problem]:
    if reason := unusable(name):
        yield Problem.on_command_line(key, reason, name)
    elif not os.path.isdir(name):
        yield Problem.on_command_line(key, "no such folder; python -m src.report lists the runs", name)
    elif not is_run(Path(name)) and not (may_be_sweep and is_sweep(Path(name))):
        kind = "a run or a sweep" if may_be_sweep else "a run"
        yield Problem.on_command_line(key, f"no folder of {kind}: it has no status.json", name)


def _unwritable(request: Request) -> Iterator[Problem]:
    """Yield why a file can't be written."""
    files = {"report.csv": request.own.csv, "report.output": request.output if request.folders else None}
    for key, name in files.items():
        if name is None:
            continue
        file, is_given = Path(name), getattr(request.own, key.removeprefix("report.")) is not None
        place = next(one for one in file.absolute().parents if os.path.lexists(one))
        if file.is_dir():
            yield Problem.on_command_line(key, "a folder, where a file is written", str(file))
        elif os.path.lexists(file) and not (file.is_file() and _is_own(key, file)):
            reason = "there already, and not written by this command: it stays as it is; choose another file"
            yield Problem.on_command_line(key, reason, str(file))
        elif is_given and (folder := next((one for one in file.absolute().parents if _is_folder_of_run(one)), None)):
            reason = f"{folder} is a run's or a sweep's; what is named needs a place of its own"
            yield Problem.on_command_line(key, reason, str(file))
        elif not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            yield Problem.on_command_line(key, f"can't be written: {place} is no folder to write to", str(file))


def _is_folder_of_run(folder: Path) -> bool:
    return is_run(folder) or is_sweep(folder)


def _is_own(key: str, file: Path) -> bool:
    """Return whether a file is a page or a table that an earlier command has written."""
    if key == "report.output":
        return is_page(file)
    with open(file, encoding="utf-8", errors="replace") as content:
        names = next(csv.reader([content.readline(LONGEST_HEAD)]), [])
        return all(name in FACTS or name in all_keys() or "/" in name for name in names)
