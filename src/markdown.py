"""Escape texts of users and data in Markdown files. Pure."""

import re
from collections.abc import Iterable, Sequence

from src.errors import visible

# Characters that begin emphasis, code, HTML, an entity or a link anywhere in a line.
_SPECIAL = re.compile(r"[\\`*<&\[\]#~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_BLOCK = re.compile(r"[-+=>]|\d+[.)]")  # what begins a list, a quotation or a rule at the start of a line


def inline(text: str) -> str:
    """Return a text as one line of Markdown without emphasis, code, links, HTML or table cells."""
    line = _SPECIAL.sub(r"\\\g<0>", " ".join(visible(text).split()))
    if begins := _BLOCK.match(line):
        line = f"{line[: begins.end() - 1]}\\{line[begins.end() - 1 :]}"
    return line.replace("|", "&#124;")


def code(text: str) -> str:
    """Return a text as a code span in one line, '—' for a blank one; it can stand in a cell of a table."""
    line = " ".join(visible(text).split())
    if not line:
        return "—"
    if "\\|" in line or (line.endswith("\\") and "|" in line):  # readers differ in what ends a cell then
        return f"<code>{inline(line)}</code>"
    fence = "`" * (_longest_fence(line) + 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def fenced(content: str, language: str) -> str:
    """Return a block of code whose fence is longer than any in the content."""
    fence = "`" * max(3, _longest_fence(content) + 1)
    return f"{fence}{language}\n{content.removesuffix(chr(10))}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already, from `inline`, `code` or the program itself."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
