"""What changed between a checkpoint and the run that goes on from it, and what that means. Pure, no torch.

Two comparisons. Configurations say what was asked for, key by key; `EFFECTS` and `JUDGES` hold every key there is.
A fingerprint says what came of it: which rows, which ids, which weights. A key whose outcome is in the fingerprint
(files, templates, a model's name) is harmless by itself, because the same outcome by another path is no change.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from src.config.quoting import shell_override
from src.config.schema import SCHEDULES, Batching
from src.errors import ConfigError
from src.util import plural

NOT_THERE = "(not there)"
"""Stands in a Change for the value of a key that one side does not have."""
LONGEST_VALUE = 48  # characters of a value in a message


class Impact(IntEnum):
    """What a change means, from harmless to impossible."""

    harmless = 0
    """Needs no leave: nothing changes in what is trained, or the run only gets longer."""
    rounding = 1
    """The same computation, rounded otherwise: goes on, said as a warning, no longer bit for bit."""
    trajectory = 2
    """What comes is another training: needs checkpoint.allow_changed=true."""
    impossible = 3
    """The saved state does not fit: refused, also with allow_changed."""


@dataclass(frozen=True)
class Change:
    """One difference. `why` is a few words: needed where it is impossible; of what is harmless, what has to be said."""

    key: str
    before: Any
    now: Any
    effect: Impact
    why: str = ""

    def __post_init__(self) -> None:
        if self.effect is Impact.impossible and not self.why:
            raise ValueError(f"{self.key}: what is refused for good needs a reason")

    @property
    def values(self) -> str:
        """The key with what it was and is, shortened; of hashes the key alone."""
        return self.key if self.key in HASHES else f"{self.key}: {_both(self.before, self.now)}"


@dataclass(frozen=True)
class Fingerprint:
    """What a configuration came to, where and when a run was trained.

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
        """Give plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Fingerprint:
        """Take back what `as_dict` gave; what a later version added is left out.

        Raises:
            TypeError: where some are missing.
        """
        return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})


HASHES = ("data", "tokenizer", "frozen_weights", "architecture", "validation")
"""Facts whose values say nothing to a reader."""

_TABLE: dict[str, dict[Impact, str]] = {
    "": {
        Impact.harmless: "name force rerun plugins",  # Fingerprint: versions
        Impact.trajectory: "seed",
    },
    "model": {
        # Fingerprint: architecture, tokenizer, frozen_weights
        Impact.harmless: "checkpoint revision weights use_safetensors",
        Impact.rounding: "attn_implementation gradient_checkpointing trust_remote_code",
        Impact.trajectory: "dtype",
        Impact.impossible: "type",
    },
    "quantization": {
        Impact.trajectory: "load_in_8bit load_in_4bit bnb_4bit_quant_type bnb_4bit_compute_dtype "
        "bnb_4bit_use_double_quant",
    },
    "adapter": {
        Impact.trajectory: "lora_alpha lora_dropout use_rslora alpha_pattern",
        Impact.impossible: "type r bias use_dora rank_pattern",
    },
    "tokens": {
        # The fingerprint has tokenizer and data. pad_to_multiple_of makes room only where tokens don't fit, so it need
        # not change any size: the shapes that are loaded tell
        Impact.harmless: "additional_special_tokens thought_open thought_close init.method init.text init.descriptions "
        "pad_to_multiple_of",
    },
    "data": {
        # what shapes the train rows: Fingerprint.data
        Impact.harmless: "format train_files dataset_name dataset_config_name train_split revision mixture columns "
        "prompt_template completion_template system_prompt supervised_turns clean_dialogue thoughts thought_pattern "
        "max_target_length overflow limit validation_fraction num_folds fold group_column "
        "validation_files test_files validation_split answer_pattern metrics max_dropped_fraction "
        "preprocessing_num_workers cache_dir",
        Impact.trajectory: "batching streaming max_seq_length",
    },
    "optimizer": {
        Impact.trajectory: "lr embedding_lr weight_decay betas eps momentum",
        Impact.impossible: "type",
    },
    "scheduler": {Impact.trajectory: "type warmup_ratio warmup_steps min_lr_ratio"},
    "generation": {
        Impact.harmless: "max_new_tokens min_new_tokens num_beams do_sample temperature top_k top_p repetition_penalty "
        "no_repeat_ngram_size",
    },
    "deepspeed": {  # another way to share out the same computation
        Impact.harmless: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "gradient_clipping wall_clock_breakdown config_file sha256 optimizer scheduler aio",
        Impact.rounding: "bf16 fp16 communication_data_type zero_optimization",
    },
    "tracking": {Impact.harmless: "type uri experiment_name run_name tags log_model"},
    "training": {
        Impact.harmless: "max_seconds per_device_eval_batch_size logging_steps",
        Impact.trajectory: "max_grad_norm mixed_precision",
    },
    "loss": {Impact.trajectory: "reduction thought_weight label_smoothing"},
    "evaluation": {Impact.harmless: "eval_steps metrics max_samples sample_steps sample_prompts"},
    "checkpoint": {
        Impact.harmless: "checkpointing_steps keep_last keep_best newest_optimizer_only metric_for_best_model "
        "greater_is_better load_best_model_at_end resume allow_changed",
    },
    "export": {Impact.harmless: "merge"},
    "runtime": {
        # Fingerprint: device, num_processes, step_sequences
        Impact.harmless: "device num_processes num_machines machine_rank main_process_ip main_process_port",
        Impact.rounding: "deterministic",
    },
}

EFFECTS: dict[str, Impact] = {
    f"{section}.{key}".lstrip("."): effect
    for section, keys_of in _TABLE.items()
    for effect, keys in keys_of.items()
    for key in keys.split()
}
"""Every key whose effect does not depend on its values, and its effect. One that stands nowhere is `trajectory`."""

_BEGINS = "says how a run begins, so it changes nothing here"

_WHY = {
    "seed": "the rows come in another order",
    "model.type": "another network",
    "model.dtype": "weights of another precision",
    "model.weights": _BEGINS,
    "model.trust_remote_code": "other code may compute",
    "quantization": "other frozen weights, or another precision",
    "adapter": "another function of the same matrices",
    "adapter.type": "other weights are trained",
    "adapter.r": "matrices of another size",
    "adapter.bias": "other weights are trained",
    "adapter.use_dora": "other weights are trained",
    "adapter.rank_pattern": "matrices of another size",
    "tokens.init.method": _BEGINS,
    "tokens.init.text": _BEGINS,
    "tokens.init.descriptions": _BEGINS,
    "data.batching": "the rows come in another order",
    "data.streaming": "the rows come in another order",
    "data.max_seq_length": "packed sequences of another length",
    "optimizer": "other updates",
    "optimizer.type": "an optimizer's state fits no other",
    "scheduler": "other learning rates",
    "deepspeed": "sums in another order",
    "loss": "something else is minimised",
    "training.max_grad_norm": "other updates",
    "training.mixed_precision": "computes in another precision",
}
"""Reasons by key; those of a section are for its keys that are not harmless and have none."""

Flat = Mapping[str, Any]
"""A configuration by dotted keys."""

_READ_WHERE: dict[str, Callable[[Flat], bool]] = {
    "data.max_seq_length": lambda c: c.get("data.batching") == Batching.packed.name,  # else Fingerprint.data does
    "scheduler.warmup_ratio": lambda c: c.get("scheduler.warmup_steps") is None,
    "tokens.init.text": lambda c: c.get("tokens.init.method") == "text",
    "tokens.init.descriptions": lambda c: c.get("tokens.init.method") == "description",
    "quantization.bnb_4bit_quant_type": lambda c: bool(c.get("quantization.load_in_4bit")),
    "quantization.bnb_4bit_compute_dtype": lambda c: bool(c.get("quantization.load_in_4bit")),
    "quantization.bnb_4bit_use_double_quant": lambda c: bool(c.get("quantization.load_in_4bit")),
}
"""Keys that only count where another has some value; where neither side's counts, a change is harmless."""

