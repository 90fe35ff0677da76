"""A DeepSpeed JSON of the user's: filled in as transformers does, held against every other section, and frozen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from src.config.frozen import config_hash
from src.config.gate import admit
from src.config.schema import ZeroFileConfig
from src.errors import ConfigError
from src.model.build import empty_model, with_zero_sizes
from src.runtime.sharding import deepspeed_settings
from src.tracking.provenance import provenance
from tests.conftest import ROOT, admitted, write_config

ZERO3: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_min_ratio": 0, "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""As transformers' documentation has it for ZeRO-3, with a cosine schedule."""
STAGE2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds_config.json"


def asked(file: Path, content: Any = ZERO3) -> list[str]:
    file.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return ["deepspeed=file", f"deepspeed.config_file={file}"]


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        admit(["tracking=none", *overrides])
    return str(caught.value).splitlines()[1:-1]


# What is auto


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_is_what_transformers_makes_of_it(file: Path, stage: int) -> None:
    zero = ZERO3["zero_optimization"] | {"stage": stage}
    config = admitted(
        *asked(file, ZERO3 | {"zero_optimization": zero}), "training.gradient_accumulation_steps=3", "optimizer.lr=3e-4"
    ).config
    ours = deepspeed_settings(with_zero_sizes(config), 2)
    training, optimizer = config.training, config.optimizer
    arguments = SimpleNamespace(
        world_size=2, per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=3, max_grad_norm=training.max_grad_norm, learning_rate=3e-4, adam_beta1=0.9,
        adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=optimizer.weight_decay, save_on_each_node=False, fp16=False,
        fp16_full_eval=False, bf16=False, bf16_full_eval=False, get_warmup_steps=lambda _: 10,
    )  # fmt: skip
    theirs = HfTrainerDeepSpeedConfig(str(file))
    theirs.trainer_config_process(arguments)
    theirs.trainer_config_finalize(arguments, empty_model(config.model), 400)
    assert ours is not None
    assert "auto" not in json.dumps(ours)
    for key in theirs.config.keys() - {"optimizer", "scheduler", "steps_per_print", "zero_optimization"}:
        assert ours[key] == theirs.config[key], key
    for key, value in theirs.config["zero_optimization"].items():
        if value != "auto":  # of stage 3, where it is another: DeepSpeed passes over it
            assert ours["zero_optimization"][key] == value, key
    assert not {"optimizer", "scheduler", "config_file", "sha256"} & ours.keys()


def test_what_the_file_leaves_out_is_what_the_options_say(file: Path) -> None:
    config = admitted(*asked(file, {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}})).config
    assert isinstance(config.deepspeed, ZeroFileConfig)
    assert config.deepspeed.zero_optimization["stage3_gather_16bit_weights_on_model_save"] is True
    assert not config.deepspeed.offloads("param")
    of_option = deepspeed_settings(admitted("deepspeed=zero3").config, 1)
    of_file = deepspeed_settings(config, 1)
    assert of_option is not None
    assert of_file is not None
    del of_option["zero_optimization"]["reduce_bucket_size"], of_file["zero_optimization"]["offload_param"]
    assert of_file == of_option


def test_keys_of_the_command_line_come_on_top(file: Path) -> None:
    zero = admitted(*asked(file), "deepspeed.zero_optimization.stage=2", "deepspeed.wall_clock_breakdown=true").config
    assert isinstance(zero.deepspeed, ZeroFileConfig)
    assert (zero.deepspeed.stage, zero.deepspeed.wall_clock_breakdown) == (2, True)
    assert zero.deepspeed.zero_optimization["sub_group_size"] == 1e9


def test_the_path_is_relative_to_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(file)
    monkeypatch.chdir(file.parent)
    (file.parent / "data").symlink_to(ROOT / "data")
    admitted("deepspeed=file", f"deepspeed.config_file={file.name}", f"model.checkpoint={ROOT}/assets/tiny_llama")


# What disagrees

