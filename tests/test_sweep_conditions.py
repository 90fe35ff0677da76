"""Keys that are varied with some values of others only: the points there are, what samplers propose, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config.axes import Axis, points, probes, size
from src.config.command_line import read_override
from src.config.conditions import with_conditions
from src.config.problems import Problem
from src.errors import ConfigError
from src.search.study import Study, Unit
from tests.sweeps import planned

OPTIMIZERS = ("optimizer=adamw,sgd", "optimizer.lr=1e-3,1e-2", "optimizer.momentum=0.0,0.9")
FOR_SGD = "sweep.when={optimizer.momentum: {optimizer: sgd}}"


def axis(key: str, num_values: int) -> Axis:
    override = read_override(f"{key}=null")
    assert not isinstance(override, Problem)
    return Axis(override, (), num_values, None, "", {f"{key}={value}": value for value in range(num_values)})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_points_are_those_of_the_product_without_what_is_not_varied(data: st.DataObject) -> None:
    keys = [f"k{number}" for number in range(data.draw(st.integers(1, 5)))]
    axes = [axis(key, data.draw(st.integers(1, 3))) for key in keys]
    num_values = {one.key: int(one.num_values) for one in axes}
    when = {
        key: {other: data.draw(st.lists(st.integers(0, num_values[other] - 1), min_size=1)) for other in others}
        for place, key in enumerate(keys)
        if place and (others := data.draw(st.sets(st.sampled_from(keys[:place]), max_size=2)))
    }
    problems: list[Problem] = []
    ordered = with_conditions(
        list(reversed(axes)), {}, when, problems, is_typed=False
    )  # the order in which they are written is free
    wanted = set()
    for values in itertools.product(*(range(num_values[key]) for key in keys)):
        point = dict(zip(keys, values, strict=True))
        for key in keys:  # each depends on keys before it
            if any(point.get(other) not in allowed for other, allowed in when.get(key, {}).items()):
                del point[key]
        wanted.add(frozenset(f"{key}={value}" for key, value in point.items()))
    never = [key for key in keys if not any(f"{key}=0" in point for point in wanted)]
    assert sorted(problem.key for problem in problems) == [f"sweep.when.{key}" for key in never]
    if problems:
        return
    found = list(points(ordered))
    assert {frozenset(point) for point in found} == wanted
    assert len(found) == size(ordered) == len(wanted)
    probed = list(probes(ordered))
    assert {text for point in probed for text in point} == {text for one in axes for text in one.values}
    assert {frozenset(point) for point in probed} <= wanted


def test_a_key_of_one_option_is_varied_with_that_option() -> None:
    plan = planned(*OPTIMIZERS, FOR_SGD, "seed=1,2")
    of_sgd = [f"optimizer.lr={lr} optimizer.momentum={one}" for lr in (0.001, 0.01) for one in (0.0, 0.9)]
    expected = ["optimizer=adamw optimizer.lr=0.001", "optimizer=adamw optimizer.lr=0.01"]
    assert [trial.setting_label for trial in plan.trials[::2]] == expected + [f"optimizer=sgd {one}" for one in of_sgd]
    assert len({trial.setting for trial in plan.trials}) == 6
    assert [trial.config["optimizer"].get("momentum") for trial in plan.trials[::2]] == [None, None, 0, 0.9, 0, 0.9]
    assert plan.space["optimizer.momentum"] == "0.0,0.9 with optimizer=sgd"
    with pytest.raises(ConfigError, match="12 points"):
        planned(*OPTIMIZERS, FOR_SGD, "seed=1,2", "sweep.max_points=11")
    assert len(planned(*OPTIMIZERS, FOR_SGD, "seed=1,2", "sweep.max_points=12").trials) == 12


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "qmc"])
def test_samplers_propose_a_key_with_its_option_only(sampler: str) -> None:
    search = ("optimizer=adamw,sgd", "optimizer.momentum=interval(0,0.9)", "optimizer.lr=tag(log,interval(1e-5,1e-1))")
    plan = planned("sweep=tpe", f"sweep.sampler={sampler}", "sweep.n_trials=30", *search, FOR_SGD)

    def propose(units: list[Unit], count: int) -> list[tuple[str, ...]]:
        study = Study(plan.config, plan.axes, units, lambda _: None)
        for number in range(len(units), len(units) + count):
            proposal = study.propose(number, 0)
            study.accept(Unit(number, proposal.overrides, attrs=json.loads(json.dumps(proposal.attrs))))
            study.end(number, "FINISHED", (float(len(proposal.overrides[-1])),))
        units[:] = study.units.values()
        return [unit.overrides for unit in units[-count:]]

    units: list[Unit] = []
    found = propose(units, 14)
    keys = {tuple(text.partition("=")[0] for text in point) for point in found}
    assert keys == {("optimizer", "optimizer.lr"), ("optimizer", "optimizer.momentum", "optimizer.lr")}
    assert all(("optimizer=sgd" in point) == (len(point) == 3) for point in found)
    assert propose(units[:11], 3) == found[11:]  # a study made anew proposes the same


@pytest.mark.parametrize(
    ("when", "key", "words"),
    [
        ("{optimizer.momentum: {optimizer: sdg}}", r"sweep\.when\.optimizer\.momentum\.optimizer", "adamw, sgd"),
        ("{optimizer.eps: {optimizer: sgd}}", r"sweep\.when\.optimizer\.eps", "not varied"),
        ("{optimizer.lr: {optimizer.eps: 1e-8}}", r"sweep\.when\.optimizer\.lr\.optimizer\.eps", "not varied"),
        ("{seed: {optimizer: sgd}}", r"sweep\.when\.seed", "not varied from setting to setting"),
        ("{optimizer.lr: {seed: 1}}", r"sweep\.when\.optimizer\.lr\.seed", "a replicate"),
        ("{optimizer.momentum: sgd}", r"sweep\.when\.optimizer\.momentum", "a mapping"),
        ("{optimizer.momentum: {optimizer: [adamw, sgd], optimizer.lr: 5}}", "optimizer.lr", "0.001, 0.01"),
        (
            "{optimizer.momentum: {optimizer.lr: 0.01}, optimizer.lr: {optimizer.momentum: 0.9}}",
            r"sweep\.when",
            "circle",
        ),
        ("[1]", r"sweep\.when", "mapping"),
    ],
)
def test_conditions_that_can_not_be_are_refused(when: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\b[^\n]*{words}"):
        planned(*OPTIMIZERS, "seed=1,2", f"sweep.when={when}")


def test_nothing_depends_on_an_interval_and_a_condition_is_offered_where_it_helps() -> None:
    with pytest.raises(ConfigError, match=r"when\.optimizer\.weight_decay\.optimizer\.lr[^\n]*a few listed values"):
        search = ("optimizer.lr=interval(1e-3,1e-2)", "optimizer.weight_decay=0.0,0.1")
        planned("sweep=tpe", *search, "sweep.when={optimizer.weight_decay: {optimizer.lr: 0.001}}")
    with pytest.raises(ConfigError, match=r"sgd[^\n]*sweep\.when=\{optimizer\.momentum: \{optimizer: …\}\}"):
        planned(*OPTIMIZERS)
    with pytest.raises(ConfigError) as error:
        planned("optimizer=adamw,sgd", "optimizer.moment=0.1,0.2")  # no option has it
    assert "sweep.when" not in str(error.value)


def from_file(folder: Path, *arguments: str) -> list[str]:
    """Return the settings of a sweep whose file varies optimizer, lr and momentum, the last with sgd only."""
    (folder / "sweep").mkdir(exist_ok=True)
    text = "defaults: [_keys]\nname: mine\nparams:\n  optimizer: [adamw, sgd]\n  optimizer.lr: 1e-3,1e-2\n"
    text += "  optimizer.momentum: 0.0,0.9\nwhen:\n  optimizer.momentum: {optimizer: sgd}\n"
    (folder / "sweep" / "mine.yaml").write_text(text)
    plan = planned(f"hydra.searchpath=[file://{folder}]", "sweep=mine", *arguments)
    return [trial.label for trial in plan.trials]


def test_a_command_sets_what_a_sweep_file_varies(tmp_path: Path) -> None:
    assert len(from_file(tmp_path)) == 6
    of_sgd = [f"optimizer.lr={lr} optimizer.momentum={one}" for lr in (0.001, 0.01) for one in (0.0, 0.9)]
    assert from_file(tmp_path, "optimizer=sgd") == of_sgd
    assert from_file(tmp_path, "optimizer=adamw") == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert len(from_file(tmp_path, "optimizer=adamw,adafactor")) == 4
    assert len(from_file(tmp_path, "optimizer=sgd", "optimizer.momentum=0.5")) == 2
    with pytest.raises(ConfigError, match="adamw has no momentum"):
        from_file(tmp_path, "~sweep.when")


@pytest.mark.parametrize("is_reversed", [False, True])
def test_what_depends_on_a_key_that_is_not_varied_is_not_either(is_reversed: bool) -> None:
    when = {"k1": {"k0": [1]}, "k2": {"k1": [0]}, "k3": {"k2": [1]}}
    axes = [axis(f"k{number}", 2) for number in range(1, 5)]
    problems: list[Problem] = []
    given = dict(reversed(when.items())) if is_reversed else when
    assert [one.key for one in with_conditions(axes, {"k0": "k0=0"}, given, problems, is_typed=False)] == ["k4"]
    assert not problems
    left = with_conditions(axes, {"k0": "k0=1"}, given, problems, is_typed=False)
    assert size(left) == 2 * (1 + 1 + 2)  # k4 times k1=1, k2=0 and k2=1 with both of k3
    assert not problems


@pytest.mark.parametrize(("values", "given"), [("true,false", "true"), ("True,False", "true"), ("true,false", "True")])
def test_conditions_compare_what_values_mean(values: str, given: str) -> None:
    when = f"sweep.when={{optimizer.lr: {{runtime.deterministic: {given}}}}}"
    plan = planned(f"runtime.deterministic={values}", "optimizer.lr=1e-3,1e-2", when)
    assert len(plan.trials) == 3


def test_numbers_are_equal_however_they_are_written() -> None:
    when = "sweep.when={optimizer.lr: {loss.label_smoothing: 1e-1}}"
    assert len(planned("loss.label_smoothing=0.0,0.10", "optimizer.lr=1e-3,1e-2", when).trials) == 3


def test_a_grid_with_conditions_is_counted_not_written_out() -> None:
    parents = [axis(f"p{number}", 99) for number in range(4)]
    children = [axis(f"c{number}", 10) for number in range(4)]
    when = {f"c{number}": {f"p{number}": [0, 1]} for number in range(4)}
    ordered = with_conditions([*parents, *children], {}, when, [], is_typed=False)
    assert size(ordered) == (97 + 2 * 10) ** 4
