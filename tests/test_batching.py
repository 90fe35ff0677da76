"""Batches: each row once an epoch however they are cut, and a row's loss does not depend on what stands beside it."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from src.config.schema import Batching, RunConfig
from src.data.batching import (
    Batch,
    BatchSampler,
    RowBounds,
    Sequences,
    Window,
    collate,
    flash_bounds,
    pack,
    similar_batches,
    steps_per_epoch,
    windows,
)
from src.data.batching_choice import choose_batching, num_positions
from src.data.dataset import Data, build_data
from src.data.encoding import IGNORE_INDEX
from src.data.micro_batches import MicroBatches
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.errors import ModelError
from src.evaluation.generate import Generator
from src.model.build import build_model, set_generation
from src.runtime.session import Runtime
from src.training.head import ModelWithLoss, shifted
from src.training.loop import train
from src.training.padding_free import find_row_bounds, row_lengths
from src.training.state import build_batch_sampler, build_train_state
from tests.conftest import ROOT, admitted, towline, write_lines
from tests.kinds import byte_bpe

PAD = 0
WAYS = [Batching.padded, Batching.length_grouped, Batching.packed]
ROWS = [{"prompt": "ab" * (i * 7 % 11) + "=", "completion": "xyz"[: 1 + i % 3] * (1 + i * 5 % 9)} for i in range(47)]
TEXTS = [{"text": "abc" * (1 + i % 5)} for i in range(9)]


def built(*overrides: str, tokenizer: Any = None) -> tuple[RunConfig, Data, Any]:
    config = admitted("tokens=none", "data.cache_dir=null", *overrides).config
    tokenizer = tokenizer or load_tokenizer(config.model, config.tokens)[0]
    return config, build_data(config, tokenizer), tokenizer


def only(file: str) -> list[str]:
    return [f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> EncodedSet:
    """47 rows of 4 to 48 tokens."""
    file = write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    train = built(*only(file))[1].train
    assert isinstance(train, EncodedSet)
    return train


# Order


def epochs(rows: EncodedSet, plan: BatchSampler, seed: int, count: int) -> list[list[Window]]:
    """Give the windows of the first epochs."""
    found: list[list[Window]] = [[]]
    for window in windows(rows, plan, seed):
        assert window.epoch == len(found) - 1
        found[-1].append(window)
        if window.ends_epoch:
            if len(found) == count:
                return found
            found.append([])
    raise AssertionError("windows never end")


def sequences_of(epoch: list[Window]) -> list[Sequences]:
    return [sequences for window in epoch for _, sequences in window.micro_batches]


def order_of(epoch: list[Window]) -> list[int]:
    return [row for sequences in sequences_of(epoch) for sequence in sequences for row in sequence]


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (1, 4), (8, 1), (5, 3), (47, 1), (64, 2)])
@pytest.mark.parametrize("seed", [0, 42])
def test_every_row_comes_once_in_an_epoch(
    rows: EncodedSet, batching: Batching, size: int, accumulation: int, seed: int
) -> None:
    plan = BatchSampler(batching, size, accumulation, max_tokens=64)
    for epoch in epochs(rows, plan, seed, 3):
        assert sorted(order_of(epoch)) == list(range(len(rows)))
        assert len(epoch) == steps_per_epoch(rows, plan, seed)
        assert all(len(window.micro_batches) == accumulation for window in epoch[:-1])
        assert 1 <= len(epoch[-1].micro_batches) <= accumulation
        assert all(len(sequences) == size for sequences in sequences_of(epoch)[:-1])
        assert 1 <= len(sequences_of(epoch)[-1]) <= size


@pytest.mark.parametrize("batching", WAYS)
def test_order_follows_seed_and_epoch(rows: EncodedSet, batching: Batching) -> None:
    plan = BatchSampler(batching, 4, 2, max_tokens=64)
    orders = [tuple(order_of(epoch)) for seed in (1, 2) for epoch in epochs(rows, plan, seed, 3)]
    assert len(set(orders)) == 6
    again = [tuple(order_of(epoch)) for seed in (1, 2) for epoch in epochs(rows, plan, seed, 3)]
    assert again == orders


@pytest.mark.parametrize("batching", WAYS[:2])
def test_a_step_has_the_same_rows_however_it_is_cut(rows: EncodedSet, batching: Batching) -> None:
    found = []
    for size, per_step in ((12, 1), (6, 2), (4, 3), (1, 12)):
        steps = epochs(rows, BatchSampler(batching, size, per_step, 64), 5, 2)
        found.append([[order_of([window]) for window in epoch] for epoch in steps])
        widths = [
            [max(rows.lengths[one[0]] for one in batch) for _, batch in window.micro_batches] for window in steps[0]
        ]
        if batching is Batching.length_grouped:  # what processes compute at once is of about one length
            assert all(of_step == sorted(of_step) for of_step in widths)
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("batching", [Batching.padded, Batching.length_grouped])
@pytest.mark.parametrize(("budget", "accumulation"), [(48, 1), (49, 4), (128, 2), (10_000, 1)])
def test_a_budget_holds_as_many_rows_as_fit(
    rows: EncodedSet, batching: Batching, budget: int, accumulation: int
) -> None:
    plan = BatchSampler(batching, 4, accumulation, 64, token_budget=budget)
    lengths = rows.lengths
    found = epochs(rows, plan, 3, 3)
    for number, epoch in enumerate(found):
        assert sorted(order_of(epoch)) == list(range(len(rows)))
        assert len(epoch) == steps_per_epoch(rows, plan, 3, epoch=number)
        batches = sequences_of(epoch)
        assert all(len(batch) * lengths[list(chain(*batch))].max() <= budget for batch in batches)
        assert all(len(window.micro_batches) == accumulation for window in epoch[:-1])
    assert [order_of(epoch) for epoch in epochs(rows, plan, 3, 3)] == [order_of(epoch) for epoch in found]
    batches = plan.micro_batches_of(rows, [3, 0])
    if batching is Batching.padded:  # in their order none could have taken the next one's first row
        assert all(
            (len(one) + 1) * lengths[list(chain(*one, other[0]))].max() > budget
            for one, other in itertools.pairwise(batches)
        )
    taken = 0
    for i, batch in enumerate(batches):
        assert list(plan.micro_batches_of(rows, [3, 0], taken)) == batches[i:]
        if len(batch) > 1:
            assert list(plan.micro_batches_of(rows, [3, 0], taken + 1)) == [batch[1:], *batches[i + 1 :]]
        taken += len(batch)
    assert not plan.micro_batches_of(rows, [3, 0], taken)


@given(
    some.lists(some.tuples(some.integers(1, 30), some.integers(0, 30)), min_size=1, max_size=60),
    some.integers(1, 200),
    some.sampled_from([Batching.padded, Batching.length_grouped]),
)
def test_a_budget_counts_targets_and_leaves_a_longer_row_alone(
    pairs: list[tuple[int, int]], budget: int, batching: Batching
) -> None:
    lengths, targets = np.array(pairs).T
    batches = BatchSampler(batching, 1, 1, 64, token_budget=budget).micro_batches(lengths, [0], 0, targets)
    each = [list(chain(*batch)) for batch in batches]
    assert sorted(chain(*each)) == list(range(len(pairs)))
    assert all(len(one) == 1 or len(one) * (lengths[one].max() + targets[one].max()) <= budget for one in each)


@given(
    some.lists(some.tuples(some.integers(1, 30), some.integers(0, 30)), max_size=60),
    some.integers(1, 8),
    some.booleans(),
)
def test_rows_that_are_scored_come_in_batches_of_as_many_positions(
    pairs: list[tuple[int, int]], size: int, is_pair: bool
) -> None:
    lengths = np.array(pairs, dtype=int).reshape(-1, 2).T
    lengths = lengths if is_pair else lengths[0]
    batches = similar_batches(lengths, size)
    each = np.atleast_2d(lengths)
    assert list(chain(*batches)) == np.argsort(each[0], kind="stable").tolist()
    most = size * each.max(axis=1, initial=0).sum()
    assert all(len(batch) * each[:, batch].max(axis=1).sum() <= most for batch in batches)
    assert all(len(batch) >= min(size, each.shape[1]) for batch in batches[:-1])
    if len({*pairs}) == 1:
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)


def positions_of(batches: list[Sequences], lengths: np.ndarray) -> int:
    return sum(len(batch) * max(sum(lengths[row] for row in sequence) for sequence in batch) for batch in batches)


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize("budget", [None, 100])
def test_positions_are_those_of_the_batches(rows: EncodedSet, batching: Batching, budget: int | None) -> None:
    plan = BatchSampler(batching, 4, 1, 64, token_budget=budget)
    computed = [
        collate(rows, sequences, PAD).input_ids.numel() for sequences in sequences_of(epochs(rows, plan, 7, 1)[0])
    ]
    assert num_positions(rows, plan, 7) == sum(computed)


def test_rows_are_grouped_where_that_saves_enough(rows: EncodedSet) -> None:
    plan = BatchSampler(Batching.auto, 4, 2, 64)
    chosen = choose_batching(rows, plan, 7)
    padded, grouped = (
        positions_of(replace(plan, batching=one).micro_batches(rows.lengths, [7, 0]), rows.lengths)
        for one in (Batching.padded, Batching.length_grouped)
    )
    assert chosen == replace(plan, batching=Batching.length_grouped, saved_share=1 - grouped / padded)
    alike = rows.select(np.flatnonzero(rows.lengths == np.bincount(rows.lengths).argmax()))
    assert len(alike) > 1
    for few in (alike, rows.select([0]), rows.select([])):
        assert choose_batching(few, plan, 7) == replace(plan, batching=Batching.padded)
    assert choose_batching(rows, BatchSampler(Batching.auto, 1, 1, 64), 7).batching is Batching.padded
    for size, per_step in ((8, 1), (2, 4), (1, 8)):  # of the last nothing is padded, and a step has the same rows
        chosen = choose_batching(rows, BatchSampler(Batching.auto, size, per_step, 64), 7)
        assert chosen.batching is Batching.length_grouped
        assert (chosen.saved_share == 0) is (size == 1)


@pytest.mark.parametrize(("share", "expected"), [(0.049, Batching.padded), (0.051, Batching.length_grouped)])
def test_a_few_positions_are_no_reason_to_group(
    rows: EncodedSet, monkeypatch: pytest.MonkeyPatch, share: float, expected: Batching
) -> None:
    def counted(_: EncodedSet, plan: BatchSampler, __: int) -> int:
        return 1000 if plan.batching is Batching.padded else round(1000 * (1 - share))

    monkeypatch.setattr("src.data.batching_choice.num_positions", counted)
    assert choose_batching(rows, BatchSampler(Batching.auto, 4, 1, 64), 0).batching is expected


@pytest.mark.parametrize(
    ("overrides", "batching", "is_padding_free"),
    [
        ([], "padded", True),
        (["data.batching=padded"], "padded", True),
        (["data.batching=packed"], "packed", True),
        (["data.batching=length_grouped"], "length_grouped", True),
        (["training.per_device_train_batch_size=1"], "padded", False),  # nothing to pad
        (["model.attn_implementation=eager"], "length_grouped", False),
        (["model.attn_implementation=eager", "data.batching=packed"], "packed", False),
        (["runtime.compile=true"], "length_grouped", False),
        (
            ["model.attn_implementation=flash_attention_2", "runtime.device=auto", "data.batching=packed"],
            "packed",
            True,
        ),
    ],
    ids=str,
)
def test_rows_lie_in_one_sequence_where_that_saves_enough(
    rows: EncodedSet, overrides: list[str], batching: str, is_padding_free: bool
) -> None:
    config = admitted("training.per_device_train_batch_size=8", *overrides).config
    sampler = build_batch_sampler(config, rows)
    assert (sampler.batching.value, sampler.is_padding_free) == (batching, is_padding_free)


def padded_tokens(rows: EncodedSet, batching: Batching) -> int:
    plan = BatchSampler(batching, 4, 1, max_tokens=64)
    return sum(
        collate(rows, sequences, PAD).input_ids.numel() for sequences in plan.micro_batches(rows.lengths, [1, 0])
    )


def test_grouping_and_packing_pad_less(rows: EncodedSet) -> None:
    padding = {batching: padded_tokens(rows, batching) - rows.num_tokens for batching in Batching}
    assert padding[Batching.length_grouped] < padding[Batching.padded] / 4
    assert padding[Batching.packed] < padding[Batching.padded] / 2


def test_grouped_batches_come_in_random_order_and_only_the_last_is_short() -> None:
    lengths = np.random.default_rng(3).integers(1, 1000, 1003)
    batches = BatchSampler(Batching.length_grouped, 8, 1, 1000).micro_batches(lengths, [1, 0])
    assert [len(batch) for batch in batches] == [8] * 125 + [3]
    means = np.array([np.mean([lengths[row] for (row,) in batch]) for batch in batches])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3
    assert np.mean([np.ptp([lengths[row] for (row,) in batch]) for batch in batches[:-1]]) < 60


@given(some.lists(some.lists(some.lists(some.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=4)))
def test_micro_batches_are_the_lists_they_were_made_of(lists: list[list[list[int]]]) -> None:
    batches, lengths = MicroBatches.of(lists), np.arange(41) % 7
    assert (list(batches), len(batches), batches[1:]) == (lists, len(lists), lists[1:])
    longest = [max(sum(lengths[sequence]) for sequence in batch) for batch in lists]
    assert batches.num_positions(lengths) == sum(map(math.prod, zip(longest, map(len, lists), strict=True)))


def test_an_epoch_of_many_rows_takes_few_bytes_of_each() -> None:
    num_rows = 100_000
    batches = BatchSampler(Batching.padded, 8, 1, 64).micro_batches(np.zeros(num_rows), [0], 3)
    assert len(batches) == math.ceil((num_rows - 3) / 8)
    assert sum(array.nbytes for array in vars(batches).values()) < 20 * num_rows


# Packing rows into sequences


def test_a_row_goes_where_it_fits_most_tightly() -> None:
    assert pack(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    assert pack(np.array([2, 4, 4, 7]), 10) == [[3], [1, 2, 0]]  # first fit would put 2 behind 7
    assert pack(np.array([10, 10]), 10) == [[0], [1]]
    assert pack(np.array([], dtype=np.int64), 10) == []


@settings(derandomize=True, deadline=None, max_examples=200)
@given(some.data())
def test_packed_sequences_are_whole_full_and_as_many_whatever_the_order(data: some.DataObject) -> None:
    capacity = data.draw(some.integers(1, 40))
    lengths = np.array(data.draw(some.lists(some.integers(1, capacity), max_size=60)), dtype=np.int64)
    sequences = pack(lengths, capacity)
    assert sorted(chain.from_iterable(sequences)) == list(range(len(lengths)))
    loads = [int(lengths[sequence].sum()) for sequence in sequences]
    assert max(loads, default=0) <= capacity
    assert all(first + second > capacity for first, second in itertools.combinations(loads, 2))
    shuffled = lengths[np.array(data.draw(some.permutations(range(len(lengths)))), dtype=np.int64)]
    assert len(pack(shuffled, capacity)) == len(sequences)


@pytest.mark.parametrize("longest", [100, 300, 1000])
@pytest.mark.parametrize("count", [50, 2000])
def test_sequences_are_few(count: int, longest: int) -> None:
    lengths = np.random.default_rng(count + longest).integers(1, longest + 1, count)
    assert len(pack(lengths, 1000)) <= 11 / 9 * lengths.sum() / 1000 + 4


# Collating


def test_padded_rows_stand_side_by_side(rows: EncodedSet) -> None:
    batch = collate(rows, [[3], [0]], PAD)
    lengths = [len(rows[i].input_ids) for i in (3, 0)]
    assert batch.input_ids.shape == batch.labels.shape == (2, max(lengths))
    assert (batch.rows, batch.num_tokens) == ([3, 0], sum(lengths))
    assert batch.num_supervised == rows.supervised_lengths()[[3, 0]].sum()
    for i, row in enumerate((3, 0)):
        assert batch.input_ids[i].tolist() == [*rows[row].input_ids, *[PAD] * (max(lengths) - lengths[i])]
        assert batch.labels[i].tolist() == [*rows[row].labels, *[IGNORE_INDEX] * (max(lengths) - lengths[i])]
    assert set(batch.inputs()) == {"input_ids", "labels", "label_positions"}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_collating_starts_no_threads_beside_those_that_compute() -> None:
    program = """
