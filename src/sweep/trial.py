"""A trial: a run inside a sweep, with its frozen configuration and what it is told apart by. No torch here."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from src.config.frozen import config_hash
from src.records import Types, check_keys
from src.secrets import without_credentials

_LONG_NUMBER = re.compile(r"(?<==)\d*\.\d{6,}(e-?\d+)?(?= |$)")
TRIAL_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("number", "unit", "seed"), int),
    "overrides": list,
    **dict.fromkeys(("identity", "setting"), str),
    "fold": (int, NoneType),
    "config": dict,
}
REPLICATED = ("seed", "data.fold")
"""Keys in which the trials of one setting differ."""


@dataclass(frozen=True)
class Trial:
    """A run inside a sweep, its configuration frozen."""

    number: int
    unit: int
    """The trial of the Optuna study that it belongs to; where replicates are averaged, those of a setting share one."""
    overrides: tuple[str, ...]
    """What sets it apart from the other trials, each as KEY=VALUE."""
    identity: str
    setting: str
    seed: int
    fold: int | None
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        return " ".join(self.overrides)

    @property
    def setting_label(self) -> str:
        """What sets its setting apart from the others."""
        return " ".join(text for text in self.overrides if text.partition("=")[0] not in REPLICATED)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"config": dict(self.config)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Trial:
        return cls(**{**given, "overrides": tuple(given["overrides"])})


def check_trial(line: Mapping[str, Any], _before: Any = None) -> None:
    """Check that a line of trials.jsonl is the trial that was written: by its types, and the hash of what it computes.

    Raises:
        ValueError: saying what it is not.
    """
    check_keys(line, TRIAL_KEYS)
    if line.keys() != TRIAL_KEYS.keys():
        raise ValueError(f"it has the keys {', '.join(line)}, where {', '.join(TRIAL_KEYS)} are those of a trial")
    try:
        found = identity_of(line["config"]), line["config"]["seed"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its configuration is none ({type(error).__name__}: {error})") from error
    if found != (line["identity"], line["seed"]):
        raise ValueError("its configuration is not the one that its identity is the hash of")


def short(label: str) -> str:
    """Give a label for the terminal: a searched number with four digits."""
    return _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.4g}", label)


def trial_of(number: int, unit: int, overrides: tuple[str, ...], frozen: Mapping[str, Any], setting: str) -> Trial:
    """Make a trial of a configuration that was admitted."""
    config = copy.deepcopy(dict(frozen)) | {"force": False}
    if config["tracking"].get("run_name") == config["name"]:  # so that MLflow's list tells them apart
        config["tracking"]["run_name"] = " ".join(overrides) or config["name"]
    fold = config["data"].get("fold")
    overrides = tuple(without_credentials(text) for text in overrides)
    return Trial(number, unit, overrides, identity_of(config), setting, config["seed"], fold, config)


def identity_of(config: Mapping[str, Any]) -> str:
    """Give a hash of what a configuration computes: without paths and tracking. 16 hex digits."""
    data = {key: value for key, value in config["data"].items() if key != "cache_dir"}
    return config_hash({**config, "data": data})


def setting_of(config: Mapping[str, Any]) -> str:
    """Give the identity without seed and fold: what all replicates of a setting share."""
    data = {key: value for key, value in config["data"].items() if key != "fold"}
    return identity_of({**config, "data": data, "seed": None})
