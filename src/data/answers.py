"""What of a text is the answer: neither thoughts nor what a chat template writes around it. Pure.

Generated texts and references go through the same function, so that a model that writes just what its rows teach is
right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def strip_thoughts(text: str, tags: tuple[str, str] | None) -> str:
    """Leave out everything from each opening tag to its closing tag; a thought never closed goes to the end."""
    if tags is None:
        return text
    opened, closed = map(re.escape, tags)
    return re.sub(f"{opened}.*?(?:{closed}|\\Z)", "", text, flags=re.DOTALL)


@dataclass(frozen=True)
class AnswerFrame:
    """What a chat template writes between the generation prompt and the token that ends the assistant's turn.

    `before` and `after` stand around an answer without a thought. `thought_open` and `thought_close` stand around a
    thought at the beginning of the turn, where the template has a place for one; `opens_thought` says that the
    generation prompt has opened it already. All are '' where the template writes nothing.
    """

    before: str = ""
    after: str = ""
    thought_open: str = ""
    thought_close: str = ""
    opens_thought: bool = False

    def answer(self, turn: str) -> str:
        """Return the answer of an assistant's turn, given without its end; '' where a thought is never closed."""
        begun = turn.lstrip()
        if self.thought_close and (self.opens_thought or (self.thought_open and begun.startswith(self.thought_open))):
            _, close, answer = turn.partition(self.thought_close)
            if not close:
                return ""
            turn = answer.lstrip()
        elif self.before and turn.startswith(self.before):
            turn = turn[len(self.before) :]
        elif self.before.strip() and begun.startswith(self.before.strip()):
            turn = begun[len(self.before.strip()) :].lstrip()
        if self.end_text:
            return turn.partition(self.end_text)[0].removesuffix(self.after.partition(self.end_text)[0])
        return turn.removesuffix(self.after)

    @property
    def end_text(self) -> str:
        """What ends a turn where it is ordinary text for the tokenizer, '' where nothing or a token does."""
        return self.after.strip()
