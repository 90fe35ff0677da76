"""Chats: read from messages, written by the model's own template, learned where the assistant speaks."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from src.config.schema import Overflow, RunConfig
from src.data.chat import ChatTemplate
from src.data.chat_render import FALLBACK_TEMPLATE, set_chat_template
from src.data.dataset import Data, build_data
from src.data.encoding import IGNORE_INDEX, Encoder, Lengths
from src.data.examples import Example, ExampleBuilder
from src.data.formats import BadRow, Chat
from src.data.formats.messages import read
from src.data.readers.record import Record
from src.data.sets import EncodedSet
from src.errors import DataError, TokenError
from tests.conftest import admitted, write_lines
from tests.kinds import byte_bpe, character_level, sentencepiece

Row = dict[str, Any]
SOME_FILE = "data.train_files=['data/tow_addition/train.jsonl']"  # what is in it is not read
Messages = list[dict[str, str]]

# the format


@cache
def configured(*overrides: str) -> RunConfig:
    """Admit a configuration for chats, or for other rows where the overrides say so."""
    option = [] if any(override.startswith("data=") for override in overrides) else ["data=messages"]
    return admitted(*option, SOME_FILE, "data.cache_dir=null", "tokens=none", *overrides).config


def message(role: str, content: str = "text") -> Row:
    return {"role": role, "content": content}


def chat(*turns: str, system: str | None = None) -> Messages:
    """Give a chat of these turns, the user's first."""
    messages = [message("system", system)] if system is not None else []
    return messages + [message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]


def parsed(messages: Any, *overrides: str) -> Chat:
    given = read({"messages": messages}, configured(*overrides).data)
    assert isinstance(given, Chat)
    return given


def test_both_forms_of_messages_are_read_alike() -> None:
    openai = parsed(chat("a", "b", "c", "d", system="s"))
    sharegpt = parsed([
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "user", "value": "c"},
        {"from": "assistant", "value": "d"},
    ])  # fmt: skip
    assert openai == sharegpt == Chat(chat("a", "b", "c", "d", system="s"), [True, True])


def test_an_answer_of_weight_zero_is_not_learned() -> None:
    messages: list[Any] = chat("a", "b", "c", "d", "e", "f")
    messages[0]["weight"] = 0  # of the user: never learned anyway
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    messages[5]["weight"] = None
    assert parsed(messages) == Chat(chat("a", "b", "c", "d", "e", "f"), [False, True, True])


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_train_and_loss_mean_what_weight_means(key: str) -> None:
    for value in (0, False):
        messages: list[Any] = chat("a", "b", "c", "d")
        messages[1][key] = value
        assert parsed(messages) == Chat(chat("a", "b", "c", "d"), [False, True])
    for value in (1, True, None):
        messages = chat("a", "b")
        messages[1][key] = value
        assert parsed(messages) == Chat(chat("a", "b"), [True])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_beside_the_content_is_read(key: str) -> None:
    messages: list[Any] = chat("a", "b")
    messages[1] |= {"reasoning_content": None, "thinking": "", key: "because"}
    expected = chat("a", "b")
    expected[1]["reasoning_content"] = "because"
    assert parsed(messages) == Chat(expected, [True])


def test_what_tables_fill_in_says_nothing() -> None:
    openai: list[Any] = [
        {"role": "user", "content": "a", "from": None, "value": None, "tool_calls": None, "name": None, "meta": {}},
        {
            "role": "assistant",
            "content": "b",
            "from": None,
            "value": None,
            "tool_calls": [],
            "name": "",
            "refusal": None,
        },
    ]
    sharegpt: list[Any] = [
        {"role": None, "content": None, "from": "human", "value": "a", "audio": {"id": None, "data": None}},
        {"role": None, "content": None, "from": "gpt", "value": "b", "audio": None},
    ]
    both: list[Any] = [
        {"role": "user", "content": "a", "from": "human", "value": "a"},
        {"role": "assistant", "content": "b", "from": "gpt", "value": "b"},
    ]
    assert parsed(openai) == parsed(sharegpt) == parsed(both) == Chat(chat("a", "b"), [True])


