"""When something happens while a run trains, as `…_steps` keys say: every N steps, every epoch, or at the end alone."""

from dataclasses import dataclass
from typing import Protocol


class StepLike(Protocol):
    """The part of a training step that a rhythm reads."""

    @property
    def is_last(self) -> bool: ...

    def is_due(self, every: int | str | None) -> bool: ...


@dataclass(frozen=True)
class Every:
    """A rhythm: each N steps, each `epoch`, or never (None); and at the run's last step where `at_end` says so."""

    steps: int | str | None
    at_end: bool = True

    def is_due(self, step: StepLike) -> bool:
        """Return whether it happens after a step."""
        return (self.at_end and step.is_last) or step.is_due(self.steps)
