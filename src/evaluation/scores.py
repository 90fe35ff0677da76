"""What is written of each row that was scored, and the metrics of many. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.metrics import perplexity
from src.training.loss import span_losses


@dataclass(frozen=True)
class RowScore:
    """One line: `row` is the index in its set. Sums over the row's supervised tokens, in nats.

    `answer_nll`, `num_answer_tokens` and `num_bytes` (UTF-8) are of the answer alone: without thoughts, tags, and the
    tokens that end a turn. `bits_per_byte` is null where the answer has no byte. `thoughts` are those that the model
    wrote, in the view `own`.
    """

    row: int
    source: str
    nll: float
    thought_nll: float
    answer_nll: float
    num_tokens: int
    num_thought_tokens: int
    num_answer_tokens: int
    num_bytes: int
    bits_per_byte: float | None
    thoughts: list | None = None


def row_score(
    row: int,
    source: str,
    nll: np.ndarray,
    is_thought: np.ndarray,
    is_answer: np.ndarray,
    num_bytes: int,
    thoughts: list[str] | None = None,
) -> RowScore:
    """Return a row's line; nats and masks are of its supervised tokens, [supervised]."""
    answer_nll = float(nll[is_answer].sum())
    return RowScore(
        row,
        source,
        nll=float(nll.sum()),
        thought_nll=float(nll[is_thought].sum()),
        answer_nll=answer_nll,
        num_tokens=len(nll),
        num_thought_tokens=int(is_thought.sum()),
        num_answer_tokens=int(is_answer.sum()),
        num_bytes=num_bytes,
        bits_per_byte=bits_per_byte(answer_nll, num_bytes) if num_bytes else None,
        thoughts=thoughts,
    )


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Compute bits per byte from the summed nats of a text's tokens and its UTF-8 bytes.

    It does not depend on how the text is cut into tokens, other than by what the model makes of it: one that takes all
    of v tokens to be equally likely has tokens x log2(v) / bytes.

    Source: Gao et al. 2020, "The Pile: An 800GB Dataset of Diverse Text for Language Modeling", 3.1.
    """
    return nll / math.log(2) / num_bytes


def view_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the metrics of a view from its lines: losses as in training, in mean nats per supervised token; summed
    log-probabilities of all supervised tokens and of the answers; bits per byte of all answers together.
    """
    names = ("nll", "num_tokens", "thought_nll", "num_thought_tokens", "answer_nll", "num_bytes")
    table = np.array([[line[name] for name in names] for line in lines], dtype=np.float64)
    nll, num_tokens, thought_nll, num_thought_tokens, answer_nll, num_bytes = table.sum(axis=0).tolist()
    loss = nll / num_tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        **span_losses(nll, num_tokens, thought_nll, num_thought_tokens),
        "log_probability": -nll,
        "answer_log_probability": -answer_nll,
        **({"bits_per_byte": bits_per_byte(answer_nll, num_bytes)} if num_bytes else {}),
    }


def columns(lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and bytes of the answers in some lines, [rows] each."""
    nats, num_bytes = (
        np.array([line[name] for line in lines], dtype=np.float64) for name in ("answer_nll", "num_bytes")
    )
    return nats, num_bytes
