"""How a text is laid out on a terminal: lines end between words, keep their indent, break no number and no command.

Pure text.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import IO
from unicodedata import category, east_asian_width

NARROWEST = 20  # the width below which lines are not wrapped
DEFAULT_COLUMNS = 80  # the width assumed for a terminal that does not report its own
LAST_COLUMN = 0.72  # share of the width within which a table's last column must begin to be continued below itself

_PAINT = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[+±-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.:_]\d+)*(?:[eE][+-]?\d+)?%?")
_LONG_NUMBER = re.compile(r"(?<==)\d*\.\d{6,}(e-?\d+)?(?= |$)")
_UNIT = r"(?<=\d) (?=(?:[KMGT]i)?B\b)"
_PLAIN_WORD = re.compile(rf"(?:{_UNIT}|\S)+")
_CODE = r"[^\s`]*`[^`\n]*`\S*"
_WORD = re.compile(rf"{_CODE}|{_PLAIN_WORD.pattern}")
_QUOTED = r"""'[^'\n]*'(?:"'"'[^'\n]*')*"""
_ARGUMENT = rf"(?:{_QUOTED}|[\w.+~/@-]+=(?:{_QUOTED}|[^\s'])+)[^\s']*"
_PROGRAM = r"(?:make [\w-]+|python -m [\w.]+) "
_COMMAND = re.compile(rf"{_CODE}|(?<![^\s(])(?:{_PROGRAM})?{_ARGUMENT}(?: {_ARGUMENT})*")
"""What may be pasted into a shell: code, and arguments as a shell's quoting has them."""
_SINGLE = re.compile(_ARGUMENT)
_COLUMN = re.compile(r"\S {3,}(?=\S)")
_AFTER = ("/\\,;:=&>)]}", "._-")  # after which a word that is longer than a line is best divided, and next best


def columns_of(stream: IO[str]) -> int | None:
    """Return the columns of the terminal that a stream writes to; None for a file or a pipe, whose lines stay whole.

    COLUMNS in the environment counts for a terminal that does not say how wide it is, and for nothing else: libraries
    (readline) set it for all processes that they start, whatever these write to.
    """
    if not stream.isatty():
        return None
    with suppress(OSError, ValueError):  # a stream of Python's own has no number
        if found := os.get_terminal_size(stream.fileno()).columns:
            return found
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else DEFAULT_COLUMNS


def wrapped(text: str, columns: int | None, *, hang: int | None = None) -> str:
    """Return a text wrapped to a width (None: as it is); commands that are longer stay on one line.

    `hang` is the columns in front of a continued line; by default the indent of the line, or where the last column of
    a table (three spaces or more) begins.
    """
    if columns is None or columns < NARROWEST:
        return text
    return "\n".join(shown for line in text.split("\n") for shown in _wrapped_line(line, columns, hang))


def filled(begin: str, items: Sequence[str], columns: int | None, *, hang: int) -> str:
    """Return a text of items that are two spaces apart, none of them divided."""
    lines = [begin]
    for item in items:
        longer = f"{lines[-1]}  {item}"
        if columns is None or width(longer) <= columns or not lines[-1].strip():
            lines[-1] = longer
        else:
            lines.append(" " * hang + item)
    return "\n".join(lines)


def cut_to(text: str, columns: int | None) -> str:
    """Return the first words of a line that fit into a width, with … where some are missing."""
    if columns is None or width(text) <= columns:
        return text
    (start, stop), *_ = divided(text, columns - 2, columns - 2)
    return f"{text[start:stop]} …"


def shortened(text: str, most: int, end: str = " …") -> str:
    """Return a text of at most `most` characters, with `end` where it is cut; no number is cut."""
    if len(text) <= most:
        return text
    stop = most - len(end)
    inside = next((m for m in _NUMBER.finditer(text) if m.start() < stop < m.end()), None)
    if inside is not None and not text[: inside.start()].strip():
        return f"a number of {sum(map(str.isdigit, inside.group()))} digits"
    return f"{text[: stop if inside is None else inside.start()].rstrip()}{end}"


def width(text: str) -> int:
    """Count the columns that a line takes; what paints it takes none."""
    return sum(_widths(text))


