"""Chats rendered by a template, and the texts of their messages located in them.

A template is a program: it may refuse a chat, or rewrite what is in it. The words of a message are not searched for,
since a short answer may occur in many places: a chat is rendered as it is and with markers, and where both agree the
markers show where each text is, and what the template did to it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from src.data.formats import BadRow
from src.data.formats.messages import THOUGHT
from src.errors import LimitError, one_line
from src.templates import sandbox

# characters of a private use area mark what must be found in rendered text
SUPERVISED_FROM, SUPERVISED_TO, LITERAL_FROM, LITERAL_TO = "\uf8d0", "\uf8d1", "\uf8d2", "\uf8d3"
TEXT_FROM, TEXT_TO, NUMBER_END = "\uf8d4", "\uf8d5", "\uf8d6"
MARKERS = (SUPERVISED_FROM, SUPERVISED_TO, LITERAL_FROM, LITERAL_TO, TEXT_FROM, TEXT_TO, NUMBER_END)
MARKER_PATTERN = re.compile(f"({SUPERVISED_FROM}|{SUPERVISED_TO})|({TEXT_FROM}|{TEXT_TO})(\\d+){NUMBER_END}")

Messages = list[dict[str, str]]

TRIMMED, CHANGED, MISSING = "trimmed", "changed", "missing"
"""What a template does to a text: it moves or drops white space, cuts or rewrites it, leaves it out."""

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
"""For tokenizers without a template of their own; it is exported with the tokenizer."""

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""A tag around supervised text, as in transformers."""


def set_chat_template(tokenizer: Any) -> None:
    """Set a chat template where the tokenizer has none, and have it write BOS where the tokenizer adds one."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        template = tokenizer.get_chat_template()
        for chat in probes():
            try:
                rendered = render(tokenizer, template, chat)
            except BadRow:  # reported for rows, with their place
                continue
            except LimitError:
                return
            if not rendered.startswith(tokenizer.bos_token):
                tokenizer.chat_template = "{{- bos_token -}}" + template
            return


def probes(*turns: str, **thought: str) -> Iterator[Messages]:
    """Yield a short chat without and with a system message, since a template may refuse one of them."""
    answers = [{"role": "assistant", "content": text} | thought for text in turns or ("b",)]
    chat = [message for answer in answers for message in ({"role": "user", "content": "a"}, answer)]
    yield chat
    yield [{"role": "system", "content": "s"}, *chat]


def render(tokenizer: Any, template: str, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """Return a chat as a template writes it; BadRow where it refuses, LimitError where it takes too long or much."""
    try:
        return sandbox.render(tokenizer, template, messages, add_generation_prompt=add_generation_prompt)
    except LimitError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        what = "refuses it" if isinstance(error, TemplateError) else f"fails with a {type(error).__name__}"
        raise BadRow(f"the chat template {what}: {one_line(error)}") from error


def as_marker(match: re.Match[str]) -> str:
    """Return a marker in the text for a {% generation %} tag, with the tag's own control of white space."""
    before, end, after = match.groups()
    return f"{{%{before} if true %}}{SUPERVISED_TO if end else SUPERVISED_FROM}{{% endif {after}%}}"


class MessageText(NamedTuple):
    """A text of a message: its content, by the role's name, or its thought.

    [begin, end) is where it is in the rendered chat without the white space at its ends; one of them is None where the
    template split the text, both where it left it out. `is_trimmed` says that white space at its ends is lost.
    """

    message: int
    name: str
    text: str
    begin: int | None
    end: int | None
    is_trimmed: bool = False

    @property
    def core(self) -> str:
        return self.text.strip()

    def is_in(self, rendered: str) -> bool:
        """Return whether the text is in the rendered chat, white space aside."""
        if self.begin is not None and self.end is not None:
            return rendered[self.begin : self.end] == self.core
        if self.end is not None:  # the template split the text, and may have joined it again
            return squeezed(rendered[: self.end]).endswith(squeezed(self.core))
        return self.begin is not None and squeezed(rendered[self.begin :]).startswith(squeezed(self.core))

    def change_in(self, rendered: str) -> str | None:
        """Return what the template did to the text; None where it is unchanged."""
        if not self.core:
            return None
        if not self.is_in(rendered):
            return MISSING if self.begin is None and self.end is None else CHANGED
        return TRIMMED if self.is_trimmed or self.begin is None or self.end is None else None


