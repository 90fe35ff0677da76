"""Train sets of several sources, and those that are read while training: exact shares, no row lost or counted twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from src.config.schema import Batching
from src.data import preparation, stream
from src.data.batching import BatchSampler, windows
from src.data.dataset import Data, TrainSet, build_data
from src.data.formats.dialogue_summary import clean
from src.data.report import SplitReport
from src.data.sets import EncodedSet
from src.data.splits import interleave, sample_counts
from src.data.stream import StreamedSet
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError
from tests.conftest import FORKS, admitted, read_lines, towline, write_lines

# How many rows of each source, and which


@pytest.mark.parametrize(
    ("sizes", "weights", "counts", "taken"),
    [
        ([100, 100], [0.7, 0.3], [None, None], [100, 42]),
        ([100, 100], [7, 3], [None, None], [100, 42]),
        ([10, 1000], [0.5, 0.5], [None, None], [10, 10]),
        ([10, 1000], [0.1, 0.9], [None, None], [10, 90]),
        ([300, 200, 100], [3, 2, 1], [None, None, None], [300, 200, 100]),
        ([7, 7], [1e-9, 1], [None, None], [0, 7]),
        ([5, 0], [1, 1], [None, None], [0, 0]),
        ([5], [3], [None], [5]),
        ([5, 6], [None, None], [None, None], [5, 6]),
        ([5, 6], [None, None], [12, None], [12, 6]),
        ([5, 6], [None, None], [2, 6], [2, 6]),
    ],
)
def test_how_many_rows_are_taken(
    sizes: list[int], weights: list[float | None], counts: list[int | None], taken: list[int]
) -> None:
    assert sample_counts(sizes, weights, counts) == taken


def test_rows_are_chosen_and_interleaved_by_seed() -> None:
    sources = [np.arange(100, 130), np.arange(200, 205)]
    mixed = interleave(sources, [20, 12], seed=3)
    assert mixed.shape == (32, 2)
    of_first, of_second = (mixed[mixed[:, 0] == i, 1] for i in (0, 1))
    assert len(set(of_first.tolist())) == 20
    assert (np.diff(of_first) > 0).all()
    assert of_second[:10].tolist() == [*range(200, 205)] * 2
    assert sorted(Counter(of_second.tolist()).values()) == [2, 2, 2, 3, 3]
    assert 0 < mixed[:16, 0].sum() < 12
    assert np.array_equal(interleave(sources, [20, 12], seed=3), mixed)
    assert not np.array_equal(interleave(sources, [20, 12], seed=4), mixed)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(some.lists(some.tuples(some.integers(1, 30), some.integers(0, 70)), min_size=1, max_size=4), some.integers(0, 9))
def test_every_row_comes_as_often_as_any_other_or_once_more(sources: list[tuple[int, int]], seed: int) -> None:
    mixed = interleave([np.arange(size) for size, _ in sources], [count for _, count in sources], seed)
    for number, (size, count) in enumerate(sources):
        times = np.bincount(mixed[mixed[:, 0] == number, 1], minlength=size)
        assert times.sum() == count
        assert times.max() - times.min() <= 1


# A mixture of files


def as_override(value: Any) -> str:
    """Write a value as Hydra's grammar has it."""
    match value:
        case dict():
            return f"{{{','.join(f'{key}:{as_override(one)}' for key, one in value.items())}}}"
        case list():
            return f"[{','.join(map(as_override, value))}]"
        case str():
            return f"'{value}'"
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def mixture(**sources: dict[str, Any]) -> str:
    return f"data.mixture={as_override(sources)}"


def built(*overrides: str) -> Data:
    option = [] if any(override.startswith("data=") for override in overrides) else ["data=prompt_completion"]
    config = admitted(*option, "tokens=none", "data.cache_dir=null", *overrides).config
    return build_data(config, load_tokenizer(config.model, config.tokens)[0])


def whole(rows: TrainSet) -> EncodedSet:
    assert isinstance(rows, EncodedSet)
    return rows


