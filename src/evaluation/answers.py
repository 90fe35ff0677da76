"""Completions and their answers, which are compared with references in the same form."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from src.data.answers import AnswerFrame, strip_thoughts
from src.data.encoding import Encoder
from src.data.sets import EncodedSet


@dataclass(frozen=True)
class Completion:
    """Generated ids, without EOS, and why they end: `eos` or `length`."""

    ids: list[int]
    stop_reason: str


def cut_at(ids: list[int], stop_ids: Sequence[int]) -> Completion:
    """Cut generated ids before the first stop id, EOS or the end of a turn; padding follows it."""
    for i, token_id in enumerate(ids):
        if token_id in stop_ids:
            return Completion(ids[:i], "eos")
    return Completion(ids, "length")


@dataclass(frozen=True)
class AnswerReader:
    """Extracts answers; `frame` is what a chat template writes around an answer, in rows that it wrote.

    Each of `stop_texts` ends an answer, unless it stands in a thought.
    """

    encoder: Encoder
    tags: tuple[str, str] | None
    frame: AnswerFrame
    stop_texts: tuple[str, ...] = ()

    @property
    def end_texts(self) -> tuple[str, ...]:
        """The texts of which one may end generation: that which ends a turn, and the stop texts."""
        return tuple(filter(None, (self.frame.end_text, *self.stop_texts)))

    def answer_text(self, generated: str) -> str:
        """Return the answer in a text that continues a prompt of this frame, up to the first stop text in it."""
        text = self.frame.answer(strip_thoughts(generated, self.tags))
        return text[: min((at for stop in self.stop_texts if (at := text.find(stop)) >= 0), default=len(text))]

    def answer(self, rows: EncodedSet, index: int, generated: str) -> str:
        """Return the answer in a text generated for a row: without thoughts and what a chat template adds."""
        text = strip_thoughts(generated, self.tags)
        return self.frame.answer(text) if rows.is_rendered(index) else text

    def reference(self, rows: EncodedSet, index: int) -> str:
        """Return a row's reference answer as the tokenizer can write it.

        What its normaliser replaces (such as wide letters by plain ones) no model could write.
        """
        return self.encoder.normalized(self.plain_reference(rows, index))

    def plain_reference(self, rows: EncodedSet, index: int) -> str:
        """Return a row's reference answer, without thoughts, also without those that the data has between tags."""
        return strip_thoughts(rows.reference(index), self.tags)

    def is_over(self, ids: Sequence[int]) -> bool:
        """Return whether generated ids contain the text that ends a turn, in chat templates that end turns with words
        that are no token, or a stop text; in a thought neither ends anything.
        """
        if not self.end_texts:
            return False
        generated = self.encoder.decode(ids)
        text = self.frame.answer(strip_thoughts(generated, self.tags)) if self.stop_texts else ""
        return self.frame.is_over(generated) or any(stop in text for stop in self.stop_texts)

    def cut(self, completion: Completion) -> Completion:
        """Cut a completion after the token that completes the text that ends it."""
        ids = completion.ids
        if not self.is_over(ids):
            return completion
        return Completion(ids[: bisect_left(range(len(ids) + 1), True, key=lambda n: self.is_over(ids[:n]))], "eos")
