"""How Hydra puts option files together here: what does not fit is placed, and which file gave what is kept.

A list or value in place of a mapping, or the reverse, is taken: the gate reports it with the other problems.
"""

import copy
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from src.config.options import OptionFileError, error_at, error_in_defaults
from src.util import did_you_mean, nearest

HYDRA, BASE = "hydra", "config"
HAS_DEFAULTS = "HYDRA_REMOVE_TOP_LEVEL_DEFAULTS"  # Hydra's flag on a section that has a `defaults` of its own
SWEEPER = "hydra/sweeper"
FILE = "file://"
MOST_LISTED = 20  # the most names that an error lists, where it can't say which was meant
SEARCHPATH = (
    "is read from the command line: hydra.searchpath=[file:///DIR], or --config-dir DIR; an experiment can't add to it"
)


@dataclass(frozen=True)
class Merged:
    """A file that was merged into a configuration, and the dotted key that its own keys are put under; '' for none."""

    file: Path
    package: str

    def within(self, key: str) -> list[str] | None:
        """Return the way to a key in this file; None where it can't have it, an empty one where it is all below it."""
        inner, whole = key.split("."), self.package.split(".") if self.package else []
        if inner[: len(whole)] == whole:
            return inner[len(whole) :]
        return [] if whole[: len(inner)] == inner else None


