"""How files and overrides become one configuration: nothing is dropped, and what is wrong is told by its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from benchmarks.conf_fuzz import YAML_VALUES
from src.config.gate import admit
from src.config.keys import all_keys
from src.config.options import OptionFileError, option_text, read_option
from src.config.schema import SECTIONS
from src.errors import ConfigError
from src.sweep.plan import plan_sweep
from tests.conftest import admitted, towline
from tests.sweeps import planned
from tests.test_gate import refusal

GLOBAL = "# @package _global_\n"
SWEPT = {"sweeper": {"params": {"optimizer.lr": "1e-3,1e-4"}}}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


def put(own: Path, name: str, content: str | dict[str, Any]) -> list[str]:
    """Write an option of the user's, an experiment with its first line, and give the flags by which it is found."""
    file = own / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    file.write_text((GLOBAL if name.startswith("experiment/") else "") + text, encoding="utf-8")
    return ["--config-dir", str(own)]


def problems(*arguments: str) -> list[str]:
    """Give a command that is refused; returns its problems, a line each."""
    first, *told = refusal(*arguments).split("\n")[:-1]
    assert first == f"Configuration refused: {len(told)} problem{'s' if len(told) > 1 else ''}"
    return [" ".join(line.split()) for line in told]


# What can't be resolved

BY_ITSELF = "it takes its value from itself"
UNRESOLVED = {
    "name=a_${nope}": "there is no key nope",
    "name=${name}": BY_ITSELF,
    "name=${hydra:}": "needs other arguments",
    "name=${.x}": "there is no key x",
    "name=${oc.env:NO_SUCH_VARIABLE}": "Environment variable 'NO_SUCH_VARIABLE' not found",
    "name=${foo:bar}": "Unsupported interpolation type foo",
    "hydra.run.dir=outputs/${nme}": "there is no key nme",
    "hydra.run.dir=${hydra.run.dir}": BY_ITSELF,
    "hydra.run.dir=${now:}": "needs other arguments",
    "data.system_prompt=${nope}": "there is no key nope",
    "optimizer.lr=${optimizer.lrr}": "there is no key optimizer.lrr",
}


@pytest.mark.parametrize("text", UNRESOLVED)
@pytest.mark.parametrize("more", [(), ("tracking=none",), ("--cfg", "job"), ("--help",)])
def test_what_can_not_be_resolved_is_the_one_problem(text: str, more: tuple[str, ...]) -> None:
    key, _, value = text.partition("=")
    (told,) = problems(text, *more)
    assert told.startswith(f"{key} = {value} can't be resolved: ")
    assert UNRESOLVED[text] in told
    assert told.endswith("where `${` is text, write `\\${` (command line)")


@pytest.mark.parametrize("text", ["name=a_${nope}", "hydra.run.dir=outputs/${nme}"])
def test_what_can_not_be_resolved_is_refused_by_every_entry(text: str) -> None:
    done = towline(text)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
    with pytest.raises(ConfigError, match="can't be resolved"):
        admit([text], "preflight")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["hydra.sweep.dir=a_${nope}"], "hydra.sweep.dir"),
        (["name=a_${nope}"], "name"),
        (["sweep.name=${nope}"], "sweep.name"),
        (["hydra.sweeper.params={optimizer.lr: '1e-3,${nope}'}"], "hydra.sweeper.params.optimizer.lr"),
    ],
)
def test_what_a_sweep_can_not_resolve_is_its_one_problem(arguments: list[str], key: str) -> None:
    (told,) = problems("-m", "seed=1,2", *arguments)
    assert told.startswith(f"{key} = ")
    assert "there is no key nope" in told


def test_what_can_not_be_resolved_in_a_file_has_its_line_and_is_told_once(own: Path) -> None:
    content = "name: ${nope}\ndata:\n  system_prompt: ${name}\ntraining:\n  max_seconds: ${oc.env:NO_SUCH_VARIABLE}\n"
    name, seconds = problems(*put(own, "experiment/mine", content), "experiment=mine")
    assert name.startswith("name = ${nope} can't be resolved")
    assert name.endswith(f"({own}/experiment/mine.yaml, line 2)")
    assert seconds.startswith("training.max_seconds = ${oc.env:NO_SUCH_VARIABLE} can't be resolved")
    assert seconds.endswith(f"({own}/experiment/mine.yaml, line 6)")
    assert any("optimizer.lrr" in one for one in problems(f"--config-dir={own}", "experiment=mine", "optimizer.lrr=1"))


