"""Scores of generated text, as pure functions of texts."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import regex

from src.config.schema import Metric
from src.patterns import Pattern, at

ROUGE = (Metric.rouge1, Metric.rouge2, Metric.rougeL)
FULL_MARKS = {metric: 100.0 if metric in (Metric.chrf, Metric.bleu) else 1.0 for metric in Metric}
"""What each metric says of predictions that are their references."""
BLEU_ORDER = 4
"""BLEU compares runs of one to four words."""

INVISIBLE = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}\p{Joining_Type=Join_Causing}]+")
"""Format characters: joiners, marks of direction, soft hyphens, selectors of variants, and the strokes that only make
a word longer, as the Arabic tatweel."""
UNSPACED = (
    r"[[\p{LB=SA}\p{LB=AK}\p{LB=AP}\p{LB=AS}\p{LB=VF}\p{LB=VI}\p{Script=Tibetan}\p{LB=ID}\p{LB=CJ}"
    "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"]&&[\p{L}\p{M}\u3007]]"
)
"""A letter or sign of a script that puts no spaces between words.

They are those between which a line may be broken all the same: classes SA (Thai, Lao, Khmer, Burmese, Tai …), AK to VI
(Balinese, Javanese, Cham …), ID and CJ (Chinese characters, kana, Yi …), and Tibetan.

Source: Unicode Standard Annex 14, "Unicode Line Breaking Algorithm".
"""
RUN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*")
"""What stands between spaces, punctuation and symbols; a mark at its start belongs to a symbol, as an emoji."""
WORD = regex.compile(rf"(?={UNSPACED})\X|(?:\p{{M}}|(?!{UNSPACED})[\p{{L}}\p{{N}}])+", regex.VERSION1)
"""Within a run: one grapheme cluster of a script without spaces, or everything up to the next one."""

MTEVAL_13A = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
"""Where mteval-v13a cuts: at ASCII punctuation, but not within a number."""


def scores(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    references: Sequence[str],
    answer_pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
) -> dict[str, float]:
    """Return the metrics asked for by name, in that order: exact match and ROUGE from 0 to 1, chrF and BLEU to 100.

    Only exact match looks at `answer_pattern`; the others compare whole texts.

    Args:
        place: says where the row of a prediction comes from.
    Raises:
        DataError: naming the row on which the pattern does not come to an end.
    """
    values = rouge([metric.value for metric in metrics if metric in ROUGE], predictions, references)
    if Metric.exact_match in metrics:
        values["exact_match"] = exact_match(predictions, references, answer_pattern, place)
    if Metric.chrf in metrics:
        values["chrf"] = chrf(predictions, references)
    if Metric.bleu in metrics:
        values["bleu"] = bleu(predictions, references)
    return {metric.value: values[metric.value] for metric in metrics}


def is_full_marks(metric: Metric, prediction: str, reference: str, answer_pattern: str | None = None) -> bool:
    """Return whether one prediction gets full marks; never against a reference that the metric can't score.

    Equal texts are answered at once, without the libraries that score.
    """
    if unscorable(metric, reference, answer_pattern):
        return False
    if prediction == reference:
        return True
    value = scores([metric], [prediction], [reference], answer_pattern)[metric.value]
    return math.isclose(value, FULL_MARKS[metric], rel_tol=1e-9)


def unscorable(metric: Metric, reference: str, answer_pattern: str | None = None) -> bool:
    """Return whether a metric can't give full marks even to the reference itself.

    ROUGE needs a word, ROUGE-2 two; BLEU four, as it cuts them; chrF anything but white space; exact match with a
    pattern a match. No library is imported for it.
    """
    if metric is Metric.exact_match:
        return answer(reference, answer_pattern) is None
    if metric is Metric.chrf:
        return not reference.strip()
    if metric is Metric.bleu:
        # what stands between spaces is one word or more, unless mteval-13a joins or removes it
        is_plain = "-\n" not in reference and "<skipped>" not in reference
        has_four = is_plain and len(reference.split(maxsplit=BLEU_ORDER)) >= BLEU_ORDER
        return not has_four and len(bleu_words(reference)) < BLEU_ORDER
    needed = 2 if metric is Metric.rouge2 else 1
    # the last word of a text's beginning may be cut, those in front of it are whole
    return len(words(reference[:100])) <= needed and len(words(reference)) < needed


def answer(text: str, pattern: str | None) -> str | None:
    """Return what a text answers: all of it, or the last match of the pattern's first group; None without a match.

    Text and pattern are taken in NFC: "é" is the same letter, written as one character or as two.

    Raises:
        LimitError: where the pattern does not come to an end.
    """
    text = nfc(text)
    if pattern is None:
        return text.strip()
    groups = Pattern("data.answer_pattern", nfc(pattern)).groups(text)
    return groups[-1].strip() if groups and groups[-1] is not None else None


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
) -> float:
    """Compute the share of predictions whose answer is the reference's, from 0 to 1; no answer is no match."""
    hits = 0
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        with at(place, number):
            given = answer(prediction, pattern)
            hits += given is not None and given == answer(reference, pattern)
    return hits / len(predictions)


