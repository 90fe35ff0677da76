"""Chats in the templates of ten model families: whoever writes just what the rows teach gets full marks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.data.advice import Level, advice
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.errors import DataError
from src.evaluation.answers import AnswerReader
from src.evaluation.generate import Generator
from src.inspection.findings import answer_scorer, prove
from src.metrics import METRICS, compute_metrics
from src.model.build import set_generation
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest
from tests.chat_templates import DEEPSEEK_R1, FAMILIES, LLAMA_3_NO_PROMPT, PHI_3
from tests.kinds import byte_bpe, sentencepiece
from tests.test_chat import built, by_tokenizer, chat, configured, learned, with_template

ANSWER, FIRST = "It is the Danube, of course.", "Well, I think it is the Nile."
THOUGHT = "Vienna lies on it."

FULL_MARKS = {"chrf": 100.0, "bleu": 100.0}

NO_SYSTEM = {"Gemma"}
"""Families whose template refuses a system message: the row is refused, and the error says what to do."""
EARLIER_THOUGHTS_CUT = {"Qwen 3", "DeepSeek R1"}
"""Families whose template cuts the thoughts of earlier turns, so these turns can't be learned as they were written."""


def tokenizer_of(family: str) -> Any:
    template, added = FAMILIES[family]
    tokenizer = byte_bpe()
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template
    return tokenizer