def locate(messages: Messages, rendered: str, render: Callable[[Messages], str]) -> list[MessageText]:
    """Locate the texts of messages in a chat that `render` wrote: each content, followed by its thought."""
    texts = []
    for i, message in enumerate(messages):
        texts.append((i, message["role"], "content", message["content"]))
        if THOUGHT in message:
            texts.append((i, "thought", THOUGHT, message[THOUGHT]))
    marked = [dict(message) for message in messages]
    for number, (i, _, key, text) in enumerate(texts):
        marked[i][key] = _between_markers(text, number)
    try:
        text, _, places = read_markers(render(marked))
    except BadRow:  # a template that depends on how a text begins
        text, places = "", {}
    if text != rendered:
        places = dict(enumerate(_searched([text for *_, text in texts], rendered)))
    parts = []
    for number, (i, name, key, text) in enumerate(texts):
        core = text.strip()
        begin, end = _completed(places.get(number, (None, None)), core, rendered)
        is_trimmed = False
        if core != text and (begin, end) != (None, None):
            without = [message | {key: core} if at == i else message for at, message in enumerate(messages)]
            is_trimmed = len(rendered) - len(_rendered_or(rendered, without, render)) != len(text) - len(core)
        parts.append(MessageText(i, name, text, begin, end, is_trimmed))
    return parts


def read_markers(text: str) -> tuple[str, list[tuple[int, int]], dict[int, tuple[int | None, int | None]]]:
    """Return a text without markers, [start, stop) of what is marked as supervised, and of each text by its number."""
    if SUPERVISED_FROM not in text and TEXT_FROM not in text and TEXT_TO not in text:
        return text, [], {}
    supervised: list[int] = []
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    num_removed = 0  # characters of the markers before
    for match in MARKER_PATTERN.finditer(text):
        at = match.start() - num_removed
        num_removed += len(match.group())
        if match.group(1):
            supervised.append(at)
        else:
            (begins if match.group(2) == TEXT_FROM else ends).setdefault(int(match.group(3)), at)
    numbers = begins.keys() | ends.keys()
    places = {number: (begins.get(number), ends.get(number)) for number in numbers}
    return MARKER_PATTERN.sub("", text), list(zip(supervised[::2], supervised[1::2], strict=False)), places


def squeezed(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())


def _between_markers(text: str, number: int) -> str:
    """Return a text with markers around it, inside the white space at its ends, which a template may trim."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    begin, end = f"{TEXT_FROM}{number}{NUMBER_END}", f"{TEXT_TO}{number}{NUMBER_END}"
    return text[:start] + begin + core + end + text[start + len(core) :]


def _searched(texts: Sequence[str], rendered: str) -> Iterator[tuple[int | None, int | None]]:
    """Locate texts by their words, each after the one before: for a template that the markers change."""
    done = 0
    for text in texts:
        core = text.strip()
        if (at := rendered.find(core, done)) < 0:
            yield None, None
        else:
            done = at + len(core)
            yield at, done


def _completed(place: tuple[int | None, int | None], core: str, rendered: str) -> tuple[int | None, int | None]:
    """Add the other end of a text that the template split and joined again unchanged."""
    begin, end = place
    if begin is None and end is not None and rendered[:end].endswith(core):
        begin = end - len(core)
    if end is None and begin is not None and rendered[begin:].startswith(core):
        end = begin + len(core)
    return begin, end


def _rendered_or(otherwise: str, messages: Messages, render: Callable[[Messages], str]) -> str:
    try:
        return read_markers(render(messages))[0]
    except BadRow:
        return otherwise
