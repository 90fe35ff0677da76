"""The consensus of several texts: the one that is most like the others. Pure."""

import math
from collections.abc import Callable, Sequence
from functools import cache

from src.metrics import METRICS, compute_metrics

Similarity = Callable[[str, str], float]


def most_alike(texts: Sequence[str], similarity: Similarity) -> int:
    """Return the index of the text with the greatest mean similarity to the others; the first where several have it.

    That is minimum Bayes risk decoding, with the texts as samples and the similarity as gain.

    Sources: Kumar and Byrne 2004, "Minimum Bayes-Risk Decoding for Statistical Machine Translation"; Freitag et al.
    2022, "High Quality Rather than High Model Probability".
    """
    gains = [  # summed exactly, so that equal texts have equal gains wherever they stand
        math.fsum(similarity(text, other) for j, other in enumerate(texts) if j != i) for i, text in enumerate(texts)
    ]
    return gains.index(max(gains))


def similarity_by(metric: str, answer_pattern: str | None) -> Similarity:
    """Return a metric as a function of a text and of one that it is compared with; equal texts have full marks, also
    those that the metric finds no words in.
    """
    full_marks = METRICS[metric].full_marks
    assert full_marks is not None

    @cache
    def similarity(text: str, other: str) -> float:
        if text == other:
            return full_marks
        return compute_metrics([metric], [text], [other], answer_pattern)[metric]

    return similarity
