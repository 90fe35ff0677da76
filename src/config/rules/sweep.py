"""Rules of `sweep`: of what it varies, and with each of its runs. The sweep calls them, which has all of these."""

import importlib.util
import math
from collections.abc import Sequence
from itertools import zip_longest

from src.config.axes import REPLICATED, Axis, size
from src.config.problems import COMMAND_LINE, Problem
from src.config.rules.checkpoint import scores_of
from src.config.rules.rule import Problems
from src.config.schema import Direction, Pruner, RunConfig, Sampler, SweepConfig
from src.metrics import THOUGHT_LOSSES, greater_is_better
from src.util import in_words, plural

KNOWN_METRICS = (
    *("train/loss", "train/objective", *(f"train/{name}" for name in THOUGHT_LOSSES), "train/grad_norm"),
    *("train_seconds", "tokens_per_second", "tokens_seen", "peak_memory_bytes", "perf/tokens_per_second"),
)
"""Metrics of summary.json besides evaluations that a sweep may compare."""
MOST_WRITTEN = 10**15  # the largest number of points that is written out
LEARNING = (Sampler.tpe, Sampler.gp, Sampler.cmaes)  # propose by what was tried


def sweep_problems(sweep: SweepConfig, config: RunConfig) -> Problems:
    """Yield a metric that no run computes, a direction that would rank the worst first, and runs that can't resume."""
    if (resume := config.checkpoint.resume) != "auto":
        more = "" if resume == "never" else "; to begin with weights, init_from"
        yield Problem("checkpoint.resume", f"a sweep resumes its trials: auto{more}", resume)
    for metric, direction in zip_longest(sweep.metrics, sweep.directions[: len(sweep.metrics)]):
        yield from _metric_problems(metric, direction, sweep.pruner is not Pruner.none, config)


def _metric_problems(given: str, direction: Direction | None, is_early: bool, config: RunConfig) -> Problems:
    metric = given.removeprefix("best/")
    kind, _, rest = metric.partition("/")
    set_name, _, score = rest.rpartition("/")
    if kind == "eval":
        scores, test_sets = scores_of(config.data, config.evaluation, config.tokens), list(config.data.test_sets())
        sets = [*config.data.validation_names(), *([] if is_early else test_sets)]
        if score not in scores or set_name not in sets:
            allowed = ", ".join(f"eval/{name}/{one}" for name in sets for one in scores)
            reason = f"no evaluation computes this; {'one of ' + allowed if allowed else 'there is no validation set'}"
            if is_early and set_name in test_sets and score in scores:
                at_end = "known at the end only, so no run can end early by it"
                reason = f"{at_end}: sweep.pruner=none, or a validation set's"
            yield Problem("sweep.metric", reason, given)
            return
    elif given != metric or (metric not in KNOWN_METRICS and not metric.startswith("tokens/")):  # best/ is of eval/
        allowed = f"a name of summary.json: eval/<set>/<score>, {', '.join(KNOWN_METRICS)}"
        yield Problem("sweep.metric", f"no run computes this; {allowed}", given)
        return
    if kind == "eval" or metric == "train/loss":
        better = Direction.maximize if greater_is_better(metric) else Direction.minimize
        if direction is not None and direction is not better:
            reason = f"{given} is better when it is {'higher' if better is Direction.maximize else 'lower'}"
            yield Problem("sweep.direction", f"{reason}: {better.value}", direction.value)


def count_problems(sweep: SweepConfig, axes: Sequence[Axis], *, is_own_sweeper: bool) -> Problems:
    """Count what axes span, and yield a grid of more points than sweep.max_points, or an axis of more values."""
    most = sweep.max_points
    too_long = [axis for axis in axes if axis.num_values > most]
    for axis in too_long:
        count = "a range that never ends" if axis.num_values == math.inf else f"{_written(axis.num_values)} values"
        remedy = "search among them: KEY=interval(LOW,HIGH), sweep=tpe"
        yield axis.problem(f"{count}, more than sweep.max_points, {most:,}; {remedy}")
    total = size(axes)
    is_grid = sweep.sampler is Sampler.grid or sweep.n_trials is None or not is_own_sweeper
    if is_grid and total is not None and total > most and (len(axes) > 1 or not too_long):
        product = " x ".join(f"{_written(axis.num_values)} of {axis.key}" for axis in axes)
        remedy = "search among them: sweep=tpe sweep.n_trials=N, or allow more"
        reason = f"{_written(total)} points ({product}), more than sweep.max_points, {most:,}; {remedy}"
        yield Problem("-m", reason, has_value=False, where=COMMAND_LINE)


def _written(count: float) -> str:
    """Return a number of values in digits, or one that is too long for that by its size."""
    return f"{int(count):,}" if count < MOST_WRITTEN else f"about 1e{math.floor(math.log10(count))}"


def axis_problems(sweep: SweepConfig, of_settings: Sequence[Axis], of_replicates: Sequence[Axis]) -> Problems:
    """Yield what can't be varied in this way, and samplers that have nothing to do or can't do it."""
    yield from objective_problems(sweep)
    sampler = sweep.sampler
    for axis in [*of_settings, *of_replicates]:
        if axis.interval and axis.key in REPLICATED:
            yield axis.problem("a replicate needs values: A,B,C or range(…)")
        elif axis.interval and sampler is Sampler.grid:
            ways = "A,B,C, range(…) or choice(…). Or search: sweep=tpe, sweep=asha"
            yield axis.problem(f"a search space; a grid takes values: {ways}")
        elif axis.interval and sweep.n_trials is None:
            yield Problem("sweep.n_trials", f"{axis.key} is an interval, so how many are tried?", None)
    if sampler is not Sampler.grid and not of_settings:
        yield Problem("sweep.sampler", "nothing is varied: give KEY=A,B or KEY=interval(LOW,HIGH)", sampler.value)
    if sampler is Sampler.cmaes and importlib.util.find_spec("cmaes") is None:
        yield Problem("sweep.sampler", "needs the package cmaes: pip install cmaes", sampler.value)
    if sweep.warm_start is not None and sampler not in LEARNING:
        names = in_words([one.name for one in LEARNING], "or")
        yield Problem("sweep.warm_start", f"only {names} learn from it: sweep.sampler", sweep.warm_start)


def objective_problems(sweep: SweepConfig) -> Problems:
    """Yield metrics without a direction each, one that is there twice, and what can't be done by several."""
    metrics = sweep.metrics
    if len(metrics) != len(sweep.directions):
        reason = f"not one for each of {plural(len(metrics), 'metric')}, in their order"
        yield Problem("sweep.direction", reason, sweep.direction)
    for metric in {one: None for one in metrics if metrics.count(one) > 1}:
        yield Problem("sweep.metric", f"{metric} is there twice", sweep.metric)
    if len(metrics) > 1 and sweep.pruner is not Pruner.none:
        reason = f"ends runs early by one metric, and there are {len(metrics)}: sweep.pruner=none"
        yield Problem("sweep.pruner", reason, sweep.pruner.name)
    if len(metrics) > 1 and sweep.sampler is Sampler.cmaes:
        yield Problem("sweep.sampler", "searches by one metric: tpe, gp, random or qmc", sweep.sampler.name)