Verdict = tuple[Impact, str]


def _init_from(key: str, before: Flat, now: Flat) -> Verdict:
    return Impact.harmless, "" if now[key] is None else _BEGINS


def _length(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge how long the run is: it may get longer. From epochs to steps or back, Fingerprint.num_steps decides."""
    steps = "training.max_train_steps"
    if key != steps and (before.get(steps), now.get(steps)) != (None, None):
        return Impact.harmless, ""
    if None not in (before[key], now[key]) and now[key] < before[key]:
        return Impact.trajectory, "a shorter run"
    return Impact.harmless, "the learning rate's schedule moves to the new end" if _has_end(now) else ""


def _has_end(config: Flat) -> bool:
    """Whether learning rates depend on how many steps there will be."""
    schedule = SCHEDULES.get(str(config.get("scheduler.type")))
    return getattr(schedule, "depends_on_length", False) or (
        config.get("scheduler.warmup_steps") is None and bool(config.get("scheduler.warmup_ratio"))
    )


def _batch(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge how a step's rows are cut: the same rows in other micro-batches are the same step.

    Grouping by length and the ends of streamed blocks go by micro-batches, so there the rows are others.
    """
    sizes = (
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "runtime.num_processes",
        "runtime.num_machines",
    )
    first, second = (math.prod(one.get(size, 1) for size in sizes) for one in (before, now))
    is_cut_freely = all(
        one.get("data.batching") != Batching.length_grouped.name and not one.get("data.streaming")
        for one in (before, now)
    )
    if is_cut_freely and first == second:
        return Impact.rounding, "the same rows a step, in other micro-batches"
    return Impact.trajectory, "other rows a step"


def _choice(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge a choice of modules or layers, whose order says nothing; one layer may be named without a list."""
    chosen = [
        frozenset(value) if isinstance(value, list) else frozenset([value]) if isinstance(value, int) else value
        for value in (before[key], now[key])
    ]
    return (Impact.harmless, "") if chosen[0] == chosen[1] else (Impact.impossible, "other matrices are trained")


def _init_lora_weights(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge how an adapter began: some move a part of the base into it, which is then missing from the base."""
    if {"pissa", "olora"} & {before[key], now[key]}:
        return Impact.impossible, "the base that these matrices belong to is another one"
    return Impact.harmless, _BEGINS


def _shared_out(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge whether DeepSpeed shares out; an option and a file of the user's that say the same are the same."""
    if {before[key], now[key]} <= {"zero", "file"}:
        return Impact.harmless, ""
    return Impact.rounding, _WHY["deepspeed"]


JUDGES: dict[str, Callable[[str, Flat, Flat], Verdict]] = {
    "init_from": _init_from,
    "deepspeed.type": _shared_out,
    "adapter.target_modules": _choice,
    "adapter.exclude_modules": _choice,
    "adapter.layers_to_transform": _choice,
    "adapter.init_lora_weights": _init_lora_weights,
    "training.num_train_epochs": _length,
    "training.max_train_steps": _length,
    "training.per_device_train_batch_size": _batch,
    "training.gradient_accumulation_steps": _batch,
}
"""Keys whose effect depends on the values."""


def compare_configs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Tell every key that differs, in the order of the configuration, also those that one side does not have.

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
    """Give a configuration by dotted keys; a mapping that is the value of a key stays one."""
    nested = {key.rpartition(".")[0] for key in EFFECTS}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (not prefix or key in nested):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _judge(key: str, before: Flat, now: Flat) -> Verdict:
    if key not in before or key not in now:
        return _judge_lone(key, before, now)
    if key in JUDGES:
        return JUDGES[key](key, before, now)
    if key in _READ_WHERE and not any(_READ_WHERE[key](one) for one in (before, now)):
        return Impact.harmless, ""
    return _by_table(key)


def _by_table(key: str) -> Verdict:
    if key not in EFFECTS:
        return Impact.trajectory, "a key that this version does not know"
    effect = EFFECTS[key]
    of_section = "" if effect is Impact.harmless else _WHY.get(key.partition(".")[0], "")
    return effect, _WHY.get(key, of_section)


def _judge_lone(key: str, before: Flat, now: Flat) -> Verdict:
    """Judge a key that one side does not have.

    With another `type` of the section others come and go, and the type says it all. Else one of the two is of another
    version: null is how a key says nothing, and whether a state fits is found when it is loaded.
    """
    kind = f"{key.partition('.')[0]}.type"
    if before.get(kind) != now.get(kind) or before.get(key, now.get(key)) is None:
        return Impact.harmless, ""
    effect = EFFECTS.get(key, Impact.trajectory)
    return (effect, "") if effect is Impact.harmless else (min(effect, Impact.trajectory), "a key of another version")


def compare_fingerprints(before: Fingerprint, now: Fingerprint) -> list[Change]:
    """Tell what the configurations came to, where it differs.

    Args:
        before: as the checkpoint has them; its `step` are the steps done.
        now: of the run that would go on; its `step` is not looked at.
    """
    return [
        Change(key, getattr(before, key), getattr(now, key), *judge(before, now))
        for key, judge in _FACTS.items()
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
        return Impact.trajectory, "the train set is another one, or is read otherwise"
    return Impact.trajectory, f"the train rows are other ones: {before.num_rows:,} then, {now.num_rows:,} now"


def _base(before: Fingerprint, now: Fingerprint) -> Verdict:
    if before.frozen_weights is None:
        return Impact.impossible, "all weights were trained then, now some are frozen"
    if now.frozen_weights is None:
        return Impact.impossible, "some weights were frozen then, now all are trained"
    return Impact.trajectory, "the frozen weights are other ones, or were quantised otherwise"


def _steps(before: Fingerprint, now: Fingerprint) -> Verdict:
    if now.num_steps < before.step:
        return Impact.impossible, f"already {before.step:,} steps done"
    if now.num_steps < before.num_steps:
        return Impact.trajectory, "fewer steps in all"
    return Impact.harmless, ""


_FACTS: dict[str, Callable[[Fingerprint, Fingerprint], Verdict]] = {
    "data": _rows,
    "tokenizer": lambda before, now: (Impact.impossible, "ids mean other tokens"),
    "frozen_weights": _base,
    "architecture": lambda before, now: (Impact.trajectory, "the model's settings (its config.json) are other ones"),
    "validation": lambda before, now: (Impact.harmless, "evaluated on other rows, so the best so far is forgotten"),
    "num_steps": _steps,
    "device": lambda before, now: (Impact.rounding, ""),
    "num_processes": lambda before, now: (Impact.rounding, "sums in another order"),
    "step_sequences": lambda before, now: (
        Impact.trajectory,
        "other rows a step: rows x accumulation x processes",
    ),
}


def check(changes: Sequence[Change], *, allow_changed: bool, where: str) -> list[str]:
    """Refuse what may not change, all of it together, and give warnings of the rest that has to be said.

    Args:
        allow_changed: whether another training is meant.
        where: the checkpoint's folder.
    Raises:
        ConfigError: naming each change, and what to do.
    """
    least = Impact.impossible if allow_changed else Impact.trajectory
    if refused := [change for change in changes if change.effect >= least]:
        raise ConfigError(_refusal(refused, where))
    of = {effect: [change for change in changes if change.effect is effect] for effect in Impact}
    warnings = []
    if others := of[Impact.trajectory]:
        warnings.append(f"what comes after {where} is another training: {_joined(others)}")
    if rounded := of[Impact.rounding]:
        warnings.append(f"goes on from {where}, but no longer bit for bit: {_joined(rounded)}")
    return [*warnings, *(_joined([change]) for change in of[Impact.harmless] if change.why)]


def _joined(changes: Sequence[Change]) -> str:
    return "; ".join(f"{change.values} ({change.why})" if change.why else change.values for change in changes)


def _refusal(refused: Sequence[Change], where: str) -> str:
    impossible = [change for change in refused if change.effect is Impact.impossible]
    width = min(60, max(len(change.values) for change in refused))
    lines = [f"Can't go on from {where}: {plural(len(refused), 'change')} since then"]
    lines += [f"  {change.values:<{width}}   {change.why}".rstrip() for change in refused]
    if not impossible:
        lines.append("What comes would be another training: checkpoint.allow_changed=true goes on all the same.")
    elif len(impossible) < len(refused):
        for_good = ", ".join(change.key for change in impossible)
        lines.append(f"The saved state does not fit {for_good}; checkpoint.allow_changed=true is for the rest only.")
    else:
        lines.append("The saved state does not fit.")
    back = "Put it back as it was" if len(refused) == 1 else "Put them back as they were"
    lines.append(
        f"{back} to go on with the same training; or start a new run in another hydra.run.dir "
        f"({shell_override('init_from', where)} gives it these weights)."
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
    """Whether the order of the epoch that is under way can't be continued, so that it begins again.

    Args:
        changes: of configuration and facts.
        now: the whole configuration that goes on.
    """
    changed = {change.key for change in changes}
    ordering = {"seed", "data", "data.batching", "data.streaming"}
    batching = now["data"]["batching"]
    if batching == Batching.length_grouped.name:
        ordering.add("training.per_device_train_batch_size")
    if batching == Batching.packed.name:
        ordering.add("data.max_seq_length")
    return bool(changed & ordering)