def test_keys_that_nothing_reads_are_named() -> None:
    messages: list[Any] = chat("a", "b", "c", "d")
    messages[0] |= {"name": "Bob", "reasoning_content": "of a user"}
    messages[2]["name"] = "Bob"
    fields = {"messages": messages, "id": 7, "source": "crawl", "tools": [], "system": None, "score": 0.0}
    found = read(fields, configured().data)
    assert found.unread == ("id", "source", "score", "messages[].name", "messages[].reasoning_content")


def test_a_rows_own_system_message_is_its_system_turn() -> None:
    with_system = chat("a", "b", system="own")
    given = {"messages": chat("a", "b"), "system": "own"}
    assert read(given, configured().data).messages == with_system
    assert read(given, configured("data.system_prompt=mine").data).messages == with_system
    assert read({"messages": with_system, "system": "own"}, configured().data).messages == with_system
    with pytest.raises(BadRow, match="'system' and the first message are two system messages that differ"):
        read({"messages": with_system, "system": "other"}, configured().data)
    with pytest.raises(BadRow, match="'system' is a number, not a text"):
        read({"messages": chat("a", "b"), "system": 3}, configured().data)


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_of_a_row_are_refused(key: str) -> None:
    with pytest.raises(BadRow, match=rf"the row has {key}, which is not supported: leave these rows out"):
        read({"messages": chat("a", "b"), key: [{"type": "function"}]}, configured().data)
    for nothing in (None, [], "", "[]", {}):
        assert read({"messages": chat("a", "b"), key: nothing}, configured().data).unread == ()


