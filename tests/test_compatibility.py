"""What changed between a checkpoint and the run that resumes from it: judged key by key."""

from __future__ import annotations

import dataclasses
import json
import shlex
from functools import cache
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.types import Override

from src.checkpoint.compatibility import (
    NOT_THERE,
    Change,
    Fingerprint,
    Impact,
    check_changes,
    compare_configs,
    compare_fingerprints,
    is_reordered,
)
from src.config.command_line import read_override
from src.config.keys import all_keys, known_keys
from src.config.schema import SECTIONS, TopLevelConfig
from src.config.schema.fields import key, key_info
from src.errors import ConfigError
from tests.conftest import admitted

WHERE = "outputs/a/checkpoints/step-00000100"
HARMLESS, ROUNDING, TRAJECTORY, IMPOSSIBLE = Impact

QWEN = ("model=qwen3_0_6b",)
LORA = (*QWEN, "adapter=lora")
QLORA = (*QWEN, "adapter=qlora")

FACTS = Fingerprint(
    step=100,
    num_steps=200,
    data="d1",
    num_rows=1000,
    tokenizer="t1",
    frozen_weights="w1",
    device="cpu",
    num_processes=1,
    step_sequences=8,
    versions={"torch": "2.8", "peft": "0.21"},
    architecture="a1",
)


@cache
def frozen(*overrides: str) -> dict[str, Any]:
    begins = [override.partition("=")[2] for override in overrides if override.startswith("init_from=")]
    sections = admitted(*(override for override in overrides if not override.startswith("init_from="))).frozen
    return sections | ({"init_from": begins[-1]} if begins else {})  # without weights that the gate would look for


def changes_of(base: tuple[str, ...], before: tuple[str, ...], now: tuple[str, ...]) -> list[Change]:
    return compare_configs(frozen(*base, *before), frozen(*base, *now))


def effects_of(base: tuple[str, ...], before: str, now: str) -> dict[str, Impact]:
    return {change.key: change.impact for change in changes_of(base, tuple(before.split()), tuple(now.split()))}