class Loader(ConfigLoaderImpl):
    """Hydra's own, but for the way in which files are merged and mistakes in them are reported."""

    files: tuple[Merged, ...] = ()  # what the last composition was merged of, the later over the earlier

    def load_configuration(self, config_name: str | None, *arguments: Any, **named: Any) -> DictConfig:
        """Compose as Hydra does, and raise what it raises.

        OptionFileError names file, line and column where what is wrong is in a file.
        """
        self.files = ()
        try:
            composed = super().load_configuration(config_name, *arguments, **named)
        except OptionFileError:
            raise
        except Exception:
            self._check_defaults()
            raise
        self._check_choices_of_hydra(str(config_name))
        return composed

    @classmethod
    def set_values(cls, cfg: DictConfig, values: list[Override]) -> None:
        """Set in a composed configuration what overrides of no group say, as Hydra does while it composes."""
        cls.validate_sweep_overrides_legal(values, RunMode.RUN, from_shell=False)
        _make_room_for(cfg, values)
        cls._apply_overrides_to_config(values, cfg)
        cfg.hydra.runtime.cwd = os.getcwd()

    def _parse_overrides_and_create_caching_repo(self, *arguments: Any) -> Any:
        self._overrides, self._repo = super()._parse_overrides_and_create_caching_repo(*arguments)
        return self._overrides, self._repo

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        read = repo.load_config(config_path=default.config_path)
        if read is not None and (file := _file_of(read, default.config_path)) is not None:
            package = default.package if default.package is not None else read.header["package"]
            self.files += (Merged(file, package or ""),)
            inner = self.files[-1].within("hydra.searchpath")
            if inner and not default.primary and OmegaConf.select(read.config, ".".join(inner)) is not None:
                raise error_at(file, inner, f"hydra.searchpath {SEARCHPATH}")
        return super()._load_single_config(default, repo)

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        cfg = OmegaConf.create()
        with flag_override(cfg, "no_deepcopy_set_nodes", True):
            for default in defaults:
                given = self._load_single_config(default=default, repo=repo).config
                _make_room(cfg, given)
                try:
                    cfg.merge_with(given)
                except OmegaConfBaseException as error:  # now only Hydra's own section can have what does not fit
                    general = (str(error.full_key or HYDRA), str(error).splitlines()[0])
                    key, reason = _misfit(cfg.get(HYDRA), given.get(HYDRA), HYDRA) or general
                    last = self.files[-1]
                    raise error_at(last.file, last.within(key) or [], f"{key}: {reason}") from error
        _make_room_for(cfg, self._overrides)
        section = cfg.get(HYDRA)
        if isinstance(section, DictConfig) and section._get_flag(HAS_DEFAULTS):
            with flag_override(section, ["readonly", "struct"], False):
                section._set_flag(HAS_DEFAULTS, None)
                section.pop("defaults", None)
        return cfg

    def _check_choices_of_hydra(self, primary: str) -> None:
        """Refuse entries of `defaults` that choose for Hydra itself, where conf/config.yaml goes before them."""
        read = self._read()
        base = read[BASE].defaults_list if BASE in read else None
        fixed = {entry.group: entry.value for entry in base or () if isinstance(entry, GroupDefault) and entry.override}
        for path, result in read.items():
            entries = result.defaults_list if path not in (BASE, primary) else None
            for number, entry in enumerate(entries or ()):
                group = str(entry.group).strip("/") if isinstance(entry, GroupDefault) and entry.override else ""
                if group in fixed and entry.value != fixed[group] and (file := _file_of(result, path)) is not None:
                    in_place = f"on the command line it counts: {group}={entry.value}"
                    remedy = in_place if group == SWEEPER else "leave it out"
                    reason = f"would change nothing, as conf/config.yaml goes before it; {remedy}"
                    raise error_in_defaults(file, number, reason)

    def _read(self) -> dict[str, ConfigResult]:
        """Return the files that were read, by their paths."""
        cache: dict[str, ConfigResult | None] = getattr(getattr(self, "_repo", None), "cache", {})
        return {key.removeprefix("config_path="): result for key, result in cache.items() if result is not None}

    def _check_defaults(self) -> None:
        """Refuse entries of `defaults` that name no option, or choose where another file has chosen."""
        read = self._read()
        chosen: dict[str, str] = {}
        for path in sorted(read, key=lambda path: path not in (f"{HYDRA}/config", BASE)):
            for number, entry in enumerate(read[path].defaults_list or ()):
                reason = self._wrong_entry(entry, path, chosen)
                if reason and (file := _file_of(read[path], path)) is not None:
                    raise error_in_defaults(file, number, reason)
                if isinstance(entry, GroupDefault) and not entry.override and entry.package is None:
                    chosen.setdefault(_absolute(str(entry.group), path), path)

    def _wrong_entry(self, entry: InputDefault, path: str, chosen: Mapping[str, str]) -> str:
        """Return what is wrong with an entry of a file's `defaults`; '' where it is good."""
        if isinstance(entry, GroupDefault):
            return self._wrong_group(entry, path, chosen)
        assert isinstance(entry, ConfigDefault)
        name = str(entry.path)
        place = _absolute(name, path)
        if entry.is_self() or "${" in name or self._repo.config_exists(place):
            return ""
        group, _, option = place.rpartition("/")
        if near := nearest(option, self._options(group)):
            found = f"{group}/{near}" if group else near
            return f"no file {place}.yaml; did you mean {f'/{found}' if name.startswith('/') else near}?"
        other, _, leaf = name.strip("/").rpartition("/")
        if other and leaf in self._options(other):
            return f"no file {place}.yaml; an option of another group is chosen by `override /{other}: {leaf}`"
        return f"no file {place}.yaml; {_listed(self._options(group))}"

    def _wrong_group(self, entry: GroupDefault, path: str, chosen: Mapping[str, str]) -> str:
        name = str(entry.group)
        group, given = _absolute(name, path), entry.value if isinstance(entry.value, list) else [entry.value]
        value = "null" if entry.value is None else str(entry.value).replace("'", "")

        def written(group: str, *, overrides: bool = True) -> str:
            return f"`{'override ' if overrides else ''}/{group}: {value}`"

        if entry.optional or "${" in name or any("${" in str(option) for option in given):
            return ""
        if not self._repo.group_exists(group):
            if not name.startswith("/") and self._repo.group_exists(name):
                return f"a group is looked for in this file's own folder unless it begins with '/': {written(name)}"
            groups = self._repo.get_group_options("", ObjectType.GROUP)
            meant = did_you_mean(group.rpartition("/")[2], groups, written)
            return f"no group {group}{meant or f'; {_listed(groups)}'}"
        for option in given:
            if option is not None and option != "???" and not self._repo.config_exists(f"{group}/{option}"):
                known = self._options(group)
                return f"{group} has no option {option}; {_listed(known)}{did_you_mean(option, known)}"
        if entry.override and entry.package is not None:
            return f"nothing else has chosen an option for {entry.package}: {written(group)}, without '@'"
        if entry.override and group not in chosen and not group.startswith(f"{HYDRA}/"):
            without = written(group, overrides=False)
            return f"nothing else has chosen an option of {group}: {without}, without `override`"
        if not entry.override and entry.package is None and group in chosen:
            other = f"{chosen[group]}.yaml has chosen an option of {group}"
            return f"{other}; another one takes its place: {written(group)}"
        return ""

    def _options(self, group: str) -> list[str]:
        found: list[str] = self._repo.get_group_options(group, ObjectType.CONFIG)
        return [name for name in found if not name.startswith("_")]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"one of {', '.join(names[:MOST_LISTED])}{more}" if names else "there is none"


