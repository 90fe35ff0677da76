"""Hints: an unknown key is told its place, its name here or the option that has it; what is suggested is admitted."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from src.config import groups, peers
from src.config.gate import admit, admit_finished
from src.config.keys import all_keys
from src.config.options import CONF
from src.config.peers import Counterpart, all_peers
from src.config.quoting import shell_override
from src.errors import ConfigError
from tests.conftest import ROOT, admitted
from tests.test_gate import refusal

PRETRAINED = ("model=causal_lm", "model.checkpoint=hub/id")
"""A model that an adapter, and weights in 4 bits, are for."""


def suggestions(message: str) -> Iterator[list[str]]:
    """Yield what each problem of a refusal suggests, as arguments of a command."""
    for line in message.splitlines():
        if found := re.search(r"did you mean (one of )?(.*?)\?(?:\s|$)", line):
            several, text = found.groups()
            yield from (shlex.split(one.partition(", ")[0] if several else one) for one in text.split(" or "))


MEANT: tuple[tuple[list[str], str], ...] = (
    # an option that has it, and the one that was chosen
    (["adapter.r=8"], "adapter=none has no r; choose adapter=lora "),
    (["optimizer.momentum=0.9"], "optimizer=adamw has no momentum, which is a key of optimizer=sgd "),
    (["optimizer=sgd", "optimizer.eps=1e-6"], "optimizer=sgd has no eps, which is a key of optimizer=adamw "),
    (["scheduler=constant", "scheduler.min_lr_ratio=0"], "has no min_lr_ratio, which is a key of scheduler=cosine"),
    (["tracking=none", "tracking.uri=x"], "tracking=none has no uri; choose tracking=mlflow "),
    (["deepspeed.zero_optimization.stage=3"], "deepspeed=none has no zero_optimization; choose deepspeed=zero1, z"),
    # the same name elsewhere before a similar one here
    (["training.eval_steps=5"], "did you mean evaluation.eval_steps? "),
    (["model.batching=packed"], "did you mean data.batching? "),
    (["data.label_smoothing=0.1"], "did you mean loss.label_smoothing? "),
    (["training.seed=1"], "did you mean seed? "),
    (["tokens.text=[a]"], "did you mean tokens.init.text? "),
    (["revision=main"], "did you mean model.revision or data.revision? "),
    (["loss.momentum=0.9"], "did you mean optimizer=sgd optimizer.momentum=0.9? "),
    # a name that its section makes clear: as one word with it, or among the words of its keys
    (["evaluation.steps=10"], "did you mean evaluation.eval_steps? "),
    (["evaluations.steps=10"], "did you mean evaluation.eval_steps? "),
    (["evaluation.batch_size=4"], "did you mean training.per_device_eval_batch_size? "),
    (["checkpoint.steps=10"], "did you mean checkpoint.checkpointing_steps? "),
    (["checkpoint.metric=eval/validation/loss"], "did you mean checkpoint.metric_for_best_model? "),
    (["logging.steps=5"], "did you mean training.logging_steps? "),
    (["training.steps=5"], "did you mean training.max_train_steps? "),
    (["training.epochs=5"], "did you mean training.num_train_epochs? "),
    (["generation.max_length=5"], "did you mean generation.max_new_tokens? "),
    (["generation.max_tokens=5"], "did you mean generation.max_new_tokens or generation.max_thought_tokens? "),
    (["generate.max_tokens=5"], "did you mean generation.max_new_tokens or generation.max_thought_tokens? "),
    (["loss.weight=3"], "did you mean loss.thought_weight or loss.thought_open_weight or "),
    (["tracking.experiment=x"], "did you mean tracking.experiment_name? "),
    (["tracking.name=x"], "did you mean tracking.run_name? "),
    (["tracking=none", "tracking.name=x"], "did you mean tracking=mlflow tracking.run_name=x? "),
    (["tracking.url=http://x"], "did you mean tracking.uri? "),
    (["optimizer.beta1=0.9"], "did you mean optimizer.betas? (both in one list"),
    (["model.name=hub/id"], "did you mean model=causal_lm model.checkpoint=hub/id? "),
    (["data.name=hub/id"], "did you mean data=prompt_completion data.dataset_name=hub/id? "),
    ([*PRETRAINED, "adapter.alpha=4"], "did you mean adapter=lora adapter.lora_alpha=4? "),
    (["wandb.project=x"], "did you mean tracking.experiment_name? "),
    (["early_stopping.patience=3"], "training.early_stopping_patience"),
    # what chooses an option elsewhere, and what is deep in another library's mapping
    (["optimizer.name=sgd"], "did you mean optimizer=sgd? "),
    (["optimizer.name=adamw_torch"], "did you mean optimizer=adamw? "),
    (["scheduler.name=nope"], "did you mean one of scheduler=constant, constant_with_warmup, cosine, linear? "),
    ([*PRETRAINED, "deepspeed.stage=3"], "did you mean deepspeed=zero3? "),
    ([*PRETRAINED, "deepspeed.stage=2"], "did you mean deepspeed=zero2? "),
    # a section that is none, key by key
    (["optimzer.lr=1"], "optimzer.lr = 1   unknown key; did you mean optimizer.lr? "),
    (["trainer.max_epochs=3"], "trainer.max_epochs = 3   unknown key; did you mean training.num_train_epochs? "),
    ([*PRETRAINED, "peft.lora.r=8"], "peft.lora.r = 8   unknown key; did you mean adapter=lora adapter.r=8? "),
    # similar names
    (["optimizer.lrr=1"], "did you mean optimizer.lr? "),
    (["lerning_rate=1"], "did you mean optimizer.lr? "),
    (["training.logingSteps=1"], "did you mean training.logging_steps? "),
    (["qqq=1"], "unknown key; the top level has name, seed"),
    # other trainers' names, wherever they stand
    (["learning_rate=1e-4"], "did you mean optimizer.lr? "),
    (["training.learning_rate=1e-4"], "did you mean optimizer.lr? "),
    (["+learning_rate=1e-4"], "did you mean optimizer.lr? "),
    (["++training.learningRate=1e-4"], "did you mean optimizer.lr? "),
    (["lr=1e-4"], "did you mean optimizer.lr? "),
    (["per_device_train_batch_size=4"], "did you mean training.per_device_train_batch_size? "),
    (["micro_batch_size=4"], "did you mean training.per_device_train_batch_size? "),
    (["num_epochs=4"], "did you mean training.num_train_epochs? "),
    (["sequence_len=512"], "did you mean data.max_seq_length? "),
    (["cutoff_len=512"], "did you mean data.max_seq_length? "),
    (["save_steps=10"], "did you mean checkpoint.checkpointing_steps? "),
    (["save_total_limit=3"], "did you mean checkpoint.keep_last? "),
    # with their values, where these are others here
    (["bf16=true"], "did you mean training.mixed_precision=bf16? "),
    (["fp16=false"], "did you mean training.mixed_precision=no? "),
    (["training.bf16=auto"], "did you mean training.mixed_precision=auto? "),
    (["report_to=none"], "did you mean tracking=none? "),
    (["report_to=[mlflow]"], "did you mean tracking=mlflow? "),
    (["report_to=wandb"], "did you mean tracking=wandb? "),
    (["report_to=comet_ml"], "did you mean one of tracking=mlflow, none, tensorboard, wandb? (trackers besides"),
    (["packing=true"], "did you mean data.batching=packed? "),
    (["group_by_length=true"], "did you mean data.batching=length_grouped? "),
    (["max_steps=-1"], "did you mean training.max_train_steps=null? "),
    (["max_steps=10"], "did you mean training.max_train_steps? "),
    (["eval_strategy=no"], "did you mean evaluation.eval_steps=null? "),
    (["optim=adamw_torch"], "did you mean optimizer=adamw? "),
    (["lr_scheduler_type=cosine_with_min_lr"], "did you mean scheduler=cosine? "),
    (["adam_beta2=0.99"], "did you mean optimizer.betas? (both in one list"),
    ([*PRETRAINED, "load_in_4bit=true"], "did you mean adapter=lora quantization=nf4? "),
    ([*PRETRAINED, "adapter=dora", "load_in_4bit=true"], "did you mean quantization=nf4? "),
    ([*PRETRAINED, "use_peft=true"], "did you mean adapter=lora? "),
    ([*PRETRAINED, "lora_r=8"], "did you mean adapter=lora adapter.r=8? "),
    ([*PRETRAINED, "adapter=lora", "lora_r=8"], "did you mean adapter.r? "),
    ([*PRETRAINED, "lora_target='q_proj, v_proj'"], "adapter=lora 'adapter.target_modules=[q_proj,v_proj]'? "),
    (["dataset_name='a b'"], "did you mean data=prompt_completion 'data.dataset_name=\"a b\"'? "),
    (["train_file='it is.csv'"], "did you mean data=prompt_completion 'data.train_files=[\"it is.csv\"]'? "),
    (["dataset_name='" + "x" * 200 + "'"], "did you mean data.dataset_name, with data=prompt_completion? "),
    (["lora_r=8"], "did you mean adapter=lora export.merge=true adapter.r=8? "),
    (["base_model=hub/id"], "did you mean model=causal_lm model.checkpoint=hub/id? "),
    # and where there is none
    (["tf32=true"], "unknown key; there is no counterpart, because PyTorch's own setting is left as it is "),
    (["dpo_beta=0.1"], "there is no counterpart, because there is supervised fine-tuning only"),
)  # fmt: skip
"""Overrides of which the last one is refused, and what is said of it."""


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+-")


def told_together() -> list[tuple[tuple[str, ...], list[tuple[str, str]]]]:
    """Return the last overrides that go with the same others, in as few commands as it takes, with what is said."""
    commands: dict[tuple[tuple[str, ...], int], dict[str, tuple[str, str]]] = {}
    for (*context, override), told in MEANT:
        number = next(n for n in count() if key_of(override) not in commands.get((tuple(context), n), {}))
        commands.setdefault((tuple(context), number), {})[key_of(override)] = (override, told)
    return [(context, list(refused.values())) for (context, _), refused in commands.items()]


@pytest.mark.parametrize(("context", "refused"), told_together())
def test_what_was_meant(context: tuple[str, ...], refused: list[tuple[str, str]]) -> None:
    lines = refusal(*context, *(override for override, _ in refused)).splitlines()[1:-1]
    typed: list[list[str]] = []
    for override, told in refused:
        (line,) = [line for line in lines if f"{key_of(override)}.".startswith(f"{line.split(maxsplit=1)[0]}.")]
        assert re.sub(" +", " ", told) in re.sub(" +", " ", line), override
        for one in suggestions(line):
            if "it is.csv" in line:
                assert "no such file" in refusal(*context, *one)
            elif all("=" in part for part in one):
                typed.append(one)
            else:
                assert one[0].rstrip(",") in all_keys()
    for batch in batches(typed):
        admit_all(batch, context)


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--learning_rate=1e-4", "unrecognized arguments: --learning_rate=1e-4; keys are written without dashes: o"),
        ("--help=optimizer", "there is no = after --help: --help optimizer"),
    ],
)
def test_flags(flag: str, told: str) -> None:
    assert told in refusal(flag)


def test_a_key_of_a_source_of_a_mixture() -> None:
    message = refusal("data.mixture={a: {train_files: [data/tow_addition], weigth: 1}}", "data.train_files=null")
    assert "data.mixture.a.weigth = 1   unknown key; did you mean data.mixture.a.weight?" in message


def test_another_trainers_name_in_a_source_of_a_mixture() -> None:
    source = "{train_file: [data/tow_addition/train.jsonl]}"
    message = refusal(f"data.mixture={{a: {source}}}", "data.train_files=null")
    assert "unknown key; did you mean data.mixture.a.train_files?" in message


def test_hints_of_a_sweep_and_of_a_file(tmp_path: Path) -> None:
    assert "did you mean optimizer.lr?" in refusal("-m", "learning_rate=1e-4,1e-3")
    assert "did you mean sweep.n_trials?" in refusal("-m", "seed=1,2", "sweep.num_trials=3")
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\ntraining:\n  learning_rate: 1e-4\n  bf16: true\nlora_config: {r: 8}\n")
    message = refusal("--config-dir", str(tmp_path), "experiment=mine", *PRETRAINED)
    assert f"training.learning_rate = 0.0001   unknown key; did you mean optimizer.lr?   ({file}, line 3)" in message
    assert "training.bf16 = true              unknown key; did you mean training.mixed_precision=bf16?" in message
    assert "lora_config.r = 8                 unknown key; did you mean adapter=lora adapter.r=8?" in message
    file.write_text("# @package _global_\ndefaults:\n  - override /optimizer: sgd\noptimizer: {eps: 1}\n")
    message = refusal("--config-dir", str(tmp_path), "experiment=mine")
    assert f"optimizer=sgd has no eps, which is a key of optimizer=adamw   ({file}, line 4)" in message


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("optimizer=adamw_torch", "did you mean optimizer=adamw?"),
        ("optimizer=adamw_torch_fused", "did you mean optimizer=adamw?"),
        ("optimizer=adamw_bnb_8bit", "did you mean optimizer=adamw_8bit?"),
        ("optimizer=adamx", "did you mean adamw?"),
        ("optimizer=lion", "one of adafactor, adamw, adamw_8bit, paged_adamw_32bit, sgd "),
        ("scheduler=cosine_with_min_lr", "did you mean scheduler=cosine?"),
        ("adapter=full", "did you mean adapter=none?"),
        ("tracking=comet", "one of mlflow, none, tensorboard, wandb; trackers besides the run's own folder: MLflow"),
        ("tracking=all", "did you mean tracking=mlflow?"),
        ("model=hub/id", "did you mean model=causal_lm model.checkpoint=hub/id?"),
        ("model=gpt2", "did you mean model=causal_lm model.checkpoint=gpt2?"),
        ("model=tiny_lama", "did you mean tiny_llama?"),
        ("data=openai/gsm8k", "did you mean data=prompt_completion data.dataset_name=openai/gsm8k?"),
        (
            "data=data/tow_addition/train.jsonl",
            "did you mean data=prompt_completion 'data.train_files=[data/tow_addition/train.jsonl]'?",
        ),
        ("data=tow_additions", "did you mean tow_addition?"),
    ],
)
def test_options_of_other_names(given: str, told: str) -> None:
    message = refusal(given)
    assert told in message
    for one in suggestions(message):
        assert admit(one if "=" in one[0] else [f"{given.partition('=')[0]}={one[0]}"])


def test_a_long_option_is_not_repeated() -> None:
    assert len(refusal(f"model={'x' * 5000}")) < 1000


@pytest.mark.parametrize("name", ["ds_config.json", "my configs/it's, (b).json"])
def test_a_json_of_deepspeeds_is_an_option_with_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"zero_optimization": {"stage": 2}}')
    (typed,) = suggestions(refusal(shell_quoted("deepspeed", str(file))))
    assert typed[0] == "deepspeed=file"
    run = admit([*PRETRAINED, *typed]).run
    assert run is not None
    assert run.frozen["deepspeed"]["config_file"] == str(file)
    assert run.frozen["deepspeed"]["zero_optimization"]["stage"] == 2


def shell_quoted(key: str, value: str) -> str:
    return shlex.split(shell_override(key, value))[0]


def test_hints_name_every_key_that_may_be_meant() -> None:
    message = refusal(f"data.files={ROWS}".replace("'", ""))
    assert "did you mean data.train_files or data.validation_files or data.test_files?" in message
    message = refusal("deepspeed=zero2", "deepspeed.stage=3", "deepspeed.offload_optimizer.device=cpu")
    assert "did you mean deepspeed.zero_optimization.stage?" in message
    assert "did you mean deepspeed.zero_optimization.offload_optimizer.device?" in message


def test_keys_that_are_not_indented(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\noptimizer:\nlr: 1e-3\ntraining:\nnum_train_epochs: 2\n")
    lines = refusal("--config-dir", str(tmp_path), "experiment=mine").splitlines()[1:-1]
    below = "a section of keys, not a value; its keys have to be indented below it"
    assert [re.sub(r" +", " ", line.strip().partition(f"   ({file}, line ")[0]) for line in lines] == [
        "lr = 0.001 unknown key; did you mean optimizer.lr? (indented below `optimizer:`)",
        "num_train_epochs = 2 unknown key; did you mean training.num_train_epochs? (indented below `training:`)",
        f"optimizer = null {below}",
        f"training = null {below}",
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "experiment/mine",
            "name: x\n",
            "its first line must be `# @package _global_`: without it its keys are those of",
        ),
        ("experiment/mine", "# A run.\n# @package _global_\nname: x\n", "it stands too low"),
        ("experiment/mine", "# @package _globl_\nname: x\n", "its keys are those of `_globl_`"),
        ("debug/mine", "data: {limit: 3}\n", "its first line must be `# @package _global_`"),
        ("optimizer/mine", "# @package _global_\ndefaults: [adamw@optimizer]\nlr: 1\n", "this would be optimizer.lr"),
    ],
)
def test_an_option_whose_keys_go_astray_is_told_by_its_file(name: str, content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(content)
    message = refusal("--config-dir", str(tmp_path), f"{name.partition('/')[0]}=mine")
    assert told in message
    assert "1 problem\n" in message
    assert str(file) in message


def test_a_run_that_was_started_keeps_its_options(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(admitted().frozen))
    message = refusal(
        f"rerun={tmp_path}", "adapter.r=8", "report_to=none", "learning_rate=1e-4", "bf16=true", "lora_r=8"
    )
    assert "adapter is none in this run and has no r" in message
    assert list(suggestions(message)) == [["optimizer.lr"], ["training.mixed_precision=bf16"]]
    (tmp_path / "status.json").write_text('{"state": "FINISHED", "step": 1}')
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError) as caught:
        admit_finished([f"run={tmp_path}", "learning_rate=1", "eval_batch_size=7", "max_tokens=3"], "predict")
    assert list(suggestions(str(caught.value))) == [["training.per_device_eval_batch_size"], ["data.max_seq_length"]]


def entries() -> Iterator[tuple[str, str, Counterpart]]:
    for peer in all_peers():
        yield from ((peer.title, name, here) for name, here in peer.table.items())


def table(title: str) -> Mapping[str, Counterpart]:
    return next(peer.table for peer in all_peers() if peer.title == title)


def is_known(key: str) -> bool:
    """Return whether there is such a key, section or group."""
    sections = {one.section for one in all_keys().values()}
    return key in {*all_keys(), *sections, "hydra.run.dir"} or (CONF / key).is_dir()


@pytest.mark.parametrize("theirs", [TrainingArguments, SFTConfig, ModelConfig, ScriptArguments])
def test_every_argument_of_the_installed_trainers_is_in_the_tables(theirs: type) -> None:
    known = {*table("transformers"), *(table("TRL") if theirs is not TrainingArguments else ())}
    assert {one.name for one in dataclasses.fields(theirs)} - known == set()


def test_the_first_table_has_no_name_that_is_none() -> None:
    assert set(table("transformers")) == {one.name for one in dataclasses.fields(TrainingArguments)}


def test_the_tables_of_trainers_that_are_not_installed_are_large() -> None:
    for known in (table("axolotl"), table("LLaMA-Factory")):
        assert len(known) >= 80
        assert sum(bool(here.key) for here in known.values()) >= 40


def test_no_name_is_twice_in_a_table() -> None:
    tables = yaml.compose(peers.TABLES.read_text(), yaml.SafeLoader).value[1][1].value
    for node, peer in zip(tables, all_peers(), strict=True):
        (_, arguments), (_, none) = node.value[2:]
        names = [*(key.value for key, _ in arguments.value), *(value.value for _, value in none.value)]
        assert len(" ".join(names).split()) == len(peer.table), peer.title


def test_every_entry_has_a_key_that_there_is_or_says_why_there_is_none() -> None:
    for peer, name, here in entries():
        assert is_known(here.key) if here.key else len(here.note) > 10, f"{peer}: {name}"
        assert here.key or not (here.values or here.is_same), f"{peer}: {name}"


def test_every_value_of_the_tables_is_one_that_the_key_takes() -> None:
    for peer, name, here in entries():
        for theirs, ours in here.values.items():
            if here.key in all_keys():
                value = OverridesParser.create().parse_override(f"key={ours}").value()
                assert all_keys()[here.key].accepts(value), f"{peer}: {name}: {theirs} -> {ours}"
            else:
                assert ours in groups.readable(here.key, (CONF,)), f"{peer}: {name}: {theirs} -> {ours}"


def test_the_same_name_is_the_same_everywhere_but_where_trainers_differ() -> None:
    meant: dict[str, set[str]] = {}
    for _, name, here in entries():
        meant.setdefault(name, set()).add(here.key)
    assert {name for name, keys in meant.items() if len(keys) > 1} == set()


SAMPLES = (True, 8, 0.5, "epoch", "text", ["text"], "auto", "none")
ROWS = ["data/tow_addition/train.jsonl"]
SAMPLES_OF = {
    **dict.fromkeys(("data.train_files", "data.validation_files", "data.test_files"), ROWS),
    "checkpoint.resume": "never",
    "checkpoint.metric_for_best_model": "eval/validation/loss",
    "tracking.uri": "http://localhost",
    "runtime.device": "cuda",
    "scheduler": "cosine",
    "optimizer": "adamw",
    "adapter": "lora",
    "init_from": None,
    "export.merge": "false",
    "data.num_folds": None,
    "data.streaming": None,
    "adapter.layers_to_transform": None,
    "runtime.num_machines": None,
    "runtime.machine_rank": None,
}
"""Values where the file system or other keys leave no choice; None for keys that can't be given alone."""