def refusal(changes: list[Change], *, allow_changed: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        check_changes(changes, allow_changed=allow_changed, checkpoint=WHERE)
    return str(caught.value)


def test_each_key_has_one_impact() -> None:
    declared: dict[str, set[Any]] = {}
    for section, schema in {**SECTIONS, "": TopLevelConfig}.items():
        for owner in schema.values() if isinstance(schema, dict) else [schema]:
            for one in dataclasses.fields(owner):
                info = key_info(one)
                declared.setdefault(f"{section}.{one.name}".lstrip("."), set()).add((info.resume, info.why))
    assert {key: impacts for key, impacts in declared.items() if len(impacts) > 1} == {}
    assert set(known_keys()) - declared.keys() == {"tokens.init.method", "tokens.init.text", "tokens.init.descriptions"}


def test_a_key_without_a_stated_impact_is_another_training() -> None:
    @dataclasses.dataclass
    class Later:
        plain: int = 1
        declared: int = key(default=1)

    assert [key_info(one).resume for one in dataclasses.fields(Later)] == [TRAJECTORY, TRAJECTORY]


def test_the_same_configuration_has_no_changes_also_read_back_from_its_file() -> None:
    now = frozen(*LORA, "optimizer.lr=3")
    assert compare_configs(yaml.safe_load(yaml.safe_dump(now)), now) == []
    assert compare_configs(now | {"training": now["training"] | {"num_train_epochs": 2}}, now) == []


@pytest.mark.parametrize(
    ("base", "now", "expected"),
    [
        # one key each, changed from its default
        ((), "name=other", {"name": HARMLESS}),
        ((), "force=true", {"force": HARMLESS}),
        ((), "seed=1", {"seed": TRAJECTORY}),
        ((), "model.revision=main", {"model.revision": HARMLESS}),
        ((), "model.checkpoint=someone/model", {"model.checkpoint": HARMLESS}),
        (QWEN, "model.weights=random", {"model.weights": HARMLESS}),
        (QWEN, "model.use_safetensors=false", {"model.use_safetensors": HARMLESS}),
        ((), "model.trust_remote_code=true", {"model.trust_remote_code": ROUNDING}),
        ((), "model.dtype=bfloat16", {"model.dtype": TRAJECTORY}),
        ((), "model.attn_implementation=eager", {"model.attn_implementation": ROUNDING}),
        ((), "model.gradient_checkpointing=true", {"model.gradient_checkpointing": ROUNDING}),
        ((), "tokens.pad_to_multiple_of=64", {"tokens.pad_to_multiple_of": HARMLESS}),
        ((), "tokens.init.method=mean", {"tokens.init.method": HARMLESS}),
        ((), "tokens.init.text=[a]", {"tokens.init.text": HARMLESS}),
        ((), "data.train_files=[data/tow_addition/test.jsonl]", {"data.train_files": HARMLESS}),
        (
            (),
            "data.validation_files={a:[data/tow_addition/test.jsonl]} checkpoint.metric_for_best_model=eval/a/loss",
            {"data.validation_files", "checkpoint.metric_for_best_model"},
        ),
        ((), "data.mixture.one.dataset_name=a/b data.train_files=null", {"data.train_files", "data.mixture"}),
        ((), "data.cache_dir=null", {"data.cache_dir": HARMLESS}),
        ((), "data.preprocessing_num_workers=2", {"data.preprocessing_num_workers": HARMLESS}),
        ((), "data.prompt_template='{prompt}?'", {"data.prompt_template": HARMLESS}),
        ((), "data.columns.prompt=question", {"data.columns": HARMLESS}),
        ((), "data.thoughts=drop", {"data.thoughts": HARMLESS}),
        ((), "data.overflow=drop", {"data.overflow": HARMLESS}),
        ((), "data.limit=5", {"data.limit": HARMLESS}),
        ((), "data.max_seq_length=64", {"data.max_seq_length": HARMLESS}),
        (("data.batching=packed",), "data.max_seq_length=64", {"data.max_seq_length": TRAJECTORY}),
        ((), "data.batching=packed data.max_seq_length=64", {"data.batching": 2, "data.max_seq_length": 2}),
        ((), "data.batching=length_grouped", {"data.batching": TRAJECTORY}),
        (("training.max_train_steps=9",), "data.streaming=true", {"data.streaming": TRAJECTORY}),
        ((), "optimizer.lr=1e-5", {"optimizer.lr": TRAJECTORY}),
        ((), "optimizer.embedding_lr=1e-5", {"optimizer.embedding_lr": TRAJECTORY}),
        ((), "optimizer.betas=[0.9,0.99]", {"optimizer.betas": TRAJECTORY}),
        (("optimizer=sgd",), "optimizer.momentum=0.9", {"optimizer.momentum": TRAJECTORY}),
        ((), "optimizer=adamw_8bit", {"optimizer.type": IMPOSSIBLE}),
        ((), "scheduler.min_lr_ratio=0.1", {"scheduler.min_lr_ratio": TRAJECTORY}),
        ((), "scheduler.warmup_ratio=0.2", {"scheduler.warmup_ratio": TRAJECTORY}),
        ((), "scheduler.warmup_steps=2", {"scheduler.warmup_steps": TRAJECTORY}),
        (("scheduler.warmup_steps=2",), "scheduler.warmup_ratio=0.2", {"scheduler.warmup_ratio": HARMLESS}),
        ((), "loss.reduction=sum", {"loss.reduction": TRAJECTORY}),
        ((), "loss.thought_weight=0.5", {"loss.thought_weight": TRAJECTORY}),
        ((), "generation.num_beams=2", {"generation.num_beams": HARMLESS}),
        ((), "evaluation.eval_steps=3", {"evaluation.eval_steps": HARMLESS}),
        ((), "checkpoint.keep_last=3", {"checkpoint.keep_last": HARMLESS}),
        ((), "checkpoint.allow_changed=true", {"checkpoint.allow_changed": HARMLESS}),
        ((), "training.logging_steps=1", {"training.logging_steps": HARMLESS}),
        ((), "training.max_seconds=60", {"training.max_seconds": HARMLESS}),
        ((), "training.per_device_eval_batch_size=1", {"training.per_device_eval_batch_size": HARMLESS}),
        ((), "training.max_grad_norm=null", {"training.max_grad_norm": TRAJECTORY}),
        ((), "training.mixed_precision=bf16", {"training.mixed_precision": TRAJECTORY}),
        ((), "runtime.device=cpu", {"runtime.device": HARMLESS}),
        ((), "runtime.deterministic=true", {"runtime.deterministic": ROUNDING}),
        (LORA, "export.merge=true", {"export.merge": HARMLESS}),
        # the length of the run
        ((), "training.num_train_epochs=3", {"training.num_train_epochs": HARMLESS}),
        ((), "training.num_train_epochs=1.5", {"training.num_train_epochs": TRAJECTORY}),
        ((), "training.max_train_steps=1", {"training.max_train_steps": HARMLESS}),
        (("training.max_train_steps=9",), "training.max_train_steps=10", {"training.max_train_steps": HARMLESS}),
        (("training.max_train_steps=9",), "training.max_train_steps=8", {"training.max_train_steps": TRAJECTORY}),
        (("training.max_train_steps=9",), "training.num_train_epochs=1", {"training.num_train_epochs": HARMLESS}),
        # adapters and quantisation
        (LORA, "adapter.r=8", {"adapter.r": IMPOSSIBLE}),
        (LORA, "adapter.use_dora=true", {"adapter.use_dora": IMPOSSIBLE}),
        (LORA, "adapter.bias=all", {"adapter.bias": IMPOSSIBLE}),
        (LORA, "adapter.target_modules=[q_proj]", {"adapter.target_modules": IMPOSSIBLE}),
        (LORA, "adapter.exclude_modules=[q_proj]", {"adapter.exclude_modules": IMPOSSIBLE}),
        (LORA, "adapter.rank_pattern={q_proj:4}", {"adapter.rank_pattern": IMPOSSIBLE}),
        (LORA, "adapter.alpha_pattern={q_proj:4}", {"adapter.alpha_pattern": TRAJECTORY}),
        (LORA, "adapter.lora_alpha=8", {"adapter.lora_alpha": TRAJECTORY}),
        (LORA, "adapter.lora_dropout=0.1", {"adapter.lora_dropout": TRAJECTORY}),
        (LORA, "adapter.use_rslora=true", {"adapter.use_rslora": TRAJECTORY}),
        (LORA, "adapter.init_lora_weights=gaussian", {"adapter.init_lora_weights": HARMLESS}),
        (LORA, "adapter.init_lora_weights=orthogonal", {"adapter.init_lora_weights": HARMLESS}),
        (LORA, "adapter.init_lora_weights=pissa", {"adapter.init_lora_weights": IMPOSSIBLE}),
        (LORA, "adapter.init_lora_weights=olora", {"adapter.init_lora_weights": IMPOSSIBLE}),
        (LORA, "quantization=int8", {"quantization.load_in_8bit": TRAJECTORY}),
        ((), "quantization.bnb_4bit_quant_type=fp4", {"quantization.bnb_4bit_quant_type": HARMLESS}),
        (QLORA, "quantization.bnb_4bit_quant_type=fp4", {"quantization.bnb_4bit_quant_type": TRAJECTORY}),
        (QLORA, "quantization.bnb_4bit_compute_dtype=float32", {"quantization.bnb_4bit_compute_dtype": TRAJECTORY}),
        (QLORA, "quantization.bnb_4bit_use_double_quant=false", {"quantization.bnb_4bit_use_double_quant": TRAJECTORY}),
    ],
)
def test_effect_of_one_change(base: tuple[str, ...], now: str, expected: Any) -> None:
    if isinstance(expected, set):
        expected = dict.fromkeys(expected, HARMLESS)
    assert effects_of(base, "", now) == expected


@pytest.mark.parametrize(
    ("base", "before", "now", "expected"),
    [
        (LORA, "adapter.init_lora_weights=pissa", "", {"adapter.init_lora_weights": IMPOSSIBLE}),
        (LORA, "adapter.target_modules=[q_proj,v_proj]", "adapter.target_modules=[v_proj,q_proj]", HARMLESS),
        (LORA, "adapter.target_modules=[q_proj]", "adapter.target_modules=q_proj", IMPOSSIBLE),  # a pattern
        (
            (*LORA, "adapter.target_modules=[q_proj]"),
            "adapter.layers_to_transform=1",
            "adapter.layers_to_transform=[1]",
            HARMLESS,
        ),
        (
            (*LORA, "adapter.target_modules=[q_proj]"),
            "adapter.layers_to_transform=1",
            "adapter.layers_to_transform=[1,2]",
            IMPOSSIBLE,
        ),
        ((), "training.max_train_steps=9", "", {"training.max_train_steps": HARMLESS}),
        ((), "optimizer=adamw_8bit", "optimizer=paged_adamw_32bit", {"optimizer.type": IMPOSSIBLE}),
        ((), "data.batching=packed", "", {"data.batching": TRAJECTORY}),
        ((), "data.batching=packed", "data.max_seq_length=64", {"data.batching": 2, "data.max_seq_length": 2}),
        (QLORA, "", "quantization.load_in_4bit=false", {"quantization.load_in_4bit": TRAJECTORY}),
        ((), "init_from=tests/weights", "", {"init_from": HARMLESS}),
    ],
)
def test_effect_of_a_change_between_two(base: tuple[str, ...], before: str, now: str, expected: Any) -> None:
    found = effects_of(base, before, now)
    if isinstance(expected, Impact):
        assert list(found.values()) == [expected]
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("base", "now", "expected"),
    [
        ((), (16, 2), ROUNDING),
        ((), (8, 4), ROUNDING),
        ((), (16, 1), TRAJECTORY),
        ((), (32, 2), TRAJECTORY),
        (("data.batching=packed",), (16, 2), ROUNDING),
        (("data.batching=length_grouped",), (16, 2), ROUNDING),
        (("training.per_device_train_tokens=2048",), (16, 2), TRAJECTORY),
        (("data.streaming=true", "training.max_train_steps=9"), (16, 2), TRAJECTORY),
    ],
)
def test_the_same_rows_a_step_are_the_same_training(base: tuple[str, ...], now: tuple[int, int], expected: Any) -> None:
    size, accumulation = now
    cut = f"training.per_device_train_batch_size={size} training.gradient_accumulation_steps={accumulation}"
    assert max(effects_of(base, "", cut).values()) is expected


