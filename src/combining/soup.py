"""The mean of several models' weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.errors import ModelError
from src.util import listed


class WeightSum:
    """The sum of models' weights, in float64 on the CPU, so that a mean is rounded once: to the type of the models.

    Of one model, or of equal ones, the mean is that model bit for bit. It takes eight bytes a weight.

    Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
    without increasing inference time".
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: Any) -> None:
        """Add a model's weights; ModelError names those that don't fit the others'."""
        self._check(model)
        for name, weights in _tensors(model):
            if name not in self._sums:
                self._sums[name] = weights.detach().to("cpu", torch.float64, copy=True)
            else:
                self._sums[name] += weights.detach().cpu()
        self.count += 1

    @torch.no_grad()
    def put_mean(self, model: Any, *, with_it: bool = False) -> None:
        """Overwrite a model's weights with the mean; `with_it`: with what the mean would be if it were added.

        ModelError names weights that don't fit.
        """
        self._check(model)
        for name, weights in _tensors(model):
            total, count = self._sums[name], self.count
            if with_it:
                total, count = total + weights.cpu(), count + 1
            weights.copy_(total / count)

    def _check(self, model: Any) -> None:
        if not self.count:
            return
        there = dict(_tensors(model))
        names = {**self._sums, **there}
        if wrong := [name for name in names if _shape(there.get(name)) != _shape(self._sums.get(name))]:
            shapes = [f"{name}: {_shape(self._sums.get(name))} and {_shape(there.get(name))}" for name in wrong]
            raise ModelError(f"the weights have no mean, as they are of different shapes:\n{listed(shapes)}")


def _shape(weights: Tensor | None) -> str:
    return "none" if weights is None else str(list(weights.shape))


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what a model stores in floating point, by name; tied weights once."""
    seen = set[int]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
