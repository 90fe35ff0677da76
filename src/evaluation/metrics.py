"""Scores of generated text, as pure functions of texts."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from types import SimpleNamespace

from src.config.schema import Metric

ROUGE = (Metric.rouge1, Metric.rouge2, Metric.rougeL)
UNSPACED = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""A character of a script that puts no spaces between words: Chinese characters and Japanese kana."""


def scores(
    metrics: Sequence[Metric], predictions: Sequence[str], references: Sequence[str], answer_pattern: str | None
) -> dict[str, float]:
    """Give the metrics asked for by name, in that order: exact match and ROUGE from 0 to 1, chrF and BLEU to 100.

    Only exact match looks at `answer_pattern`; the others compare whole texts.
    """
    values = rouge([metric.value for metric in metrics if metric in ROUGE], predictions, references)
    if Metric.exact_match in metrics:
        values["exact_match"] = exact_match(predictions, references, answer_pattern)
    if Metric.chrf in metrics:
        values["chrf"] = chrf(predictions, references)
    if Metric.bleu in metrics:
        values["bleu"] = bleu(predictions, references)
    return {metric.value: values[metric.value] for metric in metrics}


def strip_thoughts(text: str, tags: tuple[str, str] | None) -> str:
    """Leave out everything from each opening tag to its closing tag; a thought never closed goes to the end."""
    if tags is None:
        return text
    opened, closed = map(re.escape, tags)
    return re.sub(f"{opened}.*?(?:{closed}|\\Z)", "", text, flags=re.DOTALL)


def answer(text: str, pattern: str | None) -> str | None:
    """Give what a text answers: all of it, or the last match of the pattern's first group; None where there is none."""
    if pattern is None:
        return text.strip()
    groups = [match.group(1) for match in re.finditer(pattern, text, flags=re.DOTALL)]
    return groups[-1].strip() if groups and groups[-1] is not None else None


def exact_match(predictions: Sequence[str], references: Sequence[str], pattern: str | None) -> float:
    """Give the share of predictions whose answer is the reference's, from 0 to 1; no answer is no match."""
    pairs = zip(predictions, references, strict=True)
    hits = [(given := answer(p, pattern)) is not None and given == answer(r, pattern) for p, r in pairs]
    return sum(hits) / len(hits)


def words(text: str) -> list[str]:
    """Cut a text of any script into what ROUGE counts: runs of letters, marks and digits, in lower case.

    Of an English text these are rouge-score's own tokens. That keeps a to z and 0 to 9 only: nothing of a Korean text,
    and of a "café" a "caf". Korean is cut at spaces, so a noun with its particle is one word. Of Chinese and Japanese
    each character is a word. NFKC joins Hangul that is written letter by letter, and makes wide letters plain ones.
    """
    text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).lower())
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return [run for run in runs if run[0].isalnum()]  # not the mark behind an emoji


def rouge(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Give each kind of ROUGE by its name, the F-measure's mean over the rows, from 0 to 1; without stemming.

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
    """Give chrF2 of all rows together, from 0 to 100: shared runs of 1 to 6 characters, spaces left out.

    Of these metrics the one for languages whose words change their form or stand without spaces.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    from sacrebleu import corpus_chrf

    return corpus_chrf(predictions, [references]).score


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Give BLEU of all rows together, from 0 to 100; 0 also for equal texts where none has four words.

    Words are cut as mteval-v13a does, at spaces and ASCII punctuation: fit for English and Korean, not for Chinese and
    Japanese, and without the packages that sacrebleu's own cutters for these languages need.

    Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation".
    """
    from sacrebleu import corpus_bleu

    return corpus_bleu(predictions, [references], tokenize="13a").score


def perplexity(loss: float) -> float:
    """Give e to the mean nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
