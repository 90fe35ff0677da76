"""Chats in the model's own form: the tokenizer's template, cut where a turn begins and ends that is learned.

Learned is what the assistant says and the token that ends its turn. A template that marks it with {% generation %} is
taken at its word. In any other the turn begins where the generation prompt ends, because that is what generation is
fed, and ends behind its last added token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jinja2 import TemplateError

from src.config.schema import SupervisedTurns
from src.data.formats import BadRow
from src.data.pieces import Piece, any_of
from src.errors import TokenError, one_line

T = TypeVar("T")

FALLBACK_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User:\n' + message.content + '\n\n' }}"
    "{%- else -%}{{ 'Assistant:\n' }}"
    "{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}"
    "{{ '' if loop.last else '\n\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}"
)
"""For tokenizers without a template of their own; the exported tokenizer has it too."""

# characters of a private use area stand for what must be found again in rendered text
LEARNED_FROM, LEARNED_TO, LITERAL_FROM, LITERAL_TO = "\uf8d0", "\uf8d1", "\uf8d2", "\uf8d3"
MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
LITERAL = re.compile(f"{LITERAL_FROM}(\\d+){LITERAL_TO}")


def give_chat_template(tokenizer: Any) -> None:
    """See to it that the tokenizer has a chat template, and that it writes BOS where the tokenizer would put one."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        template = tokenizer.get_chat_template()
        rendered = _tried(lambda chat: _rendered(tokenizer, template, chat))
        if rendered is not None and not rendered.startswith(tokenizer.bos_token):
            tokenizer.chat_template = "{{- bos_token -}}" + template


def _tried(use: Callable[[list[dict[str, str]]], T]) -> T | None:
    """Use a short chat, with a system message where the template wants one; None where it refuses both."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in (chat, [{"role": "system", "content": "s"}, *chat]):
        try:
            return use(messages)
        except (BadRow, TokenError):  # rows will tell, by their place
            continue
    return None


class ChatTemplate:
    """A tokenizer's chat template, as training sees it."""

    def __init__(self, tokenizer: Any, control_tokens: list[str]) -> None:
        template = tokenizer.get_chat_template()
        self._tokenizer = tokenizer
        self._marks_learned = bool(MARKER.search(template))
        self._template = MARKER.sub(_as_sign, template)
        self._literal = any_of([*control_tokens, LEARNED_FROM, LEARNED_TO, LITERAL_FROM, LITERAL_TO])
        self.end_of_turn: str | None = None
        """The added token that ends the assistant's turns, where there is one: generation must stop there."""
        pieces = _tried(lambda chat: self.render(chat, [True], SupervisedTurns.all)) or []
        turn = "".join(piece.text for piece in pieces if piece.is_learned).rstrip()
        ends = [token for token in tokenizer.get_added_vocab() if turn.endswith(token)]
        self.end_of_turn = max(ends, key=len, default=None)

    @property
    def is_fallback(self) -> bool:
        return FALLBACK_TEMPLATE in self._tokenizer.get_chat_template()

    def ends_turn(self, piece: Piece) -> bool:
        """Whether a learned piece ends with a token that can end a turn."""
        return piece.is_rendered and self._ends(piece.text)

    def _ends(self, text: str) -> bool:
        return self.end_of_turn is not None and text.rstrip().endswith(self.end_of_turn)

    def render(self, messages: list[dict[str, str]], learned: list[bool], turns: SupervisedTurns) -> list[Piece]:
        """Write a chat as pieces of text.

        Args:
            learned: for each assistant's message whether it may be learned.
        Raises:
            BadRow: where the template refuses the chat.
            TokenError: where the template does not say what is learned.
        """
        literals: list[str] = []
        messages = [m | {"content": self._without_literals(m["content"], literals)} for m in messages]
        wanted = learned if turns is SupervisedTurns.all else [False] * (len(learned) - 1) + learned[-1:]
        parts = self._marked(messages, wanted) if self._marks_learned else self._by_prefix(messages, wanted)
        pieces = [piece for text, is_learned in parts if text for piece in _pieces(text, is_learned, literals)]
        return pieces or [Piece("", is_learned=False, is_rendered=True)]

    def _marked(self, messages: list[dict[str, str]], wanted: list[bool]) -> Iterator[tuple[str, bool]]:
        """Cut a rendered chat at the template's own marks."""
        before, *rest = self._apply(messages).split(LEARNED_FROM)
        turns = [part.partition(LEARNED_TO) for part in rest]
        if len(turns) != len(wanted):
            raise TokenError(
                f"the chat template marks {len(turns)} turns with {{% generation %}}, the assistant has {len(wanted)}"
            )
        yield before, False
        for (turn, _, behind), is_wanted in zip(turns, wanted, strict=True):
            yield turn, is_wanted
            yield behind, False

    def _by_prefix(self, messages: list[dict[str, str]], wanted: list[bool]) -> Iterator[tuple[str, bool]]:
        """Cut a rendered chat where the generation prompt of each learned turn ends."""
        whole = self._apply(messages)
        done = 0
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, is_wanted in zip(turns, wanted, strict=True):
            if not is_wanted:
                continue
            prompt = self._apply(messages[:i], add_generation_prompt=True)
            with_turn = whole if i == len(messages) - 1 else self._apply(messages[: i + 1])
            if not with_turn.startswith(prompt):
                differs = next((i for i, (a, b) in enumerate(zip(prompt, with_turn, strict=False)) if a != b), 0)
                same = max(0, differs - 20)
                raise TokenError(
                    "the chat template's generation prompt is not how the assistant's turn begins in a chat "
                    f"(…{prompt[same:][:60]!r} there, …{with_turn[same:][:60]!r} here); "
                    "mark what is learned in the template with {% generation %} … {% endgeneration %}"
                )
            if not whole.startswith(with_turn.rstrip()):
                raise TokenError(
                    "the chat template writes an earlier turn otherwise once more turns follow, so it can't be learned "
                    "as generation would write it; learn the last turn only: data.supervised_turns=last"
                )
            turn = with_turn[len(prompt) :]
            if self._ends(turn) or not whole.startswith(with_turn):  # white space that only a last turn has
                turn = turn.rstrip()
            yield whole[done : len(prompt)], False
            yield turn, True
            done = len(prompt) + len(turn)
        yield whole[done:], False

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        return _rendered(self._tokenizer, self._template, messages, add_generation_prompt=add_generation_prompt)

    def _without_literals(self, content: str, literals: list[str]) -> str:
        """Put a sign in place of each control token that stands in a message, so that it stays text.

        A sign that stands there is put out of the way in the same manner.
        """

        def sign(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{LITERAL_FROM}{len(literals) - 1}{LITERAL_TO}"

        return self._literal.sub(sign, content)


def _rendered(
    tokenizer: Any, template: str, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it may raise anything
        what = "refuses it" if isinstance(error, TemplateError) else f"fails with a {type(error).__name__}"
        raise BadRow(f"the chat template {what}: {one_line(error)}") from error


def _as_sign(match: re.Match[str]) -> str:
    """Turn a {% generation %} tag into a sign in the text, with the tag's own control of white space."""
    before, end, behind = match.group(1), match.group(2), match.group(3)
    return f"{{%{before} if true %}}{LEARNED_TO if end else LEARNED_FROM}{{% endif {behind}%}}"


def _pieces(text: str, is_learned: bool, literals: list[str]) -> Iterator[Piece]:
    for i, part in enumerate(LITERAL.split(text)):
        if part:
            yield Piece(literals[int(part)], is_learned) if i % 2 else Piece(part, is_learned, is_rendered=True)