@pytest.mark.parametrize(
    ("base", "now", "kind", "effect"),
    [
        (QWEN, "adapter=lora", "adapter.type", IMPOSSIBLE),
        ((), "optimizer=adafactor optimizer.lr=2e-3 optimizer.weight_decay=0.01", "optimizer.type", IMPOSSIBLE),
        ((), "scheduler=constant", "scheduler.type", TRAJECTORY),
        ((), "tracking=mlflow", "tracking.type", HARMLESS),
    ],
)
def test_keys_that_come_and_go_with_a_type_are_not_told_beside_it(
    base: tuple[str, ...], now: str, kind: str, effect: Impact
) -> None:
    changes = changes_of(base, (), tuple(now.split()))
    assert {change.key: change.impact for change in changes if change.impact is not HARMLESS or change.why} == (
        {} if effect is HARMLESS else {kind: effect}
    )
    lone = [change for change in changes if change.key != kind]
    assert lone
    assert all(NOT_THERE in (change.before, change.now) for change in lone)


def test_another_model_type_is_impossible() -> None:
    assert effects_of((), "", "model=tiny_bart") == {"model.type": IMPOSSIBLE, "model.checkpoint": HARMLESS}


def test_changes_come_in_the_order_of_the_configuration() -> None:
    changes = changes_of((), ("scheduler=linear",), ("scheduler=constant", "seed=1", "optimizer.lr=1", "name=x"))
    assert [change.key for change in changes] == [
        "name",
        "seed",
        "optimizer.lr",
        "scheduler.type",
        "scheduler.warmup_ratio",
        "scheduler.warmup_steps",
        "scheduler.min_lr_ratio",
    ]
    assert changes[1] == Change("seed", 42, 1, TRAJECTORY, "the rows come in another order")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.flavour", 3, TRAJECTORY),
        ("data.flavour", None, HARMLESS),
        ("flavour", 3, TRAJECTORY),
        ("flavour.number", 3, TRAJECTORY),
        ("evaluation.eval_steps", "epoch", HARMLESS),
        ("runtime.deterministic", False, ROUNDING),
        ("adapter.use_dora", False, TRAJECTORY),  # nobody knows; the state itself tells when it is loaded
        ("adapter.exclude_modules", None, HARMLESS),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_key_that_only_one_version_has(key: str, value: Any, expected: Impact, is_new: bool) -> None:
    section, _, name = key.rpartition(".")
    without = frozen(*LORA)
    if section:
        without = without | {section: {k: v for k, v in without.get(section, {}).items() if k != name}}
        has = without | {section: without[section] | {name: value}}
    else:
        has = without | {name: value}
    (change,) = compare_configs(without, has) if is_new else compare_configs(has, without)
    assert (change.key, change.impact) == (key, expected)
    assert (change.before, change.now) == ((NOT_THERE, value) if is_new else (value, NOT_THERE))


