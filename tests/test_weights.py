"""What each supervised token weighs in the loss: by its part of a thought, and by its row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from src.config.gate import admit
from src.data.batching import collate
from src.data.dataset import build_data
from src.data.encoding import IGNORE_INDEX, PARTS
from src.data.sets import LabelledRow
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError
from src.runtime.session import Runtime
from src.training.loop import MicroBatch, step_once, train
from src.training.state import StepStats
from tests.conftest import admitted, write_lines
from tests.test_loop import assembled, rows_of

OPEN, CLOSE = 90, 91
SUMS = [json.loads(line) for line in Path("data/tow_addition/train.jsonl").read_text().splitlines()[:12]]


@pytest.mark.parametrize(
    ("ids", "spans", "expected"),
    [
        # two thoughts with an answer between them, the second at the end
        ([1, OPEN, 5, 6, CLOSE, 7, 8, OPEN, CLOSE], [(1, 1, 5), (0, 5, 7), (1, 7, 9)], "oiicaAoc"),
        ([1, OPEN, 5, CLOSE, OPEN, 6, CLOSE, 7], [(1, 1, 4), (1, 4, 7), (0, 7, 8)], "oicoica"),  # nothing between
        ([1, 2, OPEN, 5, OPEN, 6], [(0, 1, 2), (1, 2, 6)], "Aoiii"),  # cut: no closing tag; a tag within is no tag
        ([1, 2, OPEN], [(0, 1, 2), (1, 2, 3)], "Ao"),  # cut right after the tag
        ([OPEN, 5, CLOSE, 7], [(1, 1, 3), (0, 3, 4)], "ica"),  # nothing predicts the first id
        ([OPEN, CLOSE, 7], [(1, 1, 2), (0, 2, 3)], "ca"),
    ],
)
def test_each_supervised_token_has_its_part(ids: list[int], spans: list[tuple[int, int, int]], expected: str) -> None:
    labels = np.full(len(ids), IGNORE_INDEX)
    for _, start, stop in spans:
        labels[start:stop] = ids[start:stop]
    row = LabelledRow(np.array(ids), labels, None, np.array(spans), (OPEN, CLOSE))
    letters = dict(zip(PARTS, "Aioca", strict=True))
    assert "".join(letters[PARTS[part]] for part in row.parts[labels != IGNORE_INDEX]) == expected


def test_a_model_learns_to_open_a_thought_and_nothing_within(runtime: Runtime) -> None:
    """open=1, inside=0: the objective of a step is the sum by hand, over all logits."""
    weights = ["loss.thought_weight=0", "loss.thought_open_weight=1", "loss.thought_close_weight=0"]
    size = ["training.per_device_train_batch_size=4", "training.max_train_steps=1", "data.limit=4"]
    config, data, state = assembled(runtime, *weights, *size, "optimizer=sgd")
    open_id, close_id = data.encoder.tag_ids or (0, 0)
    total, num_weighted = 0.0, 0
    for i in range(4):
        ids = data.train[i].input_ids.tolist()
        begin, end = len(data.train.prompt_ids(i)), len(ids)
        with torch.no_grad():
            logits = state.model(input_ids=torch.tensor([ids])).logits[0].double()
        nll = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        is_inside = False
        for position in range(begin, end):
            if ids[position] == open_id or not is_inside:
                total, num_weighted = total + nll[position - 1].item(), num_weighted + 1
            is_inside = (is_inside or ids[position] == open_id) and ids[position] != close_id
            if ids[position] == close_id:
                assert ids[position - 1] not in (open_id, close_id)
    step = next(iter(train(state, data.train, config, runtime, pad_token_id=0)))
    assert step.pop_metrics()["train/objective"] == pytest.approx(total / num_weighted, abs=1e-6)


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_row_of_weight_0_changes_nothing_but_what_is_read(runtime: Runtime, tmp_path: Path, batching: str) -> None:
    file = tmp_path / "rows.jsonl"
    overrides = [
        *rows_of(str(file)),
        "data.weight_column=worth",
        f"data.batching={batching}",
        "data.max_seq_length=128",
    ]
    overrides += ["training.max_train_steps=4", "training.per_device_train_batch_size=3"]

    def run(answer: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
        last = SUMS[-1] | {"completion": SUMS[-1]["completion"][: -len(answer)] + answer, "worth": 0}
        write_lines(file, [*(row | {"worth": 1 + i / 4} for i, row in enumerate(SUMS[:-1])), last])
        config, data, state = assembled(runtime, *overrides)
        report = data.reports["train"]
        assert (report.rows_kept, report.rows_of_weight_0, report.rows_dropped.total()) == (12, 1, 0)
        lines = [step.pop_metrics() for step in train(state, data.train, config, runtime, pad_token_id=0)]
        lines = [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
        counts = {"tokens": state.tokens_seen, "rows": state.examples_seen}
        return [*lines, counts], {name: p.detach().clone() for name, p in state.model.named_parameters()}

    first, second = run("123"), run("987")
    assert first[0] == second[0]
    assert all(torch.equal(weight, second[1][name]) for name, weight in first[1].items())
    assert first[0][-1]["rows"] >= 12


def test_a_step_of_rows_of_weight_0_has_no_loss(runtime: Runtime, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [row | {"worth": int(i == 0)} for i, row in enumerate(SUMS[:2])])
    overrides = [*rows_of(str(tmp_path / "rows.jsonl")), "data.weight_column=worth"]
    config, data, state = assembled(runtime, *overrides, "optimizer=sgd", "scheduler=constant")
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    batch = collate(data.train, [[1]], 0)
    assert (batch.num_supervised, batch.num_tokens) == (0, len(data.train[1].input_ids))
    step_once(state, [MicroBatch(data.train, batch)], config, runtime)
    assert state.stats.loss == state.stats.objective == 0
    assert all(torch.equal(weight, before[name]) for name, weight in state.model.named_parameters())


def built(*overrides: str) -> Any:
    config = admitted(*overrides).config
    return build_data(config, load_tokenizer(config.model, config.tokens)[0])


@pytest.mark.parametrize(
    ("worth", "said"),
    [
        ({"worth": -1}, r"'worth' is -1; a row's weight is a number of at least 0"),
        ({"worth": "much"}, "'worth' is 'much'"),
        ({"worth": True}, "'worth' is true"),
        ({"worth": None}, "'worth' is null"),
        ({"worth": "inf"}, "'worth' is 'inf'"),
        ({"worth": 1e39}, r"'worth' is 1e\+39"),
        ({}, r"no field 'worth'; there are 'prompt', 'completion' \(name yours with data.weight_column=FIELD\)"),
    ],
)
def test_what_is_no_weight_is_named_by_its_place(tmp_path: Path, worth: dict[str, Any], said: str) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [SUMS[0] | {"worth": 2}, SUMS[1] | worth])
    with pytest.raises(DataError, match=rf"rows.jsonl:2  {said}"):
        built(*rows_of(file), "data.weight_column=worth")


@pytest.mark.parametrize("key", ["weight_column", "group_column", "dataset_name", "revision", "train_split"])
def test_a_name_that_is_empty_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}\b[^\n]*not a text that is not empty"):
        admit([f"data.{key}="])


def test_a_step_without_a_supervised_token_has_no_loss() -> None:
    assert "train/loss" not in StepStats(num_steps=1, num_tokens=4, seconds=1.0).means(with_objective=True)
    assert StepStats(nll=3.0, part_counts=(2, 0, 0, 0, 0), num_steps=1).means(with_objective=False)["train/loss"] == 1.5


def test_weights_are_read_from_tables_of_texts_and_are_no_unread_key(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion", "worth"])
        writer.writeheader()
        writer.writerows([SUMS[0] | {"worth": "0.5"}, SUMS[1] | {"worth": "2"}])
    data = built(*rows_of(str(file)), "data.weight_column=worth", f"data.test_files=['{file}']")
    assert [data.train[i].weight for i in range(2)] == [0.5, 2.0]
    assert data.reports["train"].unread_keys == data.reports["test"].unread_keys == {}


def test_evaluated_rows_count_alike_also_those_that_are_held_out_of_train(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [row | {"worth": 0 if i else 1} for i, row in enumerate(SUMS)])
    held_out = built(*rows_of(file), "data.weight_column=worth", "data.num_folds=2", "data.fold=0", "seed=1")
    rows = held_out.validation["validation"]
    assert [rows[i].weight for i in range(len(rows))] == [1.0] * 6
    assert all((rows[i].labels != IGNORE_INDEX).any() for i in range(len(rows)))
    files = ["data.validation_files=[data/tow_addition/validation.jsonl]", "data.limit=12"]  # has no such field
    assert len(built(*rows_of(file), "data.weight_column=worth", *files).validation["validation"]) == 12


def test_other_weights_are_other_data(tmp_path: Path) -> None:
    digests = set()
    for worth in (1, 2):
        file = write_lines(tmp_path / "rows.jsonl", [row | {"worth": worth} for row in SUMS])
        digests.add(built(*rows_of(file), "data.weight_column=worth").train.digest())
    digests.add(built(*rows_of(file)).train.digest())
    assert len(digests) == 3


def test_rows_that_weigh_nothing_together_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [row | {"worth": 0} for row in SUMS])
    with pytest.raises(DataError, match="the weight of every row is 0"):
        built(*rows_of(file), "data.weight_column=worth")


@pytest.mark.parametrize("key", ["thought_open_weight", "thought_close_weight", "after_thought_weight"])
def test_weights_of_parts_need_thoughts(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss\.{key}.*no thoughts are written"):
        admitted(f"loss.{key}=0.5", "tokens=none")
    with pytest.raises(ConfigError, match=rf"loss\.{key}.*at least 0"):
        admitted(f"loss.{key}=-1")


def test_sums_of_an_older_checkpoint_count_until_the_next_line() -> None:
    saved = {"nll": 10.0, "num_supervised": 8.0, "thought_nll": 4.0, "num_thought": 2.0, "objective": 3.0}
    stats = StepStats.from_dict(saved | {"num_steps": 2, "num_tokens": 20, "seconds": 1.0})
    means = stats.means(with_objective=False)
    assert {name: means[f"train/{name}"] for name in ("loss", "thought_loss", "answer_loss")} == {
        "loss": 1.25, "thought_loss": 2.0, "answer_loss": 1.0,
    }  # fmt: skip
    stats.add(StepStats(1.0, (1.0, 0, 0, 0, 0), (1.0, 0, 0, 0, 0), num_steps=1))
    assert (stats.num_supervised, stats.num_steps) == (9, 3)
