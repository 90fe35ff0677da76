"""What changed between a checkpoint and the run that resumes from it, and what that means. Pure, no torch.

Two comparisons. Configurations say what was asked for, key by key; what a change means is a fact of the key
(`src.config.schema.fields.KeyInfo.resume`). A fingerprint says what resulted: which rows, which ids, which weights. A
key whose outcome is in the fingerprint (files, templates, a model's name) is harmless by itself, because the same
outcome by another path is no change.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from src.config.frozen import add_later_keys
from src.config.keys import all_keys, known_keys
from src.config.quoting import shell_override
from src.config.schema.data import is_grouped_by_length
from src.config.schema.fields import DottedConfig, Impact, Verdict
from src.errors import ConfigError
from src.util import plural

NOT_THERE = "(not there)"  # stands in a Change for the value of a key that one side does not have
LONGEST_VALUE = 48  # characters of a value in a message


@dataclass(frozen=True)
class Change:
    """One difference. `why` is a few words: needed where it is impossible; of what is harmless, what has to be said."""

    key: str
    before: Any
    now: Any
    impact: Impact
    why: str = ""

    def __post_init__(self) -> None:
        if self.impact is Impact.impossible and not self.why:
            raise ValueError(f"{self.key}: what is refused for good needs a reason")

    @property
    def values(self) -> str:
        """The key with what it was and is, shortened; of hashes the key alone."""
        return self.key if self.key in HASHES else f"{self.key}: {_both(self.before, self.now)}"


@dataclass(frozen=True)
class Fingerprint:
    """What a configuration resulted in, and where and when the run was trained."""

    step: int  # steps done
    num_steps: int  # of the whole run
    data: str  # digest of the encoded train rows in their order; of a streamed set, of its files and settings
    num_rows: int | None  # of the train set; None where it is streamed
    tokenizer: str  # hash of token -> id
    frozen_weights: str | None  # hash of the weights that are not trained, so not in a checkpoint; None: all are
    device: str  # "cpu" or "cuda"
    num_processes: int
    step_sequences: int  # rows, packs of rows, or positions that a step takes from all processes
    versions: dict[str, str]  # library -> version
    architecture: str | None = None
    """Hash of the model's own settings that no shape shows (positions, norms, dropout); None: unknown."""
    validation: str | None = None  # hash of the rows that evaluations are of; None: unknown

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Build from what `asdict` returned, without what a later version added; TypeError names what is missing."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


HASHES = ("data", "tokenizer", "frozen_weights", "architecture", "validation")
"""Entries of a fingerprint whose values say nothing to a reader."""


