"""How Hydra reads option files: by Towline's reader, so that a mistake is placed."""

import os
from pathlib import Path

from hydra._internal import hydra as hydra_main
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from src.config.merging import Loader
from src.config.options import OptionFileError, error_of_text, is_hidden, option_text, read_option
from src.secrets import as_variables

HEADER_CHARACTERS = 512
"""The length of the part of a file in which Hydra looks for `# @package`."""


class FileConfigSource(file_config_source.FileConfigSource):  # Hydra knows the source of a scheme by this name
    """Hydra's source of files, with mistakes placed."""

    hides_credentials = False
    """Whether variables replace URLs with credentials, as Hydra's own main writes, pickles and prints what it has."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read an option file; OptionFileError names file, line and column."""
        if any(is_hidden(part) and part != ".." for part in Path(config_path).parts):
            raise OptionFileError(f"{config_path}: a name that begins with '.' is no option's; give it another")
        place = self._place(config_path)
        if not os.path.lexists(place):
            return super().load_config(config_path)  # which raises that there is none
        content = read_option(place)
        try:
            config = OmegaConf.create(as_variables(content) if self.hides_credentials else content)
        except OmegaConfBaseException as error:
            raise error_of_text(place, _unfinished) or error from error
        header = self._get_header_dict(option_text(place)[:HEADER_CHARACTERS])
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", config, header)

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


def install(*, hides_credentials: bool = False) -> None:
    """Make Hydra read files by the source above, and put them together as `Loader` does, wherever it composes."""
    hydra_main.ConfigLoaderImpl = Loader
    FileConfigSource.hides_credentials |= hides_credentials
    Plugins.instance()  # registers Hydra's own sources, and would refuse another that was there before
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