def test_the_system_prompt_goes_in_front_where_the_row_has_none() -> None:
    assert parsed(chat("a", "b"), "data.system_prompt=mine").messages == chat("a", "b", system="mine")
    assert parsed(chat("a", "b", system="own"), "data.system_prompt=mine").messages == chat("a", "b", system="own")
    assert parsed(chat("a", "b"), "data.system_prompt=''").messages == chat("a", "b")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "'messages' is null, not a list of messages"),
        ("text", "'messages' is a text, not a list of messages"),
        ({"role": "user"}, "'messages' is an object, not a list of messages"),
        ([], "'messages' is empty: nothing to train on"),
        (["text"], "'messages', message 1 is a text, not an object with role and content"),
        ([{"role": "user"}], "'messages', message 1 has no 'content'; there are 'role'"),
        ([{"content": "a"}], "'messages', message 1 has no 'role'; there are 'content'"),
        ([{"from": "human", "content": "a"}], "'messages', message 1 has no 'role'; there are 'from', 'content'"),
        ([{"from": "human"}], "'messages', message 1 has no 'value'; there are 'from'"),
        ([message("tool")], "message 1 has the role 'tool'; one of system, user, human, assistant, gpt is needed"),
        ([{"role": 3, "content": "a"}], "message 1 has the role 3; one of"),
        ([message("user") | {"content": None}], "message 1: 'content' is null, not a text"),
        ([message("user") | {"content": [{"type": "text"}]}], "message 1: 'content' is a list, not a text"),
        ([message("user", " \n")], "message 1: 'content' is empty"),
        ([message("user"), message("assistant", "")], "message 2: 'content' is empty"),
        ([message("user"), message("assistant") | {"tool_calls": [{}]}], "message 2 has tool_calls, which is not sup"),
        ([message("user"), message("assistant") | {"function_call": {"name": "f"}}], "message 2 has function_call, "),
        ([message("user"), message("assistant") | {"weight": 0.5}], "weight 0.5; 0 (not supervised) or 1 is needed"),
        ([message("user"), message("assistant") | {"weight": "1"}], "weight '1'; 0 (not supervised) or 1 is needed"),
        ([message("user"), message("assistant") | {"train": "no"}], "the train 'no'; false (not supervised) or true"),
        ([message("user"), message("assistant") | {"loss": 2}], "the loss 2; false (not supervised) or true is needed"),
        ([message("user"), message("assistant") | {"train": True, "weight": 0}], "weight and train contradict"),
        ([message("user"), message("assistant") | {"thinking": 3}], "message 2: 'thinking' is a number, not a text"),
        (
            [message("user"), message("assistant") | {"thinking": "x", "reasoning_content": "y"}],
            "'reasoning_content' and 'thinking' are two different thoughts",
        ),
        ([message("user") | {"from": "gpt", "value": "text"}], "message 1: 'from' contradicts 'role'"),
        ([message("user") | {"from": "human", "value": "other"}], "message 1: 'value' contradicts 'content'"),
        ([message("system"), message("system")], "message 2 is a second system message"),
        ([message("user"), message("system")], "message 2 is a system message after the first turn"),
        ([message("assistant")], "message 1: the assistant can't speak first"),
        ([message("system"), message("assistant")], "message 2: the assistant can't speak first"),
        ([message("user"), message("user")], "message 2 is a second user's message in a row"),
        ([message("user"), message("assistant"), message("assistant")], "message 3 is a second assistant's message"),
        ([message("user")], "'messages' ends with the user: there is no answer to train on"),
        ([message("system")], "'messages' ends with the system: there is no answer to train on"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_in_words(messages: Any, told: str) -> None:
    with pytest.raises(BadRow, match=re.escape(told)):
        parsed(messages)


def test_a_row_without_its_messages_is_told_how_to_name_them() -> None:
    with pytest.raises(
        BadRow, match=r"no field 'messages'; there are 'conversations' \(name yours with data.columns.mes"
    ):
        read({"conversations": []}, configured().data)


# templates

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""Turns between tokens of their own, neither BOS nor EOS; as Qwen 2 has it."""

CHATML_MARKED = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {% generation %}
{{ message.content + '<|im_end|>' }}{% endgeneration %}

{% else %}
{{ message.content + '<|im_end|>' }}
{%- endif %}
{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_MARKED_TIGHT = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {{ '' }} {%- generation -%} {{ message.content + '<|im_end|>' }} {%- endgeneration -%} {{ '' }}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""BOS written out, roles in headers, content trimmed, a turn's end that is not EOS; as Llama 3 has it."""

LLAMA2 = """\
{%- if messages[0].role == 'system' %}
    {%- set system, turns = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""BOS before every pair of turns, EOS behind; no generation prompt of its own; as Llama 2 has it."""

NO_END = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
"""Nothing ends a turn but a newline."""

DROPS_THINKING = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""What was thought in earlier turns is left out; as Qwen 3 has it."""

TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = {  # what is learned of a turn that says "answer"
    "chatml": (CHATML, "answer<|im_end|>"),
    "chatml, marked": (CHATML_MARKED, "answer<|im_end|>"),
    "chatml, marked tightly": (CHATML_MARKED_TIGHT, "answer<|im_end|>"),
    "llama 3": (LLAMA3, "answer<|eot_id|>"),
    "llama 2": (LLAMA2, " answer </s>"),
    "fallback": (None, "answer</s>"),
}
CHATS = [
    chat("What is 12 plus 30?", "answer"),
    chat("low", "answer", "lower", "answer", "lowest", "answer"),
    chat("안녕하세요\n세계", "answer", "a\n\n  b", "answer", system="def f(x): return x"),
]


def with_template(template: str | None, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or byte_bpe()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS])
    tokenizer.chat_template = template
    return tokenizer


def built(folder: Path, tokenizer: Any, rows: list[Any], *overrides: str) -> Data:
    """Build the train set of chats, or of other rows where the overrides say so."""
    records = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    file = write_lines(folder / "rows.jsonl", records)
    config = configured(*overrides)
    config = replace(config, data=replace(config.data, train_files=[file]))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in config.tokens.additional_special_tokens])
    return build_data(config, tokenizer)


def train_set(folder: Path, tokenizer: Any, rows: list[Any], *overrides: str) -> EncodedSet:
    train = built(folder, tokenizer, rows, *overrides).train
    assert isinstance(train, EncodedSet)
    return train


def learned(tokenizer: Any, rows: EncodedSet, index: int = 0) -> list[str]:
    """Give the texts of a row that are learned, one for each stretch."""
    ids, is_supervised = rows[index].input_ids.tolist(), rows[index].labels != IGNORE_INDEX
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or is_supervised[i] != is_supervised[i - 1]]
    texts = [tokenizer.decode(ids[:end]) for end in [0, *ends]]
    parts = [text.removeprefix(before) for before, text in pairwise(texts)]
    return [part for part, end in zip(parts, ends, strict=True) if is_supervised[end - 1]]


def by_tokenizer(tokenizer: Any, messages: Messages, **given: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)


def example_of(tokenizer: Any, messages: list[Any], *overrides: str) -> Example:
    """Make the example of one chat, without the tokenizer's being given a template."""
    config = configured(*overrides)
    template = ChatTemplate(tokenizer, Encoder(tokenizer).control_tokens)
    return ExampleBuilder(config.data, config.thought_tags, template).build(Record({"messages": messages}, "rows", 1))


MAKERS = {
    "byte-level BPE": byte_bpe,
    "character level": character_level,
    "no BOS": lambda: byte_bpe(bos=False),
    "SentencePiece": lambda: sentencepiece(legacy=False),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_ids_are_the_templates_and_learned_is_what_the_assistant_says(
    tmp_path: Path, name: str, kind: str, turns: str
) -> None:
    template, turn = TURNS[name]
    tokenizer = with_template(template, MAKERS[kind]())
    if name == "llama 2" and tokenizer.bos_token is None:
        tokenizer.chat_template = LLAMA2.replace("bos_token + ", "")
    rows = train_set(tmp_path, tokenizer, CHATS, f"data.supervised_turns={turns}")
    for i, messages in enumerate(CHATS):
        ids = rows[i].input_ids.tolist()
        assert ids == by_tokenizer(tokenizer, messages)
        assert rows.prompt_ids(i) == by_tokenizer(tokenizer, messages[:-1], add_generation_prompt=True)
        num_turns = sum(m["role"] == "assistant" for m in messages) if turns == "all" else 1
        assert learned(tokenizer, rows, i) == [turn] * num_turns
        if name != "llama 2" and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            assert [at for at, i in enumerate(ids) if i == tokenizer.bos_token_id] == [0]


@pytest.mark.parametrize("template", [CHATML_MARKED, CHATML_MARKED_TIGHT, FALLBACK_TEMPLATE])
def test_marks_mean_what_transformers_takes_them_for(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(template, character_level())
    rows = train_set(tmp_path, tokenizer, CHATS)
    for i, messages in enumerate(CHATS):
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (rows[i].labels != IGNORE_INDEX).astype(int).tolist() == theirs["assistant_masks"]


def test_legacy_sentencepiece_writes_a_chat_as_its_template_does(tmp_path: Path) -> None:
    tokenizer = with_template(LLAMA2, sentencepiece(legacy=True))
    rows = train_set(tmp_path, tokenizer, CHATS)
    for i, messages in enumerate(CHATS):
        assert rows[i].input_ids.tolist() == by_tokenizer(tokenizer, messages)


def test_generation_stops_at_the_end_of_a_turn_and_at_eos(tmp_path: Path) -> None:
    for template, token in ((CHATML, "<|im_end|>"), (CHATML_MARKED, "<|im_end|>"), (LLAMA3, "<|eot_id|>")):
        tokenizer = with_template(template)
        data = built(tmp_path, tokenizer, CHATS)
        assert data.stop_ids == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(token)]
    for template in (None, LLAMA2, NO_END):
        tokenizer = with_template(template)
        assert built(tmp_path, tokenizer, CHATS).stop_ids == [tokenizer.eos_token_id]


def test_chats_whose_template_is_trimming_lose_only_the_edges(tmp_path: Path) -> None:
    tokenizer = with_template(LLAMA3)
    messages = chat(" \n question\n", "  answer \n", "b", "\tanswer ")
    rows = train_set(tmp_path, tokenizer, [messages])
    assert rows[0].input_ids.tolist() == by_tokenizer(tokenizer, messages)
    assert learned(tokenizer, rows) == ["answer<|eot_id|>"] * 2


def test_where_nothing_ends_a_turn_eos_ends_the_last(tmp_path: Path) -> None:
    tokenizer = with_template(NO_END)
    messages = chat("a", "b", "c", "d")
    rows = train_set(tmp_path, tokenizer, [messages])
    assert learned(tokenizer, rows) == ["b\n", "d\n</s>"]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(rows[0].input_ids.tolist()) == f"{written}</s>"


def test_white_space_that_only_the_last_turn_has_is_not_looked_for_in_others(tmp_path: Path) -> None:
    tokenizer = with_template(
        NO_END.replace("content + '\\n'", "content + ('\\n' if loop.last and message.role == 'assistant' else ' ')")
    )
    messages = chat("a", "b", "c", "d")
    rows = train_set(tmp_path, tokenizer, [messages])
    assert tokenizer.decode(rows[0].input_ids.tolist()) == "<s>user: a assistant: b user: c assistant: d\n</s>"
    assert learned(tokenizer, rows) == ["b", "d\n</s>"]


@pytest.mark.parametrize("end", ["</ToW>", "<|turn|>", "<|im_end|>", "</s>"])
def test_an_added_token_at_the_end_of_an_answer_is_not_the_end_of_the_turn(tmp_path: Path, end: str) -> None:
    tokenizer = with_template(NO_END)
    rows = train_set(tmp_path, tokenizer, [chat("a", f"b{end}")], "tokens=tow", "data.malformed_thoughts=keep")
    assert learned(tokenizer, rows) == [f"b{end}\n</s>"]
    assert rows[0].input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("answer", ["b", "b</s>", "b<|im_end|>", "b\n"])
def test_the_end_of_a_turn_is_learned_exactly_once(tmp_path: Path, name: str, answer: str) -> None:
    template, turn = TURNS[name]
    tokenizer = with_template(template)
    rows = train_set(tmp_path, tokenizer, [chat("a", answer, "c", answer)])
    assert learned(tokenizer, rows) == [turn.replace("answer", answer.strip() if name == "llama 3" else answer)] * 2


# control tokens, and other text that could be taken for something else


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA3, LLAMA2, None])
def test_control_tokens_in_a_message_stay_text_and_those_of_the_template_are_ids(
    tmp_path: Path, template: str | None
) -> None:
    tokenizer = with_template(template)
    plain = train_set(tmp_path, tokenizer, [chat("say x", "then x or x", "x", "x")])
    data = built(tmp_path, tokenizer, [chat("say <s>", "then </s> or <pad>", "</s>", "</s>")])
    rows = data.train
    assert isinstance(rows, EncodedSet)
    assert data.reports["train"].control_tokens_as_text == 5
    for token in ("<s>", "</s>", "<pad>"):
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert rows[0].input_ids.tolist().count(token_id) == plain[0].input_ids.tolist().count(token_id)
    text = tokenizer.decode(rows[0].input_ids.tolist())
    assert text == tokenizer.apply_chat_template(chat("say <s>", "then </s> or <pad>", "</s>", "</s>"), tokenize=False)
    first, second = learned(tokenizer, plain)
    assert learned(tokenizer, rows) == [first.replace("x or x", "</s> or <pad>"), second.replace("x", "</s>")]


