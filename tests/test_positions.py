"""Positions: going on from one gives the very windows that would have come, without making the rows before it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from src.config.schema import Batching
from src.data import stream
from src.data.batching import BatchSampler, Position, Window, windows
from src.data.dataset import TrainSet, build_data
from src.data.encoding import Encoder
from src.data.sets import EncodedSet
from src.data.stream import StreamedSet
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from tests.conftest import FORKS, admitted, write_lines

SEED = 7
PLANS = [(batching, accumulation) for batching in Batching for accumulation in (1, 4)]
OTHER_CUTS = [(1, 1), (2, 3), (7, 1), (64, 2)]
REGARDLESS_OF_SIZE = [Batching.padded, Batching.packed]
ROWS = [{"prompt": "ab" * (i * 7 % 11) + "=", "completion": "xyz"[: 1 + i % 3] * (1 + i * 5 % 9)} for i in range(31)]
STREAMED = ["data.streaming=true", "training.max_train_steps=9"]
CUT = ["data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.7"]


def builder(*overrides: str) -> Callable[[], TrainSet]:
    """Give what builds the train set anew each time, as another process would."""
    config = admitted("data=prompt_completion", "tokens=none", "data.cache_dir=null", *overrides).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    return lambda: build_data(config, tokenizer).train


def whole(rows: TrainSet) -> EncodedSet:
    assert isinstance(rows, EncodedSet)
    return rows


def read_while_training(rows: TrainSet) -> StreamedSet:
    assert isinstance(rows, StreamedSet)
    return rows


def first_epochs(rows: TrainSet, plan: BatchSampler, count: int) -> list[Window]:
    found = []
    for window in windows(rows, plan, SEED):
        found.append(window)
        if window.ends_epoch and window.epoch == count - 1:
            return found
    raise AssertionError("windows never end")


def rest_of_epoch(rows: TrainSet, plan: BatchSampler, start: Position) -> Iterator[Window]:
    for window in windows(rows, plan, SEED, start):
        assert window.epoch == start.epoch
        assert window.micro_batches
        yield window
        if window.ends_epoch:
            return


def stored(position: Position) -> Position:
    """Write a position down and take it again."""
    again = Position(**json.loads(json.dumps(asdict(position))))
    assert again == position
    return again


def numbers(given: list[Window]) -> list[int]:
    return [row for w in given for _, sequences in w.micro_batches for sequence in sequences for row in sequence]


# Sets that are encoded whole


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> EncodedSet:
    """31 rows of different length, the longest of 48 tokens."""
    file = write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return whole(builder(f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null")())


@pytest.mark.parametrize(("batching", "accumulation"), PLANS)
@pytest.mark.parametrize("size", [1, 5, 64])
def test_windows_go_on_behind_any_of_them(rows: EncodedSet, batching: Batching, accumulation: int, size: int) -> None:
    plan = BatchSampler(batching, size, accumulation, max_tokens=64)
    given = first_epochs(rows, plan, 3)
    for k, window in enumerate(given, start=1):
        coming = windows(rows, plan, SEED, stored(window.after))
        assert list(islice(coming, len(given) - k)) == given[k:]


@pytest.mark.parametrize("batching", list(Batching))
def test_a_position_counts_sequences_and_an_epoch_ends_at_the_next_ones_start(
    rows: EncodedSet, batching: Batching
) -> None:
    taken = 0
    for window in first_epochs(rows, BatchSampler(batching, 5, 2, max_tokens=64), 2):
        taken += sum(len(sequences) for _, sequences in window.micro_batches)
        if window.ends_epoch:
            taken = 0
        assert window.after == Position(window.epoch + window.ends_epoch, taken)


@pytest.mark.parametrize("batching", REGARDLESS_OF_SIZE)
@pytest.mark.parametrize(("size", "accumulation"), OTHER_CUTS)
def test_batches_of_another_size_go_on_with_the_rows_that_are_left(
    rows: EncodedSet, batching: Batching, size: int, accumulation: int
) -> None:
    given = [
        window for window in first_epochs(rows, BatchSampler(batching, 5, 3, max_tokens=64), 2) if window.epoch == 1
    ]
    plan = BatchSampler(batching, size, accumulation, max_tokens=64)
    for k, window in enumerate(given[:-1], start=1):
        rest = list(rest_of_epoch(rows, plan, stored(window.after)))
        assert numbers(given[:k]) + numbers(rest) == numbers(given)
        assert sorted(numbers(given[:k]) + numbers(rest)) == list(range(len(rows)))


@pytest.mark.parametrize("batching", list(Batching))
def test_where_nothing_of_an_epoch_is_left_the_next_one_begins(rows: EncodedSet, batching: Batching) -> None:
    plan = BatchSampler(batching, 5, 2, max_tokens=64)
    num_sequences = len(plan.micro_batches(rows.lengths, [SEED, 1])) * 5
    at_next = list(islice(windows(rows, plan, SEED, Position(2)), 9))
    for taken in (num_sequences, 1000):
        assert list(islice(windows(rows, plan, SEED, Position(1, taken)), 9)) == at_next


def test_a_set_without_rows_is_told(rows: EncodedSet) -> None:
    nothing = EncodedSet("train", rows.shards, rows.indices[:0])
    with pytest.raises(DataError, match="train has no rows"):
        next(windows(nothing, BatchSampler(Batching.padded, 5, 2, 64), SEED))


# Sets that are read while training


def contents(given: list[Window]) -> list[Any]:
    """Give all that is in windows, down to the ids and ordinals of their rows."""
    return [
        (
            window.epoch,
            window.ends_epoch,
            window.after,
            [
                [[row_of(block, row) for row in sequence] for sequence in sequences]
                for block, sequences in window.micro_batches
            ],
        )
        for window in given
    ]


def row_of(block: EncodedSet, index: int) -> tuple[Any, ...]:
    part, row = block.indices[index].tolist()
    ids, labels = block[index].input_ids.tolist(), block[index].labels.tolist()
    return index, block.place(index), int(block.shards[part].ordinals[row]), ids, labels


def places(given: list[Window]) -> list[str]:
    return [block.place(row) for w in given for block, sequences in w.micro_batches for s in sequences for row in s]


Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write rows whose prompts begin with the source's name, and give the file's path.

    Args:
        too_long: numbers of the rows that are dropped.
    """

    def write(name: str, count: int, too_long: range = range(0)) -> str:
        texts = [f"{name}{i}" + "y" * (99 if i in too_long else i * 7 % 11) for i in range(count)]
        return write_lines(
            tmp_path / f"{name}.jsonl", [{"prompt": t, "completion": "xyz"[: 1 + len(t) % 3]} for t in texts]
        )

    return write


