"""One HTML file that stands by itself: texts escaped, figures drawn by a script within it, nothing fetched."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from src.errors import visible
from src.figures import Figure, styled
from src.reporting.drawing import bokeh_item, bokeh_script, page_json, write_files
from src.terminal import shortened
from src.tracking.console import Console
from src.tracking.lock import held_beside
from src.util import write_atomically

TEMPLATE = Path(__file__).with_name("page.html")
LONGEST_TEXT = 20_000  # characters of a text that is shown


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    is_warning: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of texts; `marked` are the numbers of those that stand out."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    marked: frozenset[int] = frozenset()
    is_folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Long:
    """A text as it was written, which is opened on demand."""

    title: str
    text: str
    kind: ClassVar[str] = "long"


@dataclass(frozen=True)
class Figures:
    """Figures side by side, where there is room."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "figures"


Block = Text | Table | Long | Figures


@dataclass
class Section:
    """A part of a page; one without blocks is left out."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    title: str
    about: str
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        blocks = [block for section in self.sections for block in section.blocks]
        return [figure for block in blocks if isinstance(block, Figures) for figure in block.figures]


def write_page(page: Page, output: Path, console: Console) -> None:
    """Write a page, and next to it a folder with CSV and PNG of each figure: `report_figures` of report.html."""
    with held_beside(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, rendered(page))
        folder = output.with_name(f"{output.stem}_figures")
        taken: Counter[str] = Counter()
        with console.work("drawing", total=len(page.figures), unit="figures") as advance:
            for figure in page.figures:
                taken[figure.key] += 1
                again = f"_{taken[figure.key]}" if taken[figure.key] > 1 else ""  # names may differ in other characters
                write_files(figure, folder / f"{figure.key}{again}")
                advance()
    console.label("page", str(output))
    if page.figures:
        console.label("figures", f"{folder}, as PNG and CSV")


def rendered(page: Page) -> str:
    """Return the HTML."""
    from jinja2 import Environment, StrictUndefined

    targets = {id(figure): f"figure-{number}" for number, figure in enumerate(page.figures)}
    data = page_json([bokeh_item(figure, targets[id(figure)]) for figure in page.figures])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    script = bokeh_script() if page.figures else ""
    sections = [section for section in page.sections if section.blocks]
    return template.render(
        page=page,
        sections=sections,
        targets={id(figure): target for figure, target in zip(page.figures, targets.values(), strict=True)},
        identity=id,
        styled=styled,
        data=_markup(data),
        script=_markup(script),
        nonce=hashlib.sha256(f"{script}{data}{page.title}".encode()).hexdigest()[:32],
    )


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def shown(value: Any) -> str:
    """Return a value as a page shows it: control characters written out, secrets masked, a long text cut."""
    return shortened(visible(str(value)), LONGEST_TEXT)
