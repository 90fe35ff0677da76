"""Thoughts in rows of every format: found, written or dropped, and told by place where something is wrong with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.data.advice import Level, advice
from src.data.dataset import build_data
from src.data.encoding import SPAN_KINDS
from src.data.examples import ExampleBuilder
from src.data.formats import BadRow
from src.data.readers.record import Record
from src.data.sets import EncodedSet
from src.data.thought_finder import ANSWERLESS, CUT, IN_PROMPT, NESTED, UNCLOSED, UNOPENED, around_group
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from src.evaluation.predictions import describe_rows
from src.inspection.preview import dumped
from tests.chat_templates import DEEPSEEK_R1
from tests.conftest import admitted, write_lines
from tests.test_advice import the_one
from tests.test_chat import built as built_with
from tests.test_chat import chat, with_template
from tests.test_gate import refusal

TOW = "data.thought_pattern='<ToW>(.*?)</ToW>'"
TEXT = "<ToW>1</ToW>a<ToW>2</ToW><ToW>3</ToW>b <ToW></ToW> c<ToW>4</ToW>"
KINDS = [("thought", "<ToW>1</ToW>"), ("answer", "a"), ("thought", "<ToW>2</ToW>"), ("thought", "<ToW>3</ToW>")]
KINDS += [("answer", "b "), ("thought", "<ToW></ToW>"), ("answer", " c"), ("thought", "<ToW>4</ToW>")]
END = [("answer", "</s>")]


class Built:
    """The train rows of some records, and what is said of them."""

    def __init__(self, folder: Path, records: list[Any], *overrides: str) -> None:
        file = write_lines(folder / "rows.jsonl", records)
        no_others = ["data.validation_files=null", "data.test_files=null"]
        self.config = admitted(*overrides, f"data.train_files=['{file}']", *no_others).config
        self.tokenizer, _ = load_tokenizer(self.config.model, self.config.tokens)
        self.data = build_data(self.config, self.tokenizer)
        assert isinstance(self.data.train, EncodedSet)
        self.rows, self.report = self.data.train, self.data.reports["train"]

    def spans(self, index: int = 0) -> list[tuple[str, str]]:
        return spans_of(self.tokenizer, self.rows, index)

    def said(self) -> list[tuple[Level, str]]:
        return [(one.level, one.text) for one in advice(self.config, self.data, self.tokenizer)]


def spans_of(tokenizer: Any, rows: EncodedSet, index: int = 0) -> list[tuple[str, str]]:
    row = rows[index]
    ids = row.input_ids if row.target_ids is None else row.target_ids
    return [(SPAN_KINDS[kind], tokenizer.decode(ids[start:stop].tolist())) for kind, start, stop in row.spans.tolist()]


def pairs(*completions: str) -> list[dict[str, str]]:
    return [{"prompt": "p", "completion": completion} for completion in completions]


CHAT = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": TEXT, "reasoning_content": "0"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": TEXT},
]
OF_KEY = [("thought", "<ToW>0</ToW>")]
ROWS = {
    "text": ({"text": TEXT}, ["data=text"], KINDS + END, 5),
    "prompt_completion": ({"prompt": "p", "completion": TEXT}, ["data=prompt_completion"], KINDS + END, 5),
    "query_response": ({"query": "p", "response": TEXT}, ["data=query_response"], KINDS + END, 5),
    "gsm8k": (
        {"question": "p", "answer": TEXT.replace("<ToW>", "<<").replace("</ToW>", ">>")},
        ["data=gsm8k", "data.validation_fraction=0", "data.answer_pattern=null"], KINDS + END, 5,
    ),
    "dialogue_summary": (
        {"dialogue": "p", "summary": TEXT}, ["data=dialogue_summary", "model=tiny_bart"], KINDS + END, 5,
    ),
    "messages": ({"messages": CHAT}, ["data=messages"], OF_KEY + KINDS + END + KINDS + END, 11),
    "last message": (
        {"messages": CHAT}, ["data=messages", "model=tiny_bart", "data.supervised_turns=last"], KINDS + END, 11,
    ),
}  # fmt: skip
"""A row of each format, how it is read, its spans, and how many thoughts it has."""


@pytest.mark.parametrize("name", ROWS)
def test_thoughts_are_found_in_every_format(tmp_path: Path, name: str) -> None:
    record, overrides, spans, count = ROWS[name]
    for pattern in ["data.thought_pattern='<<(.*?)>>'"] if name == "gsm8k" else ["data.thought_pattern=null", TOW]:
        kept, dropped = (Built(tmp_path, [record], *overrides, pattern, f"data.thoughts={t}") for t in ("keep", "drop"))
        assert kept.spans() == spans
        assert set(dropped.spans()) == {("answer", "ab c</s>")}
        for found in (kept, dropped):
            assert found.rows.reference(0) == "ab c"
            assert (found.report.thoughts, found.report.about_thoughts) == (count, {})
        assert kept.said() == []


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("a<ToW>b<ToW>c</ToW>d</ToW>e", NESTED, "'<ToW>' stands inside a thought"),
        ("a<ToW>b", UNCLOSED, "'<ToW>' opens a thought that is never closed"),
        ("a</ToW>b", UNOPENED, "'</ToW>' closes a thought that was never opened"),
        ("<ToW>a</ToW>b</ToW>", UNOPENED, "'</ToW>' closes"),
        ("</ToW>a<ToW>", UNCLOSED, "'<ToW>' opens a thought that is never closed"),
    ],
)
@pytest.mark.parametrize("thoughts", ["keep", "drop"])
def test_malformed_thoughts_are_refused_by_place(
    tmp_path: Path, text: str, kind: str, words: str, thoughts: str
) -> None:
    records = pairs("<ToW>fine</ToW>a", text)
    options = ["data=prompt_completion", f"data.thoughts={thoughts}"]
    for pattern in ("data.thought_pattern=null", TOW):
        with pytest.raises(
            DataError, match=rf"1 row can't be used:\n.*rows\.jsonl:2  {words}.*malformed_thoughts=drop"
        ):
            Built(tmp_path, records, *options, pattern)
    left = Built(tmp_path, records, *options, "data.malformed_thoughts=drop", "data.max_dropped_fraction=0.5")
    assert [left.rows.place(i) for i in range(len(left.rows))] == [f"{tmp_path}/rows.jsonl:1"]
    assert left.report.rows_dropped == {"malformed_thoughts": 1}
    assert left.report.dropped_places == {"malformed_thoughts": [f"{tmp_path}/rows.jsonl:2"]}
    assert describe_rows(left.rows) == f"1 rows\n{tmp_path}/rows.jsonl:2 left out: malformed thoughts"
    with pytest.raises(DataError, match=r"1 malformed thoughts.*\n.*\nMend the thoughts .*malformed_thoughts=error"):
        Built(tmp_path, records, *options, "data.malformed_thoughts=drop")
    kept = Built(tmp_path, records, *options, "data.malformed_thoughts=keep")
    assert (len(kept.rows), kept.report.about_thoughts[kind]) == (2, 1)
    assert the_one(kept.said(), f"train: in 1 row ({tmp_path}/rows.jsonl:2) a thought is {kind}") is Level.warning


PATTERNS = {
    "another": ("<think>(.*?)</think>", "<think>a\nb</think>c<think></think>d", "<ToW>a\nb</ToW>c<ToW></ToW>d"),
    "brackets": (r"\[\[(.*?)\]\]", "[[a[0]b]]c [d]", "<ToW>a[0]b</ToW>c [d]"),
    "attributes": ("<thought[^>]*>(.*?)</thought>", "<thought n=1>a</thought>b", "<ToW>a</ToW>b"),
    "white space": (r"\s*<think>\s*(.*?)\s*</think>\s*", "x <think>\na\n</think>\n\nb", "x<ToW>a</ToW>b"),
    "a name": (r"<(think|plan)>(?P<thought>.*?)</\1>", "<plan>a</plan>b<think>c</think>", "<ToW>a</ToW>b<ToW>c</ToW>"),
    "alternatives": ("(?:<a>|<b>)(.*?)(?:</a>|</b>)", "<a>1</a>x<b>2</b>y", "<ToW>1</ToW>x<ToW>2</ToW>y"),
    "a line": (r"Thought: ([^\n]*)\n", "a\nThought: b\nc\n", "a\n<ToW>b</ToW>c\n"),
    "flags": (r"(?i)<think>(.*?)</think>", "<THINK>a</Think>b", "<ToW>a</ToW>b"),
    "JSON": (r'\{"thought": "(.*?)"\}', '{"thought": "a"} {"answer": "b"}', '<ToW>a</ToW> {"answer": "b"}'),
    "a bracket": (r"\((.*?)\)", "(a) b :)", "<ToW>a</ToW> b :)"),
    "none here": ("<think>(.*?)</think>", "a > b, [c] and <d>", "a > b, [c] and <d>"),
}


def written(pattern: str, text: str, *overrides: str) -> str:
    """Return a completion as the model is to write it."""
    data = admitted(
        "data=prompt_completion", "data.train_files=[data/tow_addition/train.jsonl]", *overrides
    ).config.data
    data.thought_pattern = pattern
    record = Record({"prompt": "p", "completion": text}, "rows", 1)
    return ExampleBuilder(data, ("<ToW>", "</ToW>"), None).build(record).completion


@pytest.mark.parametrize("name", PATTERNS)
def test_thoughts_between_other_delimiters_are_found(name: str) -> None:
    pattern, text, expected = PATTERNS[name]
    assert written(pattern, text) == expected


@pytest.mark.parametrize(
    ("pattern", "text", "words"),
    [
        ("<think>(.*)</think>", "<think>a</think>b<think>c</think>", "'<think>' stands inside a thought"),
        ("<think>(.*?)</think>", "<think>a", "'<think>' opens a thought that is never closed"),
        ("<thought>(.*?)</thought>", "<thought n=1>a</thought>", "'</thought>' closes a thought that was never"),
        ("(?i)<think>(.*?)</think>", "a</THINK>", "'</THINK>' closes"),
        ("<think>([a-z]*)</think>", "<think>1</think>", "that data.thought_pattern does not find"),
        ("<think>(.*?)</think>", "<ToW>a</ToW>b", "'<ToW>' opens a thought that is closed, and that data.thought_p"),
        ("<think>(.*?)</think>", "<think>a<ToW>b</think>", "'<ToW>' stands inside a thought"),
    ],
)
def test_delimiters_of_a_pattern_that_stand_alone_are_refused(pattern: str, text: str, words: str) -> None:
    with pytest.raises(BadRow, match=re.escape(words)):
        written(pattern, text)
    assert written(pattern, text, "data.malformed_thoughts=keep")


def test_delimiters_are_known_where_they_mean_something_alone() -> None:
    for pattern, around in {
        "<a[)]>(.*?)</a>": ("<a[)]>", "</a>"), r"\((x(?:y))\)": (r"\(", r"\)"), "(?i)<a>(.)": ("(?i)<a>", "(?i)"),
        "(?:<)(?P<thought>a)(b)": ("(?:<)", "(b)"), "<a>(.)</a>|b": ("", ""), "(?:<(a)>)": ("", ""), "": ("", ""),
    }.items():  # fmt: skip
        assert around_group(pattern) == around


def test_patterns_that_would_be_misunderstood_are_refused() -> None:
    for pattern, words in {
        "(<think>)(.*?)(</think>)": "has 3 groups, one of which is the thought",
        "<a>(.*?)</a>|<b>(.*?)</b>": "has 2 groups",
        "(.*?)": "can match nothing",
        "(x*)": "can match nothing",
        "(?:<a>)?(.*?)(?:</a>)?": "can match nothing",
    }.items():
        assert words in refusal(f"data.thought_pattern='{pattern}'")


def test_what_else_is_said_of_thoughts(tmp_path: Path) -> None:
    only, prompt = pairs("<ToW>a</ToW>"), [{"prompt": "what is <ToW>?", "completion": "a tag"}]
    found = Built(tmp_path, [*only, *prompt, *pairs("<ToW>b</ToW>c")], "data=prompt_completion")
    assert found.report.about_thoughts == {ANSWERLESS: 1, IN_PROMPT: 1}
    assert the_one(found.said(), "rows.jsonl:1)", "nothing but thoughts") is Level.warning
    assert the_one(found.said(), "rows.jsonl:2)", "the prompt holds a thought's tag") is Level.note
    marked = Built(tmp_path, pairs("<think>a</think>b", "c"), "data=prompt_completion", "tokens=none")
    assert the_one(marked.said(), "train: 1 row of", "hold <think>", "rows.jsonl:1", "no thought") is Level.warning
    never = Built(tmp_path, pairs("b", "c"), "data=prompt_completion", "tokens=none", TOW)
    assert the_one(never.said(), "data.thought_pattern finds no thought in any row") is Level.warning


@pytest.mark.parametrize(
    ("given", "taught", "remedy"),
    [
        ({}, "to open or close a thought", "(loss.thought_open_weight=1 and loss.thought_close_weight=1 if"),
        ({"thought_close_weight": 0.0}, "to open a thought", "(loss.thought_open_weight=1 if"),
        ({"thought_open_weight": 1.0}, "to close a thought", "(loss.thought_close_weight=1 if"),
        ({"thought_open_weight": 0.0, "thought_close_weight": 0.0}, "", ""),
    ],
)
def test_tags_that_weigh_nothing_unasked_are_reported(
    tmp_path: Path, given: dict[str, float], taught: str, remedy: str
) -> None:
    found = Built(tmp_path, pairs("<ToW>a</ToW>b"), "data=prompt_completion")
    assert not found.said()
    found.config.loss = replace(found.config.loss, thought_weight=0.0, **given)
    assert [taught in text and remedy in text for _, text in found.said()] == ([True] if taught else [])


def test_dropped_rows_are_refused_with_what_helps(tmp_path: Path) -> None:
    options = ["data=prompt_completion", "data.malformed_thoughts=drop", "data.overflow=drop", "data.max_seq_length=30"]
    with pytest.raises(DataError, match=r"\nMend the thoughts .*=keep\), or allow a larger"):
        Built(tmp_path, pairs("<ToW>a", *["b"] * 3), *options)
    with pytest.raises(DataError, match=r"\nRaise data.max_seq_length \(now 30\), .*, mend the thoughts .*, or allow"):
        Built(tmp_path, pairs("<ToW>a", "b" * 40, *["b"] * 3), *options)
    with pytest.raises(DataError, match=r"\nRaise data.max_seq_length .*choose another data.overflow, or allow a"):
        Built(tmp_path, pairs("b" * 40, *["b"] * 3), *options)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_a_row_cut_inside_a_thought_teaches_no_closing_tag_and_no_answer(tmp_path: Path, model: str) -> None:
    key = "data.max_seq_length" if model == "tiny_llama" else "data.max_target_length"
    options = ["data=prompt_completion", f"model={model}", f"{key}={6 if model == 'tiny_llama' else 5}"]
    found = Built(tmp_path, pairs("<ToW>1</ToW>a", "<ToW>123</ToW>a", "ab"), *options)
    assert [found.spans(i) for i in range(3)] == [
        [("thought", "<ToW>1</ToW>"), ("answer", "a")], [("thought", "<ToW>123")], [("answer", "ab</s>")],
    ]  # fmt: skip
    assert found.report.about_thoughts == {CUT: 1}
    assert (
        the_one(found.said(), "in 1 row", "rows.jsonl:2", "cut off inside a thought", f"raise {key}") is Level.warning
    )


def test_a_thought_whose_beginning_is_cut_off_is_not_learned(tmp_path: Path) -> None:
    options = ["data=messages", "data.overflow=truncate_prompt"]
    chats = [{"messages": chat("q", "<ToW>long</ToW>a", "r", "<ToW>1</ToW>b")}]
    last = [("thought", "<ToW>1</ToW>"), ("answer", "b</s>")]
    whole = Built(tmp_path, chats, *options)
    text = whole.tokenizer.decode(whole.rows[0].input_ids.tolist())
    assert whole.spans() == [("thought", "<ToW>long</ToW>"), ("answer", "a</s>"), *last]
    after = len(whole.tokenizer(text.partition("<ToW>")[2].removeprefix("<ToW>"), add_special_tokens=False).input_ids)
    cut = Built(tmp_path, chats, *options, f"data.max_seq_length={after}")  # BOS, and what follows the tag's next token
    assert whole.tokenizer.decode(cut.rows[0].input_ids.tolist()).startswith("<s>ong</ToW>a</s>")
    assert cut.spans() == [("answer", "a</s>"), *last]


def test_a_thought_that_the_generation_prompt_opens_is_one(tmp_path: Path) -> None:
    tokenizer = with_template(DEEPSEEK_R1)
    tags = ['additional_special_tokens=["<think>","</think>"]', 'thought_open="<think>"', 'thought_close="</think>"']
    row = chat("q", "b")
    row[1]["reasoning_content"] = "why"
    data = built_with(tmp_path, tokenizer, [row], *(f"tokens.{key}" for key in tags))
    spans = spans_of(tokenizer, data.train.first)
    assert spans == [("thought", "why\n</think>"), ("answer", "\n\nb<｜end｜></s>")]


def test_a_template_may_write_thoughts_of_its_own(tmp_path: Path) -> None:
    template = "data.completion_template='<ToW>as always</ToW>{completion}'"
    found = Built(tmp_path, pairs("<ToW>1</ToW>a"), "data=prompt_completion", template)
    assert found.spans()[:2] == [("thought", "<ToW>as always</ToW>"), ("thought", "<ToW>1</ToW>")]
    assert found.rows.reference(0) == "a"


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_the_dump_has_what_the_loss_is_computed_by(tmp_path: Path, model: str) -> None:
    rows = [{"prompt": "p", "completion": "<ToW>ab</ToW>cd<ToW></ToW><ToW>e</ToW>", "w": 2}]
    weights = {"thought": 0.5, "thought_open": 3, "thought_close": 0, "after_thought": 7}
    options = [f"loss.{part}_weight={weight}" for part, weight in weights.items()] + ["data.weight_column=w"]
    found = Built(tmp_path, rows, "data=prompt_completion", f"model={model}", *options)
    line = dumped(found.rows[0], found.config.loss)
    opened, inner, closed, after = "thought_open", "thought", "thought_close", "after_thought"
    parts = [opened, inner, inner, closed, after, "answer", opened, closed, opened, inner, closed, after]
    first = 2 if model == "tiny_llama" else 1  # BOS and the prompt, or the decoder's first token
    assert line["parts"] == [None] * first + parts
    assert line["weights"] == [0] * first + [2 * (weights | {"answer": 1})[part] for part in parts]
