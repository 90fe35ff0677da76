"""The gate: every problem is told, by name and place, before anything is loaded or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from src.checkpoint.manifest import Manifest, entry_of
from src.config.gate import admit
from src.config.keys import known_keys
from src.errors import ConfigError
from src.sweep.plan import plan_sweep
from tests.conftest import ROOT, admitted, towline


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        request = admit(overrides)
        if request.line.flags.multirun:
            plan_sweep(request.line)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr = 1", "did you mean optimizer.lr?", "command line", "1 problem\n"]),
        (["+optimizer.foo=1"], ["optimizer.foo = 1", "optimizer has type, lr, embedding_lr, weight_decay, betas, eps"]),
        (["optimizer.lrr=1", "+optimizer.foo=1"], ["2 problems", "optimizer.lrr", "optimizer.foo"]),
        (["training.mixed_precision=fp8", "seed=-1"], ["2 problems", "not one of no, bf16, fp16, auto", "seed = -1"]),
        (["optimizer=adamx"], ["optimizer = adamx", "one of adafactor, adamw", "did you mean adamw?", "1 problem\n"]),
        (["optimzer=adamw"], ["optimzer", "did you mean optimizer?"]),
        (["scheduler=constant", "scheduler.warmup_steps=3"], ["scheduler.warmup_steps = 3", "unknown key"]),
        (["optimizer.lr=fast"], ["optimizer.lr = fast", "not a number"]),
        (["data.columns='\\${x}'"], ["data.columns = ", "not a mapping from text to text"]),
        (["plugins='\\${x}'"], ["plugins = ", "not a list"]),
        (["training.logging_steps=1.5"], ["not a whole number"]),
        (["training.logging_steps=true"], ["training.logging_steps = true", "not a whole number"]),
        (["training.logging_steps=0"], ["not a whole number of at least 1"]),
        (["optimizer.lr=-1"], ["optimizer.lr = -1", "not a number above 0"]),
        (["optimizer.lr=nan"], ["not a number above 0"]),
        (["optimizer.betas=[0.9]"], ["not two numbers from 0 to below 1"]),
        (["optimizer.betas=[0.9,1.0]"], ["not two numbers from 0 to below 1"]),
        (["evaluation.eval_steps=sometimes"], ["'epoch', or null for never"]),
        (["data.max_dropped_fraction=1.5"], ["not a number from 0 to 1"]),
        (["model=causal_lm"], ["model.checkpoint", "needs a value", "conf/model/causal_lm.yaml"]),
        (["model.weights=pretrained"], ["model.checkpoint = assets/tiny_llama", "without weights", "random"]),
        (["model.checkpoint=./nowhere"], ["no such folder"]),
        (["model.checkpoint=conf"], ["without config.json"]),
        (["data.train_files=[nope.jsonl]"], ["data.train_files = nope.jsonl", "no such file"]),
        (["data.train_files=null"], ["data.train_files", "no training data"]),
        (["data.train_files=[3]"], ["not a file, a glob or a folder"]),
        (["data.test_files={a:[x.jsonl],b:3}"], ["data.test_files", "mapping"]),
        (["data.validation_files={train:[README.md]}"], ["can't be called train"]),
        (["data.columns.question=q"], ["data.columns.question", "has prompt, completion"]),
        (["data.prompt_template='{question}?'"], ["unknown placeholder {question}", "{prompt}"]),
        (["data.thought_pattern='<<(.*'"], ["not a regular expression"]),
        (["data.thought_pattern='<<.*>>'"], ["needs a group"]),
        (["tokens=none", "data.thoughts=keep"], ["data.thoughts = keep", "tokens.thought_open is null"]),
        (["tokens.thought_close=null"], ["come together"]),
        (["tokens.additional_special_tokens=[a,a]"], ["given twice"]),
        (["tokens.init.text=[a,b,c]"], ["one for each of the 2"]),
        (["tokens.init.method=description", "tokens.additional_special_tokens=[x]"], ["no description of x"]),
        (["training.mixed_precision=fp16", "runtime.device=cpu"], ["fp16 needs a GPU"]),
        (["training.max_train_steps=5", "scheduler.warmup_steps=5"], ["warm-up would never end"]),
        (["generation.min_new_tokens=99"], ["more than generation.max_new_tokens"]),
        (["checkpoint.load_best_model_at_end=true", "checkpoint.metric_for_best_model=eval/x/loss"], ["no evaluation"]),
        (["deepspeed=zero9"], ["deepspeed = zero9", "zero3"]),
        (["seed=1,2"], ["add -m"]),
        (["name=a/b"], ["without '/'"]),
        (["data.prompt_template=a=b"], ["needs quotes", "data.prompt_template=\"a=b\""]),
        (["-m", "optimizer.lr=1e-3,0", "seed=1,2"], ["optimizer.lr = 0", "not a number above 0"]),
        (["-m", "optimizer=adamw,adamx"], ["optimizer = adamx"]),
        (["-m", "optimizer.lr=interval(0,1)"], ["a search space"]),
        (["hydra.run.dir=pyproject.toml"], ["pyproject.toml is a file"]),
        (["hydra.run.dir=pyproject.toml/deeper/still"], ["pyproject.toml is a file"]),
        (["hydra.run.dirr=x"], ["hydra.run.dirr"]),
        (["rerun=nowhere"], ["no run to repeat there"]),
        (["data.completion_template={x}", "seed=-1"], ["2 problems", "can't be read", "seed = -1"]),
        (["hydra.run.dirr=1", "seed=-1"], ["2 problems", "hydra.run.dirr", "seed = -1"]),
        (["optimizer=null"], ["optimizer = null", "one of adafactor, adamw, adamw_8bit, paged_adamw_32bit, sgd"]),
        (["hydra.run.dir="], ["a folder of its own"]),
        (["-m", "seed=1,2", "hydra.sweep.dir=Makefile/x"], ["hydra.sweep.dir", "Makefile is a file"]),
        (["-m", "--cfg", "job", "seed=1,2"], ["-m, --cfg", "sweep.dry_run=true"]),
        (["--config-path", "x"], ["--config-path", "--config-dir"]),
        (["--config-dir", "nope"], ["--config-dir = nope", "no such folder"]),
        (["~data.columns.prompt"], ["data.columns", "needs a column for prompt"]),
        (["data.train_files=[conf]"], ["a folder without data files"]),
        (["data.train_files=['data/*.nope']"], ["matches no file"]),
        (["data.train_files=[README.md]"], ["not a kind that is read", ".parquet"]),
        (["data.train_files=[data/tow_addition/train.jsonl,./data/tow_addition]"], ["given twice"]),
        (["data.format=message"], ["not one of dialogue_summary", "did you mean messages?"]),
        (["data.prompt_template=hello"], ["without {prompt}"]),
        (["data.prompt_template='{prompt}{completion}'"], ["give the answer away"]),
        (["tokens.thought_close='<ToW>'"], ["the same as thought_open"]),
        (["tracking.uri=nonsense"], ["tracking.uri = nonsense", "sqlite:"]),
        (["data.test_files={train:[README.md]}"], ["can't be called train"]),
        (["data.test_files={a/b:[README.md]}"], ["letters, digits"]),
        (["data.test_files={..:[README.md]}"], ["letters, digits"]),  # it would be another folder
        (["data.test_files={validation:[README.md]}"], ["has this name already"]),
        (
            ["data=gsm8k", "data.train_files=[README.md]", "data.validation_fraction=0",
             "checkpoint.load_best_model_at_end=true"],
            ["no validation set"],
        ),
        (["checkpoint.checkpointing_steps=never"], ["checkpoint.checkpointing_steps = never", "'epoch', or null for"]),
        (["checkpoint.keep_last=0"], ["checkpoint.keep_last = 0", "not a whole number of at least 1"]),
        (["checkpoint.keep_best=-1"], ["checkpoint.keep_best = -1", "not a whole number of at least 0"]),
        (["checkpoint.load_best_model_at_end=true", "checkpoint.keep_best=0"],
         ["checkpoint.keep_best = 0", "checkpoint.load_best_model_at_end needs at least 1", "1 problem\n"]),
        (["checkpoint.newest_optimizer_only=maybe"], ["checkpoint.newest_optimizer_only = maybe", "not true or false"]),
        (["checkpoint.metric_for_best_model=eval/x/loss"], ["evaluation computes this; one of eval/validation/loss"]),
        (["checkpoint.greater_is_better=maybe"], ["checkpoint.greater_is_better = maybe", "not true or false"]),
        (["checkpoint.resume=''"], ["not auto, never, or a folder: a run's or a checkpoint"]),
        (["checkpoint.resume=conf"], ["checkpoint.resume = conf", "neither auto, never, nor a folder with a che"]),
        (["checkpoint.allow_changed=some"], ["checkpoint.allow_changed = some", "not true or false"]),
        (["training.max_seconds=0"], ["training.max_seconds = 0", "not a number above 0"]),
        (["init_from=conf"], ["init_from = conf", "no weights there: give the folder of a run, of a model or of a ch"]),
        (["tracking.uri=${nothing}"], ["tracking", "nothing"]),
    ],
)  # fmt: skip
def test_each_problem_is_told(overrides: list[str], told: list[str]) -> None:
    message = refusal(*overrides)
    assert message.startswith("Configuration refused: ")
    for words in told:
        assert words in message


def test_folders_to_start_from_are_looked_at(tmp_path: Path) -> None:
    run, model, other = tmp_path / "run", tmp_path / "model", tmp_path / "with_model"
    checkpoint = run / "checkpoints" / "step-00000004"
    for folder in (checkpoint, model, other / "model"):
        folder.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (model / "adapter_config.json").write_text("{}")
    (other / "model" / "config.json").write_text("{}")
    assert "no weights there" in refusal(f"init_from={model}")
    for folder in (model, other / "model"):
        (folder / "some.safetensors").touch()
    for folder in (run, checkpoint):
        assert admitted(f"checkpoint.resume={folder}").config.checkpoint.resume_from == folder
        assert admitted(f"init_from={folder}").config.init_from == str(folder)
    for folder in (model, other, other / "model"):
        assert admitted(f"init_from={folder}", "checkpoint.resume=never")
        assert "neither auto, never, nor a folder with a checkpoint" in refusal(f"checkpoint.resume={folder}")
    message = refusal(f"init_from={other}", f"checkpoint.resume={run}")
    assert "1 problem\n" in message
    assert "names one to resume: choose one of them" in message
    for word in ("auto", "never"):
        assert admitted(f"checkpoint.resume={word}").config.checkpoint.resume_from is None


def test_a_best_evaluation_is_asked_for_only_where_one_is_named() -> None:
    without = ["data.validation_files=null", "data.validation_fraction=0"]
    assert admitted(*without)
    assert "no validation set" in refusal(*without, "checkpoint.metric_for_best_model=eval/validation/perplexity")
    checkpoint = admitted("checkpoint.metric_for_best_model=eval/validation/exact_match").config.checkpoint
    assert checkpoint.is_greater_better
    assert not admitted("checkpoint.greater_is_better=false").config.checkpoint.is_greater_better
    assert not admitted().config.checkpoint.is_greater_better


def test_a_refusal_costs_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    done = towline("optimizer.lrr=1", "+optimizer.foo=1", f"hydra.run.dir={run_dir}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "2 problems" in done.stderr
    assert not run_dir.parent.exists()


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"], ["--help", "data"], ["lora_r=1"]])
def test_torch_is_not_imported(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = ['src.run', *{arguments!r}]
try:
    runpy.run_module('src.run', run_name='__main__')
except SystemExit:
    pass
heavy = [name for name in ('torch', 'transformers', 'mlflow', 'datasets', 'accelerate') if name in sys.modules]
print('HEAVY', heavy, file=sys.stderr)
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("HEAVY []")


def groups() -> list[tuple[str, str]]:
    files = sorted((ROOT / "conf").glob("*/[!_]*.yaml"))
    return [(file.parent.name, file.stem) for file in files]


@pytest.mark.parametrize(("group", "option"), groups())
def test_every_option_composes(group: str, option: str, tmp_path: Path) -> None:
    needed = ["model.checkpoint=assets/tiny_llama", "model.weights=random"]
    if group in ("adapter", "quantization"):
        needed = ["model=causal_lm", "model.checkpoint=hub/id", *(["adapter=lora"] if group != "adapter" else [])]
    elif option.startswith("smollm2"):
        needed = ["model.checkpoint=hub/id"]  # adapters are trained on it, which random weights refuse
    needed += (
        ["data.train_files=[data/tow_addition/train.jsonl]"] if (group, option) != ("data", "tow_addition") else []
    )
    if (group, option) == ("deepspeed", "file"):
        (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
        needed.append(f"deepspeed.config_file={tmp_path}/ds_config.json")
    if group != "sweep":
        assert admitted(f"{group}={option}", *needed)
        return
    more = {"kfold": ["data.num_folds=2"], "models": ["experiment=dialogue_summary"]}.get(option, [])
    assert plan_sweep(admit(["-m", f"sweep={option}", "optimizer.lr=1e-3,1e-2", *more]).line).admitted


@pytest.mark.parametrize(("group", "option"), groups())
def test_every_option_says_in_its_first_line_when_to_choose_it(group: str, option: str) -> None:
    lines = (ROOT / "conf" / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_the_schema_has_no_key_that_conf_does_not_show() -> None:
    shown: set[str] = set()

    def walk(node: object, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else []:
            shown.add(f"{prefix}{key}")
            walk(value, f"{prefix}{key}.")

    for file in (ROOT / "conf").rglob("*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        walk(content, "" if file.parent.name in ("conf", "experiment", "debug") else f"{file.parent.name}.")
    assert set(known_keys()) <= shown


def test_the_last_of_group_experiment_and_command_line_wins(tmp_path: Path) -> None:
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\ndefaults:\n  - override /optimizer: sgd\noptimizer:\n  lr: 0.5\n")
    flags = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert admitted(*flags).config.optimizer.lr == 0.5
    assert admitted(*flags, "optimizer.lr=0.25").config.optimizer.lr == 0.25
    mine.write_text("# @package _global_\noptimizer:\n  lr: -1\n")
    assert str(mine) in refusal(*flags)


def test_several_validation_sets_take_the_place_of_one() -> None:
    config = admitted("data.validation_files={easy:[data/tow_addition/test.jsonl],hard:[data/tow_addition]}").config
    assert config.data.validation_files == {"easy": ["data/tow_addition/test.jsonl"], "hard": ["data/tow_addition"]}


def test_a_sweep_over_sets_is_admitted() -> None:
    assert admit(["-m", "data.validation_files={a:[data/tow_addition]},{b:[data/tow_addition]}", "tracking=none"])


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [\n"])
def test_a_frozen_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert "no run to repeat there" in refusal(f"rerun={tmp_path}")


def test_a_rerun_of_a_run_with_any_name(tmp_path: Path) -> None:
    frozen = admitted("name='a, b'").frozen
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(frozen))
    assert admitted(f"rerun={tmp_path}").run_dir.parent == Path("outputs/a, b")


def test_rerun_takes_the_frozen_config_and_dotted_overrides_on_top(tmp_path: Path) -> None:
    first = admitted("optimizer=sgd", "optimizer.lr=0.5", "seed=7", "name=mine")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.frozen))
    again = admitted(f"rerun={tmp_path}", "seed=8")
    assert again.config.optimizer == first.config.optimizer
    assert again.config.seed == 8
    assert again.run_dir.parent == Path("outputs/mine")
    message = refusal(f"rerun={tmp_path}", "optimizer=adamw", "seed=x", "optimizer.lrr=1")
    assert "a rerun keeps the options" in message
    assert "3 problems" in message


def test_the_frozen_config_is_plain_and_admits_the_same_run(tmp_path: Path) -> None:
    first = admitted()
    assert json.loads(json.dumps(first.frozen)) == first.frozen
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.frozen))
    again = admitted(f"rerun={tmp_path}").config
    again.rerun = None
    assert again == first.config


def test_a_run_goes_on_in_its_own_folder_as_it_last_was(tmp_path: Path) -> None:
    run, here = tmp_path / "run", [f"rerun={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'run'}"]
    run.mkdir()
    first = admitted("optimizer.lr=0.5", "seed=7", "data.columns.prompt=question", f"hydra.run.dir={run}")
    (run / "config.yaml").write_text(yaml.safe_dump(first.frozen))

    def saved(step: str, *overrides: str) -> None:
        state = {"config": admitted("seed=7", *overrides).frozen}
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        place = run / "checkpoints" / f"step-{step}"
        (place / "state.json").write_text(json.dumps(state))
        listed = {"state.json": entry_of(place / "state.json")}
        (place / "manifest.json").write_text(Manifest(int(step), listed, is_save=True).text())

    assert admitted(*here).config.optimizer == first.config.optimizer  # before anything was saved
    saved("00000009", "optimizer.lr=0.125")
    saved("00000010", "optimizer.lr=0.25", "data.columns={prompt: a, completion: b}", "checkpoint.allow_changed=true")
    again = admitted(*here)
    assert again.frozen["optimizer"] == first.frozen["optimizer"] | {"lr": 0.25}
    assert again.config.seed == 7
    assert again.config.data.columns == {"prompt": "a", "completion": "b"}
    assert again.run_dir == run
    assert not again.config.checkpoint.allow_changed  # is asked for anew
    assert admitted(*here, "optimizer.lr=0.75").config.optimizer.lr == 0.75
    assert admitted(f"rerun={run}").config.optimizer.lr == 0.5  # elsewhere: the run as it was begun
    (run / "checkpoints" / "step-00000010" / "state.json").write_text('{"config": {"seed"')
    assert admitted(*here).config.optimizer.lr == 0.125