def prompts(rows: TrainSet) -> list[str]:
    return [whole(rows).prompt(i) for i in range(len(whole(rows)))]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """Write rows whose prompts begin with the source's name; the last ones can be too long."""

    def write(name: str, count: int, too_long: int = 0) -> str:
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count - too_long)]
        rows += [{"prompt": f"{name}{i}" + "y" * 99, "completion": "x"} for i in range(count - too_long, count)]
        return write_lines(tmp_path / f"{name}.jsonl", rows)

    return write


def check_account(report: SplitReport, rows: EncodedSet) -> None:
    assert report.rows_kept == len(rows) == report.rows_read - report.rows_dropped.total() + report.rows_repeated
    assert report.tokens == rows.lengths.sum()
    assert report.supervised_tokens == rows.supervised_lengths().sum()
    json.dumps(report.as_dict())


def test_weights_give_exact_proportions_and_no_row_twice(make: Callable[..., str]) -> None:
    sources = {
        "a": {"train_files": [make("a", 50)], "weight": 0.7},
        "b": {"train_files": [make("b", 50)], "weight": 0.3},
    }
    data = built(mixture(**sources))
    report = data.reports["train"]
    assert report.sources == {"a": 50, "b": 21}
    assert Counter(prompt[0] for prompt in prompts(data.train)) == {"a": 50, "b": 21}
    assert len(set(prompts(data.train))) == 71
    assert (report.rows_read, report.rows_repeated, dict(report.rows_dropped)) == (100, 0, {"not_in_mixture": 29})
    assert "mixed of a 50, b 21" in report.summary
    check_account(report, whole(data.train))


