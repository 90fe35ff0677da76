"""How a rule is declared, and all that were, by the entry that they are for."""

from collections.abc import Callable, Iterator

from src.config.problems import Problem
from src.config.schema.entries import USING_RUNS

Problems = Iterator[Problem]
Rule = Callable[..., Problems]
RULES: dict[str, list[Rule]] = {"run": [], "training": [], **{entry: [] for entry in USING_RUNS}}
"""Rules of every composed configuration, of one that is trained, and of entries that use finished runs: nothing about
training.
"""


def applies_to(*entries: str) -> Callable[[Rule], Rule]:
    """Declare a rule of these entries."""

    def declare(rule: Rule) -> Rule:
        for entry in entries:
            RULES[entry].append(rule)
        return rule

    return declare