OPTIMIZER = ZERO3["optimizer"]["params"]
SCHEDULE = ZERO3["scheduler"]["params"]
ZERO = ZERO3["zero_optimization"]
DISAGREE: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "batch": (
        {"train_batch_size": 256},
        (),
        ("deepspeed.train_batch_size = 256", "32 rows x 1 micro-batches x 1 processes says 32"),
    ),
    "micro-batch": (
        {"train_micro_batch_size_per_gpu": 4},
        (),
        ("deepspeed.train_micro_batch_size_per_gpu = 4", "training.per_device_train_batch_size says 32"),
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        (),
        ("deepspeed.gradient_accumulation_steps = 2", "training.gradient_accumulation_steps says 1"),
    ),
    "clipping": (
        {"gradient_clipping": 0.3},
        (),
        ("deepspeed.gradient_clipping = 0.3", "training.max_grad_norm says 1.0"),
    ),
    "no clipping": (
        {"gradient_clipping": 1.0},
        ("training.max_grad_norm=null",),
        ("deepspeed.gradient_clipping = 1.0", "training.max_grad_norm says 0"),
    ),
    "bf16": (
        {"bf16": {"enabled": True}},
        (),
        ("deepspeed.bf16.enabled = true", "training.mixed_precision = no: auto, or false"),
    ),
    "bf16, its former name": (
        {"bfloat16": {"enabled": True}},
        (),
        ("deepspeed.bf16.enabled = true", "training.mixed_precision = no"),
    ),
    "no bf16": (
        {"bf16": {"enabled": False}},
        ("training.mixed_precision=bf16",),
        ("deepspeed.bf16.enabled = false", "training.mixed_precision = bf16: auto, or true"),
    ),
    "fp16": ({"fp16": {"enabled": True}}, (), ("deepspeed.fp16.enabled = true", "training.mixed_precision = no")),
    "optimizer": (
        {"optimizer": {"type": "AdamW"}},
        ("optimizer=sgd",),
        ("deepspeed.optimizer.type = AdamW", "optimizer.type = sgd"),
    ),
    "another optimizer": (
        {"optimizer": {"type": "Lamb"}},
        (),
        ("deepspeed.optimizer.type = Lamb", "AdamW, Adam or SGD"),
    ),
    "lr": (
        {"optimizer": {"type": "AdamW", "params": OPTIMIZER | {"lr": 3e-5}}},
        (),
        ("deepspeed.optimizer.params.lr = 3e-05", "optimizer.lr = 0.002"),
    ),
    "betas": (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.99]}}},
        (),
        ("deepspeed.optimizer.params.betas = [0.8, 0.99]", "optimizer.betas = [0.9, 0.95]"),
    ),
    "eps": (
        {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}},
        (),
        ("deepspeed.optimizer.params.eps = 1e-06", "optimizer.eps = 1e-08"),
    ),
    "decay": (
        {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.5}}},
        (),
        ("deepspeed.optimizer.params.weight_decay = 0.5", "optimizer.weight_decay = "),
    ),
    "Adam without decoupled decay": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        (),
        ("adam_w_mode = false", "not true"),
    ),
    "schedule": (
        {"scheduler": {"type": "WarmupDecayLR"}},
        (),
        ("deepspeed.scheduler.type = WarmupDecayLR", "scheduler.type = cosine", "scheduler=linear"),
    ),
    "another schedule": (
        {"scheduler": {"type": "OneCycle"}},
        (),
        ("deepspeed.scheduler.type = OneCycle", "WarmupLR (scheduler=constant_with_warmup)"),
    ),
    "warm-up": (
        {"scheduler": {"type": "WarmupCosineLR", "params": SCHEDULE | {"warmup_num_steps": 500}}},
        ("scheduler.warmup_steps=10",),
        ("deepspeed.scheduler.params.warmup_num_steps = 500", "scheduler.warmup_steps = 10"),
    ),
    "warm-up by ratio": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 500}}},
        (),
        ("warmup_num_steps = 500", "scheduler.warmup_steps = null"),
    ),
    "steps": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 99}}},
        (),
        ("deepspeed.scheduler.params.total_num_steps = 99", "training.max_train_steps = null"),
    ),
    "peak": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 0.1}}},
        (),
        ("deepspeed.scheduler.params.warmup_max_lr = 0.1", "optimizer.lr = 0.002"),
    ),
    "warm-up's form": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "log"}}},
        (),
        ("warmup_type = log", "linear"),
    ),
    "stage 0": ({"zero_optimization": {"stage": 0}}, (), ("deepspeed.zero_optimization.stage = 0", "deepspeed=none")),
    "no stage": ({"zero_optimization": {}}, (), ("deepspeed.zero_optimization = {}", "with a stage")),
    "export": (
        {"zero_optimization": ZERO | {"stage3_gather_16bit_weights_on_model_save": False}},
        (),
        ("stage3_gather_16bit_weights_on_model_save = false", "must be true"),
    ),
    "monitor": ({"tensorboard": {"enabled": True}}, (), ("deepspeed.tensorboard", "tracking decides that here")),
    "checkpointing": (
        {"activation_checkpointing": {"partition_activations": True}},
        (),
        ("deepspeed.activation_checkpointing", "model.gradient_checkpointing decides"),
    ),
    "gradients": ({"prescale_gradients": True}, (), ("deepspeed.prescale_gradients = true", "false here")),
    "a typo": (
        {"gradient_acumulation_steps": 1},
        (),
        ("deepspeed.gradient_acumulation_steps = 1", "did you mean deepspeed.gradient_accumulation_steps?"),
    ),
    "a typo inside": (
        {"zero_optimization": ZERO | {"overlap_com": True}},
        (),
        ("deepspeed.zero_optimization.overlap_com = true", "did you mean overlap_comm?"),
    ),
    "a former name": (
        {"zero_optimization": ZERO | {"stage3_gather_fp16_weights_on_model_save": True}},
        (),
        ("did you mean stage3_gather_16bit_weights_on_model_save?",),
    ),
    "a typo of the optimizer's": (
        {"optimizer": {"type": "AdamW", "params": {"weight_decy": 0}}},
        (),
        ("deepspeed.optimizer.params.weight_decy = 0", "did you mean weight_decay?"),
    ),
    "a key of ours": ({"sha256": "0"}, (), ("deepspeed.sha256 = 0", "not a key of DeepSpeed's")),
}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({**STAGE2, "steps_per_prnt": 3}, ["not a key of DeepSpeed's; did you mean steps_per_print?"]),
        ({**STAGE2, "tensorbord": {"enabled": True}}, ["not a key of DeepSpeed's; did you mean tensorboard?"]),
        ({**STAGE2, "prescale_gradient": False}, ["not a key of DeepSpeed's; did you mean prescale_gradients?"]),
        ({**STAGE2, "train_batch_sise": 3}, ["did you mean deepspeed.train_batch_size?"]),
        ({"zero_optimization": {"stage": 2, "stag": 2}}, ["not a key of DeepSpeed's; did you mean stage?"]),
        ({"bf16": {"enabled": "auto"}}, ["needs a value: a mapping of DeepSpeed's keys, with a stage"]),
        (
            {"zero_optimisation": {"stage": 2}},
            ["needs a value: a mapping", "unknown key; did you mean deepspeed.zero_optimization?"],
        ),
        ({"stage": 3}, ["needs a value: a mapping", "unknown key; did you mean deepspeed.zero_optimization.stage?"]),
    ],
)
def test_keys_that_are_none_are_told_with_the_nearest(file: Path, content: dict[str, Any], told: list[str]) -> None:
    lines = refused(*asked(file, content))
    assert len(lines) == len(told)
    for line, words in zip(lines, told, strict=True):
        assert words in line
        assert str(file) in line