def test_other_added_tokens_in_a_message_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    messages = chat("a<|turn|>b", "<|turn|>")
    rows = train_set(tmp_path, tokenizer, [messages])
    assert rows[0].input_ids.tolist() == by_tokenizer(tokenizer, messages)
    assert rows[0].input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 2


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA3, None])
@pytest.mark.parametrize(
    "text",
    ["{% generation %}x{% endgeneration %}", "{{ bos_token }}", "\uf8d0x\uf8d1", "\uf8d20\uf8d3", "\uf8d3</s>\uf8d2"],
)
def test_no_text_of_a_message_means_anything_to_us(tmp_path: Path, template: str | None, text: str) -> None:
    tokenizer = with_template(template)
    messages = chat(text, f"a{text}b", text, text)
    rows = train_set(tmp_path, tokenizer, [messages])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(rows[0].input_ids.tolist()) == whole
    assert [part.startswith((f"a{text}b", text)) for part in learned(tokenizer, rows)] == [True, True]


KNOWN = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_end|>",
    "<|turn|>",
    "\n",
    " ",
    "low",
    "{{",
    "</think>",
    "\uf8d0",
    "\uf8d20\uf8d3",
]
TEXTS = st.lists(st.sampled_from(KNOWN) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6)
TURN = TEXTS.map("".join).filter(str.strip)


