"""Which ids tokens have: data and models both need to know."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConfiguredTokens:
    """The ids of the tokens that a configuration names (conf/tokens).

    `added` were not in the vocabulary before, `existing` were; `tags`, named by nothing else, open and close thoughts.
    """

    added: dict[str, int]
    existing: dict[str, int]
    tags: dict[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> dict[str, int]:
        """The ids of all but the tags."""
        return self.existing | self.added


def num_token_ids(tokenizer: Any) -> int:
    """Return how many rows a matrix needs to have one for every token: the highest id + 1."""
    # `len(tokenizer)` counts tokens, which are fewer where the ids have holes
    return max(tokenizer.get_vocab().values(), default=-1) + 1
