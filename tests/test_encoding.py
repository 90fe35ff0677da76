"""Ids and labels: exactly the completion and EOS are learned, whatever the text and the tokenizer do."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from src.config.schema import Overflow
from src.data.encoding import ANSWER, IGNORE_INDEX, THOUGHT, EncodedRow, Encoder, Lengths
from src.data.examples import Example
from src.data.readers.record import Record
from src.data.sets import EncodedSet
from src.data.store import Shard, SourceStats, to_batch
from src.data.text_encoder import Segment
from src.errors import TokenError
from tests.kinds import byte_bpe, character_level, one_control_token, sentencepiece, unigram, wordpiece, words

TAGS = ("<ToW>", "</ToW>")
LONG = Lengths(10_000, None, Overflow.error)

PAIRS = [
    ("4821+3977=", "8798"),
    ("Question:", "answer"),  # no space at the seam
    ("Question:", " answer"),
    ("Question: ", "answer"),
    ("Question: ", " answer "),
    (" leading", "space"),
    ("low", "er"),  # one word over the seam
    ("What is 12 pl", "us 30?"),
    ("line\n", "\nnext\n\n"),
    ("", "no prompt at all"),
    ("?", "!"),
    ("안녕", "하세요 세계"),
    ("你好，", "世界。"),
    ("👩‍👩‍👧‍👦 and 🏳️", "‍🌈 é e\u0301"),  # joiners inside and at the seam
    ("def f(x):\n    ", "return {'a': x}  # <- here\n\tpass"),
    ("turn<|turn|>", "<|turn|>\n<|turn|>end"),
    ("say {eos} now", "then {eos} or {eos}"),
    ("{eos}", "{eos}"),
    ("{bos}{pad}", "a{bos} {pad}"),
    ("{bos}", "{bos}low"),
    ("think", "<ToW>2+2</ToW>4<ToW> a </ToW> b"),
    ("a<ToW>b</ToW>c", "never closed <ToW>b"),
    ("", "<ToW>a</ToW>b"),
]


@dataclass(frozen=True)
class Kind:
    """A tokenizer, whether it puts BOS in front of a text, and what of a text it gives back."""

    make: Callable[[], Any]
    adds_bos: bool
    comes_back: Callable[[str], str] = lambda text: text

    def text(self, tokenizer: Any, ids: list[int]) -> str:
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return without_spaces(decoded) if self.comes_back is without_spaces else decoded


def without_leading_space(text: str) -> str:
    """A space in front is taken for the one that the tokenizer would put there."""
    return text.removeprefix(" ")


def without_spaces(text: str) -> str:
    """Nothing else is lost but what is no character to be seen, as a joiner."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


KINDS = {
    "character level, BOS": Kind(character_level, True),
    "byte-level BPE, BOS": Kind(byte_bpe, True),
    "byte-level BPE, EOS": Kind(lambda: byte_bpe(bos=False, adds_eos=True), False),
    "byte-level BPE, BOS and EOS": Kind(lambda: byte_bpe(adds_eos=True), True),
    "byte-level BPE, pad is EOS": Kind(lambda: byte_bpe(pad="</s>"), True),
    "byte-level BPE, no BOS, no pad": Kind(lambda: byte_bpe(bos=False, pad=None), False),
    "byte-level BPE, BOS is EOS is pad": Kind(one_control_token, False),
    "SentencePiece BPE": Kind(lambda: sentencepiece(legacy=False), True, without_leading_space),
    "SentencePiece BPE, legacy": Kind(lambda: sentencepiece(legacy=True), True),
    "SentencePiece unigram": Kind(unigram, False, without_leading_space),
    "WordPiece": Kind(lambda: wordpiece("".join(map("".join, PAIRS)) + "[CLSEPAD]<s>/"), True, without_spaces),
}
ANY_TEXT = [name for name in KINDS if name not in ("WordPiece", "byte-level BPE, EOS")]


@cache
def made(kind: str) -> Any:
    """Give the tokenizer of a kind, with the tags of thoughts."""
    tokenizer = KINDS[kind].make()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


@cache
def encoder_of(kind: str) -> Encoder:
    return Encoder(made(kind), TAGS)


def example(prompt: str, completion: str) -> Example:
    segments = (Segment(prompt, is_supervised=False), Segment(completion, is_supervised=True))
    return Example(segments, prompt, completion, completion)