def test_an_unknown_key_that_both_have_is_another_training() -> None:
    (change,) = compare_configs({"data": {"flavour": 1}}, {"data": {"flavour": 2}})
    assert change == Change("data.flavour", 1, 2, TRAJECTORY, "a key that this version does not know")


@pytest.mark.parametrize("key", [name for name in known_keys() if all_keys()[name].info.resume is IMPOSSIBLE])
def test_what_is_impossible_says_why(key: str) -> None:
    section, _, name = key.rpartition(".")
    (change,) = compare_configs({section: {name: 1}}, {section: {name: 2}})
    assert change.impact is IMPOSSIBLE
    assert change.why


def test_a_change_for_good_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="x: what is refused for good needs a reason"):
        Change("x", 1, 2, IMPOSSIBLE)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"step": 0}, []),
        ({"num_rows": 1000, "data": "d2"}, [("data", TRAJECTORY, "changed: 1,000 then, 1,000 now")]),
        ({"num_rows": None, "data": "d2"}, [("data", TRAJECTORY, "the train set changed")]),
        ({"tokenizer": "t2"}, [("tokenizer", IMPOSSIBLE, "ids mean other tokens")]),
        ({"frozen_weights": "w2"}, [("frozen_weights", TRAJECTORY, "their quantisation")]),
        ({"frozen_weights": None}, [("frozen_weights", IMPOSSIBLE, "now all are trained")]),
        ({"architecture": "a2"}, [("architecture", TRAJECTORY, "config.json")]),
        ({"architecture": None}, []),
        ({"num_steps": 201}, [("num_steps", HARMLESS, "")]),
        ({"num_steps": 199}, [("num_steps", TRAJECTORY, "fewer steps")]),
        ({"num_steps": 100}, [("num_steps", TRAJECTORY, "fewer steps")]),
        ({"num_steps": 99}, [("num_steps", IMPOSSIBLE, "already 100 steps done")]),
        ({"device": "cuda"}, [("device", ROUNDING, "")]),
        ({"num_processes": 2}, [("num_processes", ROUNDING, "another order")]),
        ({"step_sequences": 16}, [("step_sequences", TRAJECTORY, "takes different rows")]),
        ({"versions": {"torch": "2.9", "peft": "0.21"}}, [("versions.torch", ROUNDING, "")]),
        ({"versions": {"torch": "2.8"}}, [("versions.peft", ROUNDING, "")]),
        ({"versions": {"peft": "0.21", "torch": "2.8", "new": "1"}}, [("versions.new", ROUNDING, "")]),
        ({"tokenizer": "t2", "data": "d2"}, [("data", TRAJECTORY, "1,000"), ("tokenizer", IMPOSSIBLE, "ids")]),
    ],
)
def test_effect_of_facts(changed: dict[str, Any], expected: list[tuple[str, Impact, str]]) -> None:
    found = compare_fingerprints(FACTS, dataclasses.replace(FACTS, **changed))
    assert [(change.key, change.impact) for change in found] == [(key, effect) for key, effect, _ in expected]
    for change, (_, _, why) in zip(found, expected, strict=True):
        assert why in change.why
        assert bool(why) == bool(change.why)


