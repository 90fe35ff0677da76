"""Views of rows: the same answers after other thoughts. Rows are put together from ids; nothing is tokenised again.

A thought is what stands from its opening to its closing tag, both included. The tokenizer cuts a text at added tokens,
so the ids of a thought do not depend on what is around it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from src.data.encoding import IGNORE_INDEX, THOUGHT
from src.data.sets import LabelledRow

NOT_SUPERVISED = -1


class Piece(NamedTuple):
    """Adjacent ids of one kind: ANSWER, THOUGHT or NOT_SUPERVISED."""

    kind: int
    ids: list[int]


def pieces_of(row: LabelledRow, open_id: int) -> list[Piece]:
    """Cut a row's input (an encoder-decoder's target) into pieces.

    A thought at the very beginning has its opening tag again, which is not supervised there: nothing predicts it.
    """
    ids = (row.input_ids if row.target_ids is None else row.target_ids).tolist()
    spans = row.spans.tolist()
    if spans and spans[0][:2] == [THOUGHT, 1] and ids[0] == open_id and row.target_ids is None:
        spans[0][1] = 0
    pieces, done = list[Piece](), 0
    for kind, start, stop in spans:
        if start > done:
            pieces.append(Piece(NOT_SUPERVISED, ids[done:start]))
        pieces.append(Piece(kind, ids[start:stop]))
        done = stop
    if done < len(ids):
        pieces.append(Piece(NOT_SUPERVISED, ids[done:]))
    return pieces


def joined(row: LabelledRow, pieces: Sequence[Piece]) -> LabelledRow:
    """Return a row with other pieces; an encoder's input stays."""
    is_causal = row.target_ids is None
    ids = np.array([i for piece in pieces for i in piece.ids], dtype=np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    spans, start = [], 0
    for kind, its_ids in pieces:
        stop = start + len(its_ids)
        if kind != NOT_SUPERVISED:
            first = max(1, start) if is_causal else start  # nothing before the very first id predicts it
            labels[first:stop] = ids[first:stop]
            spans.append((kind, first, stop))
        start = stop
    spanned = np.array(spans, dtype=np.int32).reshape(-1, 3)
    inputs, targets = (ids, None) if is_causal else (row.input_ids, ids)
    return LabelledRow(inputs, labels, targets, spanned, row.tag_ids, row.weight)


def thoughts_of(pieces: Sequence[Piece]) -> list[list[int]]:
    """Return the ids of each thought, tags included."""
    return [piece.ids for piece in pieces if piece.kind == THOUGHT]


def with_thoughts(row: LabelledRow, thoughts: Sequence[list[int]], open_id: int) -> LabelledRow:
    """Return a row with other thoughts, as many as it has, tags included."""
    pieces = pieces_of(row, open_id)
    given = iter(thoughts)
    changed = [Piece(THOUGHT, next(given)) if piece.kind == THOUGHT else piece for piece in pieces]
    return joined(row, changed)


def donors(num_thoughts: Sequence[int], seed: int) -> dict[int, int]:
    """Return for each row the row whose thoughts it gets: another one that has as many; a derangement by seed.

    Rows of one number of thoughts are put into a random circle, in which each gets those of the next. A row that is the
    only one with its number has no partner and is missing; one without thoughts keeps none.

    Source: Sattolo 1986, "An algorithm to generate a random cyclic permutation".
    """
    found = {row: row for row, count in enumerate(num_thoughts) if not count}
    rng = np.random.default_rng(seed)
    for count in sorted(set(num_thoughts) - {0}):
        circle = rng.permutation([row for row, its_count in enumerate(num_thoughts) if its_count == count]).tolist()
        if len(circle) > 1:
            found |= dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return found


def answer_mask(targets: np.ndarray, is_thought: np.ndarray, end_ids: Sequence[int]) -> np.ndarray:
    """Return which supervised tokens are of the answer itself, [supervised]: no thought, and no end of a turn."""
    return ~is_thought & ~np.isin(targets, list(end_ids))
