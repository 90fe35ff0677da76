"""The group of each record, by data.group_column: records of a group stay in one fold."""

import sys
from collections.abc import Mapping
from numbers import Number
from typing import Any

from src.data.bad_rows import BadRows
from src.data.cache import ShowProgress
from src.data.formats import BadRow, type_name
from src.data.readers.record import Unreadable
from src.data.sources import Source

PROGRESS_RECORDS = 10_000


def read_groups(sources: Mapping[str, Source], column: str, show_progress: ShowProgress) -> list[list[str]]:
    """Read the group of each record of each source: a field as it is in the file, which encoded rows don't have.

    Records that can't be read have the group '': they are reported with all others once rows are prepared. DataError
    lists the records whose group isn't known.
    """
    groups, bad, num_records, lacks_groups = list[list[str]](), BadRows(), 0, False
    for name, source in sources.items():
        of_source: list[str] = []
        for number, record in enumerate(source.records(), start=1):
            num_records += 1
            if isinstance(record, Unreadable):
                of_source.append("")
                bad.add([(record.place, record.reason)], num_records)
            else:
                try:
                    of_source.append(_group(record.fields, column))
                except BadRow as problem:
                    lacks_groups = True
                    bad.add([(record.place, str(problem))], num_records)
            if number % PROGRESS_RECORDS == 0:
                show_progress(f"{name}: groups of {number:,} rows read")
        groups.append(of_source)
    if lacks_groups:
        bad.raise_if_any()
    return groups


def _group(fields: dict[str, Any], column: str) -> str:
    """Return a record's group as text, since one file may write 1 and another "1"; BadRow where there is none."""
    if column not in fields:
        there = ", ".join(map(repr, fields)) or "none"
        raise BadRow(f"no field {column!r}, which data.group_column names; there are {there}")
    value = fields[column]
    if value == "":  # what null is in CSV
        raise BadRow(f"{column!r} is empty: data.group_column needs a group in each row")
    if not isinstance(value, str | Number):
        raise BadRow(f"{column!r} is {type_name(value)}: a group is a text, a number, true or false")
    return sys.intern(str(value))
