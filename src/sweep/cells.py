"""Text in a table of the terminal: folded between words, or within a long one, but not within a number."""

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.containers import Lines
from rich.text import Text

from src import terminal
from src.errors import visible


class Cell(Text):
    """A text of one line, its control characters written out."""

    def __init__(self, text: str, style: str = "") -> None:
        super().__init__(visible(text, is_line=True), style)

    def wrap(
        self,
        console: Console,
        width: int,
        *,
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        tab_size: int = 8,
        no_wrap: bool | None = None,
    ) -> Lines:
        pieces = [self[start:stop] for start, stop in terminal.divided(self.plain, width, width)]
        if no_wrap or any(terminal.width(piece.plain) > width for piece in pieces):
            return super().wrap(console, width, justify=justify, overflow=overflow, tab_size=tab_size, no_wrap=no_wrap)
        lines = Lines(pieces)
        if justify is not None:
            lines.justify(console, width, justify=justify, overflow=overflow or "fold")
        return lines