def stored(encoder: Encoder, pairs: Sequence[tuple[str, str]], lengths: Lengths = LONG) -> EncodedSet:
    """Encode pairs and put them where training and generation find them; those that are too long are left out."""
    examples = [example(*pair) for pair in pairs]
    encoded = zip(examples, encoder.encode(examples, lengths), strict=True)
    rows = [(i, Record({}, "rows", i), one, row) for i, (one, row) in enumerate(encoded) if row is not None]
    return EncodedSet("rows", [Shard([to_batch(rows)], SourceStats(len(pairs)))])


def check(kind: str, rows: EncodedSet, index: int) -> None:
    """See to it that a row that was not cut is what the rules of encoding say."""
    tokenizer, expected = made(kind), KINDS[kind]
    row, prompt, completion = rows[index], rows.prompt(index), rows.completion(index)
    ids, fed = row.input_ids.tolist(), rows.prompt_ids(index)
    bos = [tokenizer.bos_token_id] if expected.adds_bos else []
    body = ids[len(bos) : -1]
    control = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}

    assert ids == [*bos, *body, tokenizer.eos_token_id]
    assert not set(tokenizer.convert_tokens_to_ids(sorted(control))) & set(body)
    assert expected.text(tokenizer, body) == expected.comes_back(prompt + completion)

    assert ids[: len(fed)] == fed
    assert expected.text(tokenizer, fed[len(bos) :]) == expected.comes_back(prompt)
    if prompt and not any(token in prompt for token in [*control, *tokenizer.get_added_vocab()]):
        own = tokenizer(prompt)["input_ids"]
        assert fed == (own[:-1] if own[-1] == tokenizer.eos_token_id else own)

    learned = list(range(max(1, len(fed)), len(ids)))  # nothing stands before the first id to predict it from
    assert [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX] == learned
    assert row.labels[learned].tolist() == row.input_ids[learned].tolist()
    in_text = {token: prompt.count(token) + completion.count(token) for token in [*control, *TAGS, "<|turn|>"]}
    assert rows.shards[0].column("num_control_tokens")[index] == sum(in_text[token] for token in control)
    for token in {*TAGS, "<|turn|>"} & set(tokenizer.get_added_vocab()):
        assert body.count(tokenizer.convert_tokens_to_ids(token)) == in_text[token]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_ids_are_the_text_and_labels_the_completion(kind: str, pair: tuple[str, str]) -> None:
    tokenizer = made(kind)
    names = {"{eos}": tokenizer.eos_token, "{bos}": tokenizer.bos_token or "<s>", "{pad}": tokenizer.pad_token or "<p>"}
    prompt, completion = pair
    for name, token in names.items():
        prompt, completion = prompt.replace(name, token), completion.replace(name, token)
    check(kind, stored(encoder_of(kind), [(prompt, completion)]), 0)


def test_kinds_do_to_a_text_what_their_names_say() -> None:
    framed = {name: made(name)("a")["input_ids"] for name in KINDS}
    for name, ids in framed.items():
        tokenizer = made(name)
        assert (ids[0] == tokenizer.bos_token_id) is KINDS[name].adds_bos
        ends = name in ("byte-level BPE, EOS", "byte-level BPE, BOS and EOS", "SentencePiece unigram", "WordPiece")
        assert (ids[-1] == tokenizer.eos_token_id) is ends
    assert made("byte-level BPE, no BOS, no pad").chat_template is None
    assert made("WordPiece").tokenize("lower answer") == ["low", "##er", "answer"]
    for name in ("SentencePiece BPE", "SentencePiece BPE, legacy", "SentencePiece unigram"):
        assert made(name).tokenize("low")[0].startswith("▁")


# any Unicode text; "▁" is how SentencePiece writes a space, no tokenizer of that kind can give it back
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
KNOWN = ["<s>", "</s>", "<pad>", *TAGS, "<|turn|>", "\n", "\n\n", " ", "  ", "low", "er", "세계", "<", "/s>"]
TEXT = st.text(CHARACTERS, max_size=12)
MIXED = st.lists(st.sampled_from(KNOWN) | st.text(CHARACTERS, max_size=3), max_size=8).map("".join)
TEXTS = TEXT | MIXED
COMPLETIONS = TEXTS.filter(bool)
ROWS = st.lists(st.tuples(TEXTS, COMPLETIONS), min_size=1, max_size=5)