def files(*names: str) -> str:
    return f"data.train_files=[{','.join(map(repr, names))}]"


def mixture(share: str, *sources: tuple[str, float]) -> str:
    own = [f"s{i}:{{train_files:['{file}'],{share}:{value}}}" for i, (file, value) in enumerate(sources)]
    return f"data.mixture={{{','.join(own)}}}"


FORMS: dict[str, Callable[[Make], list[str]]] = {
    "a file": lambda make: [files(make("a", 57))],
    "files that end with a block": lambda make: [files(make("a", 33), make("b", 7))],
    "less than a chunk": lambda make: [files(make("a", 3))],
    "limit in a block": lambda make: [files(make("a", 57)), "data.limit=25"],
    "limit at a block's end": lambda make: [files(make("a", 57)), "data.limit=40"],
    "dropped rows": lambda make: [files(make("a", 57, range(0, 57, 4))), *CUT],
    "dropped chunks": lambda make: [files(make("a", 80, range(13, 45))), *CUT],
    "dropped at the end": lambda make: [files(make("a", 55, range(40, 55))), *CUT],
    "shares, one begins again": lambda make: [mixture("weight", (make("a", 15), 0.6), (make("b", 22), 0.4))],
    "shares of three": lambda make: [
        mixture("weight", (make("a", 20, range(10)), 5), (make("b", 7), 2), (make("c", 21, range(19, 21)), 3)),
        *CUT,
    ],
    "shares, with a limit": lambda make: [
        mixture("weight", (make("a", 15), 0.5), (make("b", 40), 0.5)),
        "data.limit=31",
    ],
    "counts, less than there are": lambda make: [mixture("count", (make("a", 90), 13), (make("b", 90), 37))],
    "counts, more than there are": lambda make: [
        mixture("count", (make("a", 7), 24), (make("b", 90), 12), (make("c", 5, range(2, 3)), 5)),
        *CUT,
    ],
}


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 20)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 10)


