"""A chat template as a program: what it writes, what it refuses, and what a tokenizer without one is given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from src.data.chat_signs import LEARNED_FROM, LEARNED_TO, Messages
from src.data.formats import BadRow
from src.errors import LimitError, one_line
from src.templates import sandbox

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

MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""A tag around what is learned, as transformers takes it."""


def give_chat_template(tokenizer: Any) -> None:
    """See to it that the tokenizer has a chat template, and that it writes BOS where the tokenizer would put one."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        template = tokenizer.get_chat_template()
        for chat in probes():
            try:
                rendered = render(tokenizer, template, chat)
            except BadRow:  # rows will say so, with their place
                continue
            except LimitError:
                return
            if not rendered.startswith(tokenizer.bos_token):
                tokenizer.chat_template = "{{- bos_token -}}" + template
            return


def probes(*turns: str, **thought: str) -> Iterator[Messages]:
    """Yield a short chat without and with a system message, for templates that refuse one of them."""
    answers = [{"role": "assistant", "content": text} | thought for text in turns or ("b",)]
    chat = [message for answer in answers for message in ({"role": "user", "content": "a"}, answer)]
    yield chat
    yield [{"role": "system", "content": "s"}, *chat]


def render(tokenizer: Any, template: str, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """Write a chat by a template.

    Raises:
        BadRow: where the template refuses it.
        LimitError: where it takes too much time or memory.
    """
    try:
        return sandbox.render(tokenizer, template, messages, add_generation_prompt=add_generation_prompt)
    except LimitError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        what = "refuses it" if isinstance(error, TemplateError) else f"fails with a {type(error).__name__}"
        raise BadRow(f"the chat template {what}: {one_line(error)}") from error


def as_sign(match: re.Match[str]) -> str:
    """Turn a {% generation %} tag into a sign in the text, with the tag's own control of white space."""
    before, end, behind = match.group(1), match.group(2), match.group(3)
    return f"{{%{before} if true %}}{LEARNED_TO if end else LEARNED_FROM}{{% endif {behind}%}}"