by_property = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("kind", ANY_TEXT)
@by_property
@given(pairs=ROWS)
def test_any_text_is_encoded_by_the_rules_and_a_batch_as_row_by_row(kind: str, pairs: list[tuple[str, str]]) -> None:
    encoder = encoder_of(kind)
    rows = stored(encoder, pairs)
    for i in range(len(pairs)):
        check(kind, rows, i)
    together = encoder.encode([example(*pair) for pair in pairs], LONG)
    assert together == [row for pair in pairs for row in encoder.encode([example(*pair)], LONG)]


@pytest.mark.parametrize("kind", ["character level, BOS", "byte-level BPE, no BOS, no pad", "SentencePiece BPE"])
@pytest.mark.parametrize("overflow", Overflow)
@by_property
@given(pair=st.tuples(TEXTS, COMPLETIONS), length=st.integers(2, 40))
def test_what_is_cut_of_any_row(kind: str, overflow: Overflow, pair: tuple[str, str], length: int) -> None:
    encoder, bos = encoder_of(kind), int(KINDS[kind].adds_bos)
    (whole,) = encoder.encode([example(*pair)], LONG)
    (row,) = encoder.encode([example(*pair)], Lengths(length, None, overflow))
    assert whole is not None
    if len(whole.input_ids) <= length:
        assert row == whole
        return
    if overflow in (Overflow.drop, Overflow.error):
        assert row is None
        return
    assert row is not None
    assert row.is_truncated
    if overflow is Overflow.truncate:
        assert row.input_ids == whole.input_ids[:length]
        assert row.prompt_length == min(whole.prompt_length, length)
    else:
        completion = whole.input_ids[whole.prompt_length :][: length - bos]
        prompt = whole.input_ids[bos : whole.prompt_length]
        kept = prompt[len(prompt) - (length - bos - len(completion)) :]
        assert row.input_ids == [*whole.input_ids[:bos], *kept, *completion]
        assert row.prompt_length == bos + len(kept)
    is_whole = overflow is Overflow.truncate_prompt and len(whole.input_ids) - whole.prompt_length <= length - bos
    assert (encoder.eos_token_id in row.input_ids) is is_whole
    check_spans(kind, row)
    rows = stored(encoder, [pair], Lengths(length, None, overflow))
    for label, token_id, i in zip(rows[0].labels, row.input_ids, range(length), strict=True):
        assert label == (token_id if i >= max(1, row.prompt_length) else IGNORE_INDEX)


@pytest.mark.parametrize("kind", ANY_TEXT)
@by_property
@given(pair=st.tuples(MIXED, MIXED.filter(bool)))
def test_spans_tile_what_is_learned(kind: str, pair: tuple[str, str]) -> None:
    (row,) = encoder_of(kind).encode([example(*pair)], LONG)
    assert row is not None
    check_spans(kind, row)


def check_spans(kind: str, row: EncodedRow) -> None:
    """See to it that spans tile what is learned, and that a thought goes from tag to tag, or to the end."""
    opened, closed = made(kind).convert_tokens_to_ids(list(TAGS))
    ids = row.input_ids if row.target_ids is None else row.target_ids
    at = max(1, row.prompt_length) if row.target_ids is None else int(KINDS[kind].adds_bos)
    first = at  # here a thought may go on: its tag is in the prompt, or is the very first id, which is not learned
    for span_kind, start, stop in row.spans:
        assert start == at < stop
        at, inside = stop, ids[start:stop]
        if span_kind == ANSWER:
            assert opened not in inside
        else:
            assert span_kind == THOUGHT
            assert inside[0] == opened or start == first
            assert closed not in inside[:-1]
            assert inside[-1] == closed or stop == len(ids)
    assert at == len(ids)


def test_a_thought_is_a_span_from_tag_to_tag_and_the_rest_answers() -> None:
    encoder = encoder_of("character level, BOS")
    (row,) = encoder.encode([example("1+1=", "<ToW>ab</ToW>c<ToW>d</ToW>")], LONG)
    assert row is not None
    assert row.spans == [(THOUGHT, 5, 9), (ANSWER, 9, 10), (THOUGHT, 10, 13), (ANSWER, 13, 14)]
    (cut,) = encoder.encode([example("1+1=", "<ToW>ab</ToW>c")], Lengths(7, None, Overflow.truncate))
    assert cut is not None
    assert cut.spans == [(THOUGHT, 5, 7)]
    (plain,) = Encoder(made("character level, BOS")).encode([example("1+1=", "<ToW>ab</ToW>c")], LONG)
    assert plain is not None
    assert plain.spans == [(ANSWER, 5, 11)]


