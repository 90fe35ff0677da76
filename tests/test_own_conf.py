"""Configurations of users' own, written with Hydra's habits: files, values, folders and hints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from src.config.command_line import read_override, values_of
from src.config.gate import admit
from src.config.job import Request
from src.config.keys import is_whole_number
from src.config.options import CONF
from src.config.quoting import in_url, override, override_value
from src.errors import ConfigError
from src.sweep.plan import Plan, plan_sweep
from tests.conftest import ROOT, admitted, towline
from tests.sweeps import planned
from tests.test_gate import refusal

ADDITION = "data/tow_addition/train.jsonl"
SYSTEM = "data.system_prompt"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own conf, with=(odd) name"
    folder.mkdir()
    return folder


def put(own: Path, name: str, content: str | dict[str, Any], *, is_global: bool = False) -> list[str]:
    """Write an option of the user's, and give the flags by which it is found."""
    file = own / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)  # which is YAML, with every text in quotes
    file.write_text("# @package _global_\n" * is_global + text, encoding="utf-8")
    return ["--config-dir", str(own)]


# A value stays a value

TEXT = st.text(st.characters(max_codepoint=126))
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_a_value_is_written_so_that_hydra_reads_it_unchanged(value: Any) -> None:
    read = read_override(override("a.b", value))
    assert not hasattr(read, "reason")
    assert same(read.value(), value)


@settings(max_examples=80, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=4, unique_by=lambda one: json.dumps(one)))
def test_values_of_a_sweep_are_written_so_that_hydra_reads_them_unchanged(values: list[Any]) -> None:
    read = read_override(f"a.b={','.join(map(override_value, values))}")
    each = [read_override(text).value() for text in values_of(read, [CONF])]  # type: ignore[union-attr,arg-type]
    assert all(same(one, value) for one, value in zip(each, values, strict=True))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXT | st.none(), min_size=2, max_size=3, unique=True))
def test_a_value_arrives_unchanged_from_files_and_the_command_line(own: Path, texts: list[str | None]) -> None:
    as_written = [text if text is None else text.replace("\\${", "${").replace("${", "\\${") for text in texts]
    wanted = [text if text is None else text.replace("\\${", "${") for text in texts]
    found = [admitted(override(SYSTEM, text)).frozen["data"]["system_prompt"] for text in as_written]
    for number, text in enumerate(as_written):
        flags = put(own, f"experiment/e{number}", {"data": {"system_prompt": text}}, is_global=True)
        found.append(admitted(*flags, f"experiment=e{number}").frozen["data"]["system_prompt"])
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": {SYSTEM: as_written}})
    found += [trial.config["data"]["system_prompt"] for trial in planned(*flags, "sweep=mine").trials]
    assert found == wanted * 3


def test_lists_of_a_sweep_file_are_values(own: Path) -> None:
    params = {
        SYSTEM: [None, "null", "", "Add, please.", "1e-3", "a=b", "[x]"],
        "data.metrics": [[], ["exact_match"], ["rouge1", "bleu"]],
        "data.test_files": [{"x": [ADDITION]}],
        "optimizer.lr": [1e-3],
    }
    trials = planned(*put(own, "sweep/mine", {"defaults": ["_keys"], "params": params}), "sweep=mine").trials
    found = [(trial.config["data"]["system_prompt"], trial.config["data"]["metrics"]) for trial in trials]
    assert found == [(text, metrics) for text in params[SYSTEM] for metrics in params["data.metrics"]]
    assert all(trial.config["data"]["test_files"] == {"x": [ADDITION]} for trial in trials)
    assert all(trial.config["optimizer"]["lr"] == 1e-3 for trial in trials)
    assert trials[0].overrides == (f"{SYSTEM}=null", "data.metrics=[]")


