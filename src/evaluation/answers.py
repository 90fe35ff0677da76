"""Answers of generated texts and of references, compared in the same form."""

from dataclasses import dataclass

from src.data.answers import AnswerFrame, strip_thoughts
from src.data.encoding import Encoder
from src.data.sets import EncodedSet


@dataclass(frozen=True)
class AnswerReader:
    """Extracts answers; `frame` is what a chat template writes around an answer, in rows that it wrote."""

    encoder: Encoder
    tags: tuple[str, str] | None
    frame: AnswerFrame

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
