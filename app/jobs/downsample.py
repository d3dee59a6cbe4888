"""Thin out a metric series for a chart without losing its shape."""

from collections.abc import Sequence

StepValue = tuple[int, float]
"""A step of the training, and the value of a metric there."""


def downsample(points: Sequence[StepValue], limit: int) -> list[StepValue]:
    """Reduce `points` to at most `limit` (≥ 3) with Largest-Triangle-Three-Buckets (Steinarsson 2013, Sec. 4.2).

    `points` are (step, value) pairs in order of step. The first and the last point stay. The points between them are
    split into `limit` - 2 buckets, and each bucket keeps one point. That point spans the largest triangle with the
    point kept before it and the mean of the next bucket, so peaks survive.
    """
    if len(points) <= limit:
        return list(points)
    buckets, kept = limit - 2, [points[0]]
    width = (len(points) - 2) / buckets
    for bucket in range(buckets):
        start, stop = 1 + int(bucket * width), 1 + int((bucket + 1) * width)
        next_bucket = points[stop : min(1 + int((bucket + 2) * width), len(points))] or points[-1:]
        mean_step = sum(step for step, _ in next_bucket) / len(next_bucket)
        mean_value = sum(value for _, value in next_bucket) / len(next_bucket)
        last_step, last_value = kept[-1]

        def doubled_area(point: StepValue) -> float:
            step, value = point
            return abs((last_step - mean_step) * (value - last_value) - (last_step - step) * (mean_value - last_value))  # noqa: B023

        kept.append(max(points[start:stop], key=doubled_area))
    return [*kept, points[-1]]
