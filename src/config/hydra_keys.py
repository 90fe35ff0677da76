"""Keys of Hydra's own section: what Towline obeys, and what it refuses with the way that works. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config.compose import CommandLine, Composed, hydra_resolved
from src.config.problems import Problem

SWEEPER_PARAMS = "hydra.sweeper.params"
DESCRIBES_A_SWEEP = "describes a sweep: give the same command with -m"
OWN_SWEEPER = "towline"
SUBDIR = "${hydra:job.num}"
"""Hydra's default, and the only form in which a sweep's trials lie in their folder."""


def asks_for_sweep(composed: Composed) -> bool:
    """Return whether a file says `hydra.mode: MULTIRUN`, which is the same as -m."""
    return composed.hydra is not None and _name(composed.hydra.hydra.mode) == "MULTIRUN"


def sweeper_params(composed: Composed) -> dict[str, Any]:
    """Return what `hydra.sweeper.params` varies, in a file or on the command line."""
    if composed.hydra is None:
        return {}
    with hydra_resolved(composed.hydra):
        given = OmegaConf.select(composed.hydra, SWEEPER_PARAMS)
        found: Any = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else {}
    return found


def hydra_problems(composed: Composed, line: CommandLine) -> Iterator[Problem]:
    """Yield what is asked of Hydra and would not happen, with what to type instead."""
    if composed.hydra is None:
        return
    section: Any = OmegaConf.to_container(composed.hydra.hydra)
    is_sweep, is_own = line.flags.multirun, is_own_sweeper(composed)
    if is_sweep and _name(section["mode"]) == "RUN":
        yield Problem("hydra.mode", "says one run, and -m a sweep: leave one of them out", "RUN")
    if section["job"]["chdir"]:
        reason = "files are found from where the command was given: leave it out, or `cd` there first"
        yield Problem("hydra.job.chdir", reason, section["job"]["chdir"])
    if section["searchpath"]:
        reason = "options of your own are found by --config-dir DIR, or by hydra.searchpath on the command line"
        yield Problem("hydra.searchpath", reason, section["searchpath"])
    if not is_sweep and (params := sweeper_params(composed)):
        yield Problem(SWEEPER_PARAMS, DESCRIBES_A_SWEEP, params)
    if is_sweep and is_own and (subdir := section["sweep"]["subdir"]) != SUBDIR:
        yield Problem("hydra.sweep.subdir", "a sweep's trials are in folders 0, 1, …: leave it out", subdir)
    if is_sweep and not is_own and (params := composed.sections.get("sweep", {}).get("params")):
        reason = "is read by Towline's own sweeper; give the values on the command line, or leave hydra/sweeper out"
        yield Problem("sweep.params", reason, params)


def is_own_sweeper(composed: Composed) -> bool:
    """Return whether a sweep is run by Towline, and not by another sweeper of Hydra's (hydra/sweeper=…)."""
    return composed.choices.get("hydra/sweeper", OWN_SWEEPER) == OWN_SWEEPER


def _name(mode: Any) -> str | None:
    """Return the name of an enum's member, or of what stands for one."""
    return None if mode is None else str(getattr(mode, "name", mode)).rpartition(".")[2]