@pytest.mark.parametrize("name", ["chatml", "chatml, marked", "llama 3", "fallback"])
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(turns=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3))
def test_any_chat_is_the_templates_text_with_the_templates_ids(name: str, turns: list[tuple[str, str]]) -> None:
    template, turn = TURNS[name]
    tokenizer = with_template(template)
    set_chat_template(tokenizer)
    texts = [text for pair in turns for text in pair]
    example = example_of(tokenizer, chat(*texts))
    (row,) = Encoder(tokenizer).encode([example], Lengths(10_000, None, Overflow.error))
    assert row is not None
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(chat(*texts), tokenize=False)
    answers = [answer.strip() if name == "llama 3" else answer for _, answer in turns]
    said = [tokenizer.decode(row.input_ids[start:stop]) for _, start, stop in row.spans]
    assert said == [turn.replace("answer", answer) for answer in answers]
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids.count(tokenizer.eos_token_id) == (len(turns) if name == "fallback" else 0)
    assert row.input_ids.count(tokenizer.pad_token_id) == 0
    kept = [text.strip() if name == "llama 3" else text for text in texts]
    assert row.num_control_tokens == sum(text.count(token) for text in kept for token in ("<s>", "</s>", "<pad>"))


# what is refused


def refused(folder: Path, tokenizer: Any, messages: Messages, *overrides: str) -> str:
    with pytest.raises(DataError, match=r"1 row can't be used|rows\.jsonl:1") as caught:
        built(folder, tokenizer, [chat("a", "b"), messages], "data.max_dropped_fraction=0", *overrides)
    return str(caught.value)


