"""The arguments of an entry, taken apart by Hydra's own parsers; what is wrong with each is a problem.

Every override of a single key is composed as `++key=value`, so that an unknown key survives composition and the gate
can report all of them together; Hydra by itself stops at the first.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from src import secrets
from src.config import mistyped
from src.config.files import unusable
from src.config.formats import declare_options
from src.config.identity import declare
from src.config.merging import BASE
from src.config.options import CONF, is_hidden, options, unfit_folder
from src.config.peers import flag_hint, option_hint
from src.config.problems import COMMAND_LINE, Problem, refuse
from src.config.quoting import override as override_text
from src.util import did_you_mean, nearest

REPLACED_WHOLE = ("data.validation_files", "data.test_files", "data.mixture", "data.columns", "sweep.params")
"""Keys whose value on the command line takes the place of the whole list or mapping."""
OPTIONAL_GROUPS = ("experiment",)
PRIMARY = "--config-name"
"""The flag that names the file which a configuration begins with."""
NOT_IN_SWEEP_ID = (
    *("name", "tracking", "sweep.name", "sweep.n_trials", "sweep.n_jobs", "sweep.max_seconds", "sweep.dry_run"),
    *("sweep.fail_fast", "sweep.max_retries", "sweep.max_points", "sweep.storage", "force"),
    *("sweep.engine", "sweep.ray_address", "sweep.slurm"),
)
"""Keys that change how a sweep is run, or how long it takes, and not what it compares: the same sweep resumes."""
VARIED_BY_HYDRA = ("hydra.sweeper.params", "hydra/sweeper")
"""Keys of Hydra's own section that say what a sweep compares, or who runs it."""
MOST_NESTED = 20
"""Levels of a key or of a value: more than any has, and few enough for all that read them."""


class SeveralValues(Problem):
    """Several values for a key, which only a sweep can have."""


