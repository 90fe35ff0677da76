"""The rows of a set by views, so that every view has the same rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from src.config.schema.entries import VIEWS
from src.data.answers import strip_thoughts
from src.data.encoding import THOUGHT
from src.data.sets import EncodedSet, LabelledRow
from src.data.views import Piece, donors, pieces_of, thoughts_of, with_thoughts

GOLD, NONE, SHUFFLED, OWN = VIEWS
TOO_LONG, NO_PARTNER, NOT_SAMPLED = "too_long", "no_partner", "beyond_max_samples"


@dataclass(frozen=True)
class Tags:
    """The tags of thoughts with their ids, and the tokens that end an answer, which are no part of it."""

    texts: tuple[str, str] | None
    ids: tuple[int, int]  # -1 where there are none
    ends: Mapping[int, str]  # id -> text


@dataclass
class PairedRows:
    """The rows of a set, `gold`, by `views`; `kept` are the indices of the rows that every view has.

    Left out, and counted by reason in `left_out`, are rows that are too long in any view, that have no supervised token
    without their thoughts, and that have no partner to exchange thoughts with. `bare` is the same set written without
    thoughts, where a view needs it. `own` are the model's thoughts for a row, tags included, put here once they are
    written.
    """

    gold: EncodedSet
    bare: EncodedSet | None
    views: Sequence[str]
    tags: Tags
    most_tokens: int  # of a row; of an encoder-decoder's target
    kept: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    own: dict[int, list[list[int]]] = field(default_factory=dict)
    donors: dict[int, int] = field(default_factory=dict)

    def choose(self, count: int, seed: int) -> None:
        """Choose the rows that all views but `own` can have, of the first `count` rows, and who exchanges thoughts."""
        self.left_out[NOT_SAMPLED] += len(self.gold) - count
        reasons = [self._why_left_out(i) for i in range(count)]
        self.left_out.update(filter(None, reasons))
        candidates = [i for i, reason in enumerate(reasons) if reason is None]
        if SHUFFLED in self.views:
            given = donors([self.num_thoughts(i) for i in candidates], seed)
            self.donors = {candidates[row]: candidates[donor] for row, donor in given.items()}
            self.left_out[NO_PARTNER] += len(candidates) - len(given)
            partnered = [i for i in candidates if i in self.donors]
            candidates = [i for i in partnered if len(self.row(SHUFFLED, i).labels) <= self.most_tokens]
            self.left_out[TOO_LONG] += len(partnered) - len(candidates)
        self.kept = candidates

    def keep(self, own: Mapping[int, list[list[int]] | None]) -> None:
        """Take the thoughts that the model wrote; rows that had no room for them (None) are left out."""
        self.own = {i: thoughts for i, thoughts in own.items() if thoughts is not None}
        self.left_out[TOO_LONG] += len(self.kept) - len(self.own)
        self.kept = [i for i in self.kept if i in self.own]

    def places(self) -> list[str]:
        """Return the file and line of each row that is kept."""
        return [self.gold.place(i) for i in self.kept]

    def reasons(self) -> str:
        """Return in words why rows are left out, and how many."""
        return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in (+self.left_out).items())

    @cached_property
    def _bare_rows(self) -> dict[tuple[int, int], int]:
        """The index of each row in `bare`, by the record that it was made of."""
        return {} if self.bare is None else {_record(self.bare, i): i for i in range(len(self.bare))}

    @cached_property
    def _bare_dropped(self) -> dict[tuple[int, int], str]:
        """Why each record that is not in `bare` is dropped there."""
        shards = [] if self.bare is None else self.bare.shards
        return {(i, row.ordinal): row.reason for i, shard in enumerate(shards) for row in shard.stats.dropped}

    def _why_left_out(self, index: int) -> str | None:
        """Return why a row can't be in every view; None where it can."""
        if self.gold.is_truncated(index):
            return TOO_LONG
        if self.bare is None:
            return None
        record = _record(self.gold, index)
        if record in self._bare_dropped:
            return self._bare_dropped[record]
        return TOO_LONG if self.bare.is_truncated(self._bare_rows[record]) else None

    def num_thoughts(self, index: int) -> int:
        return int((self.gold[index].spans[:, 0] == THOUGHT).sum())

    def longest_thought(self) -> int:
        """Return the tokens between the tags of the longest thought of the rows that are kept."""
        lengths = (len(ids) for i in self.kept for ids in thoughts_of(self.pieces(i)))
        return max(lengths, default=2) - 2

    def pieces(self, index: int) -> list[Piece]:
        """Return the pieces of a row as it is given."""
        return pieces_of(self.gold[index], self.tags.ids[0])

    def row(self, view: str, index: int) -> LabelledRow:
        """Return a row of a view."""
        gold = self.gold[index]
        if view == GOLD:
            return gold
        if view == NONE:
            assert self.bare is not None
            return self.bare[self._bare_rows[_record(self.gold, index)]]
        thoughts = self.own[index] if view == OWN else thoughts_of(self.pieces(self.donors[index]))
        return with_thoughts(gold, thoughts, self.tags.ids[0])

    def num_bytes(self, view: str, index: int) -> int:
        """Return the UTF-8 bytes of a row's answer: all its supervised text but thoughts and the ends of turns."""
        rows, tags = self.gold, self.tags.texts
        if view == NONE:
            assert self.bare is not None
            rows, index, tags = self.bare, self._bare_rows[_record(self.gold, index)], None
        text = strip_thoughts(rows.supervised_text(index), tags)
        count = len(text.encode())
        if rows.is_rendered(index):  # a chat template writes the ends of turns into the text
            labels = rows[index].labels
            for token_id, end in self.tags.ends.items():
                count -= min(int((labels == token_id).sum()), text.count(end)) * len(end.encode())
        return count


@dataclass(frozen=True)
class View:
    """One view of the rows, by their indices in the set."""

    paired: PairedRows
    name: str

    @property
    def is_encoder_decoder(self) -> bool:
        return self.paired.gold.is_encoder_decoder

    def __getitem__(self, index: int) -> LabelledRow:
        return self.paired.row(self.name, index)


def _record(rows: EncodedSet, index: int) -> tuple[int, int]:
    """Return the source and the record that a row was made of."""
    shard, row = rows.indices[index].tolist()
    return shard, int(rows.shards[shard].ordinals[row])
