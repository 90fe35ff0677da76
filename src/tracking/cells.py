"""Tables of the terminal: their text is folded between words, or within a long one, but not within a number."""

from typing import Any

from rich import box
from rich.console import Console
from rich.containers import Lines
from rich.table import Table
from rich.text import Text

from src import terminal
from src.errors import visible


class Cell(Text):
    """A text of one line, its control characters written out."""

    def __init__(self, text: str, style: str = "") -> None:
        super().__init__(visible(text, is_line=True), style)

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        pieces = [self[start:stop] for start, stop in terminal.divided(self.plain, width, width)]
        if options.get("no_wrap") or any(terminal.width(piece.plain) > width for piece in pieces):
            return super().wrap(console, width, **options)
        lines = Lines(pieces)
        if (justify := options.get("justify")) is not None:
            lines.justify(console, width, justify=justify, overflow=options.get("overflow") or "fold")
        return lines


def new_table(title: str) -> Table:
    return Table(box=box.SIMPLE, title=Cell(title), title_justify="left", pad_edge=False)
