"""Means of the metrics of a step or of a validation."""

import torch
from torch import Tensor


class Averages:
    """Means by metric name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, name: str, values: Tensor, counts: Tensor | None = None) -> None:
        """Count each element of `values` once. The tensor may have any shape.

        With `counts`, of the same shape, the elements are sums over so many things, each of which counts once.
        """
        if values.numel():
            total = values.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._weights[name] = self._weights.get(name, 0.0) + (values.numel() if counts is None else counts.sum())

    def means(self) -> dict[str, float]:
        """The mean of each metric. Waits for the device."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        return {name: total / float(self._weights[name]) for name, total in zip(self._sums, sums, strict=True)}