def test_a_template_that_drops_earlier_thinking_is_refused_but_for_the_last_turn(tmp_path: Path) -> None:
    tokenizer = with_template(DROPS_THINKING)
    messages = chat("a", "<think>so</think>b", "c", "<think>thus</think>d")
    told = refused(tmp_path, tokenizer, messages)
    assert "rows.jsonl:2" in told
    assert "train on the last turn only: data.supervised_turns=last" in told
    rows = train_set(tmp_path, tokenizer, [messages], "data.supervised_turns=last")
    assert learned(tokenizer, rows) == ["<think>thus</think>d<|im_end|>"]
    assert rows[0].input_ids.tolist() == by_tokenizer(tokenizer, messages)
    assert "<think>so" not in tokenizer.decode(rows[0].input_ids.tolist())


def test_a_generation_prompt_that_is_not_how_the_turn_begins_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML.replace("assistant\\n' }}{%- endif", "assistant (in English)\\n' }}{%- endif"))
    with pytest.raises((DataError, TokenError)) as caught:
        built(tmp_path, tokenizer, [chat("question", "answer")])
    for words in (
        "generation prompt is not how the assistant's turn begins",
        "(in English)",
        "answer",
        "{% generation %}",
    ):
        assert words in str(caught.value)


def test_marks_that_are_not_one_for_each_turn_are_refused(tmp_path: Path) -> None:
    twice = CHATML_MARKED_TIGHT.replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{%- generation -%}x{%- endgeneration -%}"
    )
    with pytest.raises((DataError, TokenError), match=r"marks 2 turns with .*, the assistant has 1"):
        built(tmp_path, with_template(twice), [chat("question", "answer")])


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    refuses = "{%- if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    told = refused(tmp_path, with_template(refuses), chat("a", "b", system="s"))
    assert "rows.jsonl:2" in told
    assert "the chat template refuses it: No system role" in told


