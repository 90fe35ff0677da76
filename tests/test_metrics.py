"""ROUGE, chrF and BLEU, against numbers worked out by hand; exact match has its tests in test_evaluation.py."""

from __future__ import annotations

import itertools
import math
import unicodedata

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from src import metrics
from src.metrics import (
    METRICS,
    answer,
    bleu,
    chrf,
    compute_metrics,
    exact_match,
    greater_is_better,
    is_full_marks,
    words,
)

NAMES = ["rouge1", "rouge2", "rougeL"]
REFERENCE = "The cat sat on the mat."
FULL_MARKS = {"chrf": 100, "bleu": 100}
BY_PROPERTY = settings(derandomize=True, deadline=None, database=None)


def rouge(names: list[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    return {name: metrics.rouge(name, predictions, references) for name in names}


def unscorable(metric: str, reference: str, pattern: str | None = None) -> bool:
    return not METRICS[metric].can_score(reference, pattern)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("the cat lay on a mat", (4 / 6, 1 / 5, 4 / 6)),  # the, cat, on, mat; the cat; the … cat … on … mat
        ("on the mat the cat", (10 / 11, 2 / 3, 6 / 11)),  # 5 of 5 and 6; 3 of 4 and 5; on the mat, 3 of 5 and 6
        (REFERENCE, (1, 1, 1)),
        ("", (0, 0, 0)),
        ("...", (0, 0, 0)),
    ],
)
def test_rouge_of_an_english_pair(prediction: str, expected: tuple[float, float, float]) -> None:
    assert rouge(NAMES, [prediction], [REFERENCE]) == pytest.approx(dict(zip(NAMES, expected, strict=True)))


def test_rouge_is_the_mean_over_rows() -> None:
    predictions = ["the cat lay on a mat", "on the mat the cat", ""]
    assert rouge(["rougeL"], predictions, [REFERENCE] * 3) == pytest.approx({"rougeL": (4 / 6 + 6 / 11) / 3})


def test_korean_counts() -> None:
    prediction, reference = "철수는 학교에 갔다.", "철수는 영희와 학교에 갔다"
    default = RougeScorer(NAMES).score(reference, prediction)
    assert [default[name].fmeasure for name in NAMES] == [0, 0, 0]
    expected = {"rouge1": 6 / 7, "rouge2": 2 / 5, "rougeL": 6 / 7}  # 3 words of 3 and 4; 1 pair of 2 and 3
    assert rouge(NAMES, [prediction], [reference]) == pytest.approx(expected)


