"""Chat templates are programs: rendering, what they refuse, and the template of a tokenizer without one."""

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from src.data.chat_markers import SUPERVISED_FROM, SUPERVISED_TO, Messages
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
"""For tokenizers without a template of their own; it is exported with the tokenizer."""

MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
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
    """Return a chat as a template writes it.

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


def as_marker(match: re.Match[str]) -> str:
    """Return a marker in the text for a {% generation %} tag, with the tag's own control of white space."""
    before, end, after = match.group(1), match.group(2), match.group(3)
    return f"{{%{before} if true %}}{SUPERVISED_TO if end else SUPERVISED_FROM}{{% endif {after}%}}"
