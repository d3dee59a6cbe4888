"""The figures of an evaluation for people: each value with its interval, where there is one. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("error", "low", "high")


@dataclass(frozen=True)
class Figure:
    """A value, and its 95 % confidence interval."""

    name: str
    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.low is None else f"  ({self.low:.4f} to {self.high:.4f})")


def figures(metrics: Mapping[str, float]) -> list[Figure]:
    """The metrics of an evaluation, `win_rate/low@0.7` for example with the `win_rate@0.7` that it belongs to."""
    found = []
    for name, value in metrics.items():
        plain, mark, temperature = name.partition("@")
        whole, _, part = plain.rpartition("/")
        if part not in PARTS or f"{whole}{mark}{temperature}" not in metrics:
            low, high = (metrics.get(f"{plain}/{end}{mark}{temperature}") for end in ("low", "high"))
            found.append(Figure(name, value, low, high))
    return found