def test_facts_of_a_run_that_trained_all_weights() -> None:
    (change,) = compare_fingerprints(dataclasses.replace(FACTS, frozen_weights=None), FACTS)
    assert (change.impact, change.why) == (IMPOSSIBLE, "all weights were trained then, now some are frozen")


@pytest.mark.parametrize("facts", [FACTS, dataclasses.replace(FACTS, num_rows=None, frozen_weights=None)])
def test_facts_survive_json(facts: Fingerprint) -> None:
    written = json.loads(json.dumps(dataclasses.asdict(facts)))
    assert Fingerprint.from_dict(written) == facts
    assert Fingerprint.from_dict(written | {"of_a_later_version": 1}) == facts
    del written["architecture"]
    assert Fingerprint.from_dict(written) == dataclasses.replace(facts, architecture=None)
    with pytest.raises(TypeError, match="tokenizer"):
        Fingerprint.from_dict({key: value for key, value in written.items() if key != "tokenizer"})


def test_all_that_is_refused_is_told_together() -> None:
    changes = changes_of((), (), ("seed=1", "optimizer=adamw_8bit", "name=x", "model.attn_implementation=eager"))
    changes += compare_fingerprints(FACTS, dataclasses.replace(FACTS, data="d2", num_rows=1200, device="cuda"))
    assert refusal(changes) == (
        f"Can't resume from {WHERE}: 3 changes since then\n"
        "  seed: 42 → 1                         the rows come in another order\n"
        "  optimizer.type: adamw → adamw_8bit   an optimizer's state fits no other\n"
        "  data                                 the train rows changed: 1,000 then, 1,200 now\n"
        "The saved state does not fit optimizer.type; checkpoint.allow_changed=true is for the rest only.\n"
        "Put them back as they were to resume the same training; or start a new run in another hydra.run.dir "
        f"(init_from={WHERE} starts it from these weights)."
    )