import os, threading
import numpy as np, torch
from src.data.batching import collate, flash_bounds
from src.data.sets import LabelledRow

class Rows:
    is_encoder_decoder = False
    def __getitem__(self, index):
        ids = np.arange(100_000, dtype=np.int32)
        return LabelledRow(ids, ids, None, np.array([[0, 10, 90_000]]), weight=0.5)

def num_threads():
    return len(os.listdir("/proc/self/task"))

def work():
    before = num_threads()
    collate(Rows(), [[0, 1], [2]], 0), collate(Rows(), [[0, 1], [2]], 0, flash_bounds)
    collated = num_threads()
    torch.ones(10**6).add(1)
    print(collated - before, num_threads() - collated)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == ["0", "1"], ended.stderr


def test_packed_rows_count_their_positions_anew_and_so_does_padding(rows: EncodedSet) -> None:
    batch = collate(rows, [[3, 0], [1]], PAD)
    first, second, alone = (len(rows[i].input_ids) for i in (3, 0, 1))
    longest = max(first + second, alone)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [
        [*range(first), *range(second), *range(longest - first - second)],
        [*range(alone), *range(longest - alone)],
    ]
    assert batch.input_ids[0].tolist() == [*rows[3].input_ids, *rows[0].input_ids, *[PAD] * (longest - first - second)]
    assert batch.rows == [3, 0, 1]
    assert batch.num_tokens == first + second + alone
    assert set(batch.inputs()) == {"input_ids", "labels", "position_ids", "label_positions"}


