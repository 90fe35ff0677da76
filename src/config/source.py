"""How Hydra reads option files: by Towline's reader, so that a mistake is placed. No torch here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from src.config.options import OptionFileError, error_of_text, is_hidden, read_option
from src.secrets import as_variables

LIST_OR_MAPPING = ("data.validation_files", "data.test_files")
"""Keys whose value is a list in some files and a mapping in others, which Hydra can't put in each other's place."""
_LIST = "towline-list:"
"""Begins a text that stands for a list while Hydra merges files; see `with_lists`."""


class FileConfigSource(file_config_source.FileConfigSource):  # Hydra tells sources of a scheme apart by this name
    """Hydra's source of files, with mistakes placed and with lists that a mapping may take the place of."""

    hides_credentials = False
    """Whether variables stand for URLs with credentials, as Hydra's own main writes, pickles and prints what it has."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read an option file.

        Raises:
            OptionFileError: naming file, line and column.
        """
        if any(is_hidden(part) and part != ".." for part in Path(config_path).parts):
            raise OptionFileError(f"{config_path}: a name that begins with '.' is no option's; give it another")
        if os.path.lexists(place := self._place(config_path)):
            read_option(place)
        try:
            result = super().load_config(config_path)
        except OmegaConfBaseException as error:
            raise error_of_text(place, _unfinished) or error from error
        package = result.header.get("package") or os.path.dirname(config_path).replace("/", ".")
        for key in LIST_OR_MAPPING:
            inner = key if package == "_global_" else key.removeprefix(f"{package}.")
            if package == "_global_" or inner != key:
                _as_text(result.config, inner)
        if self.hides_credentials:
            content = OmegaConf.to_container(result.config)
            if (hidden := as_variables(content)) != content:
                result.config = OmegaConf.create(hidden)
        return result

    def is_config(self, config_path: str) -> bool:
        """Return whether there is an option, one that can't be read included: `load_config` says why."""
        place = self._place(config_path)
        return os.path.lexists(place) and not os.path.isdir(place)

    def _place(self, config_path: str) -> Path:
        return Path(self.path, self._normalize_file_name(config_path))


def _unfinished(text: str) -> str:
    """Return why OmegaConf can't read a text; '' where it can."""
    try:
        OmegaConf.create({"": text})
    except GrammarParseError:
        return "`${` begins an interpolation that can't be read; where it is text, write `\\${`"
    return ""


def _as_text(config: Any, key: str) -> None:
    """Put a text in a list's place, in which nothing looks like an interpolation of OmegaConf's."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config._get_node(parent) if isinstance(config, DictConfig) and not config._is_none() else None
    node = config._get_node(name) if isinstance(config, DictConfig) and not config._is_none() else None
    if isinstance(node, ListConfig) and not node._is_none():
        config[name] = _LIST + json.dumps(OmegaConf.to_container(node)).replace("${", "$\\u007b")


def with_lists(sections: dict[str, Any]) -> dict[str, Any]:
    """Put lists back into sections that were composed, in place, and return them."""
    for key in LIST_OR_MAPPING:
        section, name = key.split(".")
        given = sections.get(section)
        if isinstance(given, dict) and isinstance(text := given.get(name), str) and text.startswith(_LIST):
            given[name] = json.loads(text.removeprefix(_LIST))
    return sections


def install(*, hides_credentials: bool = False) -> None:
    """Have Hydra read files by the source above, wherever it composes."""
    FileConfigSource.hides_credentials |= hides_credentials
    Plugins.instance()  # registers Hydra's own sources, and would refuse another that was there before
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
