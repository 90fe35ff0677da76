"""Which ids tokens have. No torch, no transformers here: data and models both need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NewTokens:
    """The ids of the tokens of conf/tokens.

    `added` were not in the vocabulary before, `known` were; `tags` open and close thoughts and are named nowhere else,
    so the vocabulary has them.
    """

    added: dict[str, int]
    known: dict[str, int]
    tags: dict[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> dict[str, int]:
        return self.known | self.added


def num_token_ids(tokenizer: Any) -> int:
    """Return how many rows a matrix needs to have one for every token: the highest id + 1.

    `len(tokenizer)` counts tokens, which are fewer where the ids have holes.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1
