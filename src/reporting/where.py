"""The language of `report.where`: which runs are meant. It is parsed here, and never evaluated as Python.

    or-expression:   and-expression {"or" and-expression}
    and-expression:  term {"and" term}
    term:            "not" term | "(" or-expression ")" | KEY OP VALUE
    OP:              = (or ==)  !=  <  <=  >  >=  ~ (the text contains VALUE)

KEY and VALUE are words, or texts in quotes where they hold blanks, parentheses or an operator's characters.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from src.reporting.runs import is_number

Values = Callable[[str], Any]
"""Returns a run's value of a key, None where it has none."""
Condition = Callable[[Values], bool]
TOKEN = re.compile(
    r"""\s*(?:(?P<text>"[^"]*"|'[^']*')|(?P<op><=|>=|!=|==|=|<|>|~)|(?P<bracket>[()])|(?P<word>[^\s()<>=!~"']+))"""
)
OPERATORS = "=, !=, <, <=, >, >= or ~"
DEEPEST = 50
WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


class WhereError(ValueError):
    """A condition can't be read; the text says where."""


@dataclass(frozen=True)
class Token:
    kind: str  # text, op, bracket, word, or end
    text: str
    place: int  # the number of its first character, from 1


@dataclass(frozen=True)
class Where:
    """A condition that was read, and the keys in it with their places."""

    holds: Condition
    keys: tuple[Token, ...]


def read_where(text: str) -> Where:
    """Return the condition that a text states; WhereError says at which character it can't be read."""
    return _Reader(_tokens(text)).read()


def _tokens(text: str) -> list[Token]:
    found, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            what = "a quote without its end" if text[at] in "\"'" else f"{text[at]} has no meaning"
            raise WhereError(f"at character {at + 1}: {what}")
        kind = match.lastgroup or ""
        shown = match[kind][1:-1] if kind == "text" else match[kind]
        found.append(Token(kind, shown, match.start(kind) + 1))
        at = match.end()
    return [*found, Token("end", "", len(text) + 1)]


class _Reader:
    """Reads tokens by recursive descent."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens, self._at, self._depth, self._keys = tokens, 0, 0, list[Token]()

    def read(self) -> Where:
        condition = self._any()
        if self._now.kind != "end":
            self._expected("and, or, or the end")
        return Where(condition, tuple(self._keys))

    @property
    def _now(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        token = self._now
        self._at += 1
        return token

    def _takes(self, word: str) -> bool:
        is_there = self._now.kind in ("word", "bracket") and self._now.text == word
        self._at += is_there
        return is_there

    def _expected(self, what: str) -> NoReturn:
        found = "it ends" if self._now.kind == "end" else f"there is {self._now.text}"
        raise WhereError(f"at character {self._now.place}: {found}, where {what} is expected")

    def _any(self) -> Condition:
        parts = [self._all()]
        while self._takes("or"):
            parts.append(self._all())
        return lambda values: any(part(values) for part in parts)

    def _all(self) -> Condition:
        parts = [self._term()]
        while self._takes("and"):
            parts.append(self._term())
        return lambda values: all(part(values) for part in parts)

    def _term(self) -> Condition:
        self._depth += 1
        if self._depth > DEEPEST:
            raise WhereError(f"at character {self._now.place}: it is nested more than {DEEPEST} deep")
        try:
            return self._inner_term()
        finally:
            self._depth -= 1

    def _inner_term(self) -> Condition:
        if self._takes("not"):
            inner = self._term()
            return lambda values: not inner(values)
        if self._takes("("):
            inner = self._any()
            if not self._takes(")"):
                self._expected(")")
            return inner
        return self._comparison()

    def _comparison(self) -> Condition:
        if self._now.kind not in ("word", "text"):
            self._expected("a key")
        key = self._next()
        self._keys.append(key)
        if self._now.kind != "op":
            self._expected(OPERATORS)
        op = self._next().text
        if self._now.kind not in ("word", "text"):
            self._expected("a value")
        value = _value(self._next())
        return lambda values: _compare(values(key.text), op, value)


def _value(token: Token) -> Any:
    if token.kind == "text":
        return token.text
    if token.text in WORDS:
        return WORDS[token.text]
    try:
        return float(token.text)
    except ValueError:
        return token.text


def _compare(found: Any, op: str, value: Any) -> bool:
    """Compare what a run has with the value that was given; what can't be ordered is neither less nor greater."""
    if op in ("=", "==", "!="):
        is_equal = found == value and isinstance(found, bool) == isinstance(value, bool)
        return (is_equal or (isinstance(value, str) and str(found) == value)) != (op == "!=")
    if op == "~":
        return found is not None and _text(value).lower() in str(found).lower()
    both_texts = isinstance(found, str) and isinstance(value, str)
    return (both_texts or (is_number(found) and is_number(value))) and ORDERED[op](found, value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