def test_the_flat_form_has_no_padding_and_the_bounds_of_rows(rows: EncodedSet) -> None:
    batch = collate(rows, [[3, 0], [1]], PAD, flash_bounds)
    lengths = [len(rows[i].input_ids) for i in (3, 0, 1)]
    assert batch.input_ids.tolist() == [[*rows[3].input_ids, *rows[0].input_ids, *rows[1].input_ids]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[*chain.from_iterable(map(range, lengths))]]
    given = batch.inputs()
    bounds, longest = given["cu_seq_lens_q"], given["max_length_q"]
    assert isinstance(bounds, Tensor)
    assert bounds.tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds, given["cu_seq_lens_k"])  # type: ignore[arg-type]
    assert longest == given["max_length_k"] == max(lengths)
    assert isinstance(longest, int)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("texts", [True, False])
def test_the_first_label_of_a_row_is_never_learned(tmp_path: Path, bos: bool, texts: bool) -> None:
    given = TEXTS if texts else [{"prompt": "", "completion": row["text"]} for row in TEXTS]
    option = "data=text" if texts else "data=prompt_completion"
    file = write_lines(tmp_path / "rows.jsonl", given)
    _, data, _ = built(option, *only(file), tokenizer=byte_bpe(bos=bos))
    train = data.train
    assert isinstance(train, EncodedSet)
    batch = collate(train, [[0, 1, 2], [3]], PAD)
    assert batch.position_ids is not None
    firsts = (batch.position_ids == 0).nonzero().tolist()
    assert len(firsts) >= 4
    assert all(batch.labels[i, j] == IGNORE_INDEX for i, j in firsts)
    assert batch.num_supervised == batch.num_tokens - 4


