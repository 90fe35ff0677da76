"""Rows of text to train on, made of GSM8K's questions and answers or of made-up ones of the same lengths."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.speed.workloads import Texts

PROMPT_SHARE = 0.85  # of the characters of a prompt_heavy row
LONG_ROW = 12_000  # characters, which are well over 2,048 tokens
QUESTION_WORDS, ANSWER_LINES = (45.0, 18.0), (3.4, 1.5)  # mean and standard deviation in GSM8K
LINE_WORDS = (14.0, 6.0)

Pair = tuple[str, str]


def pairs(file: str | None, seed: int) -> Iterator[Pair]:
    """Yield questions and answers of a file like GSM8K's, again and again; made-up ones where there is no file."""
    if file is None:
        yield from made_up_pairs(seed)
        return
    with Path(file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    yield from itertools.cycle([(row["question"] + "\n", row["answer"]) for row in rows])


def made_up_pairs(seed: int) -> Iterator[Pair]:
    """Yield, without end, questions and answers of made-up words, with thoughts and lengths as GSM8K has them."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(3000)]
    ranks = [1 / (rank + 3) for rank in range(len(words))]  # frequencies as in a language

    def text(lengths: tuple[float, float]) -> str:
        return " ".join(draw.choices(words, ranks, k=max(3, round(draw.gauss(*lengths)))))

    def line() -> str:
        first, second = draw.randint(2, 99), draw.randint(2, 99)
        result = first * second
        return f"{text(LINE_WORDS)} {first}*{second} = <<{first}*{second}={result}>>{result}"

    while True:
        lines = [line() for _ in range(max(1, round(draw.gauss(*ANSWER_LINES))))]
        yield text(QUESTION_WORDS) + "?\n", "\n".join([*lines, f"#### {draw.randint(2, 999)}"])


def rows(texts: Texts, source: Iterator[Pair]) -> Iterator[dict[str, str]]:
    """Yield rows with prompt and completion, made of questions and answers.

    prompt_heavy has solved questions before each; long has one question, and many solved ones after it.
    """
    for question, answer in source:
        if texts == "prompt_heavy":
            while len(question) < PROMPT_SHARE * (len(question) + len(answer)):
                question = "{}{}\n\n".format(*next(source)) + question
        elif texts == "long":
            while len(answer) < LONG_ROW:
                answer += "\n\n{}{}".format(*next(source))
        yield {"prompt": question, "completion": answer}
