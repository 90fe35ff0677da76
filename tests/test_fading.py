"""Thoughts that are left out, and thoughts that shrink: what is gone, and the same rows however they are fed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config.schema import RunConfig, ThoughtSchedule
from src.data import stream
from src.data.advice import Level, about_schedule
from src.data.answers import strip_thoughts
from src.data.batching import Position, windows
from src.data.dataset import Data, TrainSet, build_data
from src.data.encoding import IGNORE_INDEX, THOUGHT_OPEN
from src.data.fading import Fading
from src.data.sets import EncodedSet, LabelledRow
from src.data.store import FADING
from src.data.thoughts import leave_out
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError
from src.training.state import build_batch_sampler, plan_steps
from tests.conftest import admitted, write_lines
from tests.kinds import byte_bpe

TAGS = ("<ToW>", "</ToW>")

# What is around a thought that is left out


@pytest.mark.parametrize(
    ("text", "before", "joined"),
    [
        ("a <T> b", "", "a b"),  # one space, not two
        ("a <T> <T> b", "", "a b"),
        ("a<T><T>b", "", "ab"),  # tags without spaces; languages without them
        ("a <T>b <T> c", "", "a b c"),
        ("a <T>.", "", "a."),  # the full stop stands at its word
        ("a <T> .", "", "a ."),  # as the text itself has it: French does, and tokenised texts do
        ("a <T>.5", "", "a .5"),
        ("(<T> a)", "", "(a)"),
        ("我 <T>。", "", "我。"),
        ("<T> a", "", "a"),  # begins and ends without white space
        ("a <T>", "", "a"),
        ("a <T>\n", "", "a\n"),
        ("<T>", "", ""),
        (" <T> a", "prompt", " a"),  # what the prompt ends with counts
        ("<T> a", "prompt", " a"),
        ("<T> a", "prompt ", "a"),
        ("<T>\na", "prompt:\n", "a"),
        ("a\n<T> b", "", "a\nb"),
        ("a <T>\nb", "", "a\nb"),
        ("a\n\n<T>\n\nb", "", "a\n\nb"),
        ("a\n<T>     b", "", "a\n    b"),  # indented
        ("a\n    <T>\n    b", "", "a\n    b"),
    ],
)
def test_what_is_around_a_thought_joins_as_plain_text(text: str, before: str, joined: str) -> None:
    written = text.replace("<T>", "<ToW> why\nnot </ToW>")
    assert leave_out(written, TAGS, range(9), before) == joined
    assert leave_out(written, TAGS, (), before) == written
    assert strip_thoughts(f"prompt{written}", TAGS) == f"prompt{leave_out(written, TAGS, range(9), 'prompt')}"


def test_other_thoughts_stay_and_one_that_is_never_closed_is_none() -> None:
    text = "a <ToW>1</ToW> b <ToW>2</ToW> c <ToW>3"
    assert leave_out(text, TAGS, {1}, "") == "a <ToW>1</ToW> b c <ToW>3"
    assert leave_out(text, TAGS, {0, 1, 2}, "") == "a b c <ToW>3"


# What is gone in an epoch


def gone(lengths: list[int], epoch: int, *, dropout: float = 0.0, row: int = 0, **schedule: Any) -> list[int | None]:
    fades = ThoughtSchedule(**schedule) if schedule else None
    return Fading(dropout, fades, seed=7).gone(lengths, epoch, [row])


def test_a_schedule_takes_k_tokens_more_each_epoch_and_the_tags_with_the_last() -> None:
    lengths = [0, 1, 2, 3, 4, 9]
    assert gone(lengths, 0, tokens_per_epoch=2) == [0] * 6
    assert gone(lengths, 1, tokens_per_epoch=2) == [None, None, None, 2, 2, 2]
    assert gone(lengths, 2, tokens_per_epoch=2) == [None, None, None, None, None, 4]
    assert gone(lengths, 5, tokens_per_epoch=2) == [None] * 6


def test_further_tokens_are_geometric_and_left_out_thoughts_a_share() -> None:
    rows, smoothing = 4000, 0.75
    schedule = {"tokens_per_epoch": 3, "smoothing": smoothing}
    taken = np.array([gone([10**6], 2, row=row, **schedule) for row in range(rows)]).ravel() - 6
    for offset in range(4):  # P(o) = (1 - s) s^o, within four standard errors
        share = (1 - smoothing) * smoothing**offset
        assert abs((taken == offset).mean() - share) < 4 * (share * (1 - share) / rows) ** 0.5
    left_out = [one is None for row in range(rows) for one in gone([5, 5], 0, row=row, dropout=0.3)]
    assert abs(np.mean(left_out) - 0.3) < 4 * (0.3 * 0.7 / len(left_out)) ** 0.5
    assert gone([5, 0], 3, dropout=1.0) == [None, None]


def test_draws_follow_seed_epoch_and_row() -> None:
    draws = {(e, r): tuple(gone([5] * 40, e, row=r, dropout=0.5)) for e in range(3) for r in range(3)}
    assert len(set(draws.values())) == 9
    assert draws == {(e, r): tuple(gone([5] * 40, e, row=r, dropout=0.5)) for e in range(3) for r in range(3)}
    assert Fading(0.5, None, seed=8).gone([5] * 40, 0, [0]) != list(draws[0, 0])


# Rows


SUMS = ["data=tow_addition", "data.limit=40", "data.validation_files=null", "data.test_files=null"]
TEXTS = [
    "The <ToW> a word </ToW> cat <ToW>x</ToW> <ToW>lower</ToW> sat.",
    "<ToW> the beginning </ToW> low lower lowest <ToW> the end </ToW>.",
    "no thought at all",
    "안녕<ToW>세계</ToW>하세요\n<ToW>low</ToW>\ndef f(x): <ToW>a</ToW>return x",
]


def built(*overrides: str, tokenizer: Any = None) -> tuple[RunConfig, Data]:
    config = admitted(*overrides).config
    tokenizer = tokenizer or load_tokenizer(config.model, config.tokens)[0]
    return config, build_data(config, tokenizer)


def trained_on(*overrides: str, tokenizer: Any = None) -> EncodedSet:
    train = built(*overrides, tokenizer=tokenizer)[1].train
    assert isinstance(train, EncodedSet)
    return train


def content(row: LabelledRow) -> tuple[Any, ...]:
    """Return all that is trained of a row."""
    target = None if row.target_ids is None else tuple(row.target_ids.tolist())
    return tuple(row.input_ids.tolist()), tuple(row.labels.tolist()), target, tuple(map(tuple, row.spans.tolist()))


def contents(rows: EncodedSet) -> list[tuple[Any, ...]]:
    return [content(rows[i]) for i in range(len(rows))]


def bpe() -> Any:
    """A tokenizer with merges, whose ids depend on what is around a text."""
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return tokenizer


def without(ids: list[int], tags: tuple[int, int], count: int, side: str) -> list[int]:
    """Take so many ids out of each thought, and its tags where it has no more."""
    kept, start = list[int](), 0
    for token in ids:
        if token == tags[0]:
            start = len(kept)
        kept.append(token)
        if token == tags[1]:
            inner = kept[start + 1 : -1]
            left = inner[count:] if side == "left" else inner[: max(0, len(inner) - count)]
            kept[start:] = [tags[0], *left, tags[1]] if count < len(inner) else []
    return kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_rows_lack_exactly_what_is_gone_of_every_thought(model: str, side: str) -> None:
    sums = [*SUMS, f"model={model}", "tokens.init.text=[-]"]
    whole = trained_on(*sums)
    rows = trained_on(*sums, f"data.thought_schedule={{tokens_per_epoch: 3, side: {side}}}")
    assert contents(rows) == contents(rows.in_epoch(0)) == contents(whole)
    tags = rows[0].tag_ids
    assert tags is not None
    for epoch in range(1, 5):
        faded = rows.in_epoch(epoch)
        for i in range(len(rows)):
            before, row = whole[i], faded[i]
            num_prompt = int((before.labels < 0).sum())  # of a decoder 0
            ids = row.input_ids if row.target_ids is None else row.target_ids
            all_ids = before.input_ids if before.target_ids is None else before.target_ids
            assert ids.tolist() == without(all_ids.tolist(), tags, 3 * epoch, side)
            assert row.labels.tolist() == [IGNORE_INDEX] * num_prompt + ids[num_prompt:].tolist()
            assert row.parts[row.labels >= 0].tolist().count(THOUGHT_OPEN) == ids.tolist().count(tags[0])
        assert faded.lengths.tolist() == [len(faded[i].input_ids) for i in range(len(rows))]


def texts(folder: Path) -> list[str]:
    file = write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    return ["data=text", f"data.train_files=['{file}']", "data.thought_pattern='<ToW>(.*?)</ToW>'", "tokens=tow"]


def chats(folder: Path) -> list[str]:
    thinking = "<ToW> low </ToW> lower <ToW>b</ToW> lowest"
    turns = [("user", "What?"), ("assistant", thinking), ("user", "<ToW>no</ToW> 12?"), ("assistant", f"42 {thinking}")]
    messages = [{"role": role, "content": text} for role, text in turns]
    apart = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "\n\n2", "reasoning_content": "why"}]
    file = write_lines(folder / "chats.jsonl", [{"messages": messages}, {"messages": apart}])
    return ["data=messages", f"data.train_files=['{file}']", "data.thought_pattern='<ToW>(.*?)</ToW>'", "tokens=tow"]


@pytest.mark.parametrize("kind", [texts, chats])
def test_a_row_without_its_thoughts_is_the_row_that_drops_them(
    kind: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    overrides = kind(tmp_path)
    dropped = trained_on(*overrides, "data.thoughts=drop", tokenizer=bpe())
    for fades in ("data.thought_dropout=1", "data.thought_schedule={tokens_per_epoch: 99}"):
        rows = trained_on(*overrides, fades, tokenizer=bpe()).in_epoch(1)
        assert contents(rows) == contents(dropped)
        assert rows.lengths.tolist() == dropped.lengths.tolist()


def test_only_thoughts_of_supervised_turns_are_left_out(tmp_path: Path) -> None:
    overrides = [*chats(tmp_path), "data.thought_dropout=1", "data.supervised_turns=last"]
    _, data = built(*overrides, tokenizer=bpe())
    assert isinstance(data.train, EncodedSet)
    text = data.encoder.decode_all(data.train.in_epoch(0)[0].input_ids.tolist())
    assert [text.count(part) for part in ("<ToW> low </ToW> lower <ToW>b</ToW> lowest", "42 lower lowest")] == [1, 1]


def test_a_row_is_cut_after_its_thoughts_have_shrunk() -> None:
    cut = [*SUMS, "data.max_seq_length=40"]  # a prompt of 11 ids, four thoughts of 10, an answer of 5 or 6
    assert not any(2 in row[1] for row in contents(trained_on(*cut)))
    rows = trained_on(*cut, "data.thought_schedule={tokens_per_epoch: 4}")
    whole = trained_on(*SUMS, "data.thought_schedule={tokens_per_epoch: 4}")
    assert [rows.in_epoch(1).lengths.max(), whole.in_epoch(1).lengths.max()] == [40, 41]
    assert contents(rows.in_epoch(2)) == contents(whole.in_epoch(2))


def test_a_row_of_weight_0_fades_and_stays_unlearned(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": "<ToW>abcde</ToW>2", "weight": weight} for weight in (1, 0)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    fades = ["data.thought_schedule={tokens_per_epoch: 3}", "data.weight_column=weight"]
    train = trained_on("data=prompt_completion", f"data.train_files=['{file}']", "tokens=tow", *fades)
    for epoch in range(3):
        learned, fed = (train.in_epoch(epoch)[i] for i in range(2))
        assert fed.input_ids.tolist() == learned.input_ids.tolist()
        assert (fed.weight, set(fed.labels.tolist())) == (0, {IGNORE_INDEX})


def test_a_row_whose_thoughts_cannot_be_told_apart_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    nested = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<ToW>2</ToW> 3"}]}
    file = write_lines(tmp_path / "rows.jsonl", [nested])
    overrides = ["data=messages", f"data.train_files=['{file}']", "data.thought_dropout=0.5"]
    tokenizer = bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('<ToW>', '') }}<|turn|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1 .* thoughts"):
        built(*overrides, tokenizer=tokenizer)


def test_a_template_may_write_an_empty_thought_in_place_of_one_that_is_gone(tmp_path: Path) -> None:
    turns = [("user", "1"), ("assistant", "<ToW>a</ToW>2"), ("user", "3"), ("assistant", "<ToW>xyz</ToW>4")]
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": r, "content": text} for r, text in turns]}])
    overrides = ["data=messages", f"data.train_files=['{file}']", "data.thought_schedule={tokens_per_epoch: 1}"]
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and '<ToW>' not in m.content WHERE %}"
        "<ToW></ToW>{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )

    def rows(where: str) -> EncodedSet:
        tokenizer = bpe()
        tokenizer.chat_template = template.replace("WHERE", where)
        return trained_on(*overrides, tokenizer=tokenizer)

    everywhere, tokenizer = rows(""), bpe()
    for epoch, left in enumerate([("a", "xyz"), ("", "yz"), ("", "z"), ("", "")]):
        fed = tokenizer.decode(everywhere.in_epoch(epoch)[0].input_ids.tolist())
        assert re.findall("<ToW>(.*?)</ToW>", fed) == list(left)
    with pytest.raises(DataError, match=r"rows\.jsonl:1 .*writes 1 in place of 2"):
        rows("and loop.last")


def test_without_either_key_nothing_is_kept_and_every_epoch_is_the_set_itself() -> None:
    rows = trained_on(*SUMS)
    assert rows.in_epoch(3) is rows
    assert not any(FADING.name in batch.records.schema.names for batch in rows.shards[0].batches)


# However they are fed


FADES = [*SUMS, "data.thought_dropout=0.3", "data.thought_schedule={tokens_per_epoch: 2, smoothing: 0.5}"]
STREAMED = ["data.streaming=true", "training.max_train_steps=9"]


def epochs_of(
    config: RunConfig, rows: TrainSet, start: Position, num_epochs: int
) -> Iterator[tuple[Position, int, Counter[Any]]]:
    """Yield the position after each window, its epoch and the contents of its rows."""
    for window in windows(rows, build_batch_sampler(config, rows), config.seed, start):
        if window.epoch == num_epochs:
            return
        fed = [content(block[row]) for block, sequences in window.micro_batches for one in sequences for row in one]
        yield window.after, window.epoch, Counter(fed)


@pytest.mark.parametrize("how", ["padded", "length_grouped", "packed", "streamed", "budget"])
def test_an_epoch_feeds_the_same_rows_in_every_way_and_from_every_position(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 15)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 7)
    budget = ["data.max_seq_length=64", "training.per_device_train_tokens=96"]
    ways = {"streamed": STREAMED, "budget": budget}.get(how, [f"data.batching={how}"])
    config, data = built(*FADES, *ways, "training.per_device_train_batch_size=3")
    expected = trained_on(*FADES)
    given = list(epochs_of(config, data.train, Position(), 3))
    for epoch in range(3):
        fed = sum((rows for _, number, rows in given if number == epoch), Counter[Any]())
        assert fed == Counter(contents(expected.in_epoch(epoch)))
    for k in (1, len(given) // 2, len(given) - 2):
        again = built(*FADES, *ways)[1].train  # as another process has it
        assert list(epochs_of(config, again, given[k - 1][0], 3)) == given[k:]


@pytest.mark.parametrize(
    "batches", ["data.batching=packed training.per_device_train_batch_size=2", "training.per_device_train_tokens=128"]
)
def test_steps_are_planned_of_every_epochs_lengths_from_anywhere(batches: str) -> None:
    config, data = built(*FADES, *batches.split(), "data.max_seq_length=64", "training.num_train_epochs=4.5")
    sampler = build_batch_sampler(config, data.train)
    given = list(epochs_of(config, data.train, Position(), 5))
    counts = [sum(number == epoch for _, number, _ in given) for epoch in range(5)]
    assert counts[0] > counts[2] > counts[4]
    planned = sum(counts[:4]) + math.ceil(counts[4] / 2)
    assert plan_steps(config, data.train, sampler) == (planned, None)
    for step in (1, counts[0], counts[0] + 3, planned - 1):
        assert plan_steps(config, data.train, sampler, step, given[step - 1][0]) == (planned, None)


def test_a_change_of_fading_is_a_change_of_rows() -> None:
    digests = [
        trained_on(*SUMS, *fades).digest()
        for fades in (
            [],
            ["data.thought_dropout=0.1"],
            ["data.thought_dropout=0.2"],
            ["data.thought_schedule={tokens_per_epoch: 2}"],
        )
    ]
    assert len(set(digests)) == 4


# What is refused, and what preflight shows


@pytest.mark.parametrize("without_thoughts", ["tokens=none", "data.thoughts=drop"])
@pytest.mark.parametrize("fades", ["data.thought_dropout=0.5", "data.thought_schedule={tokens_per_epoch: 2}"])
def test_fading_needs_thoughts(without_thoughts: str, fades: str) -> None:
    with pytest.raises(ConfigError, match=rf"{fades.partition('=')[0]}.*no thoughts are written"):
        admitted(without_thoughts, fades)


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("data.thought_dropout=1.5", "data.thought_dropout", "from 0 to 1"),
        ("data.thought_schedule=3", "data.thought_schedule", "a mapping of tokens_per_epoch"),
        ("data.thought_schedule={side: left}", "data.thought_schedule.tokens_per_epoch", "is missing"),
        ("data.thought_schedule.tokens_per_epoch=0", "data.thought_schedule.tokens_per_epoch", "at least 1"),
        ("data.thought_schedule={tokens_per_epoch: 2, side: up}", "data.thought_schedule.side", "one of left, right"),
        ("data.thought_schedule={tokens_per_epoch: 2, smoothing: 1}", "data.thought_schedule.smoothing", "below 1"),
    ],
)
def test_bad_values_are_refused(override: str, key: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}\b.*{allowed}"):
        admitted(override)


def test_a_schedule_that_takes_nothing_is_reported() -> None:
    schedule = "data.thought_schedule={tokens_per_epoch: 2}"

    def is_reported(num_steps: int, steps_per_epoch: int | None, *overrides: str) -> bool:
        config = admitted(*overrides).config
        return [one.level for one in about_schedule(config, num_steps, steps_per_epoch)] == [Level.warning]

    assert is_reported(4, 4, schedule)
    assert is_reported(4, None, schedule, "training.num_train_epochs=1", "data.batching=packed")
    assert not is_reported(5, 4, schedule)
    assert not is_reported(4, None, schedule, "training.max_train_steps=4", "training.num_train_epochs=1")
    assert not is_reported(4, 4, "data.thought_schedule={tokens_per_epoch: 2, smoothing: 0.5}")
    assert not is_reported(4, 4, "data.thought_dropout=0.5")
