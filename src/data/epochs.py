"""The rows of an epoch, where thoughts fade: the same rows in the same order, encoded again without what is gone."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from src.config.schema import Overflow, RunConfig, Side
from src.data.chat import ChatTemplate
from src.data.encoding import EncodedRow, Encoder, Gone, Lengths, Span, moved, without
from src.data.examples import Rewriter
from src.data.fading import Fading
from src.data.formats import BadRow, Chat
from src.data.sets import EncodedSet, LabelledRow, labels_of
from src.errors import DataError, TokenError

ROWS_AT_ONCE = 250  # that are encoded to know their lengths


class Faded(NamedTuple):
    """A row that an epoch changes: its index, the thoughts that are left out, and what is gone of those it then has.

    With `only_shrinks` no text is left out and none was cut off, so that its ids need not be encoded again.
    """

    row: int
    left_out: set[int]
    shrunk: Gone
    chat: Chat | None
    only_shrinks: bool


class ThoughtFader:
    """Fades the thoughts of rows.

    A row is encoded of the text that is left, then thoughts shrink, then it is cut. One whose text is all left is not
    encoded again.
    """

    def __init__(
        self,
        fading: Fading,
        encoder: Encoder,
        rewriter: Rewriter,
        lengths: Lengths,
        show_progress: Callable[[str], None],
    ) -> None:
        self._fading, self._encoder, self._rewriter, self.show_progress = fading, encoder, rewriter, show_progress
        # what is too long with all its thoughts is dropped already
        overflow = lengths.overflow if lengths.overflow is Overflow.truncate_prompt else Overflow.truncate
        self._lengths = replace(lengths, overflow=overflow)
        self._sign = 1 if fading.side is Side.left else -1

    def settings(self) -> str:
        return repr((self._fading.dropout, self._fading.schedule))

    def in_epoch(self, rows: EncodedSet, epoch: int) -> EncodedSet:
        return EpochRows(rows, self, epoch)

    def changed(self, rows: EncodedSet, indices: Iterable[int], epoch: int) -> list[Faded]:
        """Return those of some rows that an epoch changes."""
        found = []
        for index in indices:
            if (text := rows.fading(index)) is None:
                continue
            gone = self._fading.gone(text.lengths, epoch, _identity(rows, index))
            left_out = {i for i, count in enumerate(gone) if count is None}
            shrunk = [self._sign * (count or 0) for count in gone if count is not None or text.has_others]
            if left_out or any(shrunk):
                only_shrinks = not left_out and not rows.is_truncated(index)
                found.append(Faded(index, left_out, shrunk, text.chat, only_shrinks))
        return found

    def shrink(self, row: LabelledRow, faded: Faded) -> LabelledRow:
        """Return a row that is whole with shorter thoughts."""
        ids = (row.input_ids if row.target_ids is None else row.target_ids).tolist()
        spans = row.spans.tolist()
        cuts = self._encoder.cuts(ids, spans, faded.shrunk)
        left = without(ids, cuts)
        spans = [(kind, moved(start, cuts), moved(stop, cuts)) for kind, start, stop in spans]
        if row.target_ids is None:
            return _relabelled(row, left, None, spans)
        return _relabelled(row, row.input_ids.tolist(), left, spans)

    def encode(self, rows: EncodedSet, changed: Sequence[Faded]) -> list[EncodedRow]:
        """Encode rows without what is gone; DataError names one that can't be."""
        examples = []
        for index, left_out, _, chat, _ in changed:
            try:
                examples.append(self._rewriter.without(left_out, rows.prompt(index), rows.completion(index), chat))
            except (BadRow, TokenError) as problem:
                reason = f"can't be used without some of its thoughts: {problem}"
                raise DataError(f"{rows.place(index)}  {reason}") from problem
        encoded = self._encoder.encode(examples, self._lengths, [faded.shrunk for faded in changed])
        return [row for row in encoded if row is not None]


def fader_of(
    config: RunConfig,
    encoder: Encoder,
    template: ChatTemplate | None,
    lengths: Lengths,
    show_progress: Callable[[str], None],
) -> ThoughtFader | None:
    """Return what fades the thoughts of a train set; None where they stay as they are."""
    fading, tags = Fading.of(config), config.thought_tags
    if fading is None or tags is None:
        return None
    return ThoughtFader(fading, encoder, Rewriter(tags, template), lengths, show_progress)


class EpochRows(EncodedSet):
    """The rows of a set as an epoch feeds them. Only what is asked for is encoded, and nothing of it is kept."""

    def __init__(self, rows: EncodedSet, fader: ThoughtFader, epoch: int) -> None:
        super().__init__(rows.name, rows.shards, rows.indices, is_weighted=rows.is_weighted)
        self._whole, self._thoughts, self._epoch = rows, fader, epoch

    @cached_property
    def lengths(self) -> np.ndarray:
        lengths = self._whole.lengths.copy()
        for start in range(0, len(self), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(self))
            rewritten = []
            for faded in self._thoughts.changed(self, range(start, stop), self._epoch):
                if not faded.only_shrinks:
                    rewritten.append(faded)
                elif not self.is_encoder_decoder:
                    lengths[faded.row] -= sum(map(abs, faded.shrunk))
            for faded, row in zip(rewritten, self._thoughts.encode(self, rewritten), strict=True):
                lengths[faded.row] = len(row.input_ids)
            self._thoughts.show_progress(f"{self.name}: {stop:,} rows of epoch {self._epoch} (from 0) measured")
        return lengths

    @property
    def is_encoder_decoder(self) -> bool:
        return self._whole.is_encoder_decoder

    def __getitem__(self, index: int) -> LabelledRow:
        row = super().__getitem__(index)
        for faded in self._thoughts.changed(self, [index], self._epoch):
            if faded.only_shrinks and row.weight:  # else it has no spans to shrink by
                return self._thoughts.shrink(row, faded)
            encoded = self._thoughts.encode(self, [faded])[0]
            return _relabelled(row, encoded.input_ids, encoded.target_ids, encoded.spans)
        return row


def _relabelled(
    row: LabelledRow, input_ids: Sequence[int], target_ids: Sequence[int] | None, spans: Sequence[Span]
) -> LabelledRow:
    """Return a row with other ids."""
    ids = np.array(input_ids, dtype=np.int32)
    targets = None if target_ids is None else np.array(target_ids, dtype=np.int32)
    spanned = np.array(spans if row.weight else [], dtype=np.int32).reshape(-1, 3)
    labels = labels_of(ids if targets is None else targets, spanned)
    return replace(row, input_ids=ids, labels=labels, target_ids=targets, spans=spanned)


def _identity(rows: EncodedSet, index: int) -> tuple[int, int]:
    """Return whole numbers that identify a row wherever it is: its place in its source, and a hash of its whole ids."""
    shard, row = rows.indices[index].tolist()
    batch, i = rows.shards[shard].locate(row)
    digest = hashlib.blake2b(batch.input_ids[slice(*batch.input_offsets[i : i + 2])].tobytes(), digest_size=8)
    digest.update(batch.target_ids[slice(*batch.target_offsets[i : i + 2])].tobytes())
    return int(rows.shards[shard].ordinals[row]), int.from_bytes(digest.digest())