def test_counts_repeat_and_choose(make: Callable[..., str]) -> None:
    sources = {"a": {"train_files": [make("a", 10)], "count": 25}, "b": {"train_files": [make("b", 40)], "count": 15}}
    data = built(mixture(**sources, c={"train_files": [make("c", 3)]}))
    report, times = data.reports["train"], Counter(prompts(data.train))
    assert report.sources == {"a": 25, "b": 15, "c": 3}
    assert sorted(times[f"a{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert sum(times[f"b{i}"] == 1 for i in range(40)) == 15
    assert report.rows_repeated == 15
    assert dict(report.rows_dropped) == {"not_in_mixture": 25}
    check_account(report, whole(data.train))


@pytest.mark.parametrize("limit", [7, 19, 1000])
@pytest.mark.parametrize("share", ["weight", "count", None])
def test_a_mixture_accounts_for_every_row(make: Callable[..., str], share: str | None, limit: int) -> None:
    own: list[dict[str, Any]] = [{}, {}] if share is None else [{share: 30}, {share: 10}]
    sources = {"a": {"train_files": [make("a", 20, 2)]} | own[0], "b": {"train_files": [make("b", 20, 1)]} | own[1]}
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.1"]
    data = built(mixture(**sources), *cut, "data.validation_fraction=0.25", f"data.limit={limit}")
    train, validation = whole(data.train), data.validation["validation"]
    for rows in (train, validation):
        check_account(data.reports[rows.name], rows)
    report = data.reports["train"]
    both = report.rows_dropped + data.reports["validation"].rows_dropped
    assert both["too_long"] == {7: 0, 19: 1, 1000: 3}[limit]
    assert report.rows_read + data.reports["validation"].rows_read == 2 * min(limit, 20)
    assert data.reports["validation"].rows_read == 2 * round(0.25 * min(limit, 20))
    assert not set(prompts(train)) & set(prompts(validation))
    assert len(train) == sum(report.sources.values())
    assert (report.rows_repeated > 0) == (share == "count")
    assert {prompt[0] for prompt in prompts(validation)} == {"a", "b"}


def test_a_source_has_a_format_and_columns_of_its_own(tmp_path: Path, make: Callable[..., str]) -> None:
    turns = [{"role": "user", "content": "chat"}, {"role": "assistant", "content": "yes"}]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 3)
    asked = write_lines(tmp_path / "asked.jsonl", [{"q": "why", "response": "so"}] * 2)
    sources: dict[str, Any] = {
        "pairs": {"train_files": [make("p", 4)]},
        "chats": {"train_files": [chats], "format": "messages"},
        "asked": {
            "train_files": [asked],
            "format": "query_response",
            "columns": {"query": "q", "response": "response"},
        },
        "lines": {"train_files": [make("t", 1)], "format": "text", "columns": {"text": "prompt"}},
    }
    data = built(mixture(**sources), "data.prompt_template='<{prompt}>'")
    assert data.reports["train"].sources == {"pairs": 4, "chats": 3, "asked": 2, "lines": 1}
    found = Counter(prompts(data.train))
    assert found == {
        **{f"<p{i}>": 1 for i in range(4)},
        "<s>User:\nchat\n\nAssistant:\n": 3,
        "question : why answer : ": 2,
        "": 1,
    }
    assert data.uses_fallback_template
    learned = {whole(data.train).completion(i) for i in range(10)}
    assert learned == {"x", "yes</s>", "so", "t0"}


def test_the_same_seed_mixes_the_same(make: Callable[..., str]) -> None:
    sources = {"a": {"train_files": [make("a", 30)], "weight": 2}, "b": {"train_files": [make("b", 30)], "weight": 1}}
    runs = [built(mixture(**sources), f"seed={seed}") for seed in (1, 1, 2)]
    first, again, other = (prompts(run.train) for run in runs)
    assert first == again != other
    assert Counter(prompt[0] for prompt in first) == Counter(prompt[0] for prompt in other)
    digests = [run.reports["train"].digest for run in runs]
    assert digests[0] == digests[1] != digests[2]


def test_a_bad_row_or_an_empty_source_is_told_by_its_source(tmp_path: Path, make: Callable[..., str]) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": 3, "completion": "x"}])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    for file, words in ((bad, f"{bad}:1  'prompt' is a number"), (empty, f"second has no rows: {empty}")):
        with pytest.raises(DataError) as caught:
            built(mixture(first={"train_files": [make("a", 9)]}, second={"train_files": [file]}))
        assert words in str(caught.value)


def test_a_source_that_is_held_out_as_a_whole_is_no_crash(make: Callable[..., str]) -> None:
    sources = {"a": {"train_files": [make("a", 2, 1)], "count": 3}, "b": {"train_files": [make("b", 9)], "count": 3}}
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.5"]
    for seed in range(4):
        with suppress(DataError):
            data = built(mixture(**sources), *cut, "data.validation_fraction=0.3", f"seed={seed}")
            check_account(data.reports["train"], whole(data.train))


# What the gate refuses

F = "data/tow_addition/test.jsonl"
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "with train_files": (
        [f"data.train_files=['{F}']", mixture(a={"train_files": [F]})],
        ["data.mixture", "not together with data.train_files"],
    ),
    "no mapping": (["data.mixture=[a,b]"], ["data.mixture", "not a mapping from a source's name to its keys"]),
    "no keys": (["data.mixture={a:1}"], ["data.mixture", "not a mapping from a source's name to its keys"]),
    "name": (["data.mixture={a+b:{train_files:[" + F + "]}}"], ["a source's name may have letters, digits"]),
    "typo": (
        [mixture(a={"train_files": [F], "wieght": 1})],
        ["data.mixture.a.wieght", "did you mean data.mixture.a.weight?"],
    ),
    "unknown": (
        [mixture(a={"train_files": [F], "zzz": 1})],
        ["data.mixture.a.zzz", "data.mixture.a has", "train_files, dataset_n"],
    ),
    "not for a source": ([mixture(a={"train_files": [F], "max_seq_length": 9})], ["data.mixture.a.max_seq_length"]),
    "no rows": ([mixture(a={"weight": 1})], ["data.mixture.a", "no rows: give it train_files or dataset_name"]),
    "no list": ([mixture(a={"train_files": [3]})], ["data.mixture.a.train_files", "not a file, a glob or a fol"]),
    "no file": ([mixture(a={"train_files": ["none.jsonl"]})], ["data.mixture.a.train_files", "no such file"]),
    "no kind": ([mixture(a={"train_files": ["Makefile"]})], ["not a kind that is read"]),
    "no glob": ([mixture(a={"train_files": ["none*.jsonl"]})], ["matches no file"]),
    "weight 0": ([mixture(a={"train_files": [F], "weight": 0})], ["data.mixture.a.weight", "not a number above 0"]),
    "weight a text": (
        [mixture(a={"train_files": [F], "weight": "x"})],
        ["data.mixture.a.weight", "not a number or null"],
    ),
    "count 0": ([mixture(a={"train_files": [F], "count": 0})], ["data.mixture.a.count", "whole number of at least 1"]),
    "count 1.5": (
        [mixture(a={"train_files": [F], "count": 1.5})],
        ["data.mixture.a.count", "not a whole number or null"],
    ),
    "turns": (
        [mixture(a={"train_files": [F], "format": "messages", "supervised_turns": "first"})],
        ["data.mixture.a.supervised_turns", "not one of all, last"],
    ),
    "some weights": (
        [mixture(a={"train_files": [F], "weight": 1}, b={"train_files": [F]})],
        ['data.mixture = ["b"]', "a weight for each source, or for none"],
    ),
    "both": (
        [mixture(a={"train_files": [F], "weight": 1}, b={"train_files": [F], "count": 1})],
        ["weights (proportions) or counts (rows), not both"],
    ),
    "format": (
        [mixture(a={"train_files": [F], "format": "mesages"})],
        ["data.mixture.a.format", "did you mean messages?"],
    ),
    "columns": (
        [mixture(a={"train_files": [F], "format": "messages", "columns": {"prompt": "x"}})],
        ["data.mixture.a.columns", "format messages has messages", "needs a column for messages"],
    ),
    "template": (
        [mixture(a={"train_files": [F], "prompt_template": "{query}"})],
        ["data.mixture.a.prompt_template", "unknown placeholder {query}"],
    ),
    "stream, no end": ([f"data.train_files=['{F}']", "data.streaming=true"], ["training.max_train_steps", "needed wi"]),
    "stream, held out": (
        [
            f"data.train_files=['{F}']",
            "data.streaming=true",
            "training.max_train_steps=1",
            "data.validation_fraction=0.1",
        ],
        ["data.validation_fraction", "can't hold out rows of a stream"],
    ),
    "stream, no share": (
        [mixture(a={"train_files": [F]}), "data.streaming=true", "training.max_train_steps=1"],
        ["data.mixture.a", "a streamed source needs a weight or a count"],
    ),
    "cleaning": (
        [f"data.train_files=['{F}']", "data.clean_dialogue=true"],
        ["data.clean_dialogue", "only format dialogue_summary cleans its dialogue"],
    ),
    "cleaning a source": (
        [mixture(a={"train_files": [F], "clean_dialogue": True})],
        ["data.mixture.a.clean_dialogue", "only format dialogue_summary"],
    ),
    "text as chat": (
        ["data=text", f"data.train_files=['{F}']", "data.system_prompt=Hi"],
        ["data.system_prompt", "format text is no chat"],
    ),
    "a source's text as chat": (
        [mixture(a={"train_files": [F], "format": "text", "system_prompt": ""})],
        ["data.mixture.a.system_prompt", "format text is no chat"],
    ),
    "packed pairs": (
        ["model.type=encoder_decoder", f"data.train_files=['{F}']", "data.batching=packed"],
        ["data.batching", "an encoder-decoder takes padded or length_grouped"],
    ),
    "text to read": (
        ["model.type=encoder_decoder", "data=text", f"data.train_files=['{F}']"],
        ["data.format", "an encoder-decoder needs something to read"],
    ),
    "several turns": (
        ["model.type=encoder_decoder", mixture(a={"train_files": [F], "format": "messages"})],
        ["data.mixture.a.supervised_turns", "an encoder-decoder writes one turn: data.supervised_turns=last"],
    ),
    "nothing": ([], ["data.train_files", "no training data"]),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_the_gate_refuses(overrides: list[str], words: list[str]) -> None:
    option = [] if any(override.startswith("data=") for override in overrides) else ["data=prompt_completion"]
    with pytest.raises(ConfigError) as caught:
        admitted(*option, *overrides)
    for one in words:
        assert one in str(caught.value)


def test_the_gate_takes_good_mixtures() -> None:
    admitted(
        "data=prompt_completion",
        mixture(
            a={"train_files": [F], "weight": 1},
            b={"train_files": ["data/tow_addition/*.jsonl"], "weight": 0.5, "format": "messages"},
            c={"dataset_name": "some/thing", "train_split": "train[:5%]", "weight": 2},
        ),
        "data.streaming=true",
        "training.max_train_steps=1",
    )


# Streaming

STREAMED = ["data.streaming=true", "training.max_train_steps=9"]


def streamed(*overrides: str) -> StreamedSet:
    train = built(*STREAMED, *overrides).train
    assert isinstance(train, StreamedSet)
    return train


def epochs_of(rows: TrainSet, plan: BatchSampler, count: int, seed: int = 1) -> list[list[str]]:
    """Give the prompts of the first epochs, in their order."""
    found: list[list[str]] = [[]]
    for window in windows(rows, plan, seed):
        assert window.epoch == len(found) - 1
        assert 1 <= len(window.micro_batches) <= plan.micro_batches_per_step
        assert window.ends_epoch or len(window.micro_batches) == plan.micro_batches_per_step
        for block, sequences in window.micro_batches:
            found[-1] += [block.prompt(row) for sequence in sequences for row in sequence]
        if window.ends_epoch:
            if len(found) == count:
                return found
            found.append([])
    raise AssertionError("windows never end")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 20)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batching", list(Batching))