def divided(line: str, first: int, rest: int, whole: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Divide a line between words; one that is longer than a line is divided too, but not within a number.

    Args:
        first: columns for the first segment.
        rest: columns for each of the others.
        whole: (start, stop) of what is not divided where it has room.
    Returns: (start, stop) of each segment, without the white space between them.
    """
    total, undivided = [0, *accumulate(_widths(line))], _undivided(line)
    segments: list[tuple[int, int]] = []
    start = stop = 0  # of the segment that is being filled
    for begin, end in _words(line, rest, whole):
        room = rest if segments else first
        while total[end] - total[start] > room:
            is_longer = total[end] - total[begin] > rest
            cut = _cut(line, begin, end, total, total[start] + room, undivided) if is_longer else None
            if cut is not None and (begin == start or line[cut - 1] in _AFTER[0]):
                segments.append((start, cut))
                start = begin = stop = cut
            elif stop > start:
                segments.append((start, stop))
                start = begin
            else:  # nothing of it can be divided
                break
            room = rest
        stop = end
    return [*segments, (start, max(start, len(line.rstrip())))]


def _words(line: str, columns: int, whole: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what is not divided: words, and what is quoted as code where it has room in a line."""
    at = 0
    for start, stop in (*whole, (len(line), len(line))):
        for word in _WORD.finditer(line, at, start):
            if len(word.group()) <= columns:
                yield word.span()
            else:
                yield from (part.span() for part in _PLAIN_WORD.finditer(line, *word.span()))
        if start < stop:
            yield start, stop
        at = stop


def _undivided(line: str) -> set[int]:
    """Return the places of a line that are within a number, or within what paints it."""
    found = (*_NUMBER.finditer(line), *_PAINT.finditer(line))
    return {place for one in found for place in range(one.start() + 1, one.end())}


def _cut(line: str, begin: int, end: int, total: Sequence[int], most: int, whole: set[int]) -> int | None:
    """Return the best place to divide a word so that its first part ends within `most` columns."""
    end = min(end - 1, bisect_right(total, most) - 1)
    places = [i for i in range(end, begin, -1) if i not in whole and total[i + 1] > total[i]]
    half = (total[begin] + most) // 2
    best = (place for after in _AFTER for place in places if line[place - 1] in after and total[place] > half)
    return next(best, places[0] if places else None)


def _wrapped_line(line: str, columns: int, hang: int | None) -> Iterator[str]:
    if width(line) <= columns:
        yield line
        return
    indent = _hanging(line, columns) if hang is None else min(hang, columns // 2)
    room, left = columns, 0
    for part, is_long in _parts(line, columns, columns - indent):
        if is_long:  # on a line of its own, as far to the left as it takes
            yield " " * max(0, min(indent, columns - width(part))) + part
        else:
            for start, stop in divided(part, room, columns - indent, list(_commands(part, columns))):
                yield " " * left + part[start:stop]
                left = indent
        room, left = columns - indent, indent


def _commands(line: str, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of commands; of several arguments that are longer than a line each by itself."""
    for found in _COMMAND.finditer(line):
        several = [one.span() for one in _SINGLE.finditer(line, *found.span())]
        yield from several if several[1:] and width(found.group()) > columns else [found.span()]


def _parts(line: str, columns: int, room: int) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a line, each with whether it is a command that has no room in the rest of a line."""
    at = 0
    for start, stop in [*_commands(line, columns), (len(line), len(line))]:
        if width(line[start:stop]) > room or start == stop:
            if (before := line[at:start]).strip():
                yield (before.lstrip() if at else before), False
            if start < stop:
                yield line[start:stop], True
            at = stop


def _hanging(line: str, columns: int) -> int:
    """Return where a line is continued: below its last column, where it is of a table, else below its first word."""
    plain = _PAINT.sub("", line)
    begins = [width(plain[: found.end()]) for found in _COLUMN.finditer(plain)]
    text = plain.lstrip(" ")
    own = len(plain) - len(text) + 2 * text.startswith("- ")  # of a list
    return max([own, *(begin for begin in begins if begin <= LAST_COLUMN * columns)])


def _widths(text: str) -> list[int]:
    if text.isascii() and "\x1b" not in text:
        return [1] * len(text)
    found = [_width(character) for character in text]
    for paint in _PAINT.finditer(text):
        found[paint.start() : paint.end()] = [0] * (paint.end() - paint.start())
    return found


def short_numbers(label: str) -> str:
    """Return a label of KEY=VALUE pairs in which a searched number has four digits."""
    return _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.4g}", label)


def _width(character: str) -> int:
    if category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if east_asian_width(character) in "WF" else 1