def test_all_else_is_told_beside_what_can_not_be_resolved() -> None:
    given = ["optimizer.lr=${nope}", "optimizer.lrr=1", "loss.reduction=sun", "data.limit=-1"]
    told = problems(*given, "data.train_files=[${nope}]", "training.max_grad_norm=${optimizer.lr}")
    starts = ["optimizer.lr = ", "data.train_files[0] = ", "optimizer.lrr = 1", "loss.reduction = sun", "data.limit ="]
    assert len(told) == len(starts)
    assert all(any(one.startswith(start) for one in told) for start in starts)
    assert all(one.endswith("(command line)") for one in told)
    told = problems("-m", "seed=1,2", "sweep.name=${nope}", "sweep.n_jobs=0")
    assert [one.partition(" = ")[0] for one in told] == ["sweep.name", "sweep.n_jobs"]
    (found,) = problems("deepspeed=file", "deepspeed.config_file=${nope}")
    assert found.startswith("deepspeed.config_file = ${nope} can't be resolved")


def test_what_takes_a_missing_value_is_never_admitted(own: Path) -> None:
    content = {"sweep": {"foo": "???"}, "training": {"max_train_steps": "${sweep.foo}"}}
    (told,) = problems(*put(own, "experiment/mine", content), "experiment=mine", "tracking=none")
    assert told.startswith("training.max_train_steps takes a value that is missing")
    (told,) = problems("name=${optimizer.lr}", "optimizer.lr=???")
    assert told.startswith("optimizer.lr = ???")


# Hydra's flags and keys


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--experimental-rerun", "/no/such"], ["--experimental-rerun = /no/such", "rerun=DIR"]),
        (["hydra.mode=???"], ["hydra.mode", "missing"]),
        (["hydra.run.dir=???"], ["hydra.run.dir", "missing"]),
        (["-m", "seed=1,2", "hydra.sweep.dir=???"], ["hydra.sweep.dir", "missing"]),
        (["hydra.job.chdir=???"], ["hydra.job.chdir", "missing"]),
        (["hydra.mode=${nope}"], ["hydra.mode = ${nope}", "no interpolation"]),
        (["-m", "seed=1,2", "hydra.sweep.subdir=???"], ["hydra.sweep.subdir", "missing"]),
        (["-m", "seed=1,2", "hydra.launcher=3"], ["hydra.launcher = 3", "hydra/launcher=NAME"]),
        (["-m", "seed=1,2", "hydra.sweeper=null"], ["hydra.sweeper", "hydra/sweeper=NAME"]),
        (["name=???"], ["name", "missing"]),
        (["--run", "-m", "seed=1,2"], ["--run, -m", "one of them"]),
        (["--resolve"], ["--resolve", "--cfg job"]),
        (["--package", "data"], ["--package", "--cfg job"]),
        (["hydra.output_subdir=foo"], ["hydra.output_subdir = foo", "leave it out"]),
        (["+hydra.callbacks.x._target_=nope.Foo"], ["hydra.callbacks.x._target_", "leave it out"]),
        (["-m", "seed=1,2", "+hydra.callbacks.x._target_=nope.Foo"], ["hydra.callbacks.x._target_", "leave it out"]),
        (["+hydra.job.env_set.A=b"], ["hydra.job.env_set.A = b", "in front of the command"]),
        (["hydra.verbose=true"], ["hydra.verbose = true", "leave it out"]),
        (["hydra/job_logging=disabled"], ["hydra/job_logging = disabled", "leave it out"]),
        (["hydra/sweeper=basic"], ["hydra/sweeper = basic", "add -m"]),
        (["-m", "seed=1,2", "+hydra.launcher.foo=3"], ["hydra.launcher.foo = 3", "hydra/launcher=basic has no foo"]),
        (["-m", "hydra/sweeper=basic", "seed=1,2", "sweep.dry_run=true"], ["sweep.dry_run = true", "hydra/sweeper"]),
        (["-m", "hydra/sweeper=basic", "seed=1,2", "sweep.n_jobs=2"], ["sweep.n_jobs = 2", "hydra/sweeper"]),
        (["-m", "hydra/sweeper=basic", "seed=1,2", "sweep.storage=sqlite:///x"], ["sweep.storage", "hydra/sweeper"]),
        (["-m", "hydra.sweeper.params=[seed]"], ["hydra.sweeper.params", "not a mapping"]),
    ],
)
def test_what_of_hydras_would_not_happen_is_refused(arguments: list[str], told: list[str]) -> None:
    (found,) = problems(*arguments)
    for words in told:
        assert words in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["hydra.output_subdir=null", "hydra.job.chdir=false", "hydra.verbose=false"],
        ["hydra.job.name=mine", "hydra.run.dir='outs/${hydra:job.name}'", "hydra.mode=RUN"],
        ["hydra.job.config.override_dirname.exclude_keys=[seed]", "seed=3"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=3"],
    ],
)
def test_what_of_hydras_asks_for_no_other_thing_is_admitted(arguments: list[str]) -> None:
    assert admitted(*arguments).run_dir.parts[0] in ("outs", "outputs")