def compare_configs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return every key of two whole frozen configurations that differs, in their order, also those that one lacks."""
    wholes = dict(before), dict(now)
    for sections in wholes:
        add_later_keys(sections)  # one that lacks such a key is as one with its default
    first, second = (dict(_flat(sections)) for sections in wholes)
    order = list(dict.fromkeys(key.partition(".")[0] for key in [*second, *first]))
    return [
        Change(key, then, today, *_judge(key, first, second))
        for key in sorted({**second, **first}, key=lambda key: order.index(key.partition(".")[0]))
        if (then := first.get(key, NOT_THERE)) != (today := second.get(key, NOT_THERE))
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a configuration by dotted keys; a mapping that is the value of a key stays one."""
    nested = {key.rpartition(".")[0] for key in known_keys()}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (not prefix or key in nested):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _judge(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    if key not in before or key not in now:
        return _judge_lone(key, before, now)
    if key not in all_keys():
        return Impact.trajectory, "a key that this version does not know"
    info = all_keys()[key].info
    if not isinstance(info.resume, Impact):
        return info.resume(key, before, now)
    if info.counts_where is not None and not any(map(info.counts_where, (before, now))):
        return Impact.harmless, ""
    return info.resume, info.why


def _judge_lone(key: str, before: DottedConfig, now: DottedConfig) -> Verdict:
    """Judge a key that one side does not have.

    With another `type` of the section others come and go, and the type says it all. Else one of the two is of another
    version: null is how a key says nothing, and whether a state fits is found when it is loaded.
    """
    kind = f"{key.partition('.')[0]}.type"
    if before.get(kind) != now.get(kind) or before.get(key, now.get(key)) is None:
        return Impact.harmless, ""
    resume = all_keys()[key].info.resume if key in all_keys() else Impact.trajectory
    impact = min(resume, Impact.trajectory) if isinstance(resume, Impact) else Impact.trajectory
    return impact, "" if impact is Impact.harmless else "a key of another version"


def compare_fingerprints(before: Fingerprint, now: Fingerprint) -> list[Change]:
    """Return what differs between a checkpoint's fingerprint and that of the run that would resume, but for `step`."""
    changes = []
    for key, verdict in _COMPARISONS.items():
        then, today = getattr(before, key), getattr(now, key)
        is_unknown = key in ("architecture", "validation") and None in (then, today)
        if then != today and not is_unknown:
            judged = verdict(before, now) if callable(verdict) else verdict
            changes.append(Change(key, then, today, *judged))
    return changes + [
        Change(f"versions.{name}", then, today, Impact.rounding)
        for name in {**now.versions, **before.versions}
        if (then := before.versions.get(name, NOT_THERE)) != (today := now.versions.get(name, NOT_THERE))
    ]


def _rows(before: Fingerprint, now: Fingerprint) -> Verdict:
    if before.num_rows is None or now.num_rows is None:
        return Impact.trajectory, "the train set changed, or how it is read"
    return Impact.trajectory, f"the train rows changed: {before.num_rows:,} then, {now.num_rows:,} now"


def _base(before: Fingerprint, now: Fingerprint) -> Verdict:
    if before.frozen_weights is None:
        return Impact.impossible, "all weights were trained then, now some are frozen"
    if now.frozen_weights is None:
        return Impact.impossible, "some weights were frozen then, now all are trained"
    return Impact.trajectory, "the frozen weights changed, or their quantisation"


def _steps(before: Fingerprint, now: Fingerprint) -> Verdict:
    if now.num_steps < before.step:
        return Impact.impossible, f"already {before.step:,} steps done"
    if now.num_steps < before.num_steps:
        return Impact.trajectory, "fewer steps in all"
    return Impact.harmless, ""


_COMPARISONS: dict[str, Verdict | Callable[[Fingerprint, Fingerprint], Verdict]] = {
    "data": _rows,
    "tokenizer": (Impact.impossible, "ids mean other tokens"),
    "frozen_weights": _base,
    "architecture": (Impact.trajectory, "the model's settings (its config.json) changed"),
    "validation": (Impact.harmless, "evaluated on other rows, so the best so far is forgotten"),
    "num_steps": _steps,
    "device": (Impact.rounding, ""),
    "num_processes": (Impact.rounding, "sums in another order"),
    "step_sequences": (Impact.trajectory, "a step takes different rows: rows x accumulation x processes"),
}


def check_changes(changes: Sequence[Change], *, allow_changed: bool, checkpoint: str) -> list[str]:
    """Return warnings of the changes that are allowed; ConfigError names each that is not, and what to do.

    With `allow_changed` training may continue differently than before.
    """
    least = Impact.impossible if allow_changed else Impact.trajectory
    if refused := [change for change in changes if change.impact >= least]:
        raise ConfigError(_refusal(refused, checkpoint))
    by_impact = {impact: [change for change in changes if change.impact is impact] for impact in Impact}
    warnings = []
    if others := by_impact[Impact.trajectory]:
        warnings.append(f"the run trains differently after {checkpoint}: {_joined(others)}")
    if rounded := by_impact[Impact.rounding]:
        warnings.append(f"resumes from {checkpoint}, but no longer bit for bit: {_joined(rounded)}")
    return [*warnings, *(_joined([change]) for change in by_impact[Impact.harmless] if change.why)]


def _joined(changes: Sequence[Change]) -> str:
    return "; ".join(f"{change.values} ({change.why})" if change.why else change.values for change in changes)


def _refusal(refused: Sequence[Change], checkpoint: str) -> str:
    impossible = [change for change in refused if change.impact is Impact.impossible]
    width = min(60, max(len(change.values) for change in refused))
    lines = [f"Can't resume from {checkpoint}: {plural(len(refused), 'change')} since then"]
    lines += [f"  {change.values:<{width}}   {change.why}".rstrip() for change in refused]
    if not impossible:
        lines.append("From here on the run would train differently: checkpoint.allow_changed=true resumes anyway.")
    elif len(impossible) < len(refused):
        for_good = ", ".join(change.key for change in impossible)
        lines.append(f"The saved state does not fit {for_good}; checkpoint.allow_changed=true is for the rest only.")
    else:
        lines.append("The saved state does not fit.")
    back = "Put it back as it was" if len(refused) == 1 else "Put them back as they were"
    lines.append(
        f"{back} to resume the same training; or start a new run in another hydra.run.dir "
        f"({shell_override('init_from', checkpoint)} starts it from these weights)."
    )
    return "\n".join(lines)


def _both(before: Any, now: Any) -> str:
    """Write two values so that a reader sees where they differ, also where they are long."""
    texts = [_text(before), _text(now)]
    start = 0
    if max(map(len, texts)) > LONGEST_VALUE:
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        start = same - 8 if same > LONGEST_VALUE // 2 else 0  # some of what is alike, for orientation
    ends = ["…" if len(text) > start + LONGEST_VALUE else "" for text in texts]
    cut = [("…" if start else "") + t[start : start + LONGEST_VALUE] + end for t, end in zip(texts, ends, strict=True)]
    return " → ".join(cut)


def _text(value: Any) -> str:
    """Write a value as a person would."""
    is_plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    return value if is_plain else json.dumps(value, ensure_ascii=False, default=str)


def is_reordered(changes: Sequence[Change], now: Mapping[str, Any]) -> bool:
    """Return whether the row order of the current epoch can't be continued, so that the epoch starts again.

    The changes are those of configuration and fingerprint, `now` is the whole configuration that resumes.
    """
    flat, keys = dict(_flat(now)), {change.key for change in changes}
    reorders = [all_keys()[key].info.reorders for key in keys & all_keys().keys()]
    regroups = "step_sequences" in keys and is_grouped_by_length(flat)
    return "data" in keys or regroups or any(one if isinstance(one, bool) else one(flat) for one in reorders)