def arguments() -> Iterator[tuple[str, str]]:
    """Yield each argument of the tables that is no key here, with each value that it can have."""
    for _, name, here in entries():
        if not here.key or is_known(name):
            continue
        known = all_keys().get(here.key)
        sample = SAMPLES_OF.get(here.key, next((one for one in SAMPLES if known and known.accepts(one)), None))
        yield from ((name, theirs) for theirs in here.values)
        if here.is_same and sample is not None:
            yield name, f"[{','.join(sample)}]" if isinstance(sample, list) else peers.value_text(sample)


def batches(commands: Iterable[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Return commands in as few batches as it takes where no key comes twice in one."""
    made: list[tuple[set[str], list[Sequence[str]]]] = []
    for command in commands:
        keys = {part.partition("=")[0] for part in command}
        for seen, batch in made:
            if not keys & seen:
                seen |= keys
                batch.append(command)
                break
        else:
            made.append((keys, [command]))
    return [batch for _, batch in made]


def admit_all(commands: Sequence[Sequence[str]], context: Sequence[str] = PRETRAINED) -> None:
    """Admit commands, together as far as they go together."""
    try:
        admit([*context, *dict.fromkeys(part for command in commands for part in command)])
    except ConfigError:
        assert len(commands) > 1, commands
        half = len(commands) // 2
        admit_all(commands[:half], context)
        admit_all(commands[half:], context)


def test_what_the_tables_suggest_is_admitted() -> None:
    """Give each argument with each value that it can have, and what the refusal suggests in its place."""
    given = [[f"{name}='{value}'" if ":" in value else f"{name}={value}"] for name, value in sorted(set(arguments()))]
    tried: set[tuple[str, ...]] = set()
    for batch in batches(given):
        values = [one.partition("=")[2] for (one,) in batch]
        message = refusal(*PRETRAINED, *(one for (one,) in batch))
        found = [list(suggestions(line)) for line in message.splitlines()[1:-1]]
        assert all(found), message
        for value, of_one in zip(values, found, strict=True):
            tried |= {tuple(one if "=" in one[-1] else [*one[1:], f"{one[0]}={value}"]) for one in of_one}
    for batch in batches(sorted(tried)):
        admit_all(batch)
    assert len(given) > 200
    assert len(tried) > 80


def test_what_notes_name_is_there(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    for code in sorted({code for _, _, here in entries() for code in re.findall(r"`([^`]*)`", here.note)}):
        if code.startswith("python -m src."):
            assert (ROOT / "src" / f"{code.split()[2].removeprefix('src.')}.py").is_file()
        elif code.startswith("make "):
            assert f"\n{code.removeprefix('make ')}: " in (ROOT / "Makefile").read_text()
        elif "=" in code:
            needed = ["adapter=lora"] if code.startswith("quantization=") else []
            needed += ["training.max_train_steps=9"] if code == "data.streaming=true" else []
            rows = f"data.train_files={ROWS}".replace("'", "")
            typed = code.replace("ds_config.json", str(file))
            assert admit([*PRETRAINED, rows, *needed, *shlex.split(typed)]), code
        elif re.fullmatch(r"[a-z_.]+", code) and code != "summary.json":
            assert is_known(code), code