@pytest.mark.parametrize("what", DISAGREE)
def test_what_disagrees_is_refused_with_both_places(file: Path, what: str) -> None:
    change, overrides, words = DISAGREE[what]
    (line,) = refused(*asked(file, ZERO3 | change), *overrides)
    for one in words:
        assert one in line
    assert f"({file}" in line


def test_the_line_in_the_file_is_told(file: Path) -> None:
    asked(file, ZERO3 | {"train_batch_size": 256})
    number = next(i for i, line in enumerate(file.read_text().splitlines(), 1) if '"train_batch_size"' in line)
    (line,) = refused("deepspeed=file", f"deepspeed.config_file={file}")
    assert line.endswith(f"({file}, line {number})")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter=dora", "model=qwen3_0_6b"], ("adapter.use_dora = true", "conf/adapter/dora.yaml")),
        (["adapter=qlora", "model=qwen3_0_6b"], ("quantization", "4 or 8 bits")),
        (["optimizer=adafactor"], ("optimizer.type = adafactor", "adamw and sgd")),
    ],
)
def test_what_can_not_be_shared_out_names_the_stage_of_the_file(
    file: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    content = {key: value for key, value in ZERO3.items() if key != "optimizer"}
    (line,) = refused(*asked(file, content), *overrides)
    for one in (*words, f"deepspeed.zero_optimization.stage = 3 in {file}"):
        assert one in line


def test_literals_that_agree_and_blocks_that_are_off_are_admitted(file: Path) -> None:
    same = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 1,
        "gradient_clipping": 1, "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.95], "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 77, "warmup_num_steps": 7,
            "warmup_min_ratio": 0.0, "cos_min_ratio": 0.1}},
        "tensorboard": {"enabled": False}, "flops_profiler": {"enabled": False, "profile_step": 1},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "prescale_gradients": False, "zero_allow_untested_optimizer": True, "aio": {"block_size": 1048576},
    }  # fmt: skip
    admitted(*asked(file, ZERO3 | same), "runtime.num_processes=2", "training.max_train_steps=77",
        "scheduler.warmup_steps=7", "scheduler.min_lr_ratio=0.1")  # fmt: skip


