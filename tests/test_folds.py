"""Folds of the data: each record is validated once, groups stay together, and which fold is asked for moves no row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from src import preflight
from src.checkpoint.compatibility import Impact, compare_configs
from src.cli.start import run_job as train
from src.config.gate import admit_finished
from src.config.options import CONF, options
from src.data.dataset import Data, build_data, file_hashes
from src.data.sources import FileSource
from src.data.splits import assign_folds, assign_group_folds
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError
from src.runtime.signals import StopRequest
from tests.conftest import ROOT, admitted, write_config, write_lines
from tests.test_mixture import check_account, mixture, whole

PATIENTS = ["a"] * 6 + ["b"] * 4 + ["c"] * 3 + ["d"] * 3 + ["e"] * 2 + ["f"] * 2


def built(*overrides: str) -> Data:
    option = [] if any(override.startswith("data=") for override in overrides) else ["data=prompt_completion"]
    config = admitted(*option, "tokens=none", *overrides).config
    return build_data(config, load_tokenizer(config.model, config.tokens)[0])


def all_folds(num_folds: int, *overrides: str) -> Iterator[Data]:
    for fold in range(num_folds):
        yield built(*overrides, f"data.num_folds={num_folds}", f"data.fold={fold}")


def places(data: Data) -> tuple[list[str], list[str]]:
    """Give file:line of the rows to train on and of those to validate with, sorted."""
    both = (whole(data.train), data.validation["validation"])
    train, validation = (sorted(rows.place(i) for i in range(len(rows))) for rows in both)
    return train, validation


def rows_of(groups: Sequence[Any], name: str = "row") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "completion": "x", "patient": group} for i, group in enumerate(groups)]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        admitted(*overrides)
    return str(caught.value)


# Dealing


@given(some.lists(some.integers(1, 60), min_size=1, max_size=3), some.integers(2, 9), some.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_records_are_dealt_evenly(sizes: list[int], num_folds: int, seed: int) -> None:
    if max(sizes) < num_folds:
        with pytest.raises(DataError, match=f"data.num_folds = {num_folds} needs as many rows of train, and there are"):
            assign_folds(sizes, num_folds, seed)
        return
    folds = assign_folds(sizes, num_folds, seed)
    assert [len(of_source) for of_source in folds] == sizes
    for of_source in folds:
        counts = np.bincount(of_source, minlength=num_folds)
        assert len(counts) == num_folds
        assert counts.max() - counts.min() <= 1


@given(some.lists(some.lists(some.sampled_from("abcdefgh"), min_size=1, max_size=40), min_size=1, max_size=3),
       some.integers(2, 5), some.integers(0, 2**32 - 1))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_groups_are_dealt_whole(groups: list[list[str]], num_folds: int, seed: int) -> None:
    sizes = Counter(group for of_source in groups for group in of_source)
    if len(sizes) < num_folds:
        with pytest.raises(DataError, match=f"needs as many groups, and data.group_column finds {len(sizes)} in train"):
            assign_group_folds(groups, num_folds, seed)
        return
    folds = assign_group_folds(groups, num_folds, seed)
    pairs = {pair for of_source in zip(groups, folds, strict=True) for pair in zip(*of_source, strict=True)}
    assert len(pairs) == len(sizes)
    filled = np.bincount(np.concatenate(folds), minlength=num_folds)
    assert filled.min() > 0
    assert filled.max() - filled.min() <= max(sizes.values())
    backwards = assign_group_folds([of_source[::-1] for of_source in groups[::-1]], num_folds, seed)
    assert [of_source[::-1].tolist() for of_source in backwards[::-1]] == [of_source.tolist() for of_source in folds]


def test_largest_groups_go_first_and_to_the_smallest_fold() -> None:
    (folds,) = assign_group_folds([list("a" * 6 + "b" * 5 + "c" * 3 + "d" * 2 + "e")], 3, seed=1)
    assert "".join(map(str, folds)) == "000000" + "11111" + "222" + "22" + "1"


def test_the_seed_decides_and_sources_of_one_size_are_dealt_alike() -> None:
    first, again, other = (assign_folds([40, 40], 4, seed) for seed in (1, 1, 2))
    assert first[0].tolist() == first[1].tolist() == again[0].tolist() != other[0].tolist()
    alike = [[str(i) for i in range(40)]]
    first, again, other = (assign_group_folds(alike, 4, seed) for seed in (1, 1, 2))
    assert first[0].tolist() == again[0].tolist() != other[0].tolist()


# Sets


def test_each_record_is_validated_once_and_trained_on_otherwise(tmp_path: Path) -> None:
    rows = rows_of(range(22))
    for i in (3, 8, 9):
        rows[i]["prompt"] = "y" * 99  # dropped
    file = write_lines(tmp_path / "rows.jsonl", rows)
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.2", "data.test_files=null"]
    kept = sorted(f"{file}:{i + 1}" for i in range(22) if i not in (3, 8, 9))
    validated, num_read, num_dropped = [], [], 0
    for data in all_folds(4, f"data.train_files=['{file}']", *cut):
        train, validation = places(data)
        assert sorted(train + validation) == kept
        for rows_there in (whole(data.train), data.validation["validation"]):
            check_account(data.reports[rows_there.name], rows_there)
        validated += validation
        num_read.append(data.reports["validation"].rows_read)
        num_dropped += data.reports["validation"].rows_dropped["too_long"]
        assert data.reports["train"].rows_read == 22 - num_read[-1]
    assert sorted(validated) == kept
    assert (sorted(num_read), num_dropped) == ([5, 5, 6, 6], 3)


def test_another_seed_gives_other_folds_and_the_fold_is_another_train_set(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows_of(range(30)))
    plain = [f"data.train_files=['{file}']", "data.num_folds=3"]
    zero, one = built(*plain, "data.fold=0"), built(*plain, "data.fold=1")
    other = built(*plain, "data.fold=0", "seed=7")
    assert places(zero) == places(built(*plain, "data.fold=0")) != places(other)
    assert zero.train.digest() != one.train.digest()
    assert zero.validation_digest(None) != one.validation_digest(None)
    frozen = [admitted("data=prompt_completion", *plain, f"data.fold={fold}").frozen for fold in (0, 1)]
    assert {change.key: change.impact for change in compare_configs(*frozen)} == {"data.fold": Impact.harmless}


def test_a_limit_comes_first(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", rows_of(range(40), name)) for name in "ab"]
    used = sorted(f"{files[0]}:{i}" for i in range(1, 19))
    validated = []
    for data in all_folds(4, f"data.train_files=['{files[0]}']", "data.limit=18"):
        train, validation = places(data)
        assert sorted(train + validation) == used
        validated += validation
    assert sorted(validated) == used
    sources = {name: {"train_files": [file], "weight": 1} for name, file in zip("ab", files, strict=True)}
    validated, trained = [], set()
    for data in all_folds(4, mixture(**sources), "data.limit=18"):
        train, validation = places(data)
        assert len(train) == 36 - len(validation)
        assert not set(train) & set(validation)
        validated += validation
        trained |= set(train)
    assert len(validated) == len(set(validated)) == 36
    assert trained <= set(validated)


def test_groups_are_never_on_both_sides(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows_of(PATIENTS[::3] + PATIENTS[1::3] + PATIENTS[2::3]))
    lines = [json.loads(line)["patient"] for line in Path(file).read_text().splitlines()]
    seen: Counter[str] = Counter()
    for data in all_folds(3, f"data.train_files=['{file}']", "data.group_column=patient"):
        train, validation = ({lines[int(place.rpartition(":")[2]) - 1] for place in one} for one in places(data))
        assert not train & validation
        assert train | validation == set("abcdef")
        seen.update(validation)
        assert data.reports["validation"].rows_read in (6, 7, 8)
    assert seen == Counter("abcdef")


def test_a_group_is_one_over_all_sources_whatever_its_type(tmp_path: Path) -> None:
    numbers = write_lines(tmp_path / "numbers.jsonl", rows_of([1, 2, 3, True, 1.5] * 3, "n"))
    texts = write_lines(tmp_path / "texts.jsonl", rows_of(["3", "1", "True", "2", "1.5", "2"] * 2, "t"))
    sources = {"n": {"train_files": [numbers], "weight": 2}, "t": {"train_files": [texts], "weight": 1}}
    group = {
        f"{file}:{i}": str(json.loads(line)["patient"])
        for file in (numbers, texts)
        for i, line in enumerate(Path(file).read_text().splitlines(), start=1)
    }
    validated = []
    for data in all_folds(2, mixture(**sources), "data.group_column=patient"):
        train, validation = places(data)
        assert not {group[place] for place in train} & {group[place] for place in validation}
        assert {Path(place).name[0] for place in train} == {Path(place).name[0] for place in validation} == {"n", "t"}
        check_account(data.reports["validation"], data.validation["validation"])
        validated += validation
    assert sorted(validated) == sorted(group)


def test_one_file_under_two_templates_is_on_one_side(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows_of(range(11)))
    sources = {name: {"train_files": [file], "prompt_template": f"{name}: {{prompt}}"} for name in "ab"}
    for data in all_folds(3, mixture(**sources)):
        train, validation = places(data)
        assert not set(train) & set(validation)
        assert len(train + validation) == 22


@pytest.mark.parametrize("column", ["", "data.group_column=patient"])
def test_a_warm_cache_gives_the_same_and_one_preparation_is_enough(
    tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(PATIENTS)
    rows[4]["prompt"] = "y" * 99
    file = write_lines(tmp_path / "rows.jsonl", rows)
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.1", column][
        : 4 if column else 3
    ]
    own = [f"data.train_files=['{file}']", f"data.cache_dir='{tmp_path / 'cache'}'", *cut]
    cold = [(places(data), data.reports["validation"].as_dict()) for data in all_folds(3, *own)]
    monkeypatch.setattr("src.data.cache.encode_chunks", lambda *_: pytest.fail("prepared again"))
    assert [(places(data), data.reports["validation"].as_dict()) for data in all_folds(3, *own)] == cold


def test_a_source_that_changes_between_its_groups_and_its_rows_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write_lines(tmp_path / "rows.jsonl", rows_of("abc")))
    read = FileSource.records

    def read_and_change(source: FileSource) -> Iterator[Any]:
        yield from read(source)
        monkeypatch.undo()
        write_lines(file, rows_of("cab"))

    monkeypatch.setattr(FileSource, "records", read_and_change)
    own = [f"data.train_files=['{file}']", "data.group_column=patient", "data.num_folds=2", "data.fold=0"]
    with pytest.raises(DataError, match="train changed while being read"):
        built(*own)


# What a fold takes the place of


def test_the_validation_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows_of(range(9)))
    unread = write_lines(tmp_path / "unread.jsonl", [{"no": "row"}])
    own = [f"data.train_files=['{file}']", f"data.validation_files={{mine: ['{unread}', gone.jsonl]}}",
           "data.num_folds=3", "data.fold=1"]  # fmt: skip
    config = admitted("data=prompt_completion", *own).config
    assert config.data.validation_names() == ["validation"]
    assert config.data.files() == {"train": [file]}
    assert [*file_hashes(config.data)] == [file]
    data = built(*own)
    assert list(data.validation) == ["validation"]
    assert len(data.validation["validation"]) == 3
    assert data.reports["validation"].summary.startswith("fold 1 of 3, the validation files are not read; 3 of 3 rows")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    assert preflight.main(["data=prompt_completion", "tokens=none", *own, "data.cache_dir=null", "tracking=none"]) == 0
    assert "validation  fold 1 of 3, the validation files are not read" in capsys.readouterr().out


def test_the_hubs_split_and_a_fraction_are_not_used() -> None:
    hub = admitted("data=gsm8k", "data.num_folds=5", "data.fold=4").config.data
    assert (hub.has_hub_validation, hub.held_out_fraction, hub.validation_names()) == (False, 0, ["validation"])
    without = dataclasses.replace(hub, num_folds=None, fold=None)
    assert (without.has_hub_validation, without.held_out_fraction) == (True, 0)
    local = dataclasses.replace(without, train_files=["a.jsonl"])
    assert (local.has_hub_validation, local.held_out_fraction) == (False, 0.05)


def test_a_run_says_which_fold_it_is_and_its_result_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    short = ["debug=smoke", "training.max_train_steps=1", "evaluation.sample_prompts=0", "data.metrics=[]"]
    train(admitted(*short, "data.num_folds=4", "data.fold=3", f"hydra.run.dir={run}"), StopRequest())
    assert "validation: fold 3 of 4, the validation files are not read; 4 of 4 rows" in capsys.readouterr().out
    assert "eval/validation/loss" in json.loads((run / "summary.json").read_text())
    tests = f"data.test_files={{validation: ['{write_lines(tmp_path / 'ask.jsonl', rows_of('ab'))}']}}"
    assert admit_finished([f"run={run}", tests], "predict").config.data.test_sets().keys() == {"validation"}
    with pytest.raises(ConfigError, match=r"data\.fold = 1 +python -m src\.predict does not read it"):
        admit_finished([f"run={run}", tests, "data.fold=1"], "predict")
    frozen = yaml.safe_load((run / "config.yaml").read_text())
    frozen["data"] |= {"streaming": True, "group_column": "gone"}
    shutil.copytree(run, tmp_path / "other")
    write_config(tmp_path / "other", frozen)
    assert admit_finished([f"run={tmp_path / 'other'}", tests], "predict")


# What is refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.num_folds=5"], "data.num_folds = 5   which one is the validation set? data.fold=0 … 4, or all of them "
                               "with -m sweep=kfold"),
        (["data.fold=0"], "data.fold = 0   is for cross-validation: needs data.num_folds"),
        (["data.group_column=x"], "data.group_column = x   is for cross-validation: needs data.num_folds"),
        (["data.num_folds=5", "data.fold=5"], "data.fold = 5   counts from 0 to data.num_folds - 1, which is 4"),
        (["data.num_folds=1", "data.fold=0"], "data.num_folds = 1   not a whole number of at least 2"),
        (["data.num_folds=3", "data.fold=-1"], "data.fold = -1   not a whole number of at least 0"),
        (["data.num_folds=3", "data.fold=1", "data.streaming=true", "training.max_train_steps=9"],
         "data.num_folds = 3   can't divide the rows of a stream: data.streaming=false"),
        (["data.num_folds=3", "data.fold=1", "data.test_files={validation: [data/tow_addition/test.jsonl]}"],
         "data.test_files = validation   a validation set has this name already"),
        (["data.num_folds=3", "data.fold=1", "checkpoint.metric_for_best_model=eval/mine/loss"],
         "no evaluation computes this; one of eval/validation/loss"),
    ],
)  # fmt: skip
def test_the_gate_refuses(overrides: list[str], words: str) -> None:
    said = refusal(*overrides)
    assert words in said
    assert said.startswith("Configuration refused: 1 problem\n")


def test_no_data_option_stands_in_the_way_of_folds() -> None:
    own = ["data.train_files=[data/tow_addition/train.jsonl]", "data.num_folds=5", "data.fold=0"]
    for option in options("data", [CONF]):
        admitted(f"data={option}", *own, "data.batching=packed", "data.group_column=x", "data.limit=9")
    admitted("data=gsm8k", *own[1:])


def test_records_without_a_group_are_listed_by_place(tmp_path: Path) -> None:
    groups: list[Any] = ["a", None, "", ["b"], *["c"] * 3, *[None] * 9]
    rows = rows_of(groups)
    del rows[5]["patient"]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    own = [f"data.train_files=['{file}']", "data.num_folds=2", "data.fold=0", "data.group_column=patient"]
    with pytest.raises(DataError) as caught:
        built(*own)
    assert str(caught.value).split("\n") == [
        "13 rows can't be used:",
        f"  {file}:2  'patient' is null: a group is a text, a number, true or false",
        f"  {file}:3  'patient' is empty: data.group_column needs a group in each row",
        f"  {file}:4  'patient' is a list: a group is a text, a number, true or false",
        f"  {file}:6  no field 'patient', which data.group_column names; there are 'prompt', 'completion'",
        f"  {file}:8  'patient' is null: a group is a text, a number, true or false",
        *[f"  {file}:{i}  the same" for i in range(9, 14)],
        "  … and 3 more",
    ]
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:1  no field 'doctor', which data\.group_column names"):
        built(*own[:-1], "data.group_column=doctor")


def test_an_unreadable_row_is_told_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_lines(file, rows_of("abc"))
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(DataError, match=r"1 row can't be used:\n  .*rows\.jsonl:4  not JSON"):
        built(f"data.train_files=['{file}']", "data.num_folds=2", "data.fold=0", "data.group_column=patient")


def test_too_few_rows_or_groups_are_told(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows_of("aabb"))
    own = [f"data.train_files=['{file}']", "data.fold=0"]
    with pytest.raises(DataError, match=r"data\.num_folds = 5 needs as many rows of train, and there are 4"):
        built(*own, "data.num_folds=5")
    with pytest.raises(DataError, match=r"num_folds = 3 needs as many groups, and data\.group_column finds 2 in train"):
        built(*own, "data.num_folds=3", "data.group_column=patient")


def test_a_fold_of_which_nothing_is_left_is_told_from_both_sides(tmp_path: Path) -> None:
    rows = rows_of("aabb")
    for i in (0, 1):
        rows[i]["prompt"] = "y" * 99
    file = write_lines(tmp_path / "rows.jsonl", rows)
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.5"]
    own = [f"data.train_files=['{file}']", *cut, "data.num_folds=2", "data.group_column=patient"]
    said = []
    for fold in (0, 1):
        with pytest.raises(DataError) as caught:
            built(*own, f"data.fold={fold}")
        said.append(str(caught.value))
    assert any("left to train on" in text for text in said)
    assert any("is dropped: set fewer folds (data.num_folds)" in text for text in said)