def test_another_sweeper_takes_the_sweeps_name_and_its_own_keys() -> None:
    plan = planned("hydra/sweeper=basic", "seed=1,2", "sweep.name=mine", "sweep.max_points=10")
    assert (plan.is_own_sweeper, plan.folder.name, len(plan.trials)) == (False, "mine", 2)


def test_hydras_keys_in_a_file_are_held_as_on_the_command_line(own: Path) -> None:
    content = {"output_subdir": "x", "job": {"env_set": {"A": "b"}, "chdir": True}, "callbacks": {"x": {"y": 1}}}
    told = problems(*put(own, "experiment/mine", {"hydra": content}), "experiment=mine")
    lines = {"hydra.output_subdir": 3, "hydra.job.env_set.A": 6, "hydra.job.chdir": 7, "hydra.callbacks.x.y": 10}
    for key, line in lines.items():
        (found,) = (one for one in told if one.startswith(f"{key} = "))
        assert found.endswith(f"mine.yaml, line {line})")
    assert len(told) == len(lines)
    put(own, "experiment/logs", {"defaults": [{"override /hydra/job_logging": "disabled"}]})
    assert "logs.yaml, line 3" in refusal(f"--config-dir={own}", "experiment=logs")
    put(own, "experiment/basic", {"defaults": [{"override /hydra/sweeper": "basic"}]})
    assert "on the command line it counts: hydra/sweeper=basic" in refusal(f"--config-dir={own}", "experiment=basic")


def test_a_rerun_is_held_to_the_same_keys_of_hydras(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(admitted().frozen))
    assert admitted(f"rerun={tmp_path}").config.rerun == str(tmp_path)
    for text in ("hydra.job.chdir=true", "hydra.output_subdir=foo", "hydra.run.dir=${nope}"):
        (told,) = problems(f"rerun={tmp_path}", text)
        assert told.startswith(" = ".join(text.split("=")))


# Which sweep it is


def test_sweeps_that_compare_other_things_have_folders_of_their_own(own: Path) -> None:
    put(own, "experiment/here", {"seed": 3})
    commands = [
        ["hydra.sweeper.params={seed: '1,2'}"],
        ["hydra.sweeper.params={optimizer.lr: '1e-3,1e-4'}"],
        ["seed=1,2"],
        ["seed=1,2", f"hydra.searchpath=[{own}]"],
        ["seed=1,2", f"--config-dir={own}"],
        ["hydra/sweeper=basic", "seed=1,2"],
    ]
    folders = [planned(*command).folder for command in commands]
    assert len(set(folders)) == len(commands)
    again = planned("seed=1,2", "sweep.n_jobs=2", "hydra/launcher=submitit_local", "hydra.mode=MULTIRUN").folder
    assert again == folders[2]