# Packed equals padded

SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**SIZES, **HEADS, **SPECIAL}
GPT2 = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, **SPECIAL}
SEPARATE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", LLAMA),
    "GPT-2": ("GPT2Config", {**GPT2, "initializer_range": 0.2}),
    "Qwen 3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "Mistral, sliding": ("MistralConfig", {**LLAMA, "head_dim": 16, "sliding_window": 5}),
}


def model_of(config: str, settings: dict[str, Any], attention: str | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    chosen = {} if attention is None else {"attn_implementation": attention}
    made = getattr(transformers, config)(**settings)
    kind = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(made, **chosen).eval()


def row_losses(
    loss_model: ModelWithLoss, rows: EncodedSet, sequences: Sequences, bounds: RowBounds | None = None
) -> dict[int, float]:
    """Give each row's loss within a batch: the labels of all others are masked."""
    batch = collate(rows, sequences, PAD, bounds)
    losses, here = {}, sequences if bounds is None else [list(chain.from_iterable(sequences))]
    for i, sequence in enumerate(here):
        start = 0
        for row in sequence:
            stop = start + len(rows[row].input_ids)
            labels = torch.full_like(batch.labels, IGNORE_INDEX)
            labels[i, start:stop] = batch.labels[i, start:stop]
            with torch.no_grad():
                fed = batch.inputs() | {"labels": labels, "label_positions": None}
                losses[row] = float(loss_model(**fed).objective)
            start = stop
    return losses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("config", "settings"), SEPARATE.values(), ids=SEPARATE)