def _absolute(name: str, path: str) -> str:
    """Return a name in the `defaults` of a file as the way from the folder of all options."""
    folder = path.rpartition("/")[0]
    return name[1:] if name.startswith("/") else f"{folder}/{name}" if folder else name


def _file_of(read: ConfigResult, path: str) -> Path | None:
    """Return the file that was read; None of what Hydra's plugins have in memory."""
    name = f"{path.removesuffix('.yaml')}.yaml"
    return Path(read.path.removeprefix(FILE), name) if read.path.startswith(FILE) else None


def _make_room(cfg: DictConfig, given: Any) -> None:
    """Take lists out of a configuration where mappings are to be merged into it, and mappings for lists.

    Nothing is done within Hydra's own section.
    """
    for key, new in given.items_ex(resolve=False) if isinstance(given, DictConfig) and has_content(given) else ():
        old = None if key == HYDRA and cfg._get_parent() is None else cfg._get_node(key, validate_access=False)
        kinds = [type(node) for node in (old, new) if isinstance(node, Container) and has_content(node)]
        if kinds == [DictConfig, DictConfig]:
            assert isinstance(old, DictConfig)
            _make_room(old, new)
        elif len(set(kinds)) == 2:
            cfg[key] = None


def copies_of(cfg: DictConfig) -> Callable[[], DictConfig]:
    """Return a function that returns a new copy of a configuration each time: read back from its pickled form, which is
    several times faster than a deep copy.
    """
    try:
        return partial(pickle.loads, pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL))
    except pickle.PicklingError:  # it has classes of plugins that Hydra has loaded again since
        return partial(copy.deepcopy, cfg)


def copy_of(cfg: DictConfig) -> DictConfig:
    """Return a copy of a configuration."""
    return copies_of(cfg)()


def _make_room_for(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    for override in overrides:
        if not override.is_delete():
            make_room(cfg, override.key_or_group, override.value())


def make_room(cfg: DictConfig, key: str, value: Any) -> None:
    """Take out of a configuration what can't hold a key's value: a list on the way, or in place of a mapping, …

    So the value is taken, and the gate reports it.
    """
    given: Any = next((kind() for kind in (dict, list) if isinstance(value, kind)), None)
    for part in reversed(key.split(".")):
        given = {part: given}
    _make_room(cfg, OmegaConf.create(given))


def _misfit(section: Any, given: Any, key: str) -> tuple[str, str] | None:
    """Return the key of Hydra's own section that can't be what a file sets, and why; None where there is none."""
    if isinstance(section, DictConfig) and not isinstance(given, DictConfig):
        return key, f"has keys of its own ({', '.join(map(str, section))}), and is no value"
    if not isinstance(section, DictConfig):
        return None
    for name, new in given.items_ex(resolve=False):
        inner = f"{key}.{name}"
        if name not in section:
            known = [str(name) for name in section if name != "_target_"]
            meant = did_you_mean(name, known, lambda near: f"{key}.{near}")
            return inner, f"there is no such key{meant or f'; {_listed(known)}'}"
        if found := _misfit(section._get_node(name), new, inner):
            return found
    return None


def has_content(node: Container) -> bool:
    """Return whether a list or mapping is one as it is: not null, not missing, and no interpolation."""
    return not (node._is_none() or node._is_missing() or node._is_interpolation())