@pytest.mark.parametrize(("size", "accumulation"), [(4, 2), (7, 1), (100, 3), (1, 1)])
@pytest.mark.parametrize("count", [57, 40, 1])
def test_a_stream_gives_every_row_once_an_epoch(
    make: Callable[..., str], batching: Batching, size: int, accumulation: int, count: int
) -> None:
    rows = streamed(f"data.train_files=['{make('a', count)}']")
    first, second = epochs_of(rows, BatchSampler(batching, size, accumulation, max_tokens=64), 2)
    assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(count))
    if count > 1:
        assert first != second
        assert epochs_of(rows, BatchSampler(batching, size, accumulation, max_tokens=64), 1) == [first]
        assert epochs_of(rows, BatchSampler(batching, size, accumulation, max_tokens=64), 1, seed=2) != [first]
    if count == 57 and batching is not Batching.packed:  # shuffled within blocks
        assert {int(prompt[1:]) for prompt in first[:20]} == set(range(20))


@pytest.mark.usefixtures("small_blocks")
def test_a_streamed_row_is_the_row_that_is_kept_otherwise(make: Callable[..., str]) -> None:
    files = f"data.train_files=['{make('a', 33)}','{make('b', 4)}']"
    blocks = list(streamed(files).blocks())
    kept = whole(built(files).train)
    assert [len(block) for block in blocks] == [20, 17]
    given = [(block, i) for block in blocks for i in range(len(block))]
    for number, (block, i) in enumerate(given):
        assert block.place(i) == kept.place(number)
        assert block[i].input_ids.tolist() == kept[number].input_ids.tolist()
        assert block[i].labels.tolist() == kept[number].labels.tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("limit", [1, 10, 25, 40, 57, 1000])
