"""ROUGE, chrF and BLEU, against numbers worked out by hand; exact match has its tests in test_evaluation.py."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from src.config.schema import Metric
from src.evaluation.metrics import bleu, chrf, rouge, scores, words

NAMES = ["rouge1", "rouge2", "rougeL"]
REFERENCE = "The cat sat on the mat."


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
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


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


def test_scores_are_those_asked_for_in_that_order() -> None:
    predictions, references = ["so #### 72", ""], ["it is #### 72", "it is #### 3"]
    found = scores(list(Metric), predictions, references, r"#### (\d+)")
    assert list(found) == [metric.value for metric in Metric]
    assert found["exact_match"] == 0.5
    assert found["rouge1"] == pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)) / 2)
    assert scores([Metric.chrf], predictions, references, None) == {"chrf": found["chrf"]}
    assert list(scores([Metric.rougeL, Metric.exact_match], predictions, references, None)) == ["rougeL", "exact_match"]
    assert scores([], predictions, references, None) == {}