def test_the_command_line_goes_before_a_sweep_file(own: Path) -> None:
    content = {"defaults": ["_keys"], "params": {SYSTEM: ["a", "b"], "data": {"limit": 9, "max_seq_length": 99}}}
    flags = put(own, "sweep/mine", content)
    (trial,) = planned(*flags, "sweep=mine", f"{SYSTEM}=c", "data.limit=5").trials
    data = trial.config["data"]
    assert (data["system_prompt"], data["limit"], data["max_seq_length"]) == ("c", 5, 99)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"sweep.n_jobs": 2}, "is the sweep's own"),
        ({"hydra.run.dir": ["a", "b"]}, "is the sweep's own"),
        ({SYSTEM: []}, "there is no value in it"),
        ({"model": ["tiny_llama", "nope"]}, "no such option"),
        ({"model": [None, "tiny_llama"]}, "no such option"),
        ({SYSTEM: ["???", None]}, "??? stands for a value that is missing, and can't be given as a text"),
        ({"optimizer.lrr": [1, 2]}, "did you mean optimizer.lr?"),
        ({"optimizer": {"lr": [1e-3, 1e-4]}}, "by its own key: write optimizer.lr: [0.001, 0.0001]"),
        ({"optimizer": {"lr": "1e-3,1e-4"}}, "by its own key: write optimizer.lr: 1e-3,1e-4"),
        ({"tokens": {"init": {"method": ["mean", "random"]}}}, 'write tokens.init.method: ["mean", "random"]'),
        ({"data.mixture": [{"a": {"train_files": ["no"]}}, None]}, "  data.mixture                      not together"),
        ({"data.mixture": [{"a": {"train_files": ["no"]}}, None]}, "(sweep.params; at data.mixture={a:"),
    ],
)
def test_what_a_sweep_file_can_not_vary_is_told(own: Path, params: dict[str, Any], words: str) -> None:
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": params})
    assert words in refusal("-m", *flags, "sweep=mine")


@pytest.mark.parametrize(
    ("key", "values", "kept"),
    [
        ("training.num_train_epochs", [1, 1.0, "1", "1e0", 2], [1, 2]),
        ("optimizer.lr", ["1e-3", 0.001, "0.001", 1e-4], [0.001, 0.0001]),
        ("data.limit", [3, "3", None], [3, None]),
    ],
)
def test_a_number_is_one_value_however_it_is_written(own: Path, key: str, values: list[Any], kept: list[Any]) -> None:
    section, name = key.split(".")
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": {key: values}})
    trials = planned(*flags, "sweep=mine").trials
    assert [(trial.number, trial.config[section][name]) for trial in trials] == list(enumerate(kept))
    assert [type(trial.config[section][name]) for trial in trials] == [type(value) for value in kept]
    typed = planned(f"{key}={','.join(str(value) for value in values if value is not None)}").trials
    assert [trial.identity for trial in typed] == [trial.identity for trial in trials if trial.config[section][name]]


def test_line_ends_in_values_are_written_out(own: Path) -> None:
    flags = put(own, "sweep/mine", {"defaults": ["_keys"], "params": {SYSTEM: ["a\nb", "a\x1b[31m"]}})
    plan = planned(*flags, "sweep=mine")
    assert [trial.label for trial in plan.trials] == [f'{SYSTEM}="a\\nb"', f'{SYSTEM}="a\\x1b[31m"']
    assert [trial.config["data"]["system_prompt"] for trial in plan.trials] == ["a\nb", "a\x1b[31m"]
    done = towline("-m", *flags, "sweep=mine", "tracking=none", "sweep.dry_run=true", f"hydra.sweep.dir={own.parent}/s")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.count('"a\\nb"') == 2  # what is varied, and the trial
    assert [line for line in done.stdout.splitlines() if line.startswith("b")] == []


def test_an_interval_of_a_whole_number_draws_whole_numbers() -> None:
    keys = ("training.gradient_accumulation_steps", "evaluation.eval_steps", "seed", "adapter.r", "data.limit")
    assert all(map(is_whole_number, keys))
    assert not any(map(is_whole_number, ("optimizer.lr", "training.num_train_epochs", "name", "x.y", "training")))
    key = "training.gradient_accumulation_steps"
    (axis,) = planned("sweep=tpe", "sweep.n_trials=2", f"{key}=interval(1,8)").axes
    assert axis.interval is not None
    assert axis.interval.is_int
    assert axis.ends == (f"{key}=1", f"{key}=8")


