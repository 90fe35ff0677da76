"""Views of rows as pure functions: pieces, exchanged thoughts, and how sure a difference is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from src.config.schema import Overflow
from src.data.encoding import AFTER_THOUGHT, ANSWER, THOUGHT, THOUGHT_CLOSE, THOUGHT_OPEN, Encoder, Lengths
from src.data.examples import Example
from src.data.sets import LabelledRow
from src.data.text_encoder import Segment
from src.data.views import NOT_SUPERVISED, Piece, donors, joined, pieces_of, thoughts_of, with_thoughts
from src.evaluation.bootstrap import compare_bits, resampled_sums
from tests.kinds import byte_bpe, sentencepiece, unigram

OPEN, CLOSE = 8, 9


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_row_is_its_pieces_and_other_thoughts_leave_the_rest(is_causal: bool) -> None:
    ids = np.array([1, 5, OPEN, 3, CLOSE, OPEN, 4, CLOSE, 6, 2], dtype=np.int32)
    spans = np.array([[THOUGHT, 2, 5], [THOUGHT, 5, 8], [ANSWER, 8, 10]])
    labels = np.where(np.arange(10) < 2, -100, ids)
    inputs, targets = (ids, None) if is_causal else (np.array([7, 7]), ids)
    row = LabelledRow(inputs, labels, targets, spans, (OPEN, CLOSE))
    pieces = pieces_of(row, OPEN)
    assert [piece.kind for piece in pieces] == [NOT_SUPERVISED, THOUGHT, THOUGHT, ANSWER]
    again = joined(row, pieces)
    for name in ("input_ids", "labels", "spans"):
        assert np.array_equal(getattr(again, name), getattr(row, name))
    other = with_thoughts(row, [[OPEN, 3, 3, 3, CLOSE], [OPEN, CLOSE]], OPEN)
    written = other.input_ids if is_causal else other.target_ids
    assert written is not None
    assert written.tolist() == [1, 5, OPEN, 3, 3, 3, CLOSE, OPEN, CLOSE, 6, 2]
    assert other.labels.tolist() == [-100, -100, OPEN, 3, 3, 3, CLOSE, OPEN, CLOSE, 6, 2]
    assert other.spans.tolist() == [[THOUGHT, 2, 7], [THOUGHT, 7, 9], [ANSWER, 9, 11]]
    inner, after = [THOUGHT] * 3, [AFTER_THOUGHT, ANSWER]
    assert other.parts[2:].tolist() == [THOUGHT_OPEN, *inner, THOUGHT_CLOSE, THOUGHT_OPEN, THOUGHT_CLOSE, *after]


def test_a_thought_that_begins_a_row_has_its_tag() -> None:
    ids = np.array([OPEN, 3, CLOSE, 6], dtype=np.int32)
    row = LabelledRow(ids, np.array([-100, 3, CLOSE, 6]), None, np.array([[THOUGHT, 1, 3], [ANSWER, 3, 4]]))
    assert pieces_of(row, OPEN)[0] == Piece(THOUGHT, [OPEN, 3, CLOSE])
    other = with_thoughts(row, [[OPEN, CLOSE]], OPEN)
    assert (other.input_ids.tolist(), other.labels.tolist()) == ([OPEN, CLOSE, 6], [-100, CLOSE, 6])


TAGS = ("<ToW>", "</ToW>")
KINDS: dict[str, Callable[[], Any]] = {
    "bytes": byte_bpe,
    "sentencepiece": partial(sentencepiece, legacy=False),
    "older sentencepiece": partial(sentencepiece, legacy=True),
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_that_are_put_in_as_ids_are_those_of_the_whole_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    encoder, open_id = Encoder(tokenizer, TAGS), tokenizer.convert_tokens_to_ids("<ToW>")

    def encoded(first: str, second: str, *around: str) -> LabelledRow:
        text = "".join(map("".join, zip(around, (f"<ToW>{first}</ToW>", f"<ToW>{second}</ToW>", ""), strict=True)))
        segments = (Segment("What is 12=", is_supervised=False), Segment(text, is_supervised=True))
        (found,) = encoder.encode([Example(segments, "", "", "")], Lengths(500, None, Overflow.drop))
        assert found is not None
        ids, spans = np.array(found.input_ids), np.array(found.spans)
        return LabelledRow(ids, np.where(np.arange(len(ids)) < spans[0, 1], -100, ids), None, spans)

    pairs = [("a b c", " 12 plus"), (" low lower", "x"), ("", "  "), ("하나\n", "plus 30")]
    for own, given in itertools.product(pairs, pairs):
        thoughts = thoughts_of(pieces_of(encoded(*given, "", "x", " y"), open_id))
        before, whole = (encoded(*pair, "low", " er", "b 3 ") for pair in (own, given))
        other = with_thoughts(before, thoughts, open_id)
        assert other.input_ids.tolist() == whole.input_ids.tolist()
        assert other.spans.tolist() == whole.spans.tolist()


def test_no_row_keeps_its_thoughts_and_each_gets_as_many() -> None:
    counts = [2, 1, 2, 0, 2, 1, 3, 2]
    given = donors(counts, seed=1)
    assert sorted(given) == [0, 1, 2, 3, 4, 5, 7]  # 6 is the only one with three
    assert all(counts[row] == counts[donor] for row, donor in given.items())
    assert all(row != donor for row, donor in given.items() if counts[row])
    assert sorted(given.values()) == sorted(given)
    assert donors(counts, seed=1) == given
    assert any(donors(counts, seed) != given for seed in range(2, 9))


def test_draws_of_one_row_are_that_row_and_columns_are_drawn_together() -> None:
    assert resampled_sums(np.array([[2.0, 3.0]]), 0, 5).tolist() == [[2, 3]] * 5
    sums = resampled_sums(np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]), 0, 4000)
    assert np.array_equal(sums[:, 1], 2 * sums[:, 0])
    assert set(np.unique(sums[:, 0])) <= {a + 10 * b + 100 * (3 - a - b) for a in range(4) for b in range(4 - a)}
    assert sums[:, 0].mean() == pytest.approx(111, rel=0.05)


def test_a_difference_of_bits_is_that_of_the_ratios_and_its_p_counts_draws() -> None:
    sizes, rng = np.full(200, 4.0), np.random.default_rng(0)
    noise = rng.normal(size=200)
    same = compare_bits(noise, sizes, noise, sizes, seed=3)
    assert same is not None
    assert (same.difference, same.low, same.high, same.p_value, same.num_rows) == (0, 0, 0, 1, 200)
    less = compare_bits(noise - 4 * math.log(2), sizes, noise, sizes, seed=3)  # exactly one bit less a byte
    assert less is not None
    assert (less.difference, less.low, less.high) == pytest.approx((-1, -1, -1))
    assert less.p_value == 2 / 10_001
    for num_rows, least in ((1, 1.0), (4, 0.125), (11, 2**-10), (12, 2**-11), (14, 2 / 10_001)):  # all on one side
        few = slice(num_rows)
        found = compare_bits(noise[few] - 4 * math.log(2), sizes[few], noise[few], sizes[few], seed=3)
        assert found is not None
        assert found.p_value == pytest.approx(least)
    other = rng.normal(scale=math.log(2) * 4, size=200)
    found = compare_bits(other, sizes, np.zeros(200), sizes, seed=3)
    assert found is not None
    mean, error = found.difference, other.std() / math.log(2) / 4 / math.sqrt(200)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert compare_bits(noise, 0 * sizes, noise, sizes, seed=3) is None
