"""Values of metrics that MLflow already has, by step (as text) and by metric (its name there)."""

from collections.abc import Iterable, Mapping
from typing import Any

from src.tracking.mlflow_names import plain_name
from src.tracking.step_logs import is_timing, metrics_of

Points = dict[str, dict[str, list[float]]]


def add_line(points: Points, line: Mapping[str, Any]) -> None:
    """Add the values of a line of metrics."""
    at_step = points.setdefault(str(line["step"]), {})
    for name, value in metrics_of(line).items():
        values = at_step.setdefault(plain_name(name), [])
        if float(value) not in values:
            values.append(float(value))


def without_lines(points: Points, lines: Iterable[Mapping[str, Any]]) -> Points:
    """Return the points without those of these lines: what remains are values of an earlier attempt at a step."""
    if not points:
        return points
    of_lines: Points = {}
    for line in lines:
        add_line(of_lines, line)
    remaining = {step: _without(metrics, of_lines.get(step, {})) for step, metrics in points.items()}
    return {step: metrics for step, metrics in remaining.items() if metrics}


def _without(metrics: Mapping[str, list[float]], of_lines: Mapping[str, list[float]]) -> dict[str, list[float]]:
    remaining = {
        name: [value for value in values if value not in of_lines.get(name, ())]
        for name, values in metrics.items()
        if not (is_timing(name) and name in of_lines)
    }
    return {name: values for name, values in remaining.items() if values}


def undelivered(points: Points, line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line that are not among the points; a timing counts as delivered with any value."""
    delivered = points.get(str(line["step"]), {})
    return {
        name: float(value)
        for name, value in metrics_of(line).items()
        if (known := delivered.get(plain_name(name))) is None or not (is_timing(name) or float(value) in known)
    }
