"""The answer in a text: without thoughts and what a chat template writes around it. Pure.

Generated texts and references go through the same functions: a model that writes what it was trained on is right.
"""

import re
from dataclasses import dataclass

from src.data.thoughts import join_texts


def strip_thoughts(text: str, tags: tuple[str, str] | None) -> str:
    """Return a text without its thoughts, joined as `join_texts` does; one that is never closed ends with the text."""
    return join_texts(texts_between_thoughts(text, tags), before=None)


def texts_between_thoughts(text: str, tags: tuple[str, str] | None) -> list[str]:
    """Return what is before, between and after a text's thoughts, as it is written."""
    if tags is None or tags[0] not in text:
        return [text]
    opened, closed = map(re.escape, tags)
    return re.split(f"{opened}.*?(?:{closed}|\\Z)", text, flags=re.DOTALL)


@dataclass(frozen=True)
class AnswerFrame:
    """What a chat template writes between the generation prompt and the token that ends the assistant's turn.

    `before` and `after` are around an answer without a thought. `thought_open` and `thought_close` are around a thought
    at the beginning of the turn, where the template has a place for one; with `opens_thought` the generation prompt has
    opened it already. All are '' where the template writes nothing.
    """

    before: str = ""
    after: str = ""
    thought_open: str = ""
    thought_close: str = ""
    opens_thought: bool = False

    @property
    def end_text(self) -> str:
        """The text that ends a turn where the template writes one that is no token, such as '<|end|>'; or ''.

        A single character, or what is also before an answer, such as a quotation mark, would end answers too early.
        """
        mark = self.after.strip()
        return self.after.rstrip() if len(mark) > 1 and mark not in self.before else ""

    def answer(self, turn: str) -> str:
        """Return the answer of an assistant's turn, which is passed without the token that ends it.

        Removed are a thought, or else `before`; then the text that ends the turn and what follows it, or else `after`.
        """
        answer = self._begun(turn)
        return answer.partition(self.end_text)[0] if self.end_text else answer.removesuffix(self.after)

    def is_over(self, turn: str) -> bool:
        """Return whether a turn contains the text that ends it."""
        return bool(self.end_text) and self.end_text in self._begun(turn)

    def without_thought(self, answer: str) -> str:
        """Return an answer without a thought in the template's form at its beginning."""
        is_thought = bool(self.thought_open) and answer.lstrip().startswith(self.thought_open)
        return self._after_thought(answer) if is_thought else answer

    def _begun(self, turn: str) -> str:
        """Return a turn from where its answer begins; '' where a thought is never closed."""
        begun = turn.lstrip()
        if self.thought_close and (self.opens_thought or (self.thought_open and begun.startswith(self.thought_open))):
            return self._after_thought(turn)
        if turn.startswith(self.before):
            return turn[len(self.before) :]
        before = self.before.strip()
        return begun[len(before) :].lstrip() if before and begun.startswith(before) else turn

    def _after_thought(self, turn: str) -> str:
        return turn.partition(self.thought_close)[2].lstrip() if self.thought_close else turn
