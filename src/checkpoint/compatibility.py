"""What changed between a checkpoint and the run that resumes from it, and what that means. Pure, no torch.

Two comparisons. Configurations say what was asked for, key by key; what a change means is a fact of the key
(`src.config.schema.fields.KeyInfo.resume`). A fingerprint says what resulted: which rows, which ids, which weights. A
key whose outcome is in the fingerprint (files, templates, a model's name) is harmless by itself, because the same
outcome by another path is no change.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from src.config.keys import all_keys, known_keys
from src.config.quoting import shell_override
from src.config.schema.fields import DottedConfig, Impact, Verdict
from src.errors import ConfigError
from src.util import plural

NOT_THERE = "(not there)"
"""Stands in a Change for the value of a key that one side does not have."""
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
    """What a configuration resulted in, and where and when the run was trained.

    Args:
        step: steps done.
        num_steps: of the whole run.
        data: digest of the encoded train rows in their order; of a streamed set, of its files and settings.
        num_rows: of the train set; None where it is streamed.
        tokenizer: hash of token -> id.
        frozen_weights: hash of the weights that are not trained, so not in a checkpoint; None where all are trained.
        device: "cpu" or "cuda".
        step_sequences: rows, or packs of rows, that a step takes from all processes.
        versions: library -> version.
        architecture: hash of the model's own settings that no shape shows (positions, norms, dropout); None: unknown.
        validation: hash of the rows that evaluations are of; None: unknown.
    """

    step: int
    num_steps: int
    data: str
    num_rows: int | None
    tokenizer: str
    frozen_weights: str | None
    device: str
    num_processes: int
    step_sequences: int
    versions: dict[str, str]
    architecture: str | None = None
    validation: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Build from what `as_dict` returned; entries that a later version added are left out.

        Raises:
            TypeError: where some are missing.
        """
        return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})


HASHES = ("data", "tokenizer", "frozen_weights", "architecture", "validation")
"""Entries of a fingerprint whose values say nothing to a reader."""


def compare_configs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return every key that differs, in the order of the configuration, also those that one side lacks.

    Args:
        before, now: whole frozen configurations as plain containers.
    """
    first, second = dict(_flat(before)), dict(_flat(now))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in [*second, *first]))
    keys = sorted({**second, **first}, key=lambda key: sections.index(key.partition(".")[0]))
    changes = []
    for key in keys:
        then, today = first.get(key, NOT_THERE), second.get(key, NOT_THERE)
        if then != today:
            changes.append(Change(key, then, today, *_judge(key, first, second)))
    return changes


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
    """Return what differs between two fingerprints.

    Args:
        before: as the checkpoint has them; its `step` are the steps done.
        now: of the run that would resume; its `step` is ignored.
    """
    return [
        Change(key, getattr(before, key), getattr(now, key), *judge(before, now))
        for key, judge in _COMPARISONS.items()
        if getattr(before, key) != getattr(now, key) and not _is_unknown(key, before, now)
    ] + [
        Change(f"versions.{name}", then, today, Impact.rounding)
        for name in {**now.versions, **before.versions}
        if (then := before.versions.get(name, NOT_THERE)) != (today := now.versions.get(name, NOT_THERE))
    ]


def _is_unknown(key: str, before: Fingerprint, now: Fingerprint) -> bool:
    return key in ("architecture", "validation") and None in (getattr(before, key), getattr(now, key))


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


_COMPARISONS: dict[str, Callable[[Fingerprint, Fingerprint], Verdict]] = {
    "data": _rows,
    "tokenizer": lambda before, now: (Impact.impossible, "ids mean other tokens"),
    "frozen_weights": _base,
    "architecture": lambda before, now: (Impact.trajectory, "the model's settings (its config.json) changed"),
    "validation": lambda before, now: (Impact.harmless, "evaluated on other rows, so the best so far is forgotten"),
    "num_steps": _steps,
    "device": lambda before, now: (Impact.rounding, ""),
    "num_processes": lambda before, now: (Impact.rounding, "sums in another order"),
    "step_sequences": lambda before, now: (
        Impact.trajectory,
        "a step takes different rows: rows x accumulation x processes",
    ),
}


def check_changes(changes: Sequence[Change], *, allow_changed: bool, checkpoint: str) -> list[str]:
    """Raise ConfigError of every change that is not allowed; return warnings of those that are.

    Args:
        allow_changed: whether training may continue differently than before.
        checkpoint: its folder.
    Raises:
        ConfigError: naming each change, and what to do.
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

    Args:
        changes: of configuration and fingerprint.
        now: the whole configuration that resumes.
    """
    flat = dict(_flat(now))
    return any(change.key == "data" or _reorders(change.key, flat) for change in changes)


def _reorders(key: str, now: DottedConfig) -> bool:
    reorders = all_keys()[key].info.reorders if key in all_keys() else False
    return reorders if isinstance(reorders, bool) else reorders(now)
