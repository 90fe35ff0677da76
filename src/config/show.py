"""`--cfg job|hydra|all`: what a command line is composed to, as YAML."""

from typing import Any

from omegaconf import Container, OmegaConf

from src.config.command_line import CommandLine
from src.config.composed import Composed
from src.config.problems import Problem, refuse
from src.config.resolving import hydra_resolved
from src.secrets import clean


def shown_config(composed: Composed, line: CommandLine) -> str:
    """Return the configuration that a command line was composed to; ConfigError where there is no such `--package`."""
    flags, cfg = line.flags, composed.hydra
    assert cfg is not None  # without problems there always is one
    with hydra_resolved(cfg):
        names = [str(name) for name in cfg]
        kept = {"job": [name for name in names if name != "hydra"], "hydra": ["hydra"]}.get(flags.cfg, names)
        sections: Any = OmegaConf.to_container(cfg)
        whole = OmegaConf.create(sections)
        package = None if flags.package == "_global_" else flags.package
        chosen: Any = OmegaConf.masked_copy(whole, kept) if package is None else OmegaConf.select(whole, package)
        if chosen is None:
            raise refuse([Problem.on_command_line("--package", "no such section or key", package)])
        if not isinstance(chosen, Container):
            return clean(f"{chosen}\n")
        if flags.resolve:
            OmegaConf.resolve(chosen)
        header = "" if package is None else f"# @package {package}\n"
        return clean(header + OmegaConf.to_yaml(chosen))