@pytest.mark.parametrize("name", ["a?b", "50%41", "a#b c", "a&b=c", "안"])
def test_paths_stay_what_they_are_in_a_url(name: str) -> None:
    assert make_url(f"sqlite:////x/{in_url(name)}/study.db").database == f"/x/{name}/study.db"


# Mistakes in files

BROKEN = {
    "indent": ("optimizer:\n  lr: 1e-4\n   weight_decay: 0\n", "line 3, column 16", "weight_decay: 0"),
    "tab": ("optimizer:\n\tlr: 1\n", "line 2, column 1", "a tab, where YAML indents with spaces"),
    "colon": ("name: a: b\n", "line 1, column 8", "needs quotes"),
    "at": ("name: @x\n", "line 1, column 7", "needs quotes"),
    "twice": ("seed: 1\nname: a\nseed: 2\n", "line 3, column 1", "the key seed a second time, in the line: seed: 2"),
    "list": ("- seed\n", "line 1, column 1", "no keys with values"),
    "bracket": ("name: [a\n", "line 1, column 7", "[ without its end"),
    "bytes": ("name: \x07\n", "line 1, column 7", ""),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("flags", [(), ("-m",), ("--cfg", "job")])
def test_a_mistake_in_a_file_is_placed(own: Path, name: str, flags: tuple[str, ...]) -> None:
    text, place, words = BROKEN[name]
    put(own, "experiment/broken", text)
    (own / "experiment" / "broken.yaml").write_bytes(text.encode())
    told = refusal(*flags, "--config-dir", str(own), "experiment=broken")
    assert f"broken.yaml, {place}: " in told
    assert words in told


def test_a_file_without_its_package_is_told_as_that(own: Path) -> None:
    flags = put(own, "experiment/mine", {"name": "x", "optimizer": {"lr": 1}})
    assert "its first line must be `# @package _global_`" in refusal(*flags, "experiment=mine")


@pytest.mark.parametrize("parent", ["/model/causal_lm", "/model/causal_lm@_here_", "causal_lm@_here_", "causal_lm"])
def test_a_file_that_builds_on_another_in_any_form_is_no_traceback(own: Path, parent: str) -> None:
    flags = put(own, "model/mine", {"defaults": [parent], "checkpoint": "/no/such"})
    if parent == "/model/causal_lm":  # Hydra's absolute path without a package: the keys land elsewhere
        assert refusal(*flags, "model=mine").startswith("Configuration refused")
    else:
        told = refusal(*flags, "model=mine")
        assert "model.checkpoint = /no/such" in told
        assert f"{own}/model/mine.yaml" in told


# Nothing that was asked is dropped


SWEPT = {"params": {"optimizer.lr": "1e-3,1e-4"}}


def test_a_sweep_in_an_experiment_needs_its_flag(own: Path) -> None:
    flags = put(own, "experiment/mine", {"sweep": SWEPT}, is_global=True)
    assert "sweep.params" in refusal(*flags, "experiment=mine")
    assert "give the same command with -m" in refusal(*flags, "experiment=mine")
    assert len(planned(*flags, "experiment=mine").trials) == 2
    put(own, "experiment/option", {"defaults": [{"override /sweep": "seeds"}]}, is_global=True)
    assert "sweep = seeds" in refusal(*flags, "experiment=option")
    put(own, "experiment/hydras", {"hydra": {"sweeper": SWEPT}}, is_global=True)
    assert "hydra.sweeper.params" in refusal(*flags, "experiment=hydras")
    trials = planned(*flags, "experiment=hydras").trials
    assert [trial.config["optimizer"]["lr"] for trial in trials] == [1e-3, 1e-4]


def test_hydra_mode_is_the_flag(own: Path) -> None:
    content = {"hydra": {"mode": "MULTIRUN", "sweeper": SWEPT}}
    flags = put(own, "experiment/mine", content, is_global=True)
    assert trials_of(admit([*flags, "experiment=mine"])) == 2
    assert trials_of(admit(["hydra.mode=MULTIRUN", "seed=1,2,3", "tracking=none"])) == 3
    assert "leave one of them out" in refusal("-m", "hydra.mode=RUN", "seed=1,2")
    assert "several values" in refusal("hydra.mode=RUN", "seed=1,2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra.job.chdir=true"], "hydra.job.chdir"),
        (["-m", "seed=1,2", "hydra.sweep.subdir=x"], "hydra.sweep.subdir"),
        (["-m", "sweep=kfold", "data.num_folds=3", "data.fold=1", "data.validation_files=null"], "data.fold=0,1"),
        (["-m", "hydra/sweeper=basic", "sweep=thoughts_or_not"], "sweep.params"),
        (["hydra.searchpath=[pkg://x]"], "--config-dir DIR"),
        (["hydra.searchpath=[/no/such]"], "hydra.searchpath"),
        (["hydra.launcher.timeout_min=3"], "choose hydra/launcher=submitit_local or submitit_slurm"),
        (["-m", "seed=1,2", "hydra/launcher=submitit_local", "hydra.launcher.timeot_min=3"], "timeout_min?"),
        (["hydra.launcher.zzz=3"], "hydra/launcher=basic has no zzz"),
    ],
)
def test_what_would_not_happen_is_refused(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


def test_a_launchers_key_beside_another_problem_is_not_blamed() -> None:
    told = refusal("-m", "seed=1,2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=3", "optimizer=x")
    assert "1 problem\n" in told
    assert "optimizer = x" in told


# Hydra's own ways


def trials_of(request: Request) -> int:
    assert request.run is None
    return len(plan_sweep(request.line).trials)


def plan_of(*arguments: str) -> Plan:
    return plan_sweep(admit(["-m", "tracking=none", *arguments]).line)


def test_a_primary_configuration_of_ones_own(own: Path) -> None:
    content = {
        "defaults": ["config", {"override optimizer": "sgd"}, "_self_"],
        "seed": 5,
        "hydra": {"run": {"dir": "outs/${hydra:runtime.choices.optimizer}/${hydra:job.override_dirname}"}},
    }
    run = admitted(*put(own, "mine", content), "-cn", "mine", "training.max_train_steps=3")
    assert (run.frozen["seed"], run.frozen["optimizer"]["type"]) == (5, "sgd")
    assert run.run_dir.parts[:2] == ("outs", "sgd")
    assert run.run_dir.name.endswith("tracking=none,training.max_train_steps=3")
    assert "++" not in run.run_dir.name


def test_options_in_folders(own: Path) -> None:
    for name, seed in (("mine/a", 1), ("mine/b", 2), ("mine/deep/c", 3), ("_parts/d", 4)):
        flags = put(own, f"experiment/{name}", {"seed": seed}, is_global=True)
    assert admitted(*flags, "experiment=mine/a").frozen["seed"] == 1
    assert [trial.seed for trial in plan_of(*flags, "experiment=mine/b,mine/a").trials] == [2, 1]
    assert [trial.seed for trial in plan_of(*flags, "experiment=glob(mine/*)").trials] == [1, 2]
    told = refusal(*flags, "experiment=mine/aa")
    assert "did you mean mine/a?" in told
    assert "_parts" not in told
    assert admitted("experiment=null").frozen["seed"] == 42


def test_a_mapping_takes_a_lists_place(own: Path) -> None:
    sets = {"x": ADDITION, "y": [ADDITION]}
    flags = put(own, "experiment/mine", {"data": {"test_files": sets, "validation_files": None}}, is_global=True)
    data = admitted(*flags, "experiment=mine").frozen["data"]
    assert data["test_files"] == {"x": [ADDITION], "y": [ADDITION]}
    assert data["validation_files"] is None
    put(own, "experiment/back", {"defaults": ["mine"], "data": {"test_files": [ADDITION]}}, is_global=True)
    assert admitted(*flags, "experiment=back").frozen["data"]["test_files"] == [ADDITION]
    shown = towline("--cfg", "job", "-p", "data.test_files", *flags, "experiment=back")
    assert shown.stdout == f"# @package data.test_files\n- {ADDITION}\n"


def test_a_single_file_is_a_list_of_one() -> None:
    run = admitted(f"data.train_files={ADDITION}", f"data.validation_files={ADDITION}", f"data.test_files={ADDITION}")
    data = run.frozen["data"]
    assert [data[key] for key in ("train_files", "validation_files", "test_files")] == [[ADDITION]] * 3


def test_interpolations_of_hydra_and_literal_ones(own: Path) -> None:
    run = admitted(f"{SYSTEM}='\\${{x}} ${{name}}'", "name=${hydra:runtime.choices.data}", "data=prompt_completion",
                   f"data.train_files={ADDITION}")  # fmt: skip
    assert (run.frozen["name"], run.frozen["data"]["system_prompt"]) == ("prompt_completion", "${x} prompt_completion")
    here = admitted("hydra.run.dir='${hydra:runtime.cwd}/outs'").run_dir
    assert here == Path.cwd() / "outs"


def test_a_format_of_ones_own_is_trained_and_predicted_with(own: Path, tmp_path: Path) -> None:
    content = {
        "defaults": ["_rows", "_self_"],
        "format": "mine",
        "columns": {"question": "prompt", "reply": "completion"},
        "prompt_template": "Q: {question}",
        "train_files": ADDITION,
    }
    flags = put(own, "data/mine", content)
    frozen = admitted(*flags, "data=mine").frozen
    assert frozen["data"]["columns"] == {"question": "prompt", "reply": "completion"}
    tiny = ("debug=smoke", "tracking=none", "evaluation.metrics=[]", f"hydra.run.dir={tmp_path / 'run'}")
    done = towline(*flags, "data=mine", *tiny)
    assert done.returncode == 0, done.stderr
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[0])
    assert sample["prompt"].startswith("Q: ")
    again = towline(f"rerun={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert "not one of" in refusal("data.format=nope")


# Hints


@pytest.mark.parametrize("value", ["Add, please", "a=b(", "it's", 'say "a, b"', "x: {y}", "a b=c, d"])
def test_the_hint_of_a_value_that_needs_quotes_is_valid(value: str) -> None:
    told = refusal(f"{SYSTEM}={value}")
    line = next(line for line in told.split("\n") if SYSTEM in line)
    (typed,) = shlex.split(line.partition("quote it: ")[2] or line.partition("of its own: ")[2])[:1]
    assert admitted(typed).frozen["data"]["system_prompt"] == value


def test_a_folder_that_is_there_needs_no_quotes(tmp_path: Path) -> None:
    folder = tmp_path / "a, b=(c) 'd'"
    folder.mkdir()
    assert "no run to repeat there" in refusal(f"rerun={folder}")
    assert admitted(f"hydra.run.dir={folder}").run_dir == folder


def test_the_environment_names_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    config = admit(["tracking=mlflow"]).run
    assert config is not None
    assert (config.config.tracking.uri, config.config.tracking.experiment_name) == ("http://127.0.0.1:5", "mine")
    given = admit(["tracking=mlflow", "tracking.uri=http://127.0.0.1:6"]).run
    assert given is not None
    assert given.config.tracking.uri == "http://127.0.0.1:6"


def test_configurations_of_users_are_refused_by_the_entry(own: Path) -> None:
    flags = put(own, "experiment/broken", "name: a: b\n")
    done = towline(*flags, "experiment=broken")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert (ROOT / "conf").is_dir()
    with pytest.raises(ConfigError):
        admit([*flags, "experiment=broken"])


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and so are their types all the way down."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
