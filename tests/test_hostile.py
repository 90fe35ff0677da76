"""Texts, models and files that mean harm: nothing of them reaches the terminal or a page, and all of it is bounded."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from src.errors import report, visible
from src.inspection.drawing import Paint
from src.markdown import code, fenced, inline, table
from src.model.card import model_card
from src.sweep import leaderboard
from src.sweep.ranking import Row
from src.tracking.console import Console
from tests.conftest import admitted

TERMINAL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\u202egnp.exe\u2066\ud800"
PAGES = [
    "a|b", "a\\|b", "a\\", "`", "``` \n```", "<script>alert(1)</script>", "<!--", "](http://evil.example)",
    "[x](http://evil.example)", "![x](http://evil.example)", "<http://evil.example>", "# a", "- a", "1. a", "> a",
    "a\n\n# b", "a\n---\nb", "| a |\n|---|\n| b |", "**a**", "__a__ _b_", "~~a~~", "&lt;b&gt;", "=", "\\`\\|`|`",
    "a\\\\|b", "`|\\|`", "$x$", "tab\there", "\x1b[31m",
]  # fmt: skip
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\n\tb\r") == "a\\x1b[31m\n\tb\\r".replace("\\r", "\\x0d")
    assert visible("a\nb\tc", is_line=True) == "a\\nb\\tc"
    assert visible("\u202e\ud800\u2028") == "\\u202e\\ud800\\u2028"
    plain = "é 한국 👨\u200d👩 naïve ﷺ عربى"
    assert visible(plain) == plain


def test_nothing_of_a_text_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.say(TERMINAL)
    console.label("rows", TERMINAL)
    console.table({TERMINAL: 1.0})
    console.evaluation(1, {f"eval/{TERMINAL}/loss": 1.0})
    console.warn(TERMINAL)
    report(ValueError(TERMINAL))
    printed = capsys.readouterr()
    assert not CONTROLS.search(stream.getvalue() + printed.err)
    assert stream.getvalue().count("\\x1b]0;owned\\x07") == 4
    assert printed.err.count("\\x1b]0;owned\\x07") == 2


def test_rows_are_painted_in_our_colours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    paint = Paint(stream)
    Console(stream).say(paint(Paint.THOUGHT, TERMINAL), is_painted=True)
    text = stream.getvalue()
    assert text.startswith("\x1b[36m")
    assert not CONTROLS.search(text.removeprefix("\x1b[36m").removesuffix("\x1b[0m\n"))


READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def kinds(text: str) -> list[str]:
    """Return the kinds of all tokens of a text in Markdown, those in a line included."""
    return [one.type for token in READER.parse(text) for one in [token, *(token.children or [])]]


def shown(text: str) -> str:
    """Return what a reader of a text in Markdown sees."""
    return re.sub(r"<[^>]*>", "", READER.render(text)).strip()


@pytest.mark.parametrize("text", PAGES)
def test_a_text_in_markdown_stays_text(text: str) -> None:
    line = " ".join(visible(text).split())
    assert set(kinds(inline(text))) == {"paragraph_open", "inline", "text", "paragraph_close"}
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert shown(inline(text)) == escaped
    rows = table(["a", "b"], [[code(text), inline(text)], [inline(text), code(text)]])
    found = kinds(rows)
    assert (found.count("tr_open"), found.count("td_open")) == (3, 4)
    assert not {"link_open", "image", "html_block", "em_open", "strong_open", "s_open", "heading_open"} & set(found)
    html = [one.content for token in READER.parse(rows) for one in token.children or [] if one.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}
    assert READER.render(rows).count(f"<code>{escaped}</code>") == 2
    assert kinds(fenced(f"a\n{text}\nb", "yaml")) == ["fence"]


def test_a_card_and_a_leaderboard_hold_no_markup_of_names(tmp_path: Path) -> None:
    evil = "<script>|` ](http://evil.example)\n\n# owned ```\n"
    frozen: dict[str, Any] = admitted().frozen | {"name": evil}
    frozen["model"] = frozen["model"] | {"checkpoint": evil}
    data = {evil: {"rows_kept": 1000, "tokens": 2, "supervised_tokens": 3}}
    card = model_card(frozen, data, {f"eval/{evil}": 1.0}, {}, {evil: 7})
    row = Row("s", evil, evil, {(1, None): 0.5}, (1,), 1, 0, 0, 0, mean=0.5, rank=1)
    leaderboard.write([row], tmp_path, evil, "minimize", evil)
    board = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    for text in (card.split("---\n", 2)[2], board):
        found = kinds(text)
        assert not {"link_open", "html_block", "html_inline"} & set(found)
        headings = READER.render(text).count("owned")
        assert headings and not re.search(r"<h\d>owned", READER.render(text))
    assert kinds(card.split("---\n", 2)[2]).count("fence") == 2
