"""What a run and preflight say of rows before training: dropped texts, unread keys, choices that look wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.data.advice import Level, advice
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.evaluation.answers import AnswerReader
from src.inspection.findings import answer_scorer, findings, prove
from tests.chat_templates import CHATML, LLAMA_3, QWEN_3
from tests.conftest import towline, write_lines
from tests.kinds import byte_bpe, wordpiece, words
from tests.test_chat import built, chat, configured, with_template

CUTS = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""No system messages, and no thoughts."""


def said(data: Data, tokenizer: Any, *overrides: str) -> list[tuple[Level, str]]:
    return [(one.level, one.text) for one in advice(configured(*overrides), data, tokenizer)]


def the_one(found: list[tuple[Level, str]], *words: str) -> Level:
    """Return the level of the one finding that has all these words."""
    levels = [level for level, text in found if all(word in text for word in words)]
    assert len(levels) == 1, found
    return levels[0]


def test_a_system_message_that_a_template_leaves_out_is_reported(tmp_path: Path) -> None:
    rows = [chat("s", "b", system="s"), chat("a", "b"), chat("a", "b", system="Be brief.")]
    tokenizer = with_template(CUTS)
    data = built(tmp_path, tokenizer, rows)
    assert data.reports["train"].template_changes == {"system missing": 2}
    level = the_one(said(data, tokenizer), "train: in 2 rows", "rows.jsonl:1", "leaves out the system message")
    assert level is Level.warning
    data = built(tmp_path, tokenizer, rows[1:2], "data.system_prompt=mine")
    assert data.reports["train"].template_changes == {"system missing": 1}


def test_a_thought_that_a_template_cuts_is_an_error(tmp_path: Path) -> None:
    tokenizer = with_template(CUTS)
    data = built(tmp_path, tokenizer, [chat("2+2?", "<think>\ntwo and two\n</think>\n\n4"), chat("2+3?", "5")])
    assert data.reports["train"].template_changes == {"assistant changed": 1}
    found = said(data, tokenizer)
    assert the_one(found, "in 1 row ", "rows.jsonl:1", "changes or cuts the assistant message") is Level.error
    assert isinstance(data.train, EncodedSet)
    assert prove(data.train, answer_scorer(configured(), data)).altered == [0]
    with_thought: list[Any] = chat("2+2?", "4")
    with_thought[1]["thinking"] = "two and two"
    data = built(tmp_path, tokenizer, [with_thought])
    assert the_one(said(data, tokenizer), "leaves out the thought") is Level.error
    data = built(tmp_path, tokenizer, [with_thought], "data.thoughts=drop")
    assert data.reports["train"].template_changes == {}


def test_a_template_that_trims_is_reported(tmp_path: Path) -> None:
    tokenizer = with_template(LLAMA_3)
    data = built(tmp_path, tokenizer, [chat(" a", "b"), chat("a", "b\n"), chat("a", "b")])
    assert data.reports["train"].template_changes == {"user trimmed": 1, "assistant trimmed": 1}
    assert the_one(said(data, tokenizer), "rows.jsonl:2", "trims white space of the assistant message") is Level.warning


def test_white_space_is_compared_beside_the_templates_own(tmp_path: Path) -> None:
    data = built(tmp_path, with_template(LLAMA_3), [chat("\n\nq?", "\n\nThe answer"), chat("q?", "an answer")])
    assert data.reports["train"].template_changes == {"user trimmed": 1, "assistant trimmed": 1}
    kept = [chat("a", "<think>\nIt lies there.\n</think>\n\nThe answer"), chat("\n a \n", "b")]
    data = built(tmp_path, with_template(QWEN_3), kept)
    assert data.reports["train"].template_changes == {}
    thought: list[Any] = chat("a", "b")
    thought[1]["reasoning_content"] = "It lies there.\n"
    data = built(tmp_path, with_template(QWEN_3), [thought, chat("a", "\n\nThe answer")])
    assert data.reports["train"].template_changes == {"thought trimmed": 1, "assistant trimmed": 1}


