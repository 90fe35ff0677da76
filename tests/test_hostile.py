"""Texts, models and files that mean harm: nothing of them reaches the terminal or a page, and all of it is bounded."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from src import patterns
from src.config.schema import Metric
from src.data.dataset import build_data
from src.errors import ConfigError, DataError, LimitError, report, visible
from src.evaluation.metrics import scores
from src.inspection.drawing import Paint
from src.markdown import code, fenced, inline, table
from src.model.card import model_card
from src.patterns import Pattern
from src.sweep import leaderboard
from src.sweep.ranking import Row
from src.tokens import load_tokenizer
from src.tracking.console import Console
from tests.conftest import admitted, write_lines

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
        assert "owned" in READER.render(text)
        assert not re.search(r"<h\d>owned", READER.render(text))
    assert kinds(card.split("---\n", 2)[2]).count("fence") == 2


EXPLOSIVE = r"(?:a|aa)+$|(b)"
LONG = "a" * 60 + "c"


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)


def test_a_pattern_that_explodes_is_told(short_limit: None) -> None:
    pattern = Pattern("data.thought_pattern", EXPLOSIVE)
    for use in (lambda: pattern.sub("", LONG), lambda: pattern.is_in(LONG), lambda: pattern.groups(LONG)):
        with pytest.raises(LimitError, match=r"data\.thought_pattern = .* 61 characters"):
            use()
    assert pattern.groups("abb") == ["b", "b"]
    with pytest.raises(ConfigError, match=r"data\.answer_pattern"):
        Pattern("data.answer_pattern", "(")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"<<(.*?)>>", "1<<2\n>>3<<>>"), (r"\\boxed{([^}]*)}", r"so \boxed{7} is it"), (r"x{e}(a)", "x{e}a xa ya"),
        (r"(a){2}|b{,2}(c)|d{}(e)", "aabbcd{}e"), (r"[{}](a)", "{a}a"), (r"[]{e}]+(b)", "]{e}b"), (r"(?i)(É)", "é"),
        (r"(a*)", "baac"), (r"\N{DIGIT ONE}(.)", "12"), (r"^(.)|(.)$", "a\nb"), (r"[^]{]{2}(\{)", "ab{"),
        (r"#### *(-?[0-9.,]*[0-9])", "#### -1,000.5 #### 7."), (r"\{(?P<n>\w+)\}", "{a}{b_1}"),
    ],
)  # fmt: skip
def test_a_pattern_finds_what_re_finds(pattern: str, text: str) -> None:
    found = Pattern("data.answer_pattern", pattern)
    same = re.compile(pattern, re.DOTALL)
    assert found.groups(text) == [match.group(1) for match in same.finditer(text)]
    assert found.sub("<>", text) == same.sub("<>", text)
    assert found.is_in(text) == bool(same.search(text))


def test_a_row_on_which_a_pattern_explodes_is_told_by_its_place(short_limit: None, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": c} for c in ("b", LONG, LONG)])
    for given in (
        ["data=prompt_completion", f"data.thought_pattern='{EXPLOSIVE}'", "tokens=none"],
        ["data=prompt_completion", f"data.answer_pattern='{EXPLOSIVE}'", "evaluation.metrics=[exact_match]"],
    ):
        config = admitted(*given, f"data.train_files=[{file}]", f"data.test_files=[{file}]").config
        with pytest.raises(DataError, match=rf"{re.escape(str(file))}:2: data\.\w+_pattern"):
            build_data(config, load_tokenizer(config.model, config.tokens)[0])


def test_a_generated_text_on_which_a_pattern_explodes_is_told_by_its_row(short_limit: None) -> None:
    with pytest.raises(DataError, match=r"^row 1: data.answer_pattern"):
        scores([Metric.exact_match], ["b", LONG], ["b", "b"], EXPLOSIVE, "row {}".format)