@dataclass
class CommandLine:
    """The parsed arguments of an entry."""

    flags: argparse.Namespace
    argv: list[str]
    overrides: list[Override] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    roots: list[Path] = field(default_factory=lambda: [CONF])
    topics: list[str] = field(default_factory=list)  # groups, sections and keys that --help is asked about
    tried: dict[tuple[str, ...], list[Problem]] = field(default_factory=dict)  # overrides, and why they don't compose

    @property
    def asks_hydra_only(self) -> bool:
        """Whether Hydra answers by itself (help, version, completion) and there is nothing to check."""
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.shell_completion or flags.info)

    @property
    def forced(self) -> list[str]:
        """The overrides as they are composed: keys with `++`, groups and Hydra's own keys as given."""
        return [text for override in self.overrides for text in forced(override, self.roots)]

    @property
    def hydra_argv(self) -> list[str]:
        """The same arguments for Hydra's own main: flags first, then the overrides with every key forced."""
        flags = [argument for argument in self.argv if argument not in self.flags.overrides]
        if self.flags.multirun and not {"-m", "--multirun"} & set(flags):
            flags.append("-m")
        if self._searched:
            flags.append(override_text("hydra.searchpath", [f"file://{root}" for root in self._searched]))
        return [*flags, *(self.shown if self.asks_hydra_only else self.forced)]

    @property
    def _searched(self) -> list[Path]:
        """The folders of options that hydra.searchpath names."""
        return self.roots[2 if self.flags.config_dir else 1 :]

    @property
    def shown(self) -> list[str]:
        """The overrides of the one configuration that Hydra shows: without what is varied."""
        fixed = [override for override in self.overrides if not override.is_sweep_override()]
        if self.flags.hydra_help:  # which composes Hydra's own section alone
            fixed = [override for override in fixed if override.is_hydra_override()]
        return [text for override in fixed for text in forced(override, self.roots)]

    def value_of(self, key: str) -> Any:
        """Return the value that the command line sets for a key, or None."""
        return next((o.value() for o in reversed(self.overrides) if o.key_or_group == key), None)

    @property
    def sweep_id(self) -> str:
        """A hash of what the command compares, in whatever order it is written: 8 hex digits."""
        texts = sorted(
            override.input_line or ""
            for override in self.overrides
            if not any(f"{override.key_or_group}.".startswith(f"{key}.") for key in NOT_IN_SWEEP_ID)
            and not (override.is_hydra_override() and override.key_or_group not in VARIED_BY_HYDRA)
        )
        texts += [f"hydra.searchpath={root}" for root in self._searched]
        texts += [f"--{name}={given}" for name in ("config_dir", "config_name") if (given := getattr(self.flags, name))]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse the arguments; each that can't be read is a problem of its own, flags that can't be a ConfigError."""
    flags = _read_flags(argv)
    line = CommandLine(flags, list(argv), problems=list(_flag_problems(flags)))
    if flags.config_dir:
        _add_root(flags.config_dir, "--config-dir", line)
    for text in flags.overrides:
        if flags.help and "=" not in text:
            line.topics.append(text.removesuffix("."))
            continue
        read = read_override(text)
        if isinstance(read, Problem):
            line.problems.append(read)
        elif read.key_or_group == "hydra.searchpath":
            given = read.value()
            for place in given if isinstance(given, list) else [given]:
                _add_root(str(place), "hydra.searchpath", line)
        else:
            line.overrides.append(read)
    if line.value_of("hydra.mode") == "MULTIRUN":
        flags.multirun = True
    for root in line.roots[1:]:
        declare_options(root)
    for override in line.overrides:
        line.problems += _override_problems(override, line)
    line.problems += _primary_problems(line)
    declare(sweep_id=line.sweep_id)
    return line


def _flag_problems(flags: argparse.Namespace) -> Iterator[Problem]:
    """Yield what is wrong with Hydra's own flags: those that are not obeyed here, and that don't go together."""
    if flags.config_path:
        reason = "conf/ is the configuration; add options of your own with --config-dir DIR"
        yield Problem.on_command_line("--config-path", reason, flags.config_path)
    if flags.run and flags.multirun:
        yield Problem("--run, -m", "one run, or a sweep: one of them", has_value=False)
    if flags.experimental_rerun:
        reason = "a run is repeated from its folder: rerun=DIR, followed by changes of single keys"
        yield Problem.on_command_line("--experimental-rerun", reason, flags.experimental_rerun)
    for flag in ("package", "resolve"):
        if getattr(flags, flag) and not flags.cfg and not flags.help:
            yield Problem(f"--{flag}", "says how --cfg shows a configuration: add --cfg job", has_value=False)


def flags_that_are_not_taken(line: CommandLine, entry: str) -> Iterator[Problem]:
    """Yield a problem for each flag on the command line of an entry that has none but --help."""
    for flag in line.argv:
        if flag.startswith("-"):
            yield Problem(flag, f"python -m src.{entry} takes KEY=VALUE, and --help", has_value=False)


def _override_problems(override: Override, line: CommandLine) -> Iterator[Problem]:
    """Yield what is wrong with an override that can be read: several values for one run, or an unknown option."""
    in_group = is_group(override, line.roots)
    if override.is_sweep_override() and not line.flags.multirun:
        text = value_text(override)
        reason = mistyped.several(override, text, is_group=in_group)
        yield SeveralValues.on_command_line(override.key_or_group, reason, text)
    if in_group and not override.key_or_group.startswith("hydra/"):  # Hydra reports its own
        yield from _unknown_options(override, line.roots)


def _primary_problems(line: CommandLine) -> Iterator[Problem]:
    """Yield a problem where --config-name names no file of a folder of options."""
    if not (name := line.flags.config_name):
        return
    parts = Path(name).parts
    if parts[0] == "/" or ".." in parts or not os.path.lexists(primary_file(line)):
        known = sorted({file.stem for root in line.roots for file in root.glob("*.yaml") if not is_hidden(file.name)})
        reason = f"no such file in conf/ or --config-dir; one of {', '.join(known)}{did_you_mean(name, known)}"
        yield Problem.on_command_line(PRIMARY, reason, name)


def _add_root(place: str, key: str, line: CommandLine) -> None:
    """Add a folder of options that `--config-dir DIR` or `hydra.searchpath=[…]` names."""
    is_url = key == "hydra.searchpath"
    folder = place.removeprefix("file://") if is_url else place
    if reason := "no such folder" if "://" in folder else unusable(folder) or unfit_folder(Path(folder)):
        how = "; a list of folders: hydra.searchpath=[file:///DIR], or --config-dir DIR" if is_url else ""
        line.problems.append(Problem.on_command_line(key, reason + how, place))
    else:
        line.roots.append(Path(folder).resolve())


def _read_flags(argv: Sequence[str]) -> argparse.Namespace:
    def refuse_flags(message: str) -> NoReturn:
        raise refuse([Problem("command line", f"{message}{flag_hint(message)}", has_value=False)])

    parser = get_args_parser()
    parser.error = refuse_flags
    return parser.parse_intermixed_args(list(argv))


def read_override(text: str) -> Override | Problem:
    """Parse one override, or return what is wrong with it."""
    key, sign, value = text.partition("=")

    def wrong(reason: str) -> Problem:
        return Problem(key, reason, value, has_value=bool(sign), where=COMMAND_LINE)

    if any("\ud800" <= character <= "\udfff" for character in text):
        return wrong("not text in UTF-8")
    if key.count(".") + key.count("/") + key.count("[") > MOST_NESTED:
        return wrong(f"a key of more than {MOST_NESTED} parts")
    if not key.strip("+~ "):
        return wrong("not KEY=VALUE in one word")
    secrets.without_credentials(text)  # what is in it is known from here on
    if key in mistyped.FOLDERS and value and os.path.isdir(value):
        text = override_text(key, value)  # whatever its name has in it: there is such a folder
    if key in mistyped.SENTENCES and value and not mistyped.QUOTED.fullmatch(value):
        text = override_text(key, value)
    try:
        override = OverridesParser.create().parse_override(text)
    except RecursionError:
        return wrong(f"nested deeper than {MOST_NESTED} levels")
    except (HydraException, ValueError):  # the latter of numbers with thousands of digits
        if not sign:
            return wrong("not KEY=VALUE in one word")
        return wrong(mistyped.unreadable(key, value))
    given = override.value()
    if _is_nested_deeper(given.list if isinstance(given, ChoiceSweep) else given, MOST_NESTED):
        return wrong(f"nested deeper than {MOST_NESTED} levels")
    if reason := mistyped.unusable_text(key, given):
        return wrong(reason)
    return override


def _is_nested_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and mappings, or the interpolations of a text, are nested deeper than `levels`."""
    if isinstance(value, str):
        return value.count("${") > levels
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_nested_deeper(item, levels - 1) for item in inner))


