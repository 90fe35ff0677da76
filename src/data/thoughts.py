"""Thoughts in a text, from tag to tag, and the text without some of them, joined as plain text would be. Pure."""

import re
from collections.abc import Container, Sequence
from functools import cache

CLOSES = re.compile(r"[.,;:!?…)\]}。，、；：！？）」』】](?!\w)")
"""Punctuation that stands at the word before it."""
OPENS = tuple("([{（「『【")
"""Punctuation that stands at the word after it."""


@cache
def _between(tags: tuple[str, str]) -> re.Pattern[str]:
    opened, closed = map(re.escape, tags)
    return re.compile(f"({opened}.*?{closed})", re.DOTALL)


def count_thoughts(text: str, tags: tuple[str, str]) -> int:
    """Return the number of thoughts in a text; one that is never closed is none."""
    return len(_between(tags).findall(text))


def leave_out(text: str, tags: tuple[str, str], left_out: Container[int], before: str | None) -> str:
    """Return a text without those of its thoughts, counted from 0, that are left out; `before` as of `join_texts`."""
    first, *rest = _between(tags).split(text)
    texts = [first]
    for i, (thought, after) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        if i in left_out:
            texts.append(after)
        else:
            texts[-1] += thought + after
    return join_texts(texts, before)


def join_texts(texts: Sequence[str], before: str | None) -> str:
    """Join the texts between thoughts that are left out, as a plain text without them would be written.

    Where there is white space on both sides of a thought, one of the two stays: the longer one, or that with more line
    ends. It goes where only punctuation separates, as in "word <thought>.", where the text begins or ends with the
    thought, and is never added.

    Args:
        before: what is read before the texts, such as a prompt; '' where nothing is, None where that is not known.
    """
    context = before or ""
    text = context + texts[0]
    for i, after in enumerate(texts[1:], start=2):
        if not (text[-1:].isspace() or after[:1].isspace()):
            text += after
            continue
        head, tail = text.rstrip(), after.lstrip()
        left, right = text[len(head) :], after[: len(after) - len(tail)]
        if not head and before is not None:
            gap = left
        elif not tail and not "".join(texts[i:]).strip():
            gap = right
        else:
            gap = _gap(head, left, right, tail)
        fixed = context[len(head) :]  # the white space that what is read before ends with
        text = head + fixed + gap.removeprefix(fixed) + tail
    return text[len(context) :]


def _gap(head: str, left: str, right: str, tail: str) -> str:
    """Return the white space between two texts that had `left` and `right` around a thought between them."""
    if not right and "\n" not in left and CLOSES.match(tail):
        return ""
    if not left and "\n" not in right and head.endswith(OPENS):
        return ""
    if "\n" in left and right and "\n" not in right:
        return left + right[1:]  # a space that separated the thought, and what else indents the line
    return max(right, left, key=lambda gap: (gap.count("\n"), len(gap)))
