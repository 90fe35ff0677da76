"""What `${…}` in a composed configuration stands for, in memory and as it is stored."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf._utils import _DEFAULT_MARKER_
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers.oc import env as environment_variable

from src import secrets
from src.config.composed import Composed
from src.config.deepspeed import read_deepspeed_file
from src.config.formats import fill_mixture, mixed_sources
from src.config.merging import has_content
from src.config.problems import Problem

NONE_WHERE_EMPTY = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Variables that count as not set where they are empty, as MLflow reads them."""
UNRESOLVED = (OmegaConfBaseException, RecursionError)
"""What OmegaConf raises for an interpolation that can't be resolved."""
_is_storing: ContextVar[bool] = ContextVar("is_storing", default=False)
"""Whether what is resolved is to be stored: a placeholder then stands for each secret of the environment."""
_TAKES_MISSING = re.compile(r"Missing mandatory value: (?!hydra\.)")
"""What OmegaConf says of a value that takes a missing one, which the gate reports by itself."""
_INTERPOLATED = re.compile(r"(?<!\\)\$\{\s*([A-Za-z_][\w.]*)\s*\}")
"""What a text takes from another key."""


@contextmanager
def hydra_resolved(cfg: DictConfig | None) -> Iterator[None]:
    """Resolve `${hydra:…}` by what was composed."""
    known = HydraConfig.instance()
    before = known.cfg
    if cfg is not None:
        known.cfg = cfg
    try:
        yield
    finally:
        known.cfg = before


def resolve_sections(whole: DictConfig, composed: Composed) -> None:
    """Resolve `${…}` in every section; one that can't be resolved is a problem of its own."""
    reads_environment = "oc.env" in str(OmegaConf.to_container(whole))
    storing = copy_context()
    storing.run(_is_storing.set, True)
    failed: dict[str, Exception] = {}
    with hydra_resolved(composed.hydra):
        for name in whole:
            key = str(name)
            try:
                resolved = _resolved(whole, name)
                composed.sections[key] = secrets.reveal({key: resolved}, [])[key]
                kept = secrets.placed(storing.run(_resolved, whole, name), key) if reads_environment else resolved
                composed.stored[key] = secrets.masked(kept)
            except UNRESOLVED as error:
                if OmegaConf.is_missing(whole, name):
                    composed.sections[key] = "???"
                else:
                    failed[key] = error
        if failed:
            _leave_out(whole, failed, composed)
    if (stored := composed.stored.get("deepspeed")) is not None:
        composed.problems += read_deepspeed_file(composed.sections["deepspeed"], stored)
    secrets.hand_down(composed.sections, composed.stored, is_new=composed.hydra is not None)


def _leave_out(whole: DictConfig, failed: Mapping[str, Exception], composed: Composed) -> None:
    """Report why sections can't be resolved, and take the rest of each, in which `???` stands for what can't be."""
    found = unresolved(whole, failed)
    composed.problems = _to_blame([*composed.problems, *found.values()])
    for section, _, rest in {key.partition("[")[0]: key.partition("[")[0].partition(".") for key in found}.values():
        child = rest.partition(".")[0]
        composed.unresolved.add(f"{section}.{child}" if child else section)
        if child:
            whole[section][child] = "???"
    for key in failed:
        if key not in composed.unresolved:
            composed.sections[key] = _resolved(whole, key)


def unresolved(whole: DictConfig, failed: Mapping[str, Exception]) -> dict[str, Problem]:
    """Return a problem for each value whose `${…}` can't be resolved, by its dotted key.

    `failed` are the keys that hold such values, and what OmegaConf said of each.
    """
    found: dict[str, Problem] = {}
    for key, cause in failed.items():
        before, full_key = len(found), str(whole._get_full_key(key))
        for name, node in _values(whole._get_node(key), full_key):
            try:
                node._dereference_node()
            except UNRESOLVED as error:
                reason = f"can't be resolved: {_why_unresolved(error)}; where `${{` is text, write `\\${{`"
                found[name] = Problem(name, reason, str(node._value()))
        if len(found) == before:  # it is missing, or takes what can't be resolved from elsewhere
            is_missing = isinstance(cause, MissingMandatoryValue)
            reason = "needs a value" if is_missing else f"can't be resolved: {_why_unresolved(cause)}"
            found[full_key] = Problem(full_key, reason, has_value=False)
    return found


def _to_blame(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems without those of values that take from another one what can't be resolved, or is missing."""
    problems = [problem for problem in problems if not _TAKES_MISSING.search(problem.reason)]
    keys = [problem.key for problem in problems]

    def is_taken(problem: Problem) -> bool:
        sources = _INTERPOLATED.findall(str(problem.value))
        return any(one != problem.key and any(f"{key}.".startswith(f"{one}.") for key in keys) for one in sources)

    return [problem for problem in problems if not is_taken(problem)] or list(problems)


def _why_unresolved(error: Exception) -> str:
    text = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    if isinstance(error, RecursionError) or "Recursive interpolation" in text:
        return "it takes its value from itself"
    if "argument" in text:
        return "what stands before the colon needs other arguments after it"
    if found := re.fullmatch(r"Interpolation key '(.*)' not found", text):
        return f"there is no key {found[1]}"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", text).strip("\"'")


def _values(node: Any, key: str) -> Iterator[tuple[str, Node]]:
    """Yield each value in a node, unresolved, by its dotted key."""
    if isinstance(node, DictConfig) and has_content(node):
        for name in node:
            yield from _values(node._get_node(name), f"{key}.{name!s}")
    elif isinstance(node, ListConfig) and has_content(node):
        for number in range(len(node)):
            yield from _values(node._get_node(number), f"{key}[{number}]")
    elif isinstance(node, Node) and node._is_interpolation():
        yield key, node


def _resolved(whole: DictConfig, key: Any) -> Any:
    value: Any = whole._get_node(key)
    resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else whole[key]
    if key == "data":
        fill_mixture(resolved)
        list_single_files(resolved)
    return resolved


def list_single_files(data: Any) -> None:
    """Put a list in the place of each single file, in place."""
    for given in (data, *mixed_sources(data)) if isinstance(data, dict) else ():
        for key in ("train_files", "validation_files", "test_files"):
            if isinstance(files := given.get(key), str):
                given[key] = [files]
            elif isinstance(files, dict):
                given[key] = {name: [one] if isinstance(one, str) else one for name, one in files.items()}


def _environment(key: str, default: Any = _DEFAULT_MARKER_, *, _node_: Node) -> str | None:
    """Resolve `${oc.env:KEY}` and `${oc.env:KEY,DEFAULT}`, as OmegaConf does, but for secrets that are to be stored."""
    value = environment_variable(key, default)
    if value == "" and key in NONE_WHERE_EMPTY and default is not _DEFAULT_MARKER_:
        return None if default is None else str(default)
    if value is None or key not in os.environ:
        return value
    place = _node_._get_full_key(None)
    secrets.know_given(place, key, value)
    return secrets.placeholder(key) if _is_storing.get() and secrets.is_stored_interpolation(place, key) else value


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