# Files that do not fit together


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("data: [a]", 'data = ["a"] a section of keys, not a value'),
        ("data: {columns: [a, b]}", 'data.columns = ["a", "b"] not a mapping'),
        ("data: {train_files: {a: [x]}}", 'data.train_files = {"a": ["x"]} not a file, a glob or a folder'),
        ("tokens: {additional_special_tokens: {a: b}}", 'tokens.additional_special_tokens = {"a": "b"} not a list'),
        ("optimizer: [a]", 'optimizer = ["a"] a section of keys, not a value'),
        ("optimizer: {betas: {a: 1}}", 'optimizer.betas = {"a": 1} not a list'),
        ("sweep: [a]", 'sweep = ["a"] a section of keys'),
        ("deepspeed: [a]", 'deepspeed = ["a"] a section of keys'),
        ("data: {mixture: [a]}", 'data.mixture = ["a"] not a mapping'),
        ("hydra: {sweeper: {params: [a]}}", "hydra.sweeper.params = ['a'] not a mapping"),
    ],
)
def test_a_list_where_a_mapping_is_and_the_reverse_are_told_by_key_and_line(own: Path, content: str, told: str) -> None:
    flags = put(own, "experiment/mine", f"\n{content}\n")
    (found,) = problems(*flags, "experiment=mine")
    assert found.startswith(told)
    assert found.endswith(f"({own}/experiment/mine.yaml, line 3)")
    both = problems(*flags, "experiment=mine", "optimizer.lrr=1", "loss.reduction=sun")
    assert any(one.startswith("loss.reduction = sun") for one in both)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimizer.betas={a: 1}", 'optimizer.betas = {"a": 1} not a list'),
        ("optimizer.betas.x=3", 'optimizer.betas = {"x": 3} not a list'),
        ("tokens.additional_special_tokens={a: b}", 'tokens.additional_special_tokens = {"a": "b"} not a list'),
        ("training=[a]", 'training = ["a"] a section of keys'),
        ("data.columns=[a]", 'data.columns = ["a"] not a mapping'),
        ("hydra.run=3", "hydra.run int is not a subclass of RunDir"),
        ("hydra.run.dir=null", "hydra.run.dir field 'hydra.run.dir' is not Optional"),
    ],
)
def test_a_list_where_a_mapping_is_is_told_on_the_command_line_too(
    text: str, told: str, own: Path, tmp_path: Path
) -> None:
    (found,) = problems(text)
    assert found.replace("Invalid type assigned: ", "").startswith(told)
    (found,) = problems("-m", "seed=1,2", text.replace("hydra.run", "hydra.sweep"))
    if text.startswith("hydra."):
        return
    assert found.startswith(told)
    key, _, value = text.partition("=")
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": {key: [yaml.safe_load(value)]}})
    assert any(one.startswith(told) for one in problems("-m", *flags, "sweep=mine", "seed=1,2"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(admitted().frozen))
    assert any(one.startswith(told) for one in problems(f"rerun={tmp_path}", text))


def test_a_sweep_of_files_that_differ_in_kind_runs_as_it_was_admitted(own: Path) -> None:
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": {"data": ["tow_addition", "text"]}})
    put(own, "experiment/mine", {"sweep": {"params": {"data": {"limit": 9}}}})
    done = towline("-m", *flags, "sweep=mine", "experiment=mine", "seed=1,2", "tracking=none", "sweep.dry_run=true")
    assert (done.returncode, "2 trials, 2 to run" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("content", "column", "told"),
    [
        ("hydra: 3", 1, "hydra: has keys of its own"),
        ("hydra: {run: outputs/x}", 9, "hydra.run: has keys of its own (dir)"),
        ("hydra: {run: {dirr: x}}", 15, "hydra.run.dirr: there is no such key; did you mean hydra.run.dir?"),
        ("hydra: {launcher: {n_jobs: 3}}", 20, "hydra.launcher.n_jobs: there is no such key"),
        ("hydra: {mode: OFTEN}", 9, "hydra.mode: "),
        ("hydra: {run: {dir: [a]}}", 15, "hydra.run.dir: "),
        ("hydra: {searchpath: [file:///tmp]}", 9, "--config-dir DIR"),
    ],
)
def test_what_hydra_can_not_have_is_placed(own: Path, content: str, column: int, told: str) -> None:
    (found,) = problems(*put(own, "experiment/mine", content), "experiment=mine")
    assert found.startswith(f"conf {own}/experiment/mine.yaml, line 2, column {column}: ")
    assert told in found
    assert found.endswith(f", in the line: {content}")


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, "a text", None, True, 7], ids=str)
def test_any_value_in_any_key_of_a_file_is_admitted_or_told_by_its_key(own: Path, value: Any) -> None:
    sections: dict[str, list[str]] = {}
    for key in all_keys().values():
        if key.section in SECTIONS:
            sections.setdefault(key.section, []).append(key.name.split(".")[1])
    contents: list[dict[str, Any]] = [dict.fromkeys(SECTIONS, value)]
    contents += [
        {section: {names[number % len(names)]: value} for section, names in sections.items()} for number in (0, 3, 8)
    ]
    for content in contents:
        flags = put(own, "experiment/mine", content)
        try:
            admit([*flags, "experiment=mine"])
            told = []
        except ConfigError as error:
            told = str(error).split("\n")[1:-1]
        for line in told:
            assert line.split()[0].split(".")[0] in content, line
    assert value is None or told


