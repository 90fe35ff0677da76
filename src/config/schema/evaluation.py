"""The section `evaluation` of conf/config.yaml, and the metrics that it may name."""

from dataclasses import dataclass
from typing import Any

from src.config.schema.checks import AT_LEAST_ONE, COUNT, STEPS_OR_EPOCH, Check
from src.config.schema.fields import Impact, key
from src.metrics import METRICS


class RegisteredCheck(Check):
    """A condition on a list of metrics: that each is registered, by src or by a plugin."""

    def reason(self, value: Any) -> str:
        return next((f"{one} is {why}" for one in value or () if (why := METRICS.why_unknown(one))), "")


METRIC_NAMES = RegisteredCheck(
    f"a list (one of {', '.join(METRICS)} each)", lambda v: all(one in METRICS for one in v or ())
)


@dataclass
class EvaluationConfig:
    """When and on how much the run is evaluated and samples are written."""

    eval_steps: Any = key(STEPS_OR_EPOCH, resume=Impact.harmless)
    metrics: list[str] | None = key(METRIC_NAMES, resume=Impact.harmless, read_by_predict=True)
    max_samples: int | None = key(AT_LEAST_ONE, resume=Impact.harmless)
    sample_steps: Any = key(STEPS_OR_EPOCH, resume=Impact.harmless)
    sample_prompts: int = key(COUNT, resume=Impact.harmless)
