"""Rules of `sweep`, for each of the runs that it is made of: called by the sweep itself, which has both."""

from src.config.problems import Problem
from src.config.rules.checkpoint import scores_of
from src.config.rules.rule import Problems
from src.config.schema import Direction, Pruner, RunConfig, SweepConfig
from src.metrics import THOUGHT_LOSSES, greater_is_better

KNOWN_METRICS = (
    *("train/loss", "train/objective", *(f"train/{name}" for name in THOUGHT_LOSSES), "train/grad_norm"),
    *("train_seconds", "tokens_per_second", "tokens_seen", "peak_memory_bytes", "perf/tokens_per_second"),
)
"""Metrics of summary.json besides evaluations that a sweep may compare."""


def sweep_problems(sweep: SweepConfig, config: RunConfig) -> Problems:
    """Yield a metric that no run computes, a direction that would rank the worst first, and runs that can't resume."""
    if (resume := config.checkpoint.resume) != "auto":
        more = "" if resume == "never" else "; to begin with weights, init_from"
        yield Problem("checkpoint.resume", f"a sweep resumes its trials: auto{more}", resume)
    metric = sweep.metric.removeprefix("best/")
    kind, _, rest = metric.partition("/")
    set_name, _, score = rest.rpartition("/")
    if kind == "eval":
        scores, test_sets = scores_of(config.data, config.evaluation, config.tokens), list(config.data.test_sets())
        is_early = sweep.pruner is not Pruner.none
        sets = [*config.data.validation_names(), *([] if is_early else test_sets)]
        if score not in scores or set_name not in sets:
            allowed = ", ".join(f"eval/{name}/{one}" for name in sets for one in scores)
            reason = f"no evaluation computes this; {'one of ' + allowed if allowed else 'there is no validation set'}"
            if is_early and set_name in test_sets and score in scores:
                at_end = "known at the end only, so no run can end early by it"
                reason = f"{at_end}: sweep.pruner=none, or a validation set's"
            yield Problem("sweep.metric", reason, sweep.metric)
            return
    elif metric not in KNOWN_METRICS and not metric.startswith("tokens/"):
        allowed = f"a name of summary.json: eval/<set>/<score>, {', '.join(KNOWN_METRICS)}"
        yield Problem("sweep.metric", f"no run computes this; {allowed}", sweep.metric)
        return
    if kind == "eval" or metric == "train/loss":
        better = Direction.maximize if greater_is_better(metric) else Direction.minimize
        if sweep.direction is not better:
            reason = f"{sweep.metric} is better when it is {'higher' if better is Direction.maximize else 'lower'}"
            yield Problem("sweep.direction", f"{reason}: {better.value}", sweep.direction.value)
