"""Completions and their answers, which are compared with references in the same form."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.data.answers import AnswerFrame, strip_thoughts, texts_between_thoughts
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
        text = self._outside_thoughts(generated)
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

    def template_thoughts(self, ids: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return which ids of a rendered row's turns, one of each size after the other, are of a thought that the
        template wrote at the beginning of a turn, [supervised], and the UTF-8 bytes of all of them.
        """
        mask, num_bytes, start = np.zeros(len(ids), dtype=bool), 0, 0
        for size in sizes:
            turn = ids[start : start + size].tolist()
            length = self._thought_length(turn)
            mask[start : start + length] = True
            num_bytes += len(self.encoder.decode_all(turn[:length]).encode())
            start += size
        return mask, num_bytes

    def _thought_length(self, turn: Sequence[int]) -> int:
        """Return how many ids of a turn are the template's thought, with its tags and the white space after it."""
        decode, frame = self.encoder.decode_all, self.frame
        text = decode(turn)
        begins = frame.opens_thought or (bool(frame.thought_open) and text.lstrip().startswith(frame.thought_open))
        if not (begins and frame.thought_close and frame.thought_close in text):
            return 0
        length = bisect_left(range(len(turn) + 1), True, key=lambda n: frame.thought_close in decode(turn[:n]))
        while length < len(turn) and not decode(turn[length : length + 1]).strip():
            length += 1
        return length

    def is_over(self, ids: Sequence[int]) -> bool:
        """Return whether generated ids contain the text that ends a turn, in chat templates that end turns with words
        that are no token, or a stop text; in a thought neither ends anything.
        """
        if not self.end_texts:
            return False
        generated = self.encoder.decode(ids)
        text = self._outside_thoughts(generated) if self.stop_texts else ""
        return self.frame.is_over(generated) or any(stop in text for stop in self.stop_texts)

    def _outside_thoughts(self, generated: str) -> str:
        """Return the answer as it is written around thoughts: a stop text may begin before one and end after it."""
        return self.frame.answer("".join(texts_between_thoughts(generated, self.tags)))

    def cut(self, completion: Completion) -> Completion:
        """Cut a completion after the token that completes the text that ends it."""
        ids = completion.ids
        if not self.is_over(ids):
            return completion
        return Completion(ids[: bisect_left(range(len(ids) + 1), True, key=lambda n: self.is_over(ids[:n]))], "eos")