def value_text(override: Override) -> str:
    """Return the value of an override as it was written, after the first `=`."""
    return (override.input_line or "").partition("=")[2]


def is_group(override: Override, roots: Sequence[Path]) -> bool:
    """Return whether an override chooses an option of a group, rather than the value of a key."""
    return any(os.path.isdir(root / override.key_or_group) for root in roots)


def matching(pattern: Glob, names: Sequence[str]) -> list[str]:
    """Return the options that a glob means: in the folder that it names, not in folders below."""
    depths = {given.count("/") for given in pattern.include}
    return [name for name in pattern.filter(list(names)) if name.count("/") in depths]


def _unknown_options(override: Override, roots: Sequence[Path]) -> Iterator[Problem]:
    group = override.key_or_group
    known = options(group, roots)
    if isinstance(override.value(), Glob):
        if not matching(override.value(), known):
            yield Problem.on_command_line(group, f"matches none of {', '.join(known)}", value_text(override))
        return
    if isinstance(override.value(), RangeSweep | IntervalSweep):
        yield Problem.on_command_line(group, "options are named: A,B,C or glob(…)", value_text(override))
        return
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        for option in value if isinstance(value, list) else [value]:
            if (option is None and group not in OPTIONAL_GROUPS) or (option is not None and str(option) not in known):
                meant = "" if option is None else option_hint(group, str(option), nearest(option, known))
                reason = f"no such option; one of {', '.join(known)}{meant}"
                yield Problem.on_command_line(group, reason, option)


def forced(override: Override, roots: Sequence[Path], text: str | None = None) -> list[str]:
    """Return the overrides that set a key whether conf/ shows it or not; some values are replaced whole.

    `text` is one value of a sweep, as KEY=VALUE; None: the override as it was given.
    """
    text = override.input_line or "" if text is None else text
    if override.key_or_group in OPTIONAL_GROUPS and text.partition("=")[2] == "null":
        return [f"~{override.key_or_group}"]
    if is_group(override, roots) or override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/")):
        return [text]
    cleared = [f"++{override.key_or_group}=null"] if override.key_or_group in REPLACED_WHOLE else []
    return [*cleared, "++" + text.lstrip("+")]


def num_values(override: Override, roots: Sequence[Path]) -> float:
    """Count the values of a discrete sweep without writing them out; infinite where they never end."""
    sweep = override.value()
    if not isinstance(sweep, RangeSweep):
        return len(values_of(override, roots))
    start, stop, step = sweep.start or 0, sweep.stop or 0, sweep.step
    if not all(isinstance(end, int) or math.isfinite(end) for end in (start, stop, step)):
        return math.inf
    if not step:
        return 0
    return max(0, math.ceil((Fraction(stop) - Fraction(start)) / Fraction(step)))


def values_of(override: Override, roots: Sequence[Path]) -> list[str]:
    """Return each value of a discrete sweep as KEY=VALUE, each once; see `num_values` for how many there are."""
    key = override.key_or_group
    if isinstance(override.value(), Glob):
        return [f"{key}={option}" for option in matching(override.value(), options(key, roots))]
    return list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))


def primary_file(line: CommandLine) -> Path:
    """Return the file that a command's configuration begins with: conf/config.yaml, or that of -cn NAME."""
    name = f"{(line.flags.config_name or BASE).removesuffix('.yaml')}.yaml"
    return next((root / name for root in reversed(line.roots) if os.path.lexists(root / name)), CONF / name)