def test_earlier_turns_without_an_end_are_counted(tmp_path: Path) -> None:
    endless = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "\\n# ")
    tokenizer = byte_bpe()
    tokenizer.chat_template = endless
    data = built(tmp_path, tokenizer, [chat("a", "b", "c", "d"), chat("a", "b")])
    assert data.reports["train"].template_changes == {"turn without end": 1}
    assert the_one(said(data, tokenizer), "in 1 row (", "has no end that could be trained") is Level.warning


def test_an_empty_prompt_is_not_missing(tmp_path: Path) -> None:
    overrides = ["data=prompt_completion", "data.system_prompt=''"]
    data = built(tmp_path, with_template(CHATML), [{"prompt": "", "completion": "b"}], *overrides)
    assert data.reports["train"].template_changes == {}


def test_a_text_that_happens_to_stand_elsewhere_is_still_missed(tmp_path: Path) -> None:
    """The words of a message that is left out may stand in the template's own text or in another message."""
    data = built(tmp_path, with_template(CUTS), [chat("user", "b", system="user"), chat("ab", "b", system="a")])
    assert data.reports["train"].template_changes == {"system missing": 2}


def test_a_template_that_looks_at_how_a_text_begins_is_followed(tmp_path: Path) -> None:
    looks = CHATML.replace("m.content +", "(m.content[1:] if m.content.startswith('!') else m.content) +")
    data = built(tmp_path, with_template(looks), [chat("!a", "answer"), chat("b", "answer")])
    assert data.reports["train"].template_changes == {"user missing": 1}


def test_earlier_turns_that_are_written_otherwise_are_counted(tmp_path: Path) -> None:
    tokenizer = with_template(QWEN_3)
    data = built(tmp_path, tokenizer, [chat("a", "b", "c", "d"), chat("a", "b")])
    assert data.reports["train"].template_changes == {"turn not learned": 1}
    assert the_one(said(data, tokenizer), "in 1 row (", "an earlier turn is not supervised") is Level.warning
    data = built(tmp_path, tokenizer, [chat("a", "b", "c", "d")], "data.supervised_turns=last")
    assert data.reports["train"].template_changes == {}


def test_keys_that_nothing_reads_are_reported_with_their_number(tmp_path: Path) -> None:
    named: list[Any] = chat("a", "b")
    named[0]["name"] = "Bob"
    tokenizer = with_template(CHATML)
    data = built(tmp_path, tokenizer, [{"messages": named, "id": 1}, {"messages": chat("a", "b"), "id": 2}])
    assert data.reports["train"].unread_keys == {"id": 2, "messages[].name": 1}
    assert "keys that nothing reads: id (2 rows), messages[].name (1 row)" in data.reports["train"].summary
    found = said(data, tokenizer)
    assert the_one(found, "train: id is a key that nothing reads", "in 2 rows") is Level.note
    assert the_one(found, "messages[].name is a key of messages that nothing reads") is Level.warning
    rows = [{"prompt": "a", "completion": "b", "patient": 1, "id": 2}]
    pairs = ["data=prompt_completion", "data.num_folds=2", "data.fold=0", "data.group_column=patient"]
    data = built(tmp_path, tokenizer, [*rows, rows[0] | {"patient": 2}], *pairs)
    assert data.reports["train"].unread_keys == {"id": 1}


@pytest.mark.parametrize("template", ["<|im_start|>user\n{prompt}<|im_end|>\n", "[INST] {prompt} [/INST]"])
def test_chat_marks_in_a_template_that_are_ordinary_text_are_reported(tmp_path: Path, template: str) -> None:
    overrides = ["data=prompt_completion", f'data.prompt_template="{template}"']
    rows = [{"prompt": "a", "completion": "b"}]
    data = built(tmp_path, byte_bpe(), rows, *overrides)
    found = said(data, byte_bpe(), *overrides)
    assert the_one(found, "data.prompt_template writes", "data=messages", "data.system_prompt") is Level.warning
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"])
    data = built(tmp_path, tokenizer, rows, *overrides)
    assert said(data, tokenizer, *overrides) == []