def words(text: str) -> list[str]:
    """Cut a text of any script into what ROUGE counts: runs of letters, marks and digits, in lower case.

    Of an English text these are rouge-score's own tokens. That keeps a to z and 0 to 9 only: nothing of a Korean text,
    and of a "café" a "caf". Korean is cut at spaces, so a noun with its particle is one word. Where a script puts no
    spaces between words, each grapheme cluster is a word: a character of Chinese and Japanese, a Thai consonant with
    its signs. Characters that are not seen cut no word and make no difference.

    Source of the clusters: Unicode Standard Annex 29, "Unicode Text Segmentation".
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    return [word for run in RUN.findall(folded(text)) for word in WORD.findall(run)]


TAKEN_APART = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3", "\u0eab\u0e99": "\u0edc", "\u0eab\u0ea1": "\u0edd"}
"""What NFKC makes of the vowel am of Thai and Lao and of Lao's ho no and ho mo, and these."""


def folded(text: str) -> str:
    """Write a text as ROUGE compares it: NFKC, lower case, and without format characters.

    NFKC joins Hangul that is written letter by letter, makes wide letters plain ones, and takes some letters of Thai
    and Lao apart, which are put together again: each is one cluster with its signs.
    """
    seen = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).lower())
    for apart, together in TAKEN_APART.items():
        lower = lower.replace(apart, together)
    return lower


def nfc(text: str) -> str:
    """Compose letters and their marks to one character where Unicode has one."""
    return unicodedata.normalize("NFC", text)


def rouge(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute each kind of ROUGE by its name, the F-measure's mean over the rows, from 0 to 1; without stemming.

    Args:
        names: rouge1, rouge2 (shared words and pairs of words), rougeL (longest common subsequence of the whole text).

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    if not names:
        return {}
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer(list(names), tokenizer=SimpleNamespace(tokenize=words))
    rows = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references, strict=True)]
    return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in names}


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute chrF2 of all rows together, from 0 to 100: shared runs of 1 to 6 characters of NFC, spaces left out.

    Of these metrics the one for languages whose words change their form or stand without spaces.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    from sacrebleu import corpus_chrf

    return corpus_chrf([nfc(p) for p in predictions], [[nfc(r) for r in references]]).score


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute BLEU of all rows together, from 0 to 100; 0 also for equal texts where none has four words.

    Words are cut in NFC as mteval-v13a does, at spaces and ASCII punctuation: fit for English and Korean, not for
    Chinese and Japanese, and without the packages that sacrebleu's own cutters for these languages need.

    Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation".
    """
    from sacrebleu import corpus_bleu

    score = corpus_bleu([nfc(p) for p in predictions], [[nfc(r) for r in references]], tokenize="13a").score
    return min(score, 100.0)  # of equal texts it is rounded to a little more


def bleu_words(text: str) -> list[str]:
    """Cut a text as BLEU does; the tests hold it to sacrebleu's mteval-v13a.

    Source: Papineni et al. 2002; NIST's mteval-v13a.pl.
    """
    text = nfc(text).rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in MTEVAL_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def perplexity(loss: float) -> float:
    """Compute e to the mean nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
