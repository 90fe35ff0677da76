"""What each optimizer keeps for what it trains, in memory and in a checkpoint."""

from collections import Counter
from collections.abc import Iterable

from src.config.schema import OptimizerConfig
from src.forecast.items import MemoryItem
from src.forecast.parameters import ModelParameters, TrainableTensor


def optimizer_part(parameters: ModelParameters, optimizer: OptimizerConfig, device_type: str = "cpu") -> MemoryItem:
    """Forecast the optimizer's state, tensor by tensor."""
    counts = _state_counts(parameters.trained, optimizer)
    if counts is None:
        return MemoryItem("optimizer state", None, f"unknown: {optimizer.type} does not declare the size of its state")
    if not counts:
        return MemoryItem("optimizer state", 0, f"{optimizer.type} keeps nothing with these settings")
    alike: dict[tuple[int, int], list[str]] = {}
    for (name, size), num in counts.items():
        alike.setdefault((num, size), []).append(name)
    how = " + ".join(
        f"{len(names)} x {num:,} {'trained parameters' if num == parameters.num_trained else 'values'} x {size} B: "
        + ", ".join(names)
        for (num, size), names in alike.items()
    )
    if optimizer.type.startswith("paged") and device_type == "cuda":
        how += "; moved to the CPU's memory where the GPU's is full"
    return MemoryItem("optimizer state", sum(num * size for (_, size), num in counts.items()), how)


def _state_counts(trained: Iterable[TrainableTensor], optimizer: OptimizerConfig) -> Counter[tuple[str, int]] | None:
    """Return name and bytes of a value -> number of values; None where the optimizer does not say."""
    counts: Counter[tuple[str, int]] = Counter()
    for tensor in trained:
        kept = optimizer.state_of(tensor)
        if kept is None:
            return None
        for name, num, size in kept:
            counts[name, size] += num
    return counts


def checkpoint_bytes(trained: Iterable[TrainableTensor], optimizer: OptimizerConfig) -> tuple[int, int | None]:
    """Count what a resumable checkpoint holds: bytes of the weights, and of the optimizer's state (None: not known)."""
    trained = tuple(trained)
    weights = sum(tensor.num * tensor.bytes_per_value for tensor in trained)
    counts = _state_counts(trained, optimizer)
    return weights, None if counts is None else sum(num * size for (_, size), num in counts.items())