def check_every_start(build: Callable[[], TrainSet], plan: BatchSampler, num_epochs: int) -> None:
    """Go on behind every window with a set of its own, and compare all that comes and is accounted for."""
    through = read_while_training(build())
    given = first_epochs(through, plan, num_epochs)
    expected = contents(given)
    for k, window in enumerate(given[:-1], start=1):
        again = read_while_training(build())
        coming = windows(again, plan, SEED, stored(window.after))
        assert contents(list(islice(coming, len(given) - k))) == expected[k:]
        assert again.account == through.account


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("batching", "accumulation"), PLANS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_stream_goes_on_behind_any_window(
    make: Make, form: Callable[[Make], list[str]], batching: Batching, accumulation: int
) -> None:
    check_every_start(builder(*STREAMED, *form(make)), BatchSampler(batching, 5, accumulation, max_tokens=64), 2)


@pytest.mark.usefixtures("_small_blocks")
def test_a_data_set_of_the_library_goes_on(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    Path(make("train", 57)).rename(corpus / "train.jsonl")
    build = builder(*STREAMED, f"data.dataset_name='{corpus}'")
    check_every_start(build, BatchSampler(Batching.padded, 8, 2, max_tokens=64), 2)


@pytest.mark.usefixtures("_small_blocks")
def test_worker_processes_go_on_alike(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda _: FORKS)  # which need not import anything
    options = [*STREAMED, *FORMS["shares, one begins again"](make)]
    plan = BatchSampler(Batching.padded, 4, 2, max_tokens=64)
    given = first_epochs(builder(*options)(), plan, 1)
    others = builder(*options, "data.preprocessing_num_workers=2")()
    assert contents(list(rest_of_epoch(others, plan, stored(given[-3].after)))) == contents(given[-2:])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("batching", REGARDLESS_OF_SIZE)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_stream_in_batches_of_another_size_goes_on_with_the_rows_that_are_left(
    make: Make, form: Callable[[Make], list[str]], batching: Batching
) -> None:
    build = builder(*STREAMED, *form(make))
    given = [w for w in first_epochs(build(), BatchSampler(batching, 5, 3, max_tokens=64), 2) if w.epoch == 1]
    for k, window in enumerate(given[:-1], start=1):
        size, accumulation = OTHER_CUTS[k % len(OTHER_CUTS)]
        rest = list(
            rest_of_epoch(build(), BatchSampler(batching, size, accumulation, max_tokens=64), stored(window.after))
        )
        assert places(given[:k]) + places(rest) == places(given)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_block_is_read_again_where_it_began(make: Make, form: Callable[[Make], list[str]]) -> None:
    build = builder(*STREAMED, *form(make))
    through = read_while_training(build())
    blocks = [block for _ in range(2) for block in through.read()]
    for block in blocks:
        again = next(read_while_training(build()).read(json.loads(json.dumps(block.begin))))
        assert (again.number, again.begin) == (block.number, block.begin)
        assert again.rows.indices.tolist() == block.rows.indices.tolist()
        assert [part.batches[0].records for part in again.rows.shards] == [
            p.batches[0].records for p in block.rows.shards
        ]
        assert [part.stats for part in again.rows.shards] == [part.stats for part in block.rows.shards]


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("form", ["a file", "dropped rows", "shares of three"])
def test_skipped_rows_are_not_encoded(make: Make, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    build = builder(*STREAMED, *FORMS[form](make))
    through, again = read_while_training(build()), read_while_training(build())
    encoded: list[str] = []
    encode = Encoder.encode

    def counting(encoder: Encoder, examples: Any, lengths: Any) -> Any:
        encoded.extend(example.prompt for example in examples)
        return encode(encoder, examples, lengths)

    monkeypatch.setattr(Encoder, "encode", counting)
    blocks = list(through.read())
    every = Counter(encoded)
    for block in blocks:
        encoded.clear()
        assert len(list(again.read(block.begin))) == len(blocks) - block.number
        assert len(encoded) == every.total() - block.begin["num_records"]
        assert Counter(encoded) <= every


@pytest.mark.usefixtures("_small_blocks")
def test_looking_at_the_first_block_disturbs_nothing(make: Make) -> None:
    build = builder(*STREAMED, *FORMS["shares of three"](make))
    plan = BatchSampler(Batching.padded, 4, 2, max_tokens=64)
    expected = contents(first_epochs(build(), plan, 2))
    rows = read_while_training(build())
    coming = windows(rows, plan, SEED)
    given = list(islice(coming, 3))
    account = deepcopy(rows.account)
    del rows.first
    assert len(rows.first)
    assert rows.account == account
    assert contents([*given, *islice(coming, len(expected) - 3)]) == expected


@pytest.mark.usefixtures("_small_blocks")
def test_rows_that_are_dropped_behind_the_last_block_are_accounted_for(make: Make) -> None:
    rows = read_while_training(builder(*STREAMED, *FORMS["dropped at the end"](make))())
    first_epochs(rows, BatchSampler(Batching.padded, 4, 2, max_tokens=64), 2)
    assert (rows.account.num_records, rows.account.num_kept) == (110, 80)
    assert rows.account.dropped == {"too_long": 30}


@pytest.mark.usefixtures("_small_blocks")
def test_too_many_dropped_rows_stop_a_stream_that_goes_on_where_they_stop_one_that_is_read_through(make: Make) -> None:
    build = builder(*STREAMED, files(make("a", 57, range(30, 57))), *CUT[:2], "data.max_dropped_fraction=0.3")
    plan = BatchSampler(Batching.padded, 4, 1, max_tokens=64)
    given = list(islice(windows(build(), plan, SEED), 4))
    for window in given:
        with pytest.raises(DataError, match="27 of the first 57 rows would be dropped"):
            list(rest_of_epoch(build(), plan, window.after))


@pytest.mark.usefixtures("_small_blocks")
def test_a_row_that_can_no_longer_be_read_is_told_also_where_it_is_skipped(make: Make) -> None:
    file = make("a", 57)
    build = builder(*STREAMED, files(file))
    begin = list(read_while_training(build()).read())[1].begin
    rows = read_while_training(build())
    lines = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([*lines[:5], "{", *lines[6:]]))
    with pytest.raises(DataError, match=r"a\.jsonl:6  not JSON"):
        next(rows.read(begin))


@pytest.mark.usefixtures("_small_blocks")
def test_a_position_in_other_sources_is_refused(make: Make) -> None:
    start = next(
        windows(builder(*STREAMED, files(make("a", 57)))(), BatchSampler(Batching.padded, 4, 2, 64), SEED)
    ).after
    others = builder(*STREAMED, *FORMS["shares, one begins again"](make))()
    with pytest.raises(DataError, match="train has 2 sources, and had 1 where"):
        next(windows(others, BatchSampler(Batching.padded, 4, 2, 64), SEED, start))
