"""Thoughts that are left out, and thoughts that shrink: what is gone, and the same rows however they are fed."""

from __future__ import annotations

import pytest

from src.data.answers import strip_thoughts
from src.data.thoughts import leave_out

TAGS = ("<ToW>", "</ToW>")

# What is around a thought that is left out


@pytest.mark.parametrize(
    ("text", "before", "joined"),
    [
        ("a <T> b", "", "a b"),  # one space, not two
        ("a <T> <T> b", "", "a b"),
        ("a<T><T>b", "", "ab"),  # tags without spaces; languages without them
        ("a <T>b <T> c", "", "a b c"),
        ("a <T>.", "", "a."),  # the full stop stands at its word
        ("a <T> .", "", "a ."),  # as the text itself has it: French does, and tokenised texts do
        ("a <T>.5", "", "a .5"),
        ("(<T> a)", "", "(a)"),
        ("我 <T>。", "", "我。"),
        ("<T> a", "", "a"),  # begins and ends without white space
        ("a <T>", "", "a"),
        ("a <T>\n", "", "a\n"),
        ("<T>", "", ""),
        (" <T> a", "prompt", " a"),  # what the prompt ends with counts
        ("<T> a", "prompt", " a"),
        ("<T> a", "prompt ", "a"),
        ("<T>\na", "prompt:\n", "a"),
        ("a\n<T> b", "", "a\nb"),
        ("a <T>\nb", "", "a\nb"),
        ("a\n\n<T>\n\nb", "", "a\n\nb"),
        ("a\n<T>     b", "", "a\n    b"),  # indented
        ("a\n    <T>\n    b", "", "a\n    b"),
    ],
)
def test_what_is_around_a_thought_joins_as_plain_text(text: str, before: str, joined: str) -> None:
    written = text.replace("<T>", "<ToW> why\nnot </ToW>")
    assert leave_out(written, TAGS, range(9), before) == joined
    assert leave_out(written, TAGS, (), before) == written
    assert strip_thoughts(f"prompt{written}", TAGS) == f"prompt{leave_out(written, TAGS, range(9), 'prompt')}"


def test_other_thoughts_stay_and_one_that_is_never_closed_is_none() -> None:
    text = "a <ToW>1</ToW> b <ToW>2</ToW> c <ToW>3"
    assert leave_out(text, TAGS, {1}, "") == "a <ToW>1</ToW> b c <ToW>3"
    assert leave_out(text, TAGS, {0, 1, 2}, "") == "a b c <ToW>3"
