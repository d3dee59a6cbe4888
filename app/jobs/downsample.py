"""Metric series, thinned out for a picture without losing their shape."""

from collections.abc import Sequence

Point = tuple[int, float]


def downsample(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` ≥ 3 of `points` (step, value), which are in order, by Largest-Triangle-Three-Buckets.

    The first and the last stay, and of each bucket between them the point that spans the largest triangle with the
    point kept before it and the mean of the bucket after it (Steinarsson 2013, Sec. 4.2): peaks survive.
    """
    if len(points) <= limit:
        return list(points)
    buckets, kept = limit - 2, [points[0]]
    width = (len(points) - 2) / buckets
    for number in range(buckets):
        start, stop = 1 + int(number * width), 1 + int((number + 1) * width)
        after = points[stop : min(1 + int((number + 2) * width), len(points))] or points[-1:]
        mean_step = sum(step for step, _ in after) / len(after)
        mean_value = sum(value for _, value in after) / len(after)
        last_step, last_value = kept[-1]

        def area(point: Point) -> float:
            step, value = point
            return abs((last_step - mean_step) * (value - last_value) - (last_step - step) * (mean_value - last_value))  # noqa: B023

        kept.append(max(points[start:stop], key=area))
    return [*kept, points[-1]]