def test_a_packed_row_has_the_loss_that_it_has_alone(
    rows: EncodedSet, config: str, settings: dict[str, Any], attention: str
) -> None:
    loss_model = ModelWithLoss(model_of(config, settings, attention)).eval()
    loss_model.probe_head()
    loss_model.check_packing()
    packed = [[0, 5, 9], [3], [7, 1]]
    alone = {row: row_losses(loss_model, rows, [[row]])[row] for row in chain.from_iterable(packed)}
    assert min(alone.values()) > 1
    padded = row_losses(loss_model, rows, [[row] for row in alone])
    assert padded == pytest.approx(alone, rel=1e-5)
    assert row_losses(loss_model, rows, packed) == pytest.approx(alone, rel=1e-5)
    assert row_losses(loss_model, rows, packed, flash_bounds) == pytest.approx(alone, rel=1e-5)


BY_ROWS_TOO = SEPARATE | {
    "Qwen 2": ("Qwen2Config", LLAMA),
    "Gemma": ("GemmaConfig", {**LLAMA, "head_dim": 16}),
    "Gemma 3, sliding": ("Gemma3TextConfig", {**LLAMA, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6}),
    "Phi-3": ("Phi3Config", LLAMA),
    "GPT-NeoX": ("GPTNeoXConfig", {**LLAMA, "intermediate_size": 64}),
    "Mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 2}),
    "Granite": ("GraniteConfig", LLAMA),
    "OPT": ("OPTConfig", {**SIZES, **SPECIAL, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32}),
}


@pytest.mark.parametrize(("config", "settings"), BY_ROWS_TOO.values(), ids=BY_ROWS_TOO)
def test_a_row_attended_to_by_itself_has_the_loss_and_gradient_that_it_has_alone(
    rows: EncodedSet, config: str, settings: dict[str, Any]
) -> None:
    loss_model = ModelWithLoss(model_of(config, settings, "sdpa")).eval()
    loss_model.probe_head()
    batch = [[0], [5], [9], [3], [7]]
    padded = collate(rows, batch, PAD).inputs()
    loss_model(**padded).objective.backward()
    expected = {name: one.grad for name, one in loss_model.named_parameters()}
    losses = row_losses(loss_model, rows, batch)
    loss_model.zero_grad()
    sampler = BatchSampler(Batching.padded, 8, 1, 64, is_padding_free=True)
    assert find_row_bounds(loss_model, sampler, admitted().config) is row_lengths
    assert row_losses(loss_model, rows, batch, row_lengths) == pytest.approx(losses, rel=1e-5)
    loss_model(**collate(rows, batch, PAD, row_lengths).inputs()).objective.backward()
    for name, one in loss_model.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, value in collate(rows, batch, PAD).inputs().items():  # it is sdpa otherwise
        assert torch.equal(value, padded[name])
    assert row_losses(loss_model, rows, batch) == losses


