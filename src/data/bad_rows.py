"""Rows that can't be used, collected for one error."""

from collections.abc import Sequence

from src.errors import DataError
from src.util import plural

NUM_LISTED = 10
MAX_BAD = 10_000  # reading stops after so many rows that can't be used, if fewer can: the file is something else


class BadRows:
    """The first rows that can't be used, as (place, reason), and how many there are."""

    def __init__(self, rows: Sequence[tuple[str, str]] = ()) -> None:
        self.count = len(rows)
        self._first = list(rows[:NUM_LISTED])

    def add(self, rows: Sequence[tuple[str, str]], num_read: int) -> None:
        """Add rows; DataError where it makes no sense to read on, after `num_read` rows, good ones included."""
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
        reasons = [reason for _, reason in self._first]
        lines = [
            f"{place}  {'the same' if reason == before else reason}"
            for (place, reason), before in zip(self._first, ["", *reasons], strict=False)
        ]
        if self.count > len(lines):
            lines.append(f"… and {self.count - len(lines)} more")
        text = "\n".join(f"  {line}" for line in [*lines, *last_line])
        return DataError(f"{plural(self.count, 'row')} can't be used:\n{text}")