def test_processes_that_another_launcher_starts_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked(file, ZERO3 | {"train_batch_size": 128})
    assert "1 processes says 32" in refused(*given)[0]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    admitted(*given)


# What can't be read

UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "a comma at the end": ('{\n  "zero_optimization": {"stage": 2,}\n}', "line 2, column 36: not JSON"),
    "a comment": ("{\n  // mine\n}", "line 2, column 3: not JSON"),
    "cut off": ('{\n  "a": 1', "line 2, column 9: not JSON: Expecting ',' delimiter"),
    "single quotes": ("{'a': 1}", "line 1, column 2: not JSON"),
    "more behind": ("{}\n{}", "line 2, column 1: not JSON: Extra data"),
    "empty": ("", "line 1, column 1: not JSON"),
    "a list": ("[1]", "line 1, column 1: an object is needed"),
    "a key twice": (
        '{\n  "zero_optimization": {"stage": 2},\n  "zero_optimization": {}\n}',
        "line 3, column 3: the key zero_optimization a second time",
    ),
    "a key twice, inside": (
        '{"bf16": {"enabled": true},\n"fp16": {"enabled": true, "enabled": "auto"}}',
        "line 2, column 27: the key enabled a second time",
    ),
    "no number": ('{"a": "NaN",\n "b": NaN}', "line 2, column 7: not JSON: NaN is no number"),
    "digits": (f'{{"a": {"9" * 5000}}}', "too many digits"),
    "nested": ('{"a": ' + "[" * 100_000, "nested too deep"),
    "not UTF-8": (b'{\n"a": "\xe9"}', "line 2: not UTF-8 (byte 9 of the file)"),
    "large": (b" " * (2**20 + 1), "1,048,577 bytes, where 1,048,576 are the most"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_file_that_is_no_json_is_told_by_line_and_column(file: Path, what: str) -> None:
    content, words = UNREADABLE[what]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (line,) = refused("deepspeed=file", f"deepspeed.config_file={file}")
    assert f"deepspeed.config_file = {file}"[:60] in line
    assert words in line
    assert line.endswith("(command line)")


def test_a_file_that_is_not_there_or_not_named_is_told(file: Path) -> None:
    (line,) = refused("deepspeed=file", f"deepspeed.config_file={file}")
    assert "no such file (looked in" in line
    (line,) = refused("deepspeed=file")
    assert "deepspeed.config_file" in line
    assert "needs a value" in line
    (line,) = refused("deepspeed=file", f"deepspeed.config_file={file.parent}")
    assert "not a plain file" in line
    (line,) = refused("deepspeed=zero2", f"deepspeed.config_file={file}")
    assert "deepspeed.config_file" in line
    assert "unknown key" in line


# What is frozen


def test_a_frozen_run_is_repeated_and_resumed_without_the_file(file: Path, tmp_path: Path) -> None:
    first = admitted(*asked(file))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "starts.jsonl").write_text("")
    write_config(folder, first.frozen)
    said = provenance(first.frozen, {}, "cpu", ROOT)["deepspeed"]
    file.unlink()
    for overrides in ([], [f"hydra.run.dir={folder}"]):
        again = admitted(f"rerun={folder}", *overrides)
        assert again.frozen["deepspeed"] == first.frozen["deepspeed"]
        assert again.config.deepspeed == first.config.deepspeed
        assert provenance(again.frozen, {}, "cpu", ROOT)["deepspeed"] == said
    assert list(said) == [str(file)]
    changed = admitted(f"rerun={folder}", "deepspeed.zero_optimization.stage=2").config.deepspeed
    assert changed.stage == 2
    with pytest.raises(ConfigError, match=r"deepspeed\.config_file = other\.json .* change single keys"):
        admit([f"rerun={folder}", "deepspeed.config_file=other.json"])


def test_where_the_file_lies_is_no_part_of_what_is_computed(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    one, same = admitted(*asked(file)).frozen, admitted(*asked(other, json.dumps(ZERO3) + "\n")).frozen
    assert one["deepspeed"]["sha256"] != same["deepspeed"]["sha256"]
    assert config_hash(one) == config_hash(same)
    third = admitted(*asked(other, ZERO3 | {"wall_clock_breakdown": True})).frozen
    assert config_hash(one) != config_hash(third)