def test_the_default_model_is_one_of_them(rows: EncodedSet) -> None:
    config = admitted().config
    torch.manual_seed(0)
    loss_model = ModelWithLoss(build_model(config, torch.device("cpu"))).eval()
    loss_model.check_packing()
    alone = {row: row_losses(loss_model, rows, [[row]])[row] for row in (2, 4, 6)}
    assert row_losses(loss_model, rows, [[2, 4, 6]]) == pytest.approx(alone, rel=1e-5)


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "Bloom (ALiBi)": ("BloomConfig", {"vocab_size": 264, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "OPT": ("OPTConfig", {**SIZES, **SPECIAL, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32}),
    "Mamba 2": (
        "Mamba2Config",
        {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4}
        | {"head_dim": 16, "n_groups": 1},
    ),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        LLAMA | {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "LFM2 (convolutions)": ("Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention"]}),
    "Jamba (Mamba between attention)": (
        "JambaConfig",
        LLAMA | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2},
    ),
    "GPT-1": ("OpenAIGPTConfig", GPT2),
    "XGLM": (
        "XGLMConfig",
        {"vocab_size": 264, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2} | SPECIAL,
    ),
}


@pytest.mark.parametrize(("config", "settings"), MIXED.values(), ids=MIXED)
def test_a_model_that_lets_packed_rows_see_each_other_is_refused(config: str, settings: dict[str, Any]) -> None:
    settings = {key: value for key, value in settings.items() if key != "initializer_range"}  # as it is by default
    loss_model = ModelWithLoss(model_of(config, settings)).eval()
    with pytest.raises(ModelError, match=r"packed(.|\n)*data\.batching=length_grouped or padded"):
        loss_model.check_packing()
    assert not loss_model.model.training  # as it was


@pytest.mark.parametrize("name", [name for name in MIXED if name != "OPT"])
def test_a_model_that_can_not_be_told_of_rows_is_fed_padded_ones(name: str) -> None:
    config, settings = MIXED[name]
    loss_model = ModelWithLoss(model_of(config, settings)).eval()
    attention = loss_model.model.config._attn_implementation
    sampler = BatchSampler(Batching.padded, 8, 1, 64, is_padding_free=True)
    assert find_row_bounds(loss_model, sampler, admitted().config) is None
    assert loss_model.model.config._attn_implementation == attention


def test_packing_is_refused_before_training(tmp_path: Path, runtime: Runtime) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS[:4])
    config, data, _ = built(*only(file), "data.batching=packed")
    model = model_of(*MIXED["Bloom (ALiBi)"])
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        build_train_state(model, data.train, config, runtime)


class WithoutPositions(torch.nn.Module):
    """A model whose forward knows no position_ids."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of(*SEPARATE["Llama"])
        self.config, self.device = self.inner.config, self.inner.device

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_a_model_without_positions_is_refused_by_its_words() -> None:
    with pytest.raises(ModelError, match=r"WithoutPositions takes no position_ids, so rows can't be packed"):
        ModelWithLoss(WithoutPositions()).check_packing()


def losses(runtime: Runtime, *overrides: str) -> list[float]:
    """Train 20 steps and give the loss of each."""
    config, data, tokenizer = built("training.max_train_steps=20", "optimizer=sgd", "optimizer.lr=0.05", *overrides)
    torch.manual_seed(0)
    state = build_train_state(build_model(config, torch.device("cpu")), data.train, config, runtime)
    return [
        step.pop_metrics()["train/loss"] for step in train(state, data.train, config, runtime, tokenizer.pad_token_id)
    ]


def test_packing_changes_no_loss_of_training(tmp_path: Path, runtime: Runtime) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS[:24])
    whole = [*only(file), "training.per_device_train_batch_size=24", "data.max_seq_length=64"]
    padded, packed, grouped = (
        losses(runtime, *whole, f"data.batching={how}") for how in ("padded", "packed", "length_grouped")
    )
    assert len(padded) == 20
    assert padded[-1] < padded[0] - 0.2
    assert packed == pytest.approx(padded, abs=1e-5)
    assert grouped == pytest.approx(padded, abs=1e-5)
    cut = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=30"]
    assert losses(runtime, *whole, *cut, "data.batching=packed") == pytest.approx(padded, abs=1e-5)


# Encoder-decoder

BART = {"vocab_size": 264, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "init_std": 0.2, **SPECIAL,
}  # fmt: skip
T5 = {"vocab_size": 264, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2} | {
    "decoder_start_token_id": 0, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_factor": 4.0,
}  # fmt: skip
PAIRS = {"BART": ("BartConfig", BART), "T5": ("T5Config", T5)}
ENCODER_DECODER = ["model=causal_lm", "model.type=encoder_decoder", "model.weights=random"]


def pair_options(folder: Path) -> list[str]:
    return [*ENCODER_DECODER, f"model.checkpoint='{folder}'"]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A tiny encoder-decoder: its folder, without weights, and a model."""
    name, settings = PAIRS[request.param]
    return folder_of(tmp_path / "model", name, settings), model_of(name, settings)