def test_another_training_may_be_allowed() -> None:
    told = refusal(changes_of((), (), ("seed=1",)))
    assert told.splitlines() == [
        f"Can't resume from {WHERE}: 1 change since then",
        "  seed: 42 → 1   the rows come in another order",
        "From here on the run would train differently: checkpoint.allow_changed=true resumes anyway.",
        "Put it back as it was to resume the same training; or start a new run in another hydra.run.dir "
        f"(init_from={WHERE} starts it from these weights).",
    ]


def test_a_folder_is_told_as_a_shell_takes_it() -> None:
    folder = "outputs/fin2 (a), b/checkpoints/step_4"
    with pytest.raises(ConfigError) as refused:
        check_changes(changes_of((), (), ("seed=1",)), allow_changed=False, checkpoint=folder)
    typed = str(refused.value).splitlines()[-1].partition("(")[2].removesuffix(" starts it from these weights).")
    (argument,) = shlex.split(typed)
    read = read_override(argument)
    assert isinstance(read, Override)
    assert (read.key_or_group, read.value()) == ("init_from", folder)


@pytest.mark.parametrize("allow_changed", [True, False])
def test_what_is_impossible_is_refused_always_and_leave_is_not_suggested(allow_changed: bool) -> None:
    told = refusal(changes_of(LORA, (), ("adapter.r=8",)), allow_changed=allow_changed)
    assert "  adapter.r: 16 → 8   matrices of another size\nThe saved state does not fit.\n" in told
    assert "allow_changed" not in told


def test_with_leave_only_what_is_impossible_is_refused() -> None:
    told = refusal(changes_of((), (), ("seed=1", "optimizer=adamw_8bit")), allow_changed=True)
    assert "optimizer.type: adamw → adamw_8bit" in told
    assert "seed" not in told
    assert "allow_changed" not in told


def test_what_goes_on_is_said() -> None:
    changes = changes_of((), (), ("seed=1", "optimizer.lr=1", "model.gradient_checkpointing=true", "name=x"))
    changes += compare_fingerprints(FACTS, dataclasses.replace(FACTS, versions={"torch": "2.9", "peft": "0.21"}))
    assert check_changes(changes, allow_changed=True, checkpoint=WHERE) == [
        f"the run trains differently after {WHERE}: seed: 42 → 1 (the rows come in another order); "
        "optimizer.lr: 0.002 → 1 (other updates)",
        f"resumes from {WHERE}, but no longer bit for bit: model.gradient_checkpointing: false → true; "
        "versions.torch: 2.8 → 2.9",
    ]


