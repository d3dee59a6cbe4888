"""The metrics of an evaluation for people to read: each value with its interval, if it has one. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.spec.metrics import INTERVAL


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % confidence interval. The bounds are None if there is no interval."""

    name: str
    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.low is None else f"  ({self.low:.4f} to {self.high:.4f})")


def figures(metrics: Mapping[str, float]) -> list[Figure]:
    """Join each metric with its bounds: `win_rate/low@0.7`, for example, belongs to `win_rate@0.7`."""
    joined = []
    for name, value in metrics.items():
        metric, at, temperature = name.partition("@")
        parent, _, suffix = metric.rpartition("/")
        if suffix not in INTERVAL or f"{parent}{at}{temperature}" not in metrics:
            low, high = (metrics.get(f"{metric}/{bound}{at}{temperature}") for bound in ("low", "high"))
            joined.append(Figure(name, value, low, high))
    return joined
