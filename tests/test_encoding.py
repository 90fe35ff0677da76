"""Ids and labels: exactly the completion and EOS are learned, whatever the text and the tokenizer do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from src.config.schema import Overflow
from src.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from src.errors import TokenError
from src.tokens import NewTokens, add_tokens
from tests.conftest import admitted
from tests.kinds import byte_bpe, character_level, sentencepiece, unigram, words

KINDS: dict[str, Callable[[], Any]] = {
    "character level": character_level,
    "byte-level BPE": byte_bpe,
    "adds EOS": lambda: byte_bpe(adds_eos=True),
    "pad is EOS": lambda: byte_bpe(pad_is_eos=True),
    "SentencePiece": lambda: sentencepiece(legacy=False),
    "SentencePiece, legacy": lambda: sentencepiece(legacy=True),
    "no BOS": lambda: byte_bpe(bos=False),
}

PAIRS = [
    ("4821+3977=", "8798"),
    ("Question:", " answer"),
    ("Question: ", "answer"),
    ("low", "er"),  # one word over the seam
    ("line\n", "\nnext\n"),
    ("", "no prompt at all"),
    ("?", "!"),
    ("안녕", "하세요 세계"),
    ("你好", "世界🙂👩‍👩‍👧"),
    ("def f(x):\n    ", "return {'a': x}  # <- here"),
    ("say </s> and <pad>", "then <s> or </s>"),
    ("<ToW>", "x<ToW>y</ToW>z<|turn|>"),
]


def encode(
    tokenizer: Any, prompt: str, completion: str, length: int = 1000, how: str = "truncate"
) -> EncodedRow | None:
    (row,) = Encoder(tokenizer).encode_rows([prompt], [completion], length, Overflow[how])
    return row


def with_tow(tokenizer: Any) -> tuple[Any, NewTokens]:
    return tokenizer, add_tokens(tokenizer, admitted().config.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_ids_are_the_text_and_labels_the_completion(kind: str, prompt: str, completion: str) -> None:
    tokenizer, new = with_tow(KINDS[kind]())
    row = encode(tokenizer, prompt, completion)
    assert row is not None
    ids = row.input_ids.tolist()
    bos = [] if kind == "no BOS" else [tokenizer.bos_token_id]
    fed = Encoder(tokenizer).encode_prompts([prompt])[0]
    assert ids[: len(fed)] == fed
    assert fed[: len(bos)] == bos
    assert ids[-1] == tokenizer.eos_token_id
    body = ids[len(bos) : -1]
    assert tokenizer.decode(body, clean_up_tokenization_spaces=False) == prompt + completion
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(body)
    supervised = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
    assert supervised == list(range(max(1, len(fed)), len(ids)))
    assert row.labels[supervised].tolist() == row.input_ids[supervised].tolist()
    for token, token_id in new.added.items():
        assert body.count(token_id) == (prompt + completion).count(token)


def test_an_added_token_of_the_checkpoint_keeps_its_id_and_control_tokens_are_counted() -> None:
    tokenizer = byte_bpe()
    encoder = Encoder(tokenizer)
    (ids,) = encoder.encode_completions(["a"], ["<|turn|></s><s></s>"])
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|turn|>")
    assert len(ids) > 4
    assert encoder.num_control_tokens_as_text == 3


def test_a_control_token_in_the_vocabulary_itself_is_no_control_token_in_a_text() -> None:
    tokenizer = unigram()
    row = encode(tokenizer, "a </s>b", "b</s> a")
    assert row is not None
    assert row.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert Encoder(tokenizer).decode(row.input_ids.tolist()) == "a </s>bb</s> a"


def test_words_without_bos_or_pad() -> None:
    row = encode(words(), "low", "er a")
    assert row is not None
    assert row.input_ids.tolist() == [2, 3, 4, 1]
    assert row.labels.tolist() == [IGNORE_INDEX, 3, 4, 1]


@pytest.mark.parametrize(
    ("how", "length", "prompt", "completion"),
    [
        ("truncate", 9, "abcd", "efgh"),  # 1 BOS + 4 + 4: only EOS is cut, it must not stand behind a cut completion
        ("truncate", 8, "abcd", "efg"),
        ("truncate", 5, "abcd", ""),
        ("truncate", 3, "ab", ""),
        ("truncate_prompt", 8, "cd", "efgh</s>"),
        ("truncate_prompt", 6, "", "efgh</s>"),
        ("truncate_prompt", 4, "", "efg"),
    ],
)
def test_what_is_cut_when_a_row_is_too_long(how: str, length: int, prompt: str, completion: str) -> None:
    tokenizer = character_level()
    row = encode(tokenizer, "abcd", "efgh", length, how)
    assert row is not None
    assert row.truncated
    assert len(row.input_ids) == length
    learned = [int(label) for label in row.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(row.input_ids[1 : 1 + len(prompt)]) == prompt
    assert tokenizer.decode(learned) == completion


@pytest.mark.parametrize("how", ["drop", "error"])
def test_rows_that_may_not_be_cut_are_given_back_as_none(how: str) -> None:
    assert encode(character_level(), "abcd", "efgh", 9, how) is None
    assert encode(character_level(), "abcd", "efgh", 10, how) is not None


def test_decoding_keeps_thought_tags_and_leaves_control_tokens_out() -> None:
    tokenizer, new = with_tow(character_level())
    ids = [tokenizer.bos_token_id, new.added["<ToW>"], *tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert Encoder(tokenizer).decode([*ids, new.added["</ToW>"], tokenizer.eos_token_id]) == "<ToW>a</ToW>"


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(TokenError, match="no EOS"):
        Encoder(tokenizer)


def test_the_copy_for_texts_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = byte_bpe()
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    Encoder(tokenizer).encode_prompts(["x </s>"])
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before