def test_a_limit_holds_for_an_epoch_of_a_stream(make: Callable[..., str], limit: int) -> None:
    rows = streamed(f"data.train_files=['{make('a', 57)}']", f"data.limit={limit}")
    for epoch in epochs_of(rows, BatchSampler(Batching.padded, 4, 2, 64), 2):
        assert sorted(epoch) == sorted(f"a{i}" for i in range(min(limit, 57)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk_bytes", [2**20, 500, 1])
def test_a_streamed_mixture_takes_chunks_by_share(
    make: Callable[..., str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "CHUNK_BYTES", chunk_bytes)  # rows of one chunk, of three or so, of one each
    sources = {
        "a": {"train_files": [make("a", 35)], "weight": 0.7},
        "b": {"train_files": [make("b", 60)], "weight": 0.3},
    }
    blocks = list(streamed(mixture(**sources)).blocks())
    given = [block.prompt(i) for block in blocks for i in range(len(block))]
    times = Counter(given)
    assert len(times) == 95  # no row of the larger source is left out; the smaller one begins again
    assert {times[f"b{i}"] for i in range(60)} == {1}
    assert {times[f"a{i}"] for i in range(35)} == {4, 5}
    for start in range(0, 200, 10):
        assert Counter(prompt[0] for prompt in given[start : start + 10]) == {"a": 7, "b": 3}
    assert given[:10] == [*(f"a{i}" for i in range(7)), *(f"b{i}" for i in range(3))]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk_bytes", [500, 1])
def test_long_rows_are_streamed_in_small_blocks_that_can_be_read_again(
    make: Callable[..., str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1500)
    files = f"data.train_files=['{make('a', 57)}']"
    found = [(block.begin, prompts(block.rows)) for block in streamed(files).read()]
    assert [prompt for _, rows in found for prompt in rows] == [f"a{i}" for i in range(57)]
    assert {len(rows) for _, rows in found[:-1]} < set(range(1, 20))  # fewer than BLOCK_ROWS
    for i, (begin, _) in enumerate(found):
        again = streamed(files).read(begin)
        assert [prompts(block.rows) for block in again] == [rows for _, rows in found[i:]]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_streamed_mixture_gives_the_rows_that_were_counted(make: Callable[..., str], order: str) -> None:
    sources = {"a": {"train_files": [make("a", 90)], "count": 33}, "b": {"train_files": [make("b", 90)], "count": 67}}
    rows = streamed(mixture(**{name: sources[name] for name in order}))
    (given,) = epochs_of(rows, BatchSampler(Batching.padded, 8, 1, 64), 1)
    assert Counter(prompt[0] for prompt in given) == {"a": 33, "b": 67}


@pytest.mark.usefixtures("small_blocks")
def test_a_streamed_source_without_rows_is_told(tmp_path: Path, make: Callable[..., str]) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"no rows: .*empty\.jsonl"):
        streamed(f"data.train_files=['{empty}']")
    for order in (("a", "b"), ("b", "a")):
        sources = {"a": {"train_files": [make("a", 9)], "weight": 1}, "b": {"train_files": [empty], "weight": 1}}
        with pytest.raises(DataError, match=r"no rows: .*empty\.jsonl"):
            streamed(mixture(**{name: sources[name] for name in order}))


@pytest.mark.usefixtures("small_blocks")
def test_a_bad_row_stops_a_stream_by_its_place(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"a{i}", "completion": "x"} for i in range(60)]
    rows[44] = {"prompt": None, "completion": "x"}
    file = write_lines(tmp_path / "rows.jsonl", rows)
    train = streamed(f"data.train_files=['{file}']")
    seen = 0
    with pytest.raises(DataError, match=r"1 row can't be used:\n  .*rows\.jsonl:45  'prompt' is null"):
        for window in windows(train, BatchSampler(Batching.padded, 4, 1, 64), 1):
            seen += len(window.micro_batches)
    assert seen == 9  # of 40 good rows; whether the tenth window is whole is not known yet
    rows[4] = rows[44]
    with pytest.raises(DataError, match=r"rows\.jsonl:5  'prompt' is null"):
        streamed(f"data.train_files=['{write_lines(tmp_path / 'rows.jsonl', rows)}']")


@pytest.mark.usefixtures("small_blocks")
def test_too_many_dropped_rows_stop_a_stream(make: Callable[..., str]) -> None:
    cut = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.1"]
    train = streamed(f"data.train_files=['{make('a', 60, 15)}']", *cut)
    with pytest.raises(
        DataError, match=r"train: 15 of the first 60 rows would be dropped, more than data\.max_dropped_f"
    ):
        epochs_of(train, BatchSampler(Batching.padded, 4, 1, 64), 1)
    with pytest.raises(DataError, match=r"9 of the first 9 rows|5 of the first"):
        streamed(f"data.train_files=['{make('b', 9, 5)}']", *cut)


@pytest.mark.usefixtures("small_blocks")
def test_worker_processes_stream_the_same(make: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda _: FORKS)  # which need not import anything
    file = f"data.train_files=['{make('a', 57)}']"
    plan = BatchSampler(Batching.padded, 4, 2, 64)
    assert epochs_of(streamed(file, "data.preprocessing_num_workers=2"), plan, 1) == epochs_of(streamed(file), plan, 1)


@pytest.mark.usefixtures("small_blocks")
def test_a_stream_is_accounted_for_as_far_as_its_first_block(make: Callable[..., str]) -> None:
    data = built(*STREAMED, f"data.train_files=['{make('a', 57)}']")
    report = data.reports["train"]
    assert report.is_streamed
    assert (report.rows_read, report.rows_kept) == (20, 20)
    assert report.summary.startswith("streamed; of the first 20 of 20 rows")
    assert len(data.for_samples()) == 20


def test_a_streamed_run_ends_well(tmp_path: Path) -> None:
    run = towline("debug=smoke", "data.streaming=true", "tracking=none", f"hydra.run.dir='{tmp_path / 'run'}'")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["is_streamed"]
    assert report["train"]["rows_kept"] == 16
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["step"] == 4
    assert "eval/validation/loss" in metrics[-1]


# Folders, globs and the library's data sets


def test_globs_and_folders_give_their_files_in_order(tmp_path: Path, make: Callable[..., str]) -> None:
    for name in "ca":
        make(name, 2)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").write_text("prompt,completion\nb0,x\nb1,x\n")
    glob, folder = f"{tmp_path}/?.jsonl", f"{tmp_path}/more"
    assert prompts(built(f"data.train_files=['{glob}']").train) == ["a0", "a1", "c0", "c1"]
    assert prompts(built(f"data.train_files=['{folder}','{glob}']").train) == ["b0", "b1", "a0", "a1", "c0", "c1"]
    assert prompts(built(f"data.train_files=['{tmp_path}']").train) == ["a0", "a1", "c0", "c1", "b0", "b1"]
    mixed = built(mixture(all={"train_files": [glob]}, more={"train_files": [folder]}))
    assert sorted(prompts(mixed.train)) == ["a0", "a1", "b0", "b1", "c0", "c1"]


@pytest.fixture(params=["jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that datasets.load_dataset reads: 20 rows to train on, 5 to validate."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    where = tmp_path / "corpus"
    where.mkdir()
    for split, count in (("train", 20), ("validation", 5)):
        write_split(where / f"{split}.{request.param}", [f"{split}{i}" for i in range(count)])
    return where


def write_split(file: Path, texts: list[str]) -> None:
    rows = [{"prompt": text, "completion": "x"} for text in texts]
    if file.suffix == ".jsonl":
        write_lines(file, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_a_data_set_of_the_library_is_read_offline(folder: Path) -> None:
    options = [f"data.dataset_name='{folder}'", "data.validation_split=validation"]
    data = built(*options)
    assert prompts(data.train) == [f"train{i}" for i in range(20)]
    assert prompts(data.validation["validation"]) == [f"validation{i}" for i in range(5)]
    assert whole(data.train).place(3) == f"{folder}/train:4"
    part = built(*options, "data.train_split='train[5:8]'", "data.limit=2")
    assert prompts(part.train) == ["train5", "train6"]
    assert prompts(part.validation["validation"]) == ["validation0", "validation1"]


def test_a_data_set_of_the_library_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 6)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 3)
    data = built(*STREAMED, f"data.dataset_name='{folder}'", "data.validation_split=validation")
    for epoch in epochs_of(data.train, BatchSampler(Batching.padded, 4, 2, 64), 2):
        assert sorted(epoch) == sorted(f"train{i}" for i in range(20))
    digest = data.train.digest()
    assert digest == built(*STREAMED, f"data.dataset_name='{folder}'").train.digest()
    (train,) = folder.glob("train.*")
    write_split(train, [f"other{i}" for i in range(20)])
    assert digest != data.train.digest()
    assert prompts(data.validation["validation"]) == [f"validation{i}" for i in range(5)]


def test_a_data_set_of_the_library_is_found_in_the_cache_until_it_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.data import cache

    times = []
    encode_chunks = cache.encode_chunks
    monkeypatch.setattr(cache, "encode_chunks", lambda *given: times.append(1) or encode_chunks(*given))
    options = [f"data.dataset_name='{folder}'", f"data.cache_dir='{tmp_path / 'rows'}'"]
    first = prompts(built(*options).train)
    assert prompts(built(*options).train) == first
    assert len(times) == 1
    (train,) = folder.glob("train.*")
    write_split(train, [f"other{i}" for i in range(20)])
    assert prompts(built(*options).train) == [f"other{i}" for i in range(20)]


def test_a_data_set_is_a_source_of_a_mixture(folder: Path, make: Callable[..., str]) -> None:
    data = built(mixture(hub={"dataset_name": str(folder), "count": 30}, own={"train_files": [make("a", 4)]}))
    assert data.reports["train"].sources == {"hub": 30, "own": 4}
    assert data.reports["train"].rows_repeated == 10
    check_account(data.reports["train"], whole(data.train))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.train_split=tests"], ["split tests", "can't be loaded", "data.train_files=[FILE]"]),
        (["data.train_split='train[x:]'"], ["can't be loaded"]),
        (["data.dataset_config_name=other"], ["(other, split train) can't be loaded"]),
        (["data.columns.prompt=q"], ["20 rows can't be used", "/train:1  no field 'q'"]),
        ([*STREAMED, "data.train_split='train[:5]'"], ["can't be loaded"]),
    ],
)
def test_what_the_library_can_not_give_is_told(folder: Path, options: list[str], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        built(f"data.dataset_name='{folder}'", *options)
    for one in words:
        assert one in str(caught.value)


def test_files_are_read_instead_of_the_library(make: Callable[..., str]) -> None:
    data = built("data=gsm8k", f"data.train_files=['{make('a', 4)}']", "data.validation_fraction=0",
        "data.columns={question:prompt,answer:completion}")  # fmt: skip
    assert len(whole(data.train)) == 4
    assert data.validation == {}


# Cleaning

CLEANED = {
    "A: hi\r\nB: yo\rC": "A: hi\nB: yo\nC",
    "A: hi\\nB: yo\\r\\nC": "A: hi\nB: yo\nC",
    "a\u2028b\u2029c\x0bd\x0ce": "a\nb\nc\nd\ne",
    "  a \t b\u00a0\u3000c  ": "a b c",
    "a  \n\n \t\n  b\n": "a\nb",
    "what?? no!!! ,, ;; :: ~~~~ ok": "what? no! , ; : ~ ok",
    "wait.... what.. …": "wait... what.. ...",
    "a……b": "a...b",
    "so...…. and …... and ..…": "so... and ... and ...",
    "3.14, 'x', --- == #Person1#: \"안녕\" (ㅋㅋㅋ) aaa": "3.14, 'x', --- == #Person1#: \"안녕\" (ㅋㅋㅋ) aaa",
    "": "",
    " \n ": "",
}


@pytest.mark.parametrize("text", CLEANED)
def test_cleaning_by_example(text: str) -> None:
    assert clean(text) == CLEANED[text]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(some.text(some.sampled_from("ab.…!?,;:~ \n\r\t\\rn\u2028\x0b\x0c\x1f\x85\u00a0"), max_size=12))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned


@settings(derandomize=True, deadline=None, max_examples=300)
@given(some.text(max_size=30).filter(lambda text: "\\" not in text))
def test_cleaning_touches_no_word(text: str) -> None:
    def letters(given: str) -> list[str]:
        return [character for character in given if character.isalnum()]

    assert letters(clean(text)) == letters(text)


def test_cleaning_is_off_unless_asked_for_and_counted(tmp_path: Path) -> None:
    rows = [{"dialogue": "A: hi!!\\nB: yo", "summary": "Greeting!!"}, {"dialogue": "A: ok", "summary": "Fine."}]
    options = ["data=dialogue_summary", f"data.train_files=['{write_lines(tmp_path / 'rows.jsonl', rows)}']"]
    plain = built(*options)
    assert plain.reports["train"].rows_cleaned == 0
    assert prompts(plain.train)[0] == "A: hi!!\\nB: yo\n\nSummary:\n"
    cleaned = built(*options, "data.clean_dialogue=true")
    assert cleaned.reports["train"].rows_cleaned == 1
    assert prompts(cleaned.train) == ["A: hi!\nB: yo\n\nSummary:\n", "A: ok\n\nSummary:\n"]
    assert whole(cleaned.train).completion(0) == "Greeting!!"
    again = built("data=prompt_completion", mixture(
        a={"train_files": [str(tmp_path / "rows.jsonl")], "format": "dialogue_summary", "clean_dialogue": True}
    ))  # fmt: skip
    assert again.reports["train"].rows_cleaned == 1
