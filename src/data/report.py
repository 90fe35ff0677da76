"""What became of the rows: how many were read, kept, cut and dropped, and how often each new token is learned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

CHECK_ROWS = 200
"""Rows of a set that are decoded again, to see whether the tokenizer gives their text back."""


@dataclass
class SplitReport:
    """The account of one set of rows; every row that was read is either kept or counted under a reason."""

    rows_read: int = 0
    rows_kept: int = 0
    rows_truncated: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised_tokens: int = 0
    control_tokens_as_text: int = 0
    rows_changed_by_tokenizer: int = 0
    new_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"rows_dropped": dict(self.rows_dropped)}

    @property
    def summary(self) -> str:
        """One line for a person."""
        dropped = self.rows_dropped.total()
        why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.rows_dropped.items())
        text = f"{self.rows_kept:,} of {self.rows_read:,} rows"
        text += f" ({self.rows_truncated:,} truncated, {dropped:,} dropped{': ' + why if why else ''})"
        text += f", {self.supervised_tokens:,} of {self.tokens:,} tokens supervised"
        if self.rows_changed_by_tokenizer:
            text += f"\n  of the first {CHECK_ROWS} rows {self.rows_changed_by_tokenizer} do not come back as they were"
            text += " from the tokenizer"
        return text
