"""Ollama's Modelfile: how a causal model was prompted and generated with, in the words of another program.

Source: https://docs.ollama.com/modelfile
"""

from collections.abc import Iterator
from typing import Any

from src.config.schema import PLACEHOLDER, DataConfig, RunConfig
from src.data.chat_render import render
from src.data.dataset import Prompts, is_chat
from src.data.formats import BadRow

PROMPT = "{{ .Prompt }}"
QUOTES = '"""'
"""Around a text of several lines; it can't be in one."""
MARK = "\uf8d7"
"""A character of a private use area, where the user's words are in a rendered chat."""


def modelfile(config: RunConfig, tokenizer: Any, prompts: Prompts) -> str:
    """Return the Modelfile of a folder with whole weights; `prompts` say what ends an answer."""
    generation = config.generation
    parameters: dict[str, Any] = {
        "num_ctx": config.data.max_seq_length,
        "num_predict": generation.max_new_tokens,
        "repeat_penalty": generation.repetition_penalty,
        "temperature": generation.temperature if generation.do_sample else 0,
    }
    if generation.do_sample:
        parameters |= {"top_k": generation.top_k, "top_p": generation.top_p}
    lines = ["FROM .", *(f"PARAMETER {name} {value}" for name, value in parameters.items() if value is not None)]
    ends = [*tokenizer.convert_ids_to_tokens(prompts.stop_ids), prompts.frame.end_text]
    lines += [f"PARAMETER stop {_quoted(end)}" for end in dict.fromkeys(ends) if end and QUOTES not in end]
    return "\n".join([*lines, *_template(config.data, tokenizer)]) + "\n"


def _template(data: DataConfig, tokenizer: Any) -> Iterator[str]:
    """Yield the lines of TEMPLATE: what was around a prompt in training."""
    text = _chat(data, tokenizer) if is_chat(data) else _pair(data)
    if text is None or QUOTES in text:
        yield "# What was around a prompt in training can't be said here: see data.prompt_template in README.md."
        text = MARK
    yield f"TEMPLATE {QUOTES}{_literal(text).replace(MARK, PROMPT)}{QUOTES}"


def _pair(data: DataConfig) -> str | None:
    """Return a prompt with a mark in place of its only part; None where it is made of several."""
    template = data.prompt_template
    if template is None:
        return MARK
    return PLACEHOLDER.sub(MARK, template) if len(PLACEHOLDER.findall(template)) == 1 else None


def _chat(data: DataConfig, tokenizer: Any) -> str | None:
    """Return a chat of one question, with a mark in place of it, up to where the answer begins.

    BOS is left out: Ollama writes it where the tokenizer does. None where the template refuses such a chat.
    """
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    chat = [*system, {"role": "user", "content": MARK}]
    try:
        text = render(tokenizer, tokenizer.get_chat_template(), chat, add_generation_prompt=True)
    except BadRow:
        return None
    return text.removeprefix(tokenizer.bos_token or "")


def _literal(text: str) -> str:
    """Return a text that Go's templates write as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """Return a text in the quotes that it can have in it: a Modelfile knows no escapes."""
    quote = QUOTES if {'"', "\n"} & set(text) else '"'
    return f"{quote}{text}{quote}"