@BY_PROPERTY
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_ascii_is_cut_as_rouge_score_cuts_it(text: str) -> None:
    assert words(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#Person1#은 3,000원을 냈다.", ["person1", "은", "3", "000원을", "냈다"]),
        ("Déjà vu, snake_case", ["déjà", "vu", "snake", "case"]),
        ("我爱北京 2024年", ["我", "爱", "北", "京", "2024", "年"]),
        ("東京タワーへ行く", ["東", "京", "タ", "ワ", "ー", "へ", "行", "く"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ＡＢ１", ["ab1"]),
        (unicodedata.normalize("NFD", "학교에 갔다"), ["학교에", "갔다"]),
        ("☀️ 해", ["해"]),
        ("☀\u20e3해 1\ufe0f\u20e3", ["해", "1\u20e3"]),
        ("ฉันทำงาน น้ำ", ["ฉั", "น", "ทำ", "ง", "า", "น", "น้ำ"]),
        ("ราคา iPhone15 ๒๕๖๗", ["ร", "า", "ค", "า", "iphone15", "๒๕๖๗"]),
        ("ພາສາ", ["ພ", "າ", "ສ", "າ"]),
        ("ខ្ញុំ ទៅ", ["ខ្ញុំ", "ទៅ"]),
        ("မြန်မာ ၁၂", ["မြ", "န်", "မ", "ာ", "၁၂"]),
        ("བོད་སྐད།", ["བོ", "ད", "སྐ", "ད"]),
        ("ꦧꦱꦗꦮ", ["ꦧ", "ꦱ", "ꦗ", "ꦮ"]),
        ("ᬩᬮᬶ", ["ᬩ", "ᬮᬶ"]),
        ("ᨲ᩠ᨿᨾ", ["ᨲ᩠ᨿ", "ᨾ"]),
        ("か\u309aガ", ["か\u309a", "ガ"]),
        ("ক্‍ষ বাংলা", ["ক্ষ", "বাংলা"]),
        ("शक्‍ति", ["शक्ति"]),
        ("می‌خواهم كتـــاب", ["میخواهم", "كتاب"]),
        ("co\u00adope\u200brate \u200fx\u2069", ["cooperate", "x"]),
        ("👩‍👩‍👧a 👍🏽", ["a"]),
        (unicodedata.normalize("NFD", "Tiếng Việt"), ["tiếng", "việt"]),
        ("ʻOkina ΟΔΟΣ", ["ʻokina", "οδος"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words(unicodedata.normalize(form, text)) == expected


UNSPACED = ["ກ", "ก", "က", "ក", "ཀ", "ꦲ", "ᬅ", "ᨠ", "ᦀ", "ᥐ", "ꪀ", "ꨀ", "𑜀", "ᯀ", "𑀅", "漢", "か", "ㄅ", "ꀀ"]


@pytest.mark.parametrize("letter", UNSPACED, ids=[unicodedata.name(letter, letter) for letter in UNSPACED])
def test_scripts_without_spaces_are_cut_into_clusters(letter: str) -> None:
    assert words(f"{letter}{letter}x{letter}") == [letter, letter, "x", letter]
    # half of the clusters are right, in a text that is one word between its spaces
    assert rouge(["rouge1"], [letter + "xy"], [letter * 2]) == {"rouge1": pytest.approx(0.5)}


FORMAT_CHARACTERS = (
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u0640\u07fa\ufe0f\ufe00\U000e0100"
    "\u200e\u200f\u202a\u2066\u061c\u034f\u180b\u3164"
)
SOME_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@BY_PROPERTY
@given(st.lists(SOME_TEXT, max_size=4), st.sampled_from(FORMAT_CHARACTERS))
@example(["e", "\u0301 x"], "\u200d")
@example(["a\u0323", "\u0302"], "\u200c")
@example(["Σ", "Σ", "Α", "Σ"], "\u0640")
@example(["abc", "DEF 1", "2"], "\u00ad")
@example(["ก", "ำ"], "\u200b")
def test_characters_that_are_not_seen_cut_no_word_and_make_no_difference(parts: list[str], character: str) -> None:
    assert words(character.join(parts)) == words("".join(parts))


@BY_PROPERTY
@given(SOME_TEXT)
def test_words_are_words(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)


def test_chrf() -> None:
    assert chrf(["abd"], ["abc"]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    precision, recall = 1, (2 / 3 + 1 / 2) / 2  # recall weighs twice
    assert chrf(["a b"], ["abc"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    assert chrf(["안녕"], ["안녕"]) == pytest.approx(100)
    assert chrf([""], ["abc"]) == 0


def test_bleu() -> None:
    assert bleu(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    )
    assert bleu(["the cat sat on"], ["the cat sat on a mat"]) == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert bleu(["철수는 영희와 학교에 갔다."], ["철수는 영희와 학교에 갔다."]) == pytest.approx(100)
    assert bleu([""], ["the cat sat on a mat"]) == 0


def scored(
    names: list[str], samples: list[list[str]], references: list[str], pattern: str | None = None
) -> list[float]:
    first = [one for one, *_ in samples]
    return list(compute_metrics(names, first, references, pattern, samples=samples).values())


def test_the_majority_of_the_answers_is_compared() -> None:
    samples = [["#### 1", "#### 2", "so #### 2"], ["#### 3", "#### 4", "none"], ["none", "none", "#### 5"]]
    pattern = r"#### (\d+)"
    assert scored(["majority"], samples, ["#### 2", "#### 3", "#### 5"], pattern) == [1]
    assert scored(["majority"], samples, ["#### 1", "#### 4", "none"], pattern) == [0]  # a tie is the earliest's
    assert scored(["majority"], [["a", " b", "b"], ["a", "b", "c"]], ["b", "c"]) == [0.5]
    assert scored(["majority"], [["none"] * 2], ["none"], pattern) == [0]


def test_pass_at_k_is_the_chance_that_one_of_k_is_right() -> None:
    samples = [["x", "a", "a", "x", "x"], ["x"] * 5, ["a"] * 5]
    expected = []
    for k in range(1, 6):
        drawn = [[any(text == "a" for text in some) for some in itertools.combinations(row, k)] for row in samples]
        expected.append(sum(sum(row) / len(row) for row in drawn) / 3)
    assert scored([f"pass_at_{k}" for k in range(1, 6)], samples, ["a"] * 3) == pytest.approx(expected, abs=1e-12)
    assert scored(["pass_at_1", "exact_match"], [[" b "], ["c"]], ["b", "b"]) == [0.5, 0.5]
    assert scored(["pass_at_2"], [["none", "#### 1"]], ["none"], r"#### (\d+)") == [0]


def test_pass_at_is_a_metric_for_every_k() -> None:
    assert METRICS["pass_at_17"].min_samples == 17
    assert greater_is_better("eval/test/pass_at_17")
    assert is_full_marks("pass_at_3", "b ", "b")
    assert not is_full_marks("pass_at_3", "c", "b")
    for name in ("pass_at_0", "pass_at_01", "pass_at_", "pass_at_<k>", "pass_at_1x", 7):
        assert "pass_at_<k>" in METRICS.why_unknown(name)


@BY_PROPERTY
@given(
    st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x2FFF), max_size=40)
    | st.text("a1.,-&<>/'\n ", max_size=20)
)
@example("<skipped> a-\nb &quot;c&amp;lt; 1,000.5-6, end.")
def test_bleu_scores_what_has_four_words_of_mteval_13a(text: str) -> None:
    cut = Tokenizer13a()(unicodedata.normalize("NFC", text).rstrip()).split()
    assert unscorable("bleu", text) == (len(cut) < 4)


PATTERN = r"答 *(\w+)"
TEXTS = [
    "The cat sat on the mat.", "one two", "one", "...", "", " ", "\n", "¿?", "a b c", "a, b.", "1-2",
    "<skipped> a b c d", "a-\nb c d", "철수는 영희와 학교에 갔다.", "ภาษาไทย", "ก", "བོད།", "日本", "日", "👍🏽",
    "\u200b", "\u0301", "答 72", "答", unicodedata.normalize("NFD", "答 é"), "a\u00a0b c d", "a\u3000b\u2003c d",
    "x" * 99 + " yz", "?" * 120 + " é", "a" * 150,
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pattern", [None, PATTERN])
def test_what_can_not_be_scored_is_what_gets_no_full_marks_though_equal(metric: str, pattern: str | None) -> None:
    full = FULL_MARKS.get(metric, 1)
    for text in TEXTS:
        scored = compute_metrics([metric], [text], [text], pattern)[metric]
        assert unscorable(metric, text, pattern) == (scored != full), text
        assert is_full_marks(metric, text, text, pattern) == (scored == full), text


@BY_PROPERTY
@given(st.text("ab é.1", max_size=12), st.text("ab é.1", max_size=12))
@example("é a b c", "e\u0301 a  b c")
@example("A b c d", "a b c d")
@example("b a b", "a b b")
def test_full_marks_are_what_the_scores_say(prediction: str, reference: str) -> None:
    for metric in METRICS:
        scored = compute_metrics([metric], [prediction], [reference], None)[metric]
        full = FULL_MARKS.get(metric, 1)
        assert is_full_marks(metric, prediction, reference) == (scored == pytest.approx(full, rel=1e-9))


def test_letters_composed_or_not_are_the_same_under_every_metric() -> None:
    composed = "Tiếng Việt ở Đà Nẵng, 철수는 학교에 갔다"
    apart = unicodedata.normalize("NFD", composed)
    assert composed != apart
    for prediction, reference in ((composed, apart), (apart, composed)):
        assert all(is_full_marks(metric, prediction, reference) for metric in METRICS)
        pattern = unicodedata.normalize("NFD", "Việt (.*)")
        assert exact_match([prediction], [reference], pattern) == 1
    assert answer(apart, "Nẵng, (.)") == "철"


def test_scores_are_those_asked_for_in_that_order() -> None:
    predictions, references = ["so #### 72", ""], ["it is #### 72", "it is #### 3"]
    found = compute_metrics(list(METRICS), predictions, references, r"#### (\d+)")
    assert list(found) == list(METRICS)
    assert found["exact_match"] == 0.5
    assert found["rouge1"] == pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)) / 2)
    assert compute_metrics(["chrf"], predictions, references, None) == {"chrf": found["chrf"]}
    assert list(compute_metrics(["rougeL", "exact_match"], predictions, references, None)) == ["rougeL", "exact_match"]
    assert compute_metrics([], predictions, references, None) == {}


@pytest.mark.parametrize("text", ["ໝາ", "ໜຶ່ງ", "ทำ", "ນ້ຳ", "ภาษา"])
def test_letters_that_a_normal_form_takes_apart_stay_one_cluster(text: str) -> None:
    assert len(words(text)) == len(regex.findall(r"\X", text))
