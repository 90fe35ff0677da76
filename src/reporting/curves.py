"""The figures of a run's metrics: which metrics share one, and what their axes are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.figures import Figure
from src.metrics import PART_LOSSES
from src.reporting.figures import MOST_SERIES, series_of

Line = Mapping[str, Any]
NATS = "nats per token"


@dataclass(frozen=True)
class Group:
    """Metrics that share a figure."""

    key: str
    title: str
    y_label: str
    has: Callable[[str], bool]
    unit: int = 1  # by which the values are divided


def _is_eval(name: str, *leaves: str) -> bool:
    return name.startswith("eval/") and name.rpartition("/")[2] in leaves


GROUPS = (
    Group("loss", "Loss", NATS, lambda n: n in ("train/loss", "train/objective") or _is_eval(n, "loss")),
    Group(
        "thought_and_answer",
        "Loss of thoughts and answers",
        NATS,
        lambda n: n in ("train/thought_loss", "train/answer_loss") or _is_eval(n, "thought_loss", "answer_loss"),
    ),
    Group(
        "parts_train",
        "Loss of the parts of thoughts, training",
        NATS,
        lambda n: n.startswith("train/") and n.rpartition("/")[2] in PART_LOSSES,
    ),
    Group("parts_eval", "Loss of the parts of thoughts, evaluation", NATS, lambda n: _is_eval(n, *PART_LOSSES)),
    Group(
        "thoughts",
        "Generated texts with a thought, and thoughts that were closed",
        "share",
        lambda n: _is_eval(n, "thoughts_opened", "thoughts_closed"),
    ),
    Group("thoughts_per_row", "Thoughts in a generated text", "thoughts", lambda n: _is_eval(n, "thoughts_per_row")),
    Group("thought_tokens", "Length of generated thoughts", "tokens", lambda n: _is_eval(n, "thought_tokens")),
    Group("learning_rate", "Learning rate", "learning rate", lambda n: n == "train/lr"),
    Group("grad_norm", "Norm of the gradient", "norm", lambda n: n == "train/grad_norm"),
    Group("speed", "Speed", "tokens per second", lambda n: n == "perf/tokens_per_second"),
    Group("memory", "Memory", "MiB", lambda n: n in ("perf/memory_bytes", "perf/peak_memory_bytes"), 2**20),
)
TOKEN_TITLES = {
    "norm": "Norm of the embedding",
    "output_norm": "Norm of the output row",
    "cosine_to_start": "Cosine of the embedding to its start",
    "output_cosine_to_start": "Cosine of the output row to its start",
    "log_probability": "Log-probability where it is the target",
    "share_of_targets": "Share of the targets",
    "grad_norm": "Norm of the gradient of the embedding",
    "output_grad_norm": "Norm of the gradient of the output row",
}
"""Of `tokens/<token>/<measure>`, by the measure."""


def names_of(lines: Sequence[Line]) -> list[str]:
    """Return the metrics of lines, in the order in which they come."""
    return list(dict.fromkeys(name for line in lines for name in line if name != "step"))


def run_figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the figures of training and evaluation."""
    names, figures = names_of(lines), list[Figure]()
    for group in GROUPS:
        members = [name for name in names if group.has(name)]
        figures += _figure(group.key, group.title, group.y_label, lines, {name: name for name in members}, group.unit)
    left = [name for name in names if not any(group.has(name) for group in GROUPS) and not name.startswith("tokens/")]
    for leaf in dict.fromkeys(name.rpartition("/")[2] for name in left if name.startswith("eval/")):
        members = [name for name in left if _is_eval(name, leaf)]
        figures += _figure(f"eval_{leaf}", leaf, leaf, lines, {name: name for name in members})
    for name in left:
        if not name.startswith("eval/") and name != "perf/elapsed_seconds":
            figures += _figure(name, name, name, lines, {name: name})
    return figures


def token_figures(lines: Sequence[Line]) -> list[Figure]:
    """Return a figure for each measure of the new tokens, with a series a token."""
    by_measure: dict[str, dict[str, str]] = {}
    for name in names_of(lines):
        if name.startswith("tokens/"):
            token, _, measure = name.removeprefix("tokens/").rpartition("/")
            by_measure.setdefault(measure, {})[name] = token
    order = [*(measure for measure in TOKEN_TITLES if measure in by_measure), *(by_measure.keys() - TOKEN_TITLES)]
    return [
        figure
        for measure in order
        for figure in _figure(
            f"tokens_{measure}", TOKEN_TITLES.get(measure, measure), measure, lines, by_measure[measure]
        )
    ]


def _figure(
    key: str, title: str, y_label: str, lines: Sequence[Line], names: Mapping[str, str], unit: int = 1
) -> Iterator[Figure]:
    """Yield a figure of these metrics over the steps, if they have a number; `names` are those of the series."""
    series = [series_of(lines, metric, name) for metric, name in list(names.items())[:MOST_SERIES]]
    series = [replace(one, y=[y / unit for y in one.y]) if unit > 1 else one for one in series if one.x]
    note = f"the first {MOST_SERIES} of {len(names):,}" if len(names) > MOST_SERIES else ""
    if series:
        yield Figure(file_name(key), title, "step", y_label, series, note)


def file_name(key: str) -> str:
    """Return a name of a file without what has a meaning in one."""
    return "".join(one if one.isascii() and (one.isalnum() or one in "_-") else "_" for one in key)[:80]