def folder_of(folder: Path, config: str, settings: dict[str, Any]) -> Path:
    getattr(transformers, config)(**settings).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(folder)
    return folder


def test_inputs_and_targets_are_padded_each_to_its_longest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "BartConfig", BART)
    given = [{"prompt": "abc", "completion": "x"}, {"prompt": "a", "completion": "xyz"}]
    _, data, tokenizer = built(
        *only(write_lines(tmp_path / "rows.jsonl", given)), *pair_options(folder), "data.max_seq_length=64"
    )
    train = data.train
    assert isinstance(train, EncodedSet)
    batch = collate(train, [[0], [1]], tokenizer.pad_token_id)
    assert batch.target_ids is not None
    assert batch.attention_mask is not None
    assert batch.input_ids.shape == (2, 4)  # BOS and three letters
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.shape == batch.target_ids.shape == (2, 5)  # BOS, three letters, EOS
    assert tokenizer.decode(batch.target_ids[1]) == "<s>xyz</s>"
    assert batch.labels[0].tolist() == [-100, *tokenizer("x")["input_ids"][1:], 2, -100, -100]
    assert batch.labels[1].tolist() == [-100, *tokenizer("xyz")["input_ids"][1:], 2]
    assert (batch.num_supervised, batch.num_tokens) == (6, 4 + 3 + 2 + 5)
    assert set(batch.inputs()) == {"input_ids", "labels", "attention_mask", "target_ids", "label_positions"}


def expected_loss(model: Any, rows: EncodedSet, row: int) -> float:
    """Compute a row's loss by hand, alone and without padding."""
    one = rows[row]
    assert one.target_ids is not None
    targets, labels = torch.tensor([one.target_ids.tolist()]), torch.tensor([one.labels.tolist()])
    read = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), targets[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.input_ids.tolist()]), decoder_input_ids=read).logits
    return float(functional.cross_entropy(logits[0].float(), labels[0], reduction="sum", ignore_index=IGNORE_INDEX))


def batch_of_pairs(tmp_path: Path, folder: Path) -> tuple[EncodedSet, Batch]:
    file = write_lines(tmp_path / "rows.jsonl", ROWS[:6])
    _, data, _ = built(*only(file), *pair_options(folder), "data.max_seq_length=64")
    assert isinstance(data.train, EncodedSet)
    return data.train, collate(data.train, [[i] for i in range(6)], PAD)


def test_an_encoder_decoder_has_the_loss_that_its_library_gives(tmp_path: Path, pair: tuple[Path, Any]) -> None:
    folder, model = pair
    train, batch = batch_of_pairs(tmp_path, folder)
    loss_model = ModelWithLoss(model).eval()
    loss_model.probe_head()
    assert not loss_model.uses_full_logits
    with torch.no_grad():
        ours = float(loss_model(**batch.inputs()).objective)
        assert batch.target_ids is not None
        theirs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=shifted(batch.target_ids, model.config.decoder_start_token_id),
            labels=batch.labels,
        ).loss
    assert ours / batch.num_supervised == pytest.approx(float(theirs), abs=1e-5)
    assert ours == pytest.approx(sum(expected_loss(model, train, row) for row in range(6)), rel=1e-5)


def test_a_shifted_target_is_what_the_library_makes_of_labels(tmp_path: Path) -> None:
    model = model_of("BartConfig", BART)
    _, batch = batch_of_pairs(tmp_path, folder_of(tmp_path / "model", "BartConfig", BART))
    assert batch.target_ids is not None
    learned = torch.where(torch.arange(batch.target_ids.shape[1]) == 0, batch.target_ids, batch.labels)
    theirs = transformers.models.bart.modeling_bart.shift_tokens_right(learned, PAD, 2)
    ours = shifted(batch.target_ids, 2)
    assert torch.equal(ours, theirs)
    assert model.config.decoder_start_token_id == 2


