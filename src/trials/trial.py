"""A trial: a run inside a sweep, with its frozen configuration and what identifies it. No torch here."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Self

from src.config.axes import REPLICATED
from src.config.schema import MOST_INT, RunConfig
from src.errors import visible
from src.records import Types, check_keys
from src.secrets import without_credentials
from src.terminal import shortened
from src.tracking.sweep_files import CHECKSUM, check_checksum, identity_of, with_checksum

_FLOAT = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")
LONGEST_PAIR = 40  # characters of a key and its value in a trial's name
TRIAL_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("number", "unit", "seed"), int),
    "overrides": list,
    **dict.fromkeys(("identity", "setting"), str),
    "fold": (int, NoneType),
    "config": dict,
}


@dataclass(frozen=True)
class Trial:
    """A run inside a sweep, its configuration frozen."""

    number: int
    unit: int
    """The trial of the Optuna study that it belongs to; where replicates are averaged, those of a setting share one."""
    overrides: tuple[str, ...]  # what sets it apart from the other trials, each as KEY=VALUE
    identity: str
    setting: str
    seed: int
    fold: int | None
    config: Mapping[str, Any]
    sampler: Mapping[str, Any] | None = None  # what the sampler noted with its proposal, which its next ones depend on

    @property
    def label(self) -> str:
        return visible(" ".join(self.overrides), is_line=True)

    @property
    def setting_label(self) -> str:
        """What sets its setting apart from the others."""
        own = " ".join(text for text in self.overrides if text.partition("=")[0] not in REPLICATED)
        return visible(own, is_line=True)

    def as_dict(self) -> dict[str, Any]:
        """Return a line of trials.jsonl."""
        return with_checksum({key: value for key, value in vars(self).items() if key != "sampler" or value})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        values = {key: given[key] for key in TRIAL_KEYS} | {"overrides": tuple(given["overrides"])}
        return cls(**values, sampler=given.get("sampler"))


def check_trial(line: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Check that a line of trials.jsonl is the trial that was written; ValueError says what is not."""
    check_keys(line, TRIAL_KEYS)
    if line.keys() - {CHECKSUM, "sampler"} != TRIAL_KEYS.keys():
        raise ValueError(f"it has the keys {', '.join(line)}, where {', '.join(TRIAL_KEYS)} are those of a trial")
    check_checksum(line)
    if not all(isinstance(text, str) for text in line["overrides"]):
        raise ValueError(f"overrides can't be {line['overrides']}")
    try:
        found = identity_of(line["config"]), line["config"]["seed"], line["config"]["data"].get("fold")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its configuration is none ({type(error).__name__}: {error})") from error
    if found != (line["identity"], line["seed"], line["fold"]):
        raise ValueError("its configuration is not the one that its identity is the hash of")
    if line["number"] != (next_number := 0 if before is None else before["number"] + 1):
        raise ValueError(f"it is trial {line['number']}, where {next_number} is the next: a line is missing or moved")


def run_name(overrides: Sequence[str]) -> str:
    """Return a trial's name for trackers: keys by their last word, searched numbers with three digits."""
    keys = [text.partition("=")[0] for text in overrides]
    last = [key.rpartition(".")[2] for key in keys]
    names = [word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)]
    values = [rounded(text.partition("=")[2]) for text in overrides]
    pairs = (f"{name}={value}" for name, value in zip(names, values, strict=True))
    return " ".join(shortened(visible(pair, is_line=True), LONGEST_PAIR, "…") for pair in pairs)


def rounded(text: str) -> str:
    """Return a number with three digits: 0.00085432 is 8.54e-4. Whole numbers, and what is none, stay as they are."""
    if not _FLOAT.fullmatch(text):
        return text
    value = float(text)
    if 0.01 <= abs(value) < 1000 or value == 0:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def trial_of(number: int, unit: int, overrides: tuple[str, ...], frozen: Mapping[str, Any], setting: str) -> Trial:
    """Make a trial of a configuration that was admitted."""
    config = copy.deepcopy(dict(frozen)) | {"force": False}
    overrides = tuple(without_credentials(text) for text in overrides)
    if config["tracking"].get("run_name") == config["name"]:  # so that they differ where runs are listed
        config["tracking"]["run_name"] = run_name(overrides) or config["name"]
    fold = config["data"].get("fold")
    return Trial(number, unit, overrides, identity_of(config), setting, config["seed"], fold, config)


def with_typed_numbers(config: Mapping[str, Any], typed: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Return a configuration that was admitted as `typed`, the numbers of these keys in one form: 1 for 1.0."""
    whole = dict(config)
    for key in keys:
        *parents, name = key.split(".")
        section: Any = typed
        node = whole
        for parent in parents:
            section = getattr(section, parent, None)
            if not isinstance(node.get(parent), dict):
                break
            node[parent] = node = dict(node[parent])
        else:
            value = getattr(section, name, None)
            if name in node and isinstance(value, int | float) and not isinstance(value, bool):
                is_whole = isinstance(value, int) or (value.is_integer() and abs(value) < MOST_INT)
                node[name] = int(value) if is_whole else value
    return whole


def setting_of(config: Mapping[str, Any]) -> str:
    """Return the identity without seed and fold: what all replicates of a setting share."""
    data = {key: value for key, value in config["data"].items() if key != "fold"}
    return identity_of({**config, "data": data, "seed": None})