def test_a_template_that_needs_a_system_message_is_given_rows_that_have_one(tmp_path: Path) -> None:
    demands = "{%- if messages[0].role != 'system' %}{{ raise_exception('No system message') }}{% endif %}" + CHATML
    tokenizer = with_template(demands)
    data = built(tmp_path, tokenizer, [chat("a", "answer", system="s")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == ["answer<|im_end|>"]
    assert data.stop_ids == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    told = refused(tmp_path, with_template(demands), chat("a", "b"))
    assert "the chat template refuses it: No system message" in told


# templates that a tokenizer is given, or that lack BOS


def test_a_tokenizer_without_a_template_is_given_one_and_keeps_it(tmp_path: Path) -> None:
    for make, begins in ((byte_bpe, "{{- bos_token -}}"), (lambda: byte_bpe(bos=False, pad=None), "")):
        tokenizer = make()
        data = built(tmp_path, tokenizer, [chat("a", "b", "c", "d", system="s")])
        assert data.uses_fallback_template
        assert isinstance(data.train, EncodedSet)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert saved.chat_template == begins + FALLBACK_TEMPLATE
        assert data.train[0].input_ids.tolist() == by_tokenizer(saved, chat("a", "b", "c", "d", system="s"))
        text = "s\n\nUser:\na\n\nAssistant:\nb</s>\n\nUser:\nc\n\nAssistant:\nd</s>"
        assert tokenizer.decode(data.train[0].input_ids.tolist()) == ("<s>" if begins else "") + text


def test_rows_without_a_chat_leave_the_tokenizer_without_a_template(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    data = built(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}], "data=prompt_completion")
    assert tokenizer.chat_template is None
    assert not data.uses_fallback_template


def test_bos_is_put_before_a_template_that_lacks_it_and_exported(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    rows = train_set(tmp_path, tokenizer, CHATS)
    assert tokenizer.chat_template == "{{- bos_token -}}" + CHATML
    assert rows[0].input_ids[:2].tolist() == tokenizer.convert_tokens_to_ids(["<s>", "<|im_start|>"])
    for template, make in ((LLAMA3, byte_bpe), (CHATML, lambda: byte_bpe(bos=False))):
        kept = with_template(template, make())
        train_set(tmp_path, kept, CHATS)
        assert kept.chat_template == template


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    tokenizer = with_template(None)
    tokenizer.chat_template = {"default": CHATML, "rag": LLAMA3}
    rows = train_set(tmp_path, tokenizer, [chat("a", "answer")])
    assert learned(tokenizer, rows) == ["answer<|im_end|>"]
    assert tokenizer.decode(rows.prompt_ids(0)).startswith("<s><|im_start|>user\n")


# pairs as chats, turns that are not learned, thoughts


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_pairs_with_a_system_prompt_become_chats(tmp_path: Path, system: str) -> None:
    tokenizer = with_template(CHATML)
    row = {"prompt": "12 plus 30", "completion": "42"}
    overrides = ["data=prompt_completion", f"data.system_prompt='{system}'", "data.prompt_template='What is {prompt}?'"]
    data = built(tmp_path, tokenizer, [row], *overrides)
    messages = chat("What is 12 plus 30?", "42", system=system or None)
    rows = data.train
    assert isinstance(rows, EncodedSet)
    assert rows[0].input_ids.tolist() == by_tokenizer(tokenizer, messages)
    assert learned(tokenizer, rows) == ["42<|im_end|>"]
    assert rows.prompt_ids(0) == by_tokenizer(tokenizer, messages[:-1], add_generation_prompt=True)
    assert rows.reference(0) == "42"
    assert data.stop_ids == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_turns_of_weight_zero_are_read_and_not_learned(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    messages: list[Any] = chat("a", "wrong", "b", "right", "c", "left")
    messages[1]["weight"] = messages[5]["weight"] = 0
    none: list[Any] = chat("a", "wrong")
    none[1]["weight"] = 0
    data = built(tmp_path, tokenizer, [messages, none], "data.max_dropped_fraction=0.5")
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == ["right<|im_end|>"]
    assert dict(data.reports["train"].rows_dropped) == {"no_supervised_token": 1}
    assert tokenizer.decode(data.train.prompt_ids(0)).endswith("b<|im_end|>\n<|im_start|>assistant\n")
    assert data.train.reference(0) == "right"


def test_an_encoder_decoders_chat_of_weight_zero_is_not_supervised() -> None:
    tokenizer = with_template(CHATML)
    messages: list[Any] = chat("a", "b")
    messages[1]["weight"] = 0
    example = example_of(tokenizer, messages, "data.supervised_turns=last")
    (row,) = Encoder(tokenizer).encode([example], Lengths(100, 100, Overflow.error))
    assert row is not None
    assert not row.is_supervised


def test_an_encoder_decoder_reads_a_chat_behind_one_bos(tmp_path: Path) -> None:
    tokenizer = with_template(None, byte_bpe(adds_eos=True))  # BART's frame
    built(tmp_path, tokenizer, [chat("a", "b")])  # gives the template
    example = example_of(tokenizer, chat("a", "b"))
    (row,) = Encoder(tokenizer).encode([example], Lengths(100, 100, Overflow.error))
    assert row is not None
    assert row.target_ids is not None
    assert tokenizer.decode(row.input_ids) == "<s>User:\na\n\nAssistant:\n</s>"
    assert tokenizer.decode(row.target_ids) == "<s>b</s>"
    assert row.spans == [(0, 1, 3)]


@pytest.mark.parametrize("name", ["chatml", "chatml, marked", "fallback"])
def test_thoughts_of_the_assistant_are_kept_between_tags_or_dropped(tmp_path: Path, name: str) -> None:
    template, turn = TURNS[name]
    pattern = "data.thought_pattern='<think>(.*?)</think>'"
    messages = chat("<think>mine</think>a", "<think>1\n2</think>b", "c", "d<think>3</think>e")

    def turns(*overrides: str) -> tuple[list[str], EncodedSet]:
        tokenizer = with_template(template)
        rows = train_set(tmp_path, tokenizer, [messages], pattern, *overrides)
        assert "<think>mine</think>a" in tokenizer.decode(rows.prompt_ids(0))
        return [part.removesuffix(turn.removeprefix("answer")) for part in learned(tokenizer, rows)], rows

    kept, rows = turns("tokens=tow")
    assert kept == ["<ToW>1\n2</ToW>b", "d<ToW>3</ToW>e"]
    assert rows.reference(0) == "de"
    assert [kind for kind, _, _ in rows[0].spans.tolist()] == [1, 0, 0, 1, 0]
    assert turns("tokens=hcot")[0] == ["<hCoT>1\n2</hCoT>b", "d<hCoT>3</hCoT>e"]
    assert turns("tokens=tow", "data.thoughts=drop")[0] == turns("tokens=none")[0] == ["b", "de"]


def test_a_long_chat_is_cut_by_the_rules(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML, character_level())
    messages = chat("a", "b", "question", "answer")
    whole = by_tokenizer(with_template("{{- bos_token -}}" + CHATML, character_level()), messages)
    for overflow, length, turns, begins in (
        ("truncate", len(whole) - 1, ["b<|im_end|>", "answer<|im_end|>"], "<s><|im_start|>user\na"),
        ("truncate", len(whole) - 2, ["b<|im_end|>", "answer"], "<s><|im_start|>user\na"),
        ("truncate_prompt", len(whole) - 5, ["b<|im_end|>", "answer<|im_end|>"], "<s>\na<|im_end|>"),
        ("truncate_prompt", 12, ["answer<|im_end|>"], "<s>nt\nanswer"),
    ):  # fmt: skip
        rows = train_set(tmp_path, tokenizer, [messages], f"data.overflow={overflow}", f"data.max_seq_length={length}")
        assert len(rows[0].input_ids) == length
        assert learned(tokenizer, rows) == turns
        assert tokenizer.decode(rows[0].input_ids.tolist()).startswith(begins)
