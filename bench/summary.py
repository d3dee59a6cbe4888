"""A few numbers in place of many."""

import statistics
from collections.abc import Sequence


def summary(values: Sequence[float], digits: int) -> dict[str, float]:
    """The median, the 99th percentile and the maximum, rounded to `digits` after the point."""
    ascending = sorted(values)
    figures = {"p50": statistics.median(ascending), "p99": ascending[int(0.99 * len(ascending))], "max": ascending[-1]}
    return {name: round(value, digits) for name, value in figures.items()}
