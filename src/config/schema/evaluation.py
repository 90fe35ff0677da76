"""The section `evaluation` of conf/config.yaml, and the metrics that it may name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from src.config.schema.checks import AT_LEAST_ONE, COUNT, STEPS_OR_EPOCH
from src.config.schema.fields import Impact, key


class Metric(Enum):
    exact_match = "exact_match"
    rouge1 = "rouge1"
    rouge2 = "rouge2"
    rougeL = "rougeL"  # noqa: N815  (the field's own name)
    chrf = "chrf"
    bleu = "bleu"


@dataclass
class EvaluationConfig:
    """When and on how much the run is evaluated and samples are written."""

    eval_steps: Any = key(STEPS_OR_EPOCH, resume=Impact.harmless)
    metrics: list[Metric] | None = key(resume=Impact.harmless, read_by_predict=True)
    max_samples: int | None = key(AT_LEAST_ONE, resume=Impact.harmless)
    sample_steps: Any = key(STEPS_OR_EPOCH, resume=Impact.harmless)
    sample_prompts: int = key(COUNT, resume=Impact.harmless)


def greater_is_better(metric: str) -> bool:
    """Say in which direction a metric of metrics.jsonl improves: losses and perplexities fall, scores rise."""
    return not metric.endswith(("loss", "perplexity"))
