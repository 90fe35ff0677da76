"""What the machine does while a run trains, measured by MLflow's own monitors: `tracking.log_system_metrics`.

The values go into the line of metrics of a step, as `perf/system/…`, and so are delivered as all others, however long
the tracker was away. In MLflow they have its own names, `system/…`, and a page of their own.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from src.config.schema import MlflowConfig, TrackingConfig
from src.errors import one_line
from src.tracking.exporters import Warn

MONITORS = {"cpu": "CPUMonitor", "disk": "DiskMonitor", "network": "NetworkMonitor", "gpu": "GPUMonitor"}
PREFIX = "perf/system/"
Measure = Callable[[], dict[str, float]]


def system_metrics_of(config: TrackingConfig, warn: Warn) -> Measure:
    """Return what measures the machine, where the configuration asks for it; otherwise what measures nothing."""
    is_asked_for = isinstance(config, MlflowConfig) and config.log_system_metrics
    return SystemMetrics(warn).measure if is_asked_for else dict


class SystemMetrics:
    """MLflow's monitors, without those that this machine has nothing for; one that fails is left out from then on."""

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._monitors = dict(_monitors())
        self.measure()  # the use of the processor is counted from here on

    def measure(self) -> dict[str, float]:
        """Return the values now; of the processor the mean since the last call."""
        values: dict[str, float] = {}
        for name, monitor in list(self._monitors.items()):
            try:
                monitor.collect_metrics()
                measured = monitor.aggregate_metrics()
                monitor.clear_metrics()
            except Exception as error:  # whatever the operating system or a driver raises: training proceeds
                del self._monitors[name]
                self._warn(f"the {name} is not measured any more: {one_line(error, 200)}")
                continue
            values |= {f"{PREFIX}{metric}": float(value) for metric, value in measured.items()}
        return values


def _monitors() -> Iterator[tuple[str, Any]]:
    for name, kind in MONITORS.items():
        try:
            yield name, getattr(import_module(f"mlflow.system_metrics.metrics.{name}_monitor"), kind)()
        except (ImportError, RuntimeError):  # no GPU, or no library that asks it
            continue
