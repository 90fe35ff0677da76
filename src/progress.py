"""How far long work is: what does it says so here, and who called it decides how that is shown."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol


class TimeLeft(NamedTuple):
    """How long a run still takes; a lower bound where it has something to do whose pace is not known yet."""

    seconds: float
    is_lower_bound: bool


class Advance(Protocol):
    """Counts what is done of a work; `detail` says how far the next unit is."""

    def __call__(self, count: int = 1, detail: str = "") -> None: ...


class Progress(Protocol):
    """Shows work under way, such as a console."""

    def work(
        self, kind: str, what: str = "", total: int | None = None, unit: str = "rows", batch: int = 1
    ) -> AbstractContextManager[Advance]:
        """Show a work while the block lasts.

        Args:
            kind: what is done, such as "evaluating"; works of a kind take the same time a batch.
            what: what it is done to.
            total: how many units it has; None where that is unknown.
            batch: how many units are done at once.
        """
        ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def work(
        self, kind: str, what: str = "", total: int | None = None, unit: str = "rows", batch: int = 1
    ) -> Iterator[Advance]:
        def advance(count: int = 1, detail: str = "") -> None:
            """Count nothing."""

        yield advance


NO_PROGRESS = NoProgress()