def test_a_thought_that_begins_a_row_without_bos_is_a_thought_behind_its_first_id_too() -> None:
    (row,) = encoder_of("byte-level BPE, no BOS, no pad").encode([example("", "<ToW>ab</ToW>c")], LONG)
    assert row is not None
    assert row.spans == [(THOUGHT, 1, 4), (ANSWER, 4, 6)]


@pytest.mark.parametrize(
    ("overflow", "length", "prompt", "completion"),
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
def test_what_is_cut_when_a_row_is_too_long(overflow: str, length: int, prompt: str, completion: str) -> None:
    tokenizer = made("character level, BOS")
    lengths = Lengths(length, None, Overflow[overflow])
    rows = stored(encoder_of("character level, BOS"), [("abcd", "efgh")], lengths)
    assert rows.is_truncated(0)
    assert len(rows[0].input_ids) == length
    learned = rows[0].labels[rows[0].labels != IGNORE_INDEX].tolist()
    assert tokenizer.decode(rows[0].input_ids[1 : 1 + len(prompt)]) == prompt
    assert tokenizer.decode(learned) == completion


@pytest.mark.parametrize("overflow", ["drop", "error"])
def test_rows_that_may_not_be_cut_are_given_back_as_none(overflow: str) -> None:
    encoder = encoder_of("character level, BOS")
    assert encoder.encode([example("abcd", "efgh")], Lengths(9, None, Overflow[overflow])) == [None]
    assert encoder.encode([example("abcd", "efgh")], Lengths(10, None, Overflow[overflow])) != [None]


def test_an_added_token_of_the_checkpoint_keeps_its_id_and_control_tokens_are_counted() -> None:
    (row,) = encoder_of("byte-level BPE, BOS").encode([example("a", "<|turn|></s><s></s>")], LONG)
    assert row is not None
    assert row.input_ids[2] == made("byte-level BPE, BOS").convert_tokens_to_ids("<|turn|>")
    assert row.num_control_tokens == 3


def test_a_control_token_in_the_vocabulary_itself_is_no_control_token_in_a_text() -> None:
    tokenizer = unigram()
    assert tokenizer.eos_token_id in tokenizer.encode("a</s>b", add_special_tokens=False)
    (row,) = Encoder(tokenizer).encode([example("a </s>b", "b</s> a")], LONG)
    assert row is not None
    assert row.input_ids.index(tokenizer.eos_token_id) == len(row.input_ids) - 1
    assert Encoder(tokenizer).decode(row.input_ids) == "a </s>bb</s> a"


def test_a_row_without_bos_and_prompt_is_not_learned_from_its_first_id() -> None:
    kind = "byte-level BPE, no BOS, no pad"
    rows = stored(encoder_of(kind), [("", "a b")])
    ids = [*made(kind)("a b")["input_ids"], made(kind).eos_token_id]
    assert rows[0].input_ids.tolist() == ids
    assert rows[0].labels.tolist() == [IGNORE_INDEX, *ids[1:]]
    assert (rows.prompt_ids(0), rows.first_ids(0)) == ([], ids[:1])


def test_words_without_bos_or_pad() -> None:
    rows = stored(Encoder(words()), [("low", "er a")])
    assert rows[0].input_ids.tolist() == [2, 3, 4, 1]
    assert rows[0].labels.tolist() == [IGNORE_INDEX, 3, 4, 1]


def test_decoding_keeps_thought_tags_and_leaves_control_tokens_out() -> None:
    tokenizer = made("character level, BOS")
    opened, closed = tokenizer.convert_tokens_to_ids(list(TAGS))
    ids = [tokenizer.bos_token_id, opened, *tokenizer.encode("a", add_special_tokens=False), closed]
    ids += [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert encoder_of("character level, BOS").decode(ids) == "<ToW>a</ToW>"
    assert encoder_of("character level, BOS").decode_all(ids) == "<s><ToW>a</ToW></s><pad>"


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(TokenError, match="no EOS"):
        Encoder(tokenizer)


def test_the_copies_for_texts_leave_the_tokenizer_as_it_was() -> None:
    tokenizer = byte_bpe()
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    Encoder(tokenizer).encode([example("x </s>", "y")], LONG)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before


# what an encoder-decoder is given: T5 puts EOS behind a text, BART also BOS in front

PAIR_KINDS = ["SentencePiece unigram", "byte-level BPE, BOS and EOS"]
LONG_PAIR = Lengths(10_000, 10_000, Overflow.error)


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize(
    "pair", [("low: ", "er"), ("", "no prompt"), ("세계", "a\nb"), ("x y", " 🙂"), ("a", "a b c ")]
)
def test_encoder_and_decoder_are_given_what_the_tokenizer_gives(kind: str, pair: tuple[str, str]) -> None:
    tokenizer = made(kind)
    rows = stored(encoder_of(kind), [pair], LONG_PAIR)
    prompt, completion = pair
    assert rows.is_encoder_decoder
    assert rows[0].target_ids is not None
    assert rows[0].input_ids.tolist() == tokenizer(prompt)["input_ids"] == rows.prompt_ids(0)
    assert rows[0].target_ids.tolist() == tokenizer(text_target=completion)["input_ids"]


@pytest.mark.parametrize("kind", PAIR_KINDS)
@by_property
@given(pair=st.tuples(TEXTS, COMPLETIONS))
def test_a_decoder_learns_the_completion_and_eos(kind: str, pair: tuple[str, str]) -> None:
    tokenizer, expected = made(kind), KINDS[kind]
    rows = stored(encoder_of(kind), [pair], LONG_PAIR)
    row, (prompt, completion) = rows[0], pair
    assert row.target_ids is not None
    target, bos = row.target_ids.tolist(), [tokenizer.bos_token_id] * expected.adds_bos
    eos = tokenizer.eos_token_id
    written, read = target[len(bos) : -1], row.input_ids.tolist()[len(bos) : -1]
    assert (row.input_ids.tolist(), target) == ([*bos, *read, eos], [*bos, *written, eos])
    assert not {*bos, eos, tokenizer.pad_token_id} & {*written, *read}
    assert expected.text(tokenizer, read) == expected.comes_back(prompt)
    assert expected.text(tokenizer, written) == expected.comes_back(completion)
    assert row.labels.tolist() == [*[IGNORE_INDEX] * len(bos), *written, eos]
    (encoded,) = encoder_of(kind).encode([example(*pair)], LONG_PAIR)
    assert encoded is not None
    check_spans(kind, encoded)


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize("overflow", Overflow)
@by_property
@given(pair=st.tuples(TEXTS, COMPLETIONS), length=st.integers(2, 20), target_length=st.integers(2, 20))
def test_what_is_cut_of_an_encoder_decoders_row(
    kind: str, overflow: Overflow, pair: tuple[str, str], length: int, target_length: int
) -> None:
    encoder, bos = encoder_of(kind), int(KINDS[kind].adds_bos)
    (whole,) = encoder.encode([example(*pair)], LONG_PAIR)
    (row,) = encoder.encode([example(*pair)], Lengths(length, target_length, overflow))
    assert whole is not None
    assert whole.target_ids is not None
    if len(whole.input_ids) <= length and len(whole.target_ids) <= target_length:
        assert row == whole
        return
    if overflow in (Overflow.drop, Overflow.error):
        assert row is None
        return
    assert row is not None
    assert row.is_truncated
    # the frame of a prompt stays whole, and what is cut of the prompt is its end or its start
    prompt = whole.input_ids[bos:-1]
    excess = max(0, len(whole.input_ids) - length)
    kept = prompt[excess:] if overflow is Overflow.truncate_prompt else prompt[: len(prompt) - excess]
    assert row.input_ids == [*whole.input_ids[:bos], *kept, encoder.eos_token_id]
    assert row.prompt_length == len(row.input_ids) <= length
    assert row.target_ids == whole.target_ids[:target_length]
    check_spans(kind, row)


def test_an_encoder_decoders_row_with_nothing_to_learn_is_not_supervised() -> None:
    nothing = Example(
        (Segment("a", is_supervised=False), Segment("b", is_supervised=False)), "ab", "", "", needs_eos=False
    )
    for lengths in (LONG, LONG_PAIR):
        (row,) = encoder_of("byte-level BPE, BOS and EOS").encode([nothing], lengths)
        assert row is not None
        assert not row.is_supervised
