"""Scores of generated text, as pure functions of texts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


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


def perplexity(loss: float) -> float:
    """Give e to the mean nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