# The entries of defaults

ENTRIES = {
    "- override /optimizer: sgdd": "optimizer has no option sgdd; one of adafactor, adamw, adamw_8bit, ",
    "- /optimizer: sgd": "another one takes its place: `override /optimizer: sgd`",
    "- override optimizer: sgd": "`override /optimizer: sgd`",
    "- optimizer: sgd": "`override /optimizer: sgd`",
    "- override /optimzer: sgd": "no group optimzer; did you mean `override /optimizer: sgd`?",
    "- override /data@x: text": "`override /data: text`, without '@'",
    "- without_thought": "no file experiment/without_thought.yaml; did you mean without_thoughts?",
    "- nothere": "no file experiment/nothere.yaml; one of ",
    "- /nothere/x": "no file nothere/x.yaml",
    "- /optimizer/sgdd": "no file optimizer/sgdd.yaml; did you mean /optimizer/sgd?",
    "- optimizer/sgd": "`override /optimizer: sgd`",
    "- override /hydra/launcher: nope": "hydra/launcher has no option nope; one of basic",
    "- 3": "an entry of defaults is",
    "- [a]": "an entry of defaults is",
    "- {a: b, c: d}": "an entry of defaults is",
    "- {a: 3}": "an entry of defaults is",
    "- {a: {b: c}}": "an entry of defaults is",
    "- null": "an entry of defaults is",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry_of_defaults_is_placed_with_what_is_right(own: Path, entry: str) -> None:
    flags = put(own, "experiment/mine", f"defaults:\n  {entry}\nseed: 1\n")
    (told,) = problems(*flags, "experiment=mine", "tracking=none")
    assert told.startswith(f"conf {own}/experiment/mine.yaml, line 3, column 5: ")
    assert ENTRIES[entry] in told
    assert told.endswith(f", in the line: {entry}")


@pytest.mark.parametrize("text", ["sgd", "3", "{a: b}", "null"])
def test_defaults_that_are_no_list_are_placed(own: Path, text: str) -> None:
    (told,) = problems(*put(own, "experiment/mine", f"defaults: {text}\n"), "experiment=mine")
    assert "experiment/mine.yaml, line 2, column 11: defaults is a list" in told


def test_what_an_entry_of_defaults_suggests_works(own: Path) -> None:
    flags = put(own, "experiment/mine", {"defaults": [{"override /optimizer": "sgd"}]})
    assert admitted(*flags, "experiment=mine").frozen["optimizer"]["type"] == "sgd"
    put(own, "experiment/late", "defaults:\n  - override /optimizer: sgd\n  - mine\n")
    assert "late.yaml, line 4" in refusal(*flags, "experiment=late")
    put(own, "experiment/twice", "defaults:\n  - _self_\n  - mine\n  - _self_\n")
    assert "twice.yaml, line 5, column 5: _self_ a second time" in refusal(*flags, "experiment=twice")


# What YAML and OmegaConf make of a file

BROKEN = {
    "name: !foo x": (7, "no value of !foo"),
    "name: !!python/object:os.system x": (7, "no value of !!python/object:os.system"),
    "name: !!binary aGk=": (7, "no value of !!binary"),
    "? [a, b]": (3, "a list or mapping as a key"),
    "null: c": (1, "write 'null'"),
    "1: c": (1, "write '1'"),
    "on: c": (1, "write 'on'"),
    "optimizer: {1: 2}": (13, "write '1'"),
    "name: ${": (7, "write `\\${`"),
    "data: {system_prompt: 'Pay ${'}": (23, "write `\\${`"),
    "name: [a, b": (7, "[ without its end"),
    "name: {a: b": (7, "{ without its end"),
    "name: 'abc": (7, "' without its end"),
    'name: "abc': (7, '" without its end'),
}


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("behind", ["", "\n", "\n\n\n"])
def test_what_is_no_value_is_placed_where_it_begins(own: Path, text: str, behind: str) -> None:
    column, words = BROKEN[text]
    (told,) = problems(*put(own, "experiment/mine", f"seed: 1\n{text}{behind}"), "experiment=mine")
    assert told.startswith(f"conf {own}/experiment/mine.yaml, line 3, column {column}: ")
    assert words in told
    assert told.endswith(f", in the line: {text}")


@pytest.mark.parametrize(
    "text", [*YAML_VALUES, "1e-3", "1_000", "0x1F", "1:30", "'1'", "yes", "[a, 1, null]", "{a: 2020-01-01, b: .5}"]
)
def test_a_value_is_what_omegaconf_reads_of_it_or_refused(own: Path, text: str) -> None:
    put(own, "data/mine", f"a: {text}\n".encode(errors="replace").decode())
    try:
        found = read_option(own / "data" / "mine.yaml")
    except OptionFileError:
        return
    if text != "\t":  # which YAML's parser in C takes, and the one in Python does not
        expected = yaml.load(option_text(own / "data" / "mine.yaml"), get_yaml_loader())
        assert repr(found) == repr(expected)


def test_texts_that_other_readers_take_for_times_are_texts(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("2024-13-45", "2024-01-05", "2024-01-05 10:00:00")):
        flags = put(own, f"experiment/e{number}", f"name: {name}\n")
        assert admitted(*flags, f"experiment=e{number}").frozen["name"] == name
    put(own, "experiment/numbers", "optimizer:\n  lr: 1e-3\nname: 1e\n")
    frozen = admitted(f"--config-dir={own}", "experiment=numbers").frozen
    assert (frozen["optimizer"]["lr"], frozen["name"]) == (1e-3, "1e")
    assert capsys.readouterr().err == ""


# A primary configuration of one's own, and options that build on nothing


def test_mistakes_of_a_primary_configuration_are_its_own(own: Path) -> None:
    flags = put(own, "whole", "defaults:\n  - config\n  - _self_\noptimizer:\n  lrr: 3\nnmae: x\n")
    nmae, lrr = problems(*flags, "-cn", "whole")
    assert nmae.endswith(f"({own}/whole.yaml, line 6)")
    assert lrr.endswith(f"({own}/whole.yaml, line 5)")
    (told,) = problems(*flags, "-cn", "wohle")
    assert told.startswith(
        "--config-name = wohle no such file in conf/ or --config-dir; one of config, whole; did you mean whole?"
    )
    for name in ("../own/whole", str(own / "whole"), "mine/whole"):
        (told,) = problems(*flags, "-cn", name)
        assert "no such file in conf/ or --config-dir; one of config, whole" in told
    assert admit(["-cn", "config.yaml", "--cfg", "job"]).shown is not None
    put(own, "twice", "defaults:\n  - config\n  - optimizer: sgd\n  - _self_\n")
    assert "twice.yaml, line 3, column 5: " in refusal(*flags, "-cn", "twice")


def test_a_file_that_builds_on_nothing_is_told_as_that(own: Path) -> None:
    (told,) = problems(*put(own, "bare", "name: x\nseed: 3\n"), "-cn", "bare")
    assert told.startswith("--config-name = bare builds on nothing, and lacks ")
    assert "`defaults: [config, _self_]`" in told
    assert told.endswith(f"({own}/bare.yaml)")
    put(own, "bare", "defaults: [config, _self_]\nname: x\nseed: 3\n")
    assert admitted(f"--config-dir={own}", "-cn", "bare").frozen["seed"] == 3
    for group, content, base in (
        ("optimizer", "lr: 0.1\n", "adamw"),
        ("optimizer", "type: sgd\nmomentum: 0.5\nlr: 0.1\n", "sgd"),
        ("scheduler", "warmup_steps: 5\n", "cosine"),
    ):
        flags = put(own, f"{group}/mine", content)
        (told,) = problems(*flags, f"{group}=mine")
        assert told.startswith(f"{group} = mine builds on nothing, and lacks {group}.")
        assert told.endswith(f"`defaults: [{base}, _self_]` ({own}/{group}/mine.yaml)")
        put(own, f"{group}/mine", f"defaults: [{base}, _self_]\n{content}")
        assert admitted(*flags, f"{group}=mine")


# Files that describe a sweep


def test_a_file_that_says_multirun_takes_values_from_the_command_line(own: Path) -> None:
    flags = put(own, "experiment/hp", {"hydra": {"mode": "MULTIRUN", **SWEPT}})
    request = admit([*flags, "experiment=hp", "seed=1,2", "tracking=none"])
    assert len(plan_sweep(request.line).trials) == 4
    assert "optimizer.lrr" in refusal(*flags, "experiment=hp", "seed=1,2", "optimizer.lrr=1")
    assert "several values are a sweep" in refusal("seed=1,2", "tracking=none")


@pytest.mark.parametrize(
    ("content", "without"),
    [
        ({"sweep": {"params": {"optimizer.lr": "1e-3,1e-4"}}}, ["sweep.params=null"]),
        ({"sweep": {"params": {"optimizer.lr": "1e-3,1e-4"}}}, ["sweep.params={}"]),
        ({"hydra": SWEPT}, ["hydra.sweeper.params=null"]),
        ({"hydra": {"mode": "MULTIRUN", **SWEPT}}, ["hydra.sweeper.params=null", "hydra.mode=RUN"]),
        ({"defaults": [{"override /sweep": "seeds"}]}, ["sweep=none"]),
    ],
)
def test_what_describes_a_sweep_can_be_shown_looked_at_and_run_once(
    own: Path, content: dict[str, Any], without: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*put(own, "experiment/mine", content), "experiment=mine", "tracking=none"]
    if "mode" not in content.get("hydra", {}):
        (told,) = problems(*flags)
        assert "give the same command with -m" in told
        assert without[0].replace("{}", "null") in told
    assert admit([*flags, "--cfg", "job"]).shown is not None
    capsys.readouterr()
    looked_at = admit(flags, "preflight").run
    assert looked_at is not None
    assert "describes a sweep; preflight looks at the run without what it varies" in capsys.readouterr().err
    once = admit([*flags, *without]).run
    assert once is not None
    assert once.config == looked_at.config
    with pytest.raises(ConfigError, match="looks at one run"):
        admit([*flags, "sweep.n_jobs=2"], "preflight")


# What the environment gives


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"])
def test_an_empty_variable_of_mlflows_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name, raising=False)
    expected = admitted("tracking=mlflow").config.tracking
    monkeypatch.setenv(name, "")
    assert admitted("tracking=mlflow").config.tracking == expected