@pytest.mark.parametrize(
    ("base", "now", "said"),
    [
        ((), "name=x tracking=mlflow training.logging_steps=1 checkpoint.keep_last=9", []),
        ((), "model.checkpoint=some/model data.limit=9 runtime.device=cpu", []),
        (("scheduler=constant",), "training.num_train_epochs=3", []),
        (("scheduler=constant_with_warmup", "scheduler.warmup_steps=3"), "training.num_train_epochs=3", []),
        (("training.max_train_steps=9",), "training.num_train_epochs=3", []),
        (
            (),
            "training.num_train_epochs=3",
            ["training.num_train_epochs: 2.0 → 3 (the learning rate's schedule moves to the new end)"],
        ),
        (
            ("scheduler=constant_with_warmup",),
            "training.max_train_steps=900",
            ["training.max_train_steps: null → 900 (the learning rate's schedule moves to the new end)"],
        ),
        (
            (),
            "init_from=tests/weights",
            ["init_from: null → tests/weights (only decides how a run starts, so it changes nothing here)"],
        ),
        (
            (),
            "tokens.init.text=[a]",
            ['tokens.init.text: ["---"] → ["a"] (only decides how a run starts, so it changes nothing here)'],
        ),
        (("tokens.init.method=mean",), "tokens.init.text=[a]", []),
        ((), "tokens.init.descriptions={a:b}", []),
    ],
)
def test_harmless_changes_go_on_without_a_word_unless_there_is_one_to_say(
    base: tuple[str, ...], now: str, said: list[str]
) -> None:
    assert check_changes(changes_of(base, (), tuple(now.split())), allow_changed=False, checkpoint=WHERE) == said


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, "", 'null → ""'),
        ("a", "a\n", 'a → "a\\n"'),
        (NOT_THERE, 0.5, "(not there) → 0.5"),
        ("a" * 60, "b", f"{'a' * 48}… → b"),
        ([8] * 40, [], f"[{'8, ' * 15}8,… → []"),
        ("p" * 100 + "ends", "p" * 100 + "stops" + "q" * 50, f"…ppppppppends → …ppppppppstops{'q' * 35}…"),
        ("p" * 60, "p" * 61, "…pppppppp → …ppppppppp"),
    ],
)
def test_long_values_are_shortened_to_where_they_differ(before: Any, now: Any, told: str) -> None:
    assert Change("k", before, now, TRAJECTORY).values == f"k: {told}"


def test_no_value_makes_a_message_long() -> None:
    files = [f"data/part-{i}.jsonl" for i in range(500)]
    told = refusal([Change("data.later", files, [*files, "more.jsonl"], TRAJECTORY)])
    assert "more.jsonl" in told
    assert max(map(len, told.splitlines())) < 180


@pytest.mark.parametrize(
    ("base", "now", "expected"),
    [
        ((), "", False),
        ((), "seed=1", True),
        ((), "optimizer.lr=1 training.num_train_epochs=3 data.max_seq_length=64", False),
        ((), "data.batching=packed", True),
        (("training.max_train_steps=9",), "data.streaming=true", True),
        ((), "training.per_device_train_batch_size=8", False),
        (("data.batching=packed",), "training.per_device_train_batch_size=8", False),
        (("data.batching=length_grouped",), "training.per_device_train_batch_size=8", False),  # a step's size decides
        (("data.batching=length_grouped",), "training.gradient_accumulation_steps=8", False),
        (("data.batching=length_grouped",), "training.per_device_train_tokens=2048", True),
        ((), "training.per_device_train_tokens=2048", False),
        (("data.batching=length_grouped",), "data.max_seq_length=64", False),
        (("data.batching=packed",), "data.max_seq_length=64", True),
    ],
)
def test_when_an_epoch_begins_again(base: tuple[str, ...], now: str, expected: bool) -> None:
    before, after = frozen(*base), frozen(*base, *now.split())
    assert is_reordered(compare_configs(before, after), after) is expected


@pytest.mark.parametrize(("changed", "expected"), [({"data": "d2"}, True), ({"device": "cuda", "num_steps": 3}, False)])
def test_other_rows_begin_an_epoch_again(changed: dict[str, Any], expected: bool) -> None:
    changes = compare_fingerprints(FACTS, dataclasses.replace(FACTS, **changed))
    assert is_reordered(changes, frozen()) is expected


@pytest.mark.parametrize(("batching", "expected"), [("padded", False), ("length_grouped", True), ("packed", False)])
def test_steps_of_another_size_group_the_rows_anew(batching: str, expected: bool) -> None:
    changes = compare_fingerprints(FACTS, dataclasses.replace(FACTS, step_sequences=2 * FACTS.step_sequences))
    assert is_reordered(changes, frozen(f"data.batching={batching}")) is expected