def row(*, turns: int, system: bool, thought: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer in a whole sentence."}] if system else []
    for text in ([FIRST] if turns == 2 else []) + [ANSWER]:
        messages.append({"role": "user", "content": "Which river is it?"})
        messages.append({"role": "assistant", "content": text})
        if thought == "in content":
            messages[-1]["content"] = f"<think>\n{THOUGHT}\n</think>\n\n{text}"
        if thought == "beside":
            messages[-1]["reasoning_content"] = THOUGHT
    return {"messages": messages}


def written(data: Data, rows: EncodedSet, index: int) -> str:
    """Return what a perfect model generates for a row: the learned ids of the last turn up to where it stops."""
    is_supervised = rows[index].labels >= 0
    last = len(is_supervised) - 1 - is_supervised[::-1].argmax()
    start = last
    while start and is_supervised[start - 1]:
        start -= 1
    ids = rows[index].input_ids[start : last + 1].tolist()
    end = next(at for at, token in enumerate(ids) if token in data.stop_ids)
    return data.encoder.decode(ids[:end])


def marks(data: Data, *overrides: str) -> tuple[dict[str, float], list[str]]:
    """Score what the rows teach, by every metric; return the references too."""
    rows = data.train
    assert isinstance(rows, EncodedSet)
    reader = AnswerReader(data.encoder, configured(*overrides).thought_tags, data.frame)
    answers = [reader.answer(rows, i, written(data, rows, i)) for i in range(len(rows))]
    references = [reader.reference(rows, i) for i in range(len(rows))]
    return compute_metrics(METRICS, answers, references, None), references


def assert_full_marks(found: dict[str, float]) -> None:
    assert found == pytest.approx({metric: FULL_MARKS.get(metric, 1.0) for metric in METRICS})


@pytest.mark.parametrize("tokens", ["tokens=none", "tokens=tow"])
@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_without_thoughts_get_full_marks(tmp_path: Path, family: str, turns: str, tokens: str) -> None:
    systems = (False,) if family in NO_SYSTEM else (False, True)
    rows = [row(turns=n, system=system, thought="none") for n in (1, 2) for system in systems]
    overrides = [f"data.supervised_turns={turns}", tokens]
    data = built(tmp_path, tokenizer_of(family), rows, *overrides)
    found, references = marks(data, *overrides)
    assert_full_marks(found)
    assert set(references) == {ANSWER}
    config = configured(*overrides, "evaluation.metrics=[exact_match,rouge1,rouge2,rougeL,chrf,bleu]")
    assert isinstance(data.train, EncodedSet)
    proof = prove(data.train, answer_scorer(config, data))
    assert (proof.low_scoring, proof.altered, proof.wrong_mask, proof.unlike) == ([], [], [], [])
    assert proof.num_with_end == len(rows)
    assert not proof.unscorable


@pytest.mark.parametrize("thought", ["in content", "beside"])
@pytest.mark.parametrize("tokens", ["tokens=none", "tokens=tow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_with_thoughts_get_full_marks_or_are_refused_with_a_remedy(
    tmp_path: Path, family: str, tokens: str, thought: str
) -> None:
    systems = (False,) if family in NO_SYSTEM else (False, True)
    overrides = [tokens, *(["data.thought_pattern='<think>(.*?)</think>'"] if tokens == "tokens=tow" else [])]
    several = [row(turns=2, system=system, thought=thought) for system in systems]
    if tokens == "tokens=none" and (family in EARLIER_THOUGHTS_CUT):
        with pytest.raises(DataError, match=r"train on the last turn only: data\.supervised_turns=last"):
            built(tmp_path, tokenizer_of(family), several, *overrides)
        overrides.append("data.supervised_turns=last")
    rows = [*several, *(row(turns=1, system=system, thought=thought) for system in systems)]
    data = built(tmp_path, tokenizer_of(family), rows, *overrides)
    found, references = marks(data, *overrides)
    assert_full_marks(found)
    taught = "".join(learned(data.encoder._tokenizer, data.train, len(rows) - 1))  # type: ignore[arg-type]
    if tokens == "tokens=tow":
        tagged = THOUGHT if thought == "beside" else f"\n{THOUGHT}\n"
        assert f"<ToW>{tagged}</ToW>" in taught
        assert {reference.strip() for reference in references} == {ANSWER}
    elif family in EARLIER_THOUGHTS_CUT:
        assert THOUGHT in taught
        assert set(references) == {ANSWER}
    else:  # nobody says that these are thoughts, or the template has no place for them
        assert (THOUGHT in taught) == (thought == "in content")
        assert all(reference.endswith(ANSWER) for reference in references)
        levels = {one.level for one in advice(configured(*overrides), data, data.encoder._tokenizer)}
        assert (Level.error in levels) == (thought == "beside")


@pytest.mark.parametrize("family", sorted(NO_SYSTEM))
def test_a_system_message_that_a_template_refuses_is_refused_with_a_remedy(tmp_path: Path, family: str) -> None:
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer_of(family), [row(turns=1, system=True, thought="none")])
    for words in ("rows.jsonl:1", "the chat template refuses it: System role not supported", "user's first one"):
        assert words in str(caught.value)


def test_thoughts_beside_the_content_can_be_dropped(tmp_path: Path) -> None:
    rows = [row(turns=2, system=True, thought="beside")]
    for family in FAMILIES.keys() - NO_SYSTEM:
        data = built(tmp_path, tokenizer_of(family), rows, "data.thoughts=drop")
        assert isinstance(data.train, EncodedSet)
        assert THOUGHT not in data.encoder.decode_all(data.train[0].input_ids.tolist())
        assert not data.reports["train"].template_changes.keys() - {"turn not learned"}


def test_a_turns_end_that_is_not_eos_ends_every_turn(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("Phi 3")
    data = built(tmp_path, tokenizer, [row(turns=2, system=True, thought="none")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == [f"{FIRST}<|end|>", f"{ANSWER}<|end|>"]
    assert data.stop_ids == tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    text = tokenizer.decode(data.train[0].input_ids.tolist())
    assert text.endswith(f"{ANSWER}<|end|>\n</s>")  # as the template writes it, and not learned


def test_a_turns_end_that_is_ordinary_text_ends_the_answer(tmp_path: Path) -> None:
    tokenizer = with_template(PHI_3)  # <|end|> is no token here
    data = built(tmp_path, tokenizer, [row(turns=2, system=False, thought="none")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == [f"{FIRST}<|end|>\n", f"{ANSWER}<|end|>\n</s>"]
    found, references = marks(data)
    assert_full_marks(found)
    assert references == [ANSWER]
    assert data.frame.end_text == "<|end|>"
    assert data.frame.answer(f"{ANSWER}<|end|>\n<|user|>\nMore?") == ANSWER


def test_a_header_that_no_generation_prompt_writes_is_not_part_of_the_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("Llama 3")
    tokenizer.chat_template = LLAMA_3_NO_PROMPT
    data = built(tmp_path, tokenizer, [row(turns=2, system=True, thought="none")])
    assert isinstance(data.train, EncodedSet)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert learned(tokenizer, data.train) == [f"{header}{FIRST}<|eot_id|>", f"{header}{ANSWER}<|eot_id|>"]
    found, references = marks(data)
    assert_full_marks(found)
    assert references == [ANSWER]


def test_a_thought_that_the_generation_prompt_opens_is_continued(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("DeepSeek R1")
    rows = [row(turns=1, system=False, thought=thought) for thought in ("none", "in content", "beside")]
    data = built(tmp_path, tokenizer, rows)
    assert isinstance(data.train, EncodedSet)
    prompt = rows[0]["messages"][:1]
    fed = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert all(data.train.prompt_ids(i) == fed for i in range(3))
    assert [learned(tokenizer, data.train, i) for i in range(3)] == [
        [f"\n</think>\n\n{ANSWER}<｜end｜>"],
        [f"{THOUGHT}\n</think>\n\n{ANSWER}<｜end｜>"],
        [f"{THOUGHT}\n</think>\n\n{ANSWER}<｜end｜>"],
    ]
    assert data.reports["train"].template_changes == {}
    assert data.frame.answer("a thought that never ends") == ""


def test_a_thought_that_the_generation_prompt_closes_is_left_empty(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("DeepSeek R1")
    tokenizer.chat_template = DEEPSEEK_R1.replace("<think>\\n' }}", "<think>\\n\\n</think>\\n\\n' }}")
    data = built(tmp_path, tokenizer, [row(turns=1, system=False, thought=t) for t in ("none", "beside")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == [f"{ANSWER}<｜end｜>"]
    assert tokenizer.decode(data.train.prompt_ids(0)).endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert data.reports["train"].template_changes == {"thought missing": 1}


@pytest.mark.parametrize("family", ["Llama 2", "Mistral", "Zephyr", "Vicuna", "Phi 3"])
@pytest.mark.parametrize("kind", ["tokens take the space after them", "older SentencePiece"])
def test_ids_of_several_turns_are_the_templates(tmp_path: Path, family: str, kind: str) -> None:
    tokenizer = sentencepiece(legacy=True) if "older" in kind else byte_bpe()
    template, added = FAMILIES[family]
    rstrip = "take" in kind
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True, rstrip=rstrip) for token in added])
    tokenizer.chat_template = template
    chats = [chat("low lower", "answer", "a b c", "answer two", system="s x"), chat("a", "b", "c", "d", "e", "f")]
    data = built(tmp_path, tokenizer, chats)
    assert isinstance(data.train, EncodedSet)
    for i, messages in enumerate(chats):
        theirs = by_tokenizer(tokenizer, messages)
        assert data.train[i].input_ids[: len(theirs)].tolist() == theirs
        assert data.train.prompt_ids(i) == by_tokenizer(tokenizer, messages[:-1], add_generation_prompt=True)
    proof = prove(data.train, answer_scorer(configured(), data))
    assert (proof.unlike, proof.wrong_mask, proof.low_scoring) == ([], [], [])


def test_a_reference_is_the_whole_answer_where_it_holds_the_text_that_ends_turns(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ '### ' + m.role + ': ' + m.content + '\n###\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### assistant: ' }}{%- endif -%}"
    )
    answer = "A title.\n### Heading\nand the rest of a long answer"
    data = built(tmp_path, tokenizer, [chat("a", answer), chat("a", ANSWER)])
    assert isinstance(data.train, EncodedSet)
    assert data.frame.end_text == "\n###"
    assert [data.train.reference(i) for i in range(2)] == [answer, ANSWER]
    proof = prove(data.train, answer_scorer(configured(), data))
    assert proof.low_scoring == [(0, "exact_match", "A title.", answer)]  # generation would stop there


def test_a_sign_before_and_after_an_answer_ends_nothing(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = FAMILIES["Zephyr"][0].replace("m.content", "m.content | tojson")
    data = built(tmp_path, tokenizer, [chat("a", "it is so here")])
    found, references = marks(data)
    assert references == ["it is so here"]
    assert data.frame.end_text == ""
    assert_full_marks(found)


def test_marks_that_hold_header_and_newline_are_cut_to_the_turn(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{%- endgeneration -%}"
        "{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    data = built(tmp_path, tokenizer, [row(turns=2, system=True, thought="none")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == [f"{FIRST}<|im_end|>", f"{ANSWER}<|im_end|>"]
    proof = prove(data.train, answer_scorer(configured(), data))
    assert (proof.num_with_end, proof.low_scoring) == (1, [])


def test_where_only_the_next_message_ends_a_turn_its_first_token_is_learned(tmp_path: Path) -> None:
    """GLM 4 writes no end: the token that begins the user's message is what generation stops at."""
    tokenizer = tokenizer_of("Phi 3")
    tokenizer.chat_template = FAMILIES["Phi 3"][0].replace("<|end|>\\n", "").replace("{{ eos_token }}", "{{ '' }}")
    data = built(tmp_path, tokenizer, [row(turns=2, system=False, thought="none")])
    assert isinstance(data.train, EncodedSet)
    assert learned(tokenizer, data.train) == [f"{FIRST}<|user|>", f"{ANSWER}</s>"]
    assert data.stop_ids == tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"])
    assert data.reports["train"].template_changes == {}


def test_a_thoughts_close_that_nobody_knows_is_not_invented(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = FAMILIES["ChatML"][0].replace("assistant\\n' }}", "assistant\\n<|begin_thought|>' }}")
    with pytest.raises(DataError, match="generation prompt is not how the assistant's turn begins"):
        built(tmp_path, tokenizer, [row(turns=1, system=False, thought="none")])


def test_a_chat_whose_only_turn_to_learn_is_written_otherwise_is_refused(tmp_path: Path) -> None:
    messages = row(turns=2, system=False, thought="none")["messages"]
    messages[-1]["weight"] = 0
    with pytest.raises(DataError, match="there is no other to train on"):
        built(tmp_path, tokenizer_of("Qwen 3"), [messages])


def test_generation_stops_after_a_text_that_ends_turns(tmp_path: Path) -> None:
    """On a model without layers whose every token has one successor: it would write on for ever."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = PHI_3.replace("<|end|>", "<#>")
    data = built(tmp_path, tokenizer, [chat("a", "Wok")])
    assert isinstance(data.train, EncodedSet)
    written = tokenizer("Wok<#>", add_special_tokens=False)["input_ids"]
    assert len(set(written)) == len(written)
    size = len(tokenizer) + len(tokenizer) % 2  # rotary positions need an even width
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    )
    model.get_input_embeddings().weight.data = torch.eye(size)
    head = torch.zeros(size, size)
    prompt = data.train.prompt_ids(0)
    for before, after in pairwise([prompt[-1], *written, prompt[-1]]):
        head[after, before] = 1
    model.get_output_embeddings().weight.data = head
    settings = configured("generation.max_new_tokens=20").generation
    set_generation(model, settings, tokenizer, data.stop_ids)
    cpu = RuntimeConfig(device=Device.cpu, deterministic=False)
    with start_runtime(cpu, MixedPrecision.no, 1, StopRequest()) as runtime:
        alone = Generator(model, runtime, 2, []).generate([prompt], seed=1)[0]
        assert data.encoder.decode(alone.ids).startswith("Wok<#>\nWok<#>")
        assert alone.stop_reason == "length"
        reader = AnswerReader(data.encoder, None, data.frame)
        for found in Generator(model, runtime, 2, [], reader).generate([prompt, [*prompt[:2], *prompt]], seed=1):
            assert data.encoder.decode(found.ids) == "Wok<#>"
            assert found.stop_reason == "eos"
            assert data.frame.answer("Wok<#>") == "Wok"