@pytest.mark.parametrize("value", ["file:///tmp/x", "/tmp/x", "no-address"])
def test_what_the_environment_gives_is_placed_there(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    (told,) = problems("seed=3")
    assert "(environment variable MLFLOW_TRACKING_URI, by conf/tracking/mlflow.yaml, line 3)" in told
    assert ("sqlite:///FOLDER/mlflow.db" in told) == (value != "no-address")
    (told,) = problems("tracking.uri=/tmp/x")
    assert told.endswith("(command line)")
    assert os.environ["MLFLOW_TRACKING_URI"] == value


# Composed again


def test_files_that_change_or_come_are_read_again(own: Path) -> None:
    flags = put(own, "experiment/mine", {"seed": 1})
    assert admitted(*flags, "experiment=mine").config.seed == 1
    put(own, "experiment/mine", {"seed": 2})
    assert admitted(*flags, "experiment=mine").config.seed == 2
    put(own, "model/tiny_llama", {"type": "causal_lm", "checkpoint": "assets/tiny_bart"})  # conf/ goes before it
    assert admitted(*flags, "experiment=mine").config.model.checkpoint == "assets/tiny_llama"
    put(own, "optimizer/mine", "defaults: [adamw, _self_]\nlr: 0.5\n")
    assert admitted(*flags, "optimizer=mine").config.optimizer.lr == 0.5
    (own / "optimizer" / "mine.yaml").unlink()
    assert "no such option" in problems(*flags, "optimizer=mine")[0]


def test_a_configuration_does_not_depend_on_those_that_were_composed_before() -> None:
    alone = admitted("optimizer.lr=0.1").config
    admitted("optimizer.lr=0.2", "training.logging_steps=7", "optimizer.betas=[0.1,0.2]")
    assert admitted("optimizer.lr=0.1").config == alone