def test_a_bias_behind_the_head_is_seen(tmp_path: Path) -> None:
    model = model_of("BartConfig", BART)
    model.final_logits_bias.normal_()
    train, batch = batch_of_pairs(tmp_path, folder_of(tmp_path / "model", "BartConfig", BART))
    loss_model = ModelWithLoss(model).eval()
    loss_model.probe_head()
    assert loss_model.form is not None
    assert loss_model.form.bias is not None
    with torch.no_grad():
        ours = float(loss_model(**batch.inputs()).objective)
    assert ours == pytest.approx(sum(expected_loss(model, train, row) for row in range(6)), rel=1e-5)


def test_an_encoder_decoder_learns(tmp_path: Path, runtime: Runtime, pair: tuple[Path, Any]) -> None:
    folder, model = pair
    file = write_lines(tmp_path / "rows.jsonl", ROWS[:8])
    options = ["training.max_train_steps=60", "optimizer.lr=5e-3", "training.per_device_train_batch_size=8"]
    config, data, _ = built(
        *only(file), *pair_options(folder), *options, "data.max_seq_length=64", "data.batching=length_grouped"
    )
    assert build_batch_sampler(config, data.train).batching is Batching.length_grouped
    state = build_train_state(model, data.train, config, runtime)
    found = [step.pop_metrics()["train/loss"] for step in train(state, data.train, config, runtime, PAD)]
    assert found[-1] < found[0] / 2


@pytest.mark.parametrize("generation", ["greedy", "beam"])
def test_generation_does_not_depend_on_the_batch(
    tmp_path: Path, runtime: Runtime, pair: tuple[Path, Any], generation: str
) -> None:
    folder, model = pair
    file = write_lines(tmp_path / "rows.jsonl", ROWS[:7])
    beams = ["generation.num_beams=3"] if generation == "beam" else []
    config, data, tokenizer = built(
        *only(file), *pair_options(folder), "data.max_seq_length=64", "generation.max_new_tokens=12", *beams
    )
    train = data.train
    assert isinstance(train, EncodedSet)
    prompts = [train.prompt_ids(i) for i in range(7)]
    assert len({len(prompt) for prompt in prompts}) > 3
    assert prompts == [train[i].input_ids.tolist() for i in range(7)]
    set_generation(model, config.generation, tokenizer, data.stop_ids)
    found = [
        Generator(model, runtime, size, data.encoder.target_prefix).generate(prompts, seed=1) for size in (1, 7, 3)
    ]
    assert found[0] == found[1] == found[2]
    assert len({tuple(completion.ids) for completion in found[0]}) > 1
    assert all(0 < len(completion.ids) <= 12 for completion in found[0])
    assert not model.training


def test_what_was_learned_is_generated(tmp_path: Path, runtime: Runtime) -> None:
    folder = folder_of(tmp_path / "model", "BartConfig", BART)
    rows = [{"prompt": "a", "completion": "xyz"}, {"prompt": "bbbbb", "completion": "q"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    options = ["training.max_train_steps=60", "optimizer.lr=5e-3", "data.max_seq_length=64", "scheduler=constant"]
    config, data, tokenizer = built(*only(file), *pair_options(folder), *options)
    model = model_of("BartConfig", BART | {"dropout": 0.0})
    set_generation(model, config.generation, tokenizer, data.stop_ids)
    state = build_train_state(model, data.train, config, runtime)
    for _ in train(state, data.train, config, runtime, PAD):
        pass
    generator = Generator(model, runtime, 2, data.encoder.target_prefix)
    assert isinstance(data.train, EncodedSet)
    found = generator.generate([data.train.prompt_ids(i) for i in range(2)], seed=1)
    assert [data.encoder.decode(completion.ids) for completion in found] == ["xyz", "q"]
    assert [completion.stop_reason for completion in found] == ["eos", "eos"]


def test_an_encoder_decoder_runs_to_its_end(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "BartConfig", BART)
    run = towline(
        *pair_options(folder),
        "debug=smoke",
        "data.max_seq_length=64",
        "data.max_target_length=100",
        "tracking=none",
        f"data.cache_dir='{tmp_path / 'cache'}'",
        f"hydra.run.dir='{tmp_path / 'run'}'",
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.is_encoder_decoder


def test_targets_longer_than_the_decoder_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "BartConfig", BART | {"max_position_embeddings": 64})
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "x" * 200}] * 4)
    run = towline(
        *pair_options(folder),
        *only(file),
        "tokens=none",
        "data.max_seq_length=64",
        "data.max_target_length=256",
        "generation.max_new_tokens=16",
        "training.max_train_steps=1",
        "tracking=none",
        f"data.cache_dir='{tmp_path / 'cache'}'",
        f"hydra.run.dir='{tmp_path / 'run'}'",
    )
    assert "Traceback" not in run.stderr
    assert run.returncode == 2
    assert "max_target_length" in run.stderr
