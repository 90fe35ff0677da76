"""How a rule is declared, and all that were, by the entry that they are for."""

from collections.abc import Callable, Iterator

from src.config.problems import Problem

Problems = Iterator[Problem]
Rule = Callable[..., Problems]
RULES: dict[str, list[Rule]] = {"run": [], "predict": []}
"""Rules of src.run, which preflight has too, and of src.predict: nothing about how a run was trained."""


def applies_to(*entries: str) -> Callable[[Rule], Rule]:
    """Declare a rule of these entries."""

    def declare(rule: Rule) -> Rule:
        for entry in entries:
            RULES[entry].append(rule)
        return rule

    return declare
