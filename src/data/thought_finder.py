"""Thoughts in the texts of rows: found by data.thought_pattern, or between the run's own tags, and checked."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from src.config.schema import Malformed
from src.data.formats import BadRow
from src.data.thoughts import join_texts
from src.errors import ConfigError
from src.patterns import Pattern

NESTED, UNCLOSED, UNOPENED, UNFOUND = "nested", "never closed", "never opened", "not found by the pattern"
MALFORMED = {
    NESTED: "{} stands inside a thought: one in another, or data.thought_pattern takes several for one, as (.*) does",
    UNCLOSED: "{} opens a thought that is never closed",
    UNOPENED: "{} closes a thought that was never opened",
    UNFOUND: "{} opens a thought that is closed, and that data.thought_pattern does not find",
}
"""What can be wrong with the thoughts of a text, and how it is told with the delimiter."""
ANSWERLESS, IN_PROMPT, CUT = "without an answer", "tag in the prompt", "cut inside"
"""What else is counted of the rows: a thought and no answer, a tag in a prompt, a row cut inside a thought."""

SYNTAX = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P<\w+>|\(\?|[()|]", re.DOTALL)
"""What decides where a group of a regular expression begins and ends."""
FLAGS = re.compile(r"\(\?[a-zA-Z]+\)")
TELLING = re.compile(r"(?=.*[<>\[\](){}«»‹›⟨⟩【】「」])(?:.*\w.*|[^\"']{2,})", re.DOTALL)
"""Matches a delimiter that stands for nothing else: `<think>` or `[[`, but not `)`, a line end, or JSON's `"}`."""


class FoundThoughts(NamedTuple):
    """A text cut into its thoughts, without their delimiters, and what is between them, one more."""

    between: list[str]
    thoughts: list[str]

    def written(self, tags: tuple[str, str] | None, before: str) -> str:
        """Return the text with its thoughts between these tags; without tags they are dropped, see `join_texts`."""
        if tags is None:
            return join_texts(self.between, before)
        (first, *others), (opened, closed) = self.between, tags
        pairs = zip(self.thoughts, others, strict=True)
        return first + "".join(f"{opened}{thought}{closed}{text}" for thought, text in pairs)


class ThoughtFinder:
    """Finds the thoughts of texts: the group of each match of a pattern, or, without one, what is between the tags.

    Also finds what is wrong with them: one inside another, and delimiters of which the other one is missing. The tags
    are such delimiters, and so is what a pattern has before and after its group, where that is TELLING.
    """

    def __init__(
        self, pattern: str | None, tags: tuple[str, str] | None, malformed: Malformed = Malformed.error
    ) -> None:
        opened, closed = tags or ("", "")
        if pattern is None and tags is not None:
            pattern = f"{re.escape(opened)}(.*?){re.escape(closed)}"
        before, after = around_group(pattern or "")
        self._pattern = None if pattern is None else Pattern("data.thought_pattern", pattern)
        self._opening, self._closing = _Delimiter(opened, before), _Delimiter(closed, after)
        self._is_refused = malformed is Malformed.error

    def find(self, text: str) -> FoundThoughts:
        """Return a text cut into its thoughts and the rest; an empty match is none."""
        between, thoughts, done = list[str](), list[str](), 0
        for match in self._pattern.matches(text) if self._pattern else ():
            if match.end() > match.start():
                between.append(text[done : match.start()])
                thoughts.append(match[group_of(match.re.groupindex)] or "")
                done = match.end()
        return FoundThoughts([*between, text[done:]], thoughts)

    def check(self, found: FoundThoughts, where: str = "") -> list[str]:
        """Return what is wrong with the thoughts of a text, of MALFORMED; BadRow where such rows are refused."""
        wrong = list(self._wrong(found))
        if wrong and self._is_refused:
            kind, delimiter = wrong[0]
            remedy = "data.malformed_thoughts=drop leaves such rows out, keep trains on them as they are"
            raise BadRow(f"{where}{MALFORMED[kind].format(repr(delimiter))} ({remedy})")
        return list(dict.fromkeys(kind for kind, _ in wrong))

    def _wrong(self, found: FoundThoughts) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, with the delimiter that shows it."""
        everything = "\0".join([*found.thoughts, *found.between])  # searched at once: few rows have anything
        if not (self._opening.find(everything) or self._closing.find(everything)):
            return
        for thought in found.thoughts:
            if inner := self._opening.find(thought) or self._closing.find(thought):
                yield NESTED, inner[0]
        for text in found.between:
            opening = self._opening.find(text)
            if opening:
                yield UNFOUND if self._closing.find(text, opening.end) else UNCLOSED, opening[0]
            if (closing := self._closing.find(text)) and (opening is None or closing.end < opening.end):
                yield UNOPENED, closing[0]


class _Found(NamedTuple):
    text: str
    end: int


class _Delimiter:
    """What opens or closes a thought: a tag, and a regular expression; '' for none."""

    def __init__(self, tag: str, pattern: str) -> None:
        self._tag = tag
        try:
            self._pattern = Pattern("data.thought_pattern", pattern) if pattern else None
        except ConfigError:  # it means something only as a part of the whole pattern
            self._pattern = None

    def find(self, text: str, start: int = 0) -> _Found | None:
        """Return the first one from an index on."""
        found = []
        if self._tag and (at := text.find(self._tag, start)) >= 0:
            found.append((at, _Found(self._tag, at + len(self._tag))))
        for match in self._pattern.matches(text) if self._pattern else ():
            if match.start() >= start and TELLING.fullmatch(match[0].strip()):
                found.append((match.start(), _Found(match[0], match.end())))
                break
        return min(found, default=(0, None))[1]


def group_of(names: dict[str, int]) -> int:
    """Return the number of the group that is the thought: the one called `thought`, or else the first."""
    return names.get("thought", 1)


def around_group(pattern: str) -> tuple[str, str]:
    """Return what a pattern has before and after the group that is the thought; '' where that means nothing alone.

    Of alternatives, and of a group inside another one, nothing is known.
    """
    opening = "(?P<thought>" if "(?P<thought>" in pattern else "("
    depth, start, stop = 0, -1, -1
    for part in SYNTAX.finditer(pattern):
        text = part[0]
        if text == "|" and not depth:
            return "", ""
        if text == opening and not depth and start < 0:
            start = part.start()
        depth += text.startswith("(") - (text == ")")
        if text == ")" and not depth and start >= 0 and stop < 0:
            stop = part.end()
    flags = FLAGS.match(pattern)
    return ("", "") if stop < 0 else (pattern[:start], (flags[0] if flags else "") + pattern[stop:])
