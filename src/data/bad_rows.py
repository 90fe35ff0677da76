"""Rows that can't be used, collected for one error."""

from collections.abc import Sequence

from src.errors import DataError
from src.util import plural

NUM_LISTED = 10
MAX_BAD = 10_000
"""Reading stops after this many rows that can't be used, if fewer can: the file is something else."""


class BadRows:
    """The first rows that can't be used, as (place, reason), and how many there are."""

    def __init__(self, rows: Sequence[tuple[str, str]] = ()) -> None:
        self.count = len(rows)
        self._first = list(rows[:NUM_LISTED])

    def add(self, rows: Sequence[tuple[str, str]], num_read: int) -> None:
        """Add rows.

        Args:
            num_read: how many rows were read so far, good ones included.
        Raises:
            DataError: where it makes no sense to read on.
        """
        self._first += rows[: NUM_LISTED - len(self._first)]
        self.count += len(rows)
        if rows and self.count >= MAX_BAD and 2 * self.count > num_read:
            raise self._error(
                f"stopped at {rows[-1][0]}, after {self.count:,} rows that can't be used and fewer that can"
            )

    def raise_if_any(self) -> None:
        """Raise DataError with the first places and the number of bad rows, where there are any."""
        if self.count:
            raise self._error()

    def _error(self, *last_line: str) -> DataError:
        lines, before = [], ""
        for place, reason in self._first:
            lines.append(f"{place}  {'the same' if reason == before else reason}")
            before = reason
        if self.count > len(lines):
            lines.append(f"… and {self.count - len(lines)} more")
        text = "\n".join(f"  {line}" for line in [*lines, *last_line])
        return DataError(f"{plural(self.count, 'row')} can't be used:\n{text}")