def test_chat_marks_in_plain_text_are_reported(tmp_path: Path) -> None:
    rows = [{"text": "<|im_start|>user\nhi<|im_end|>"}, {"text": "plain"}]
    data = built(tmp_path, byte_bpe(), rows, "data=text")
    found = said(data, byte_bpe(), "data=text")
    assert the_one(found, "train: 1 row of the first", "rows.jsonl:1", "<|im_start|>", "data=messages") is Level.warning


def test_a_chat_template_that_is_not_used_is_reported(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    tokenizer = with_template(CHATML)
    data = built(tmp_path, tokenizer, rows, "data=prompt_completion")
    found = said(data, tokenizer, "data=prompt_completion")
    assert the_one(found, "has a chat template", "data.format = prompt_completion does not use it") is Level.warning
    for overrides in (["data=prompt_completion", "data.system_prompt=''"],):
        data = built(tmp_path, tokenizer, rows, *overrides)
        assert said(data, tokenizer, *overrides) == []


def test_tokens_on_rows_without_thoughts_are_reported(tmp_path: Path) -> None:
    overrides = ["data=prompt_completion", "tokens=tow"]
    data = built(tmp_path, byte_bpe(), [{"prompt": "a", "completion": "b"}], *overrides)
    found = said(data, byte_bpe(), *overrides)
    assert the_one(found, "<ToW>, </ToW> are in no training row", "choose tokens=none") is Level.warning


def test_rows_that_no_model_can_get_right_are_reported(tmp_path: Path) -> None:
    """A character that the tokenizer does not know can't be written."""
    tokenizer = wordpiece("abcd")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c Ω"}]
    data = built(tmp_path, tokenizer, rows, "data=prompt_completion")
    assert isinstance(data.train, EncodedSet)
    proof = prove(data.train, answer_scorer(configured("data=prompt_completion"), data))
    assert proof.low_scoring == [(1, "exact_match", "c [UNK]", "c Ω")]
    config = configured("data=prompt_completion")
    found = findings(config, data, tokenizer, data.train, {"train": proof}, num_steps=100)
    (text,) = [one.text for one in found if "full marks" in one.text]
    assert "train: of 1 row even what they teach gets less than full marks" in text
    assert "rows.jsonl:2 by exact_match: 'c [UNK]' against 'c Ω'" in text


def test_what_a_normaliser_makes_impossible_to_write_is_no_mistake(tmp_path: Path) -> None:
    """This tokenizer forgets spaces, the other writes small letters only."""
    for tokenizer, answer, writes in ((wordpiece("abcd"), "a  b", "a b"), (words(), "LOW er", "low er")):
        data = built(tmp_path, tokenizer, [{"prompt": "a", "completion": answer}], "data=prompt_completion")
        assert isinstance(data.train, EncodedSet)
        proof = prove(data.train, answer_scorer(configured("data=prompt_completion"), data))
        assert proof.low_scoring == []
        reader = AnswerReader(data.encoder, None, data.frame)
        assert reader.plain_reference(data.train, 0) == answer
        assert reader.reference(data.train, 0) == writes


def test_a_run_says_what_preflight_says(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "[INST] 1+1= [/INST]", "completion": "2"}] * 8)
    done = towline(
        "tracking=none", "data=prompt_completion", f"data.train_files=['{file}']", f"hydra.run.dir={tmp_path}/run",
        "training.max_train_steps=1", "data.cache_dir=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: train: 8 rows of the first 1,000 hold [INST], [/INST]" in done.stderr
    assert "choose tokens=none" in done.stderr
    assert "warning: the run has one step, and a warm-up begins at a learning rate of 0" in done.stderr
