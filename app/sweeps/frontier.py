"""The Pareto set of points with a cost and a gain, and a chart of them. All functions are pure."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.svg import Frame, colours, escaped


@dataclass(frozen=True)
class ParetoPoint:
    """A run, or one of its temperatures. `x` is its cost and `y` its gain, each with a standard error."""

    label: str
    series: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indexes of the Pareto set of `points` (cost, gain), in order of cost.

    A point is in the set if no other is at least as good in both and better in one. Equal points are in it together.
    """
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1]))
    indexes: list[int] = []
    best_gain, best_cost = -math.inf, math.nan
    for k in order:
        cost, gain = points[k]
        if gain > best_gain or (gain == best_gain and cost == best_cost):
            indexes.append(k)
            best_gain, best_cost = gain, cost
    return indexes


def as_csv(points: Sequence[ParetoPoint]) -> str:
    """The points as a CSV table. `pareto` is 1 for the points of the Pareto set, else 0."""
    best, out = set(pareto([(point.x, point.y) for point in points])), io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["label", "series", "x", "x_error", "y", "y_error", "pareto"])
    for number, point in enumerate(points):
        errors = ["" if error is None else error for error in (point.x_error, point.y_error)]
        writer.writerow(
            [point.label, point.series, point.x, errors[0], point.y, errors[1], int(number in best)]
        )  # fmt: skip
    return out.getvalue()


def svg(points: Sequence[ParetoPoint], x_label: str, y_label: str, title: str = "") -> str:
    """An SVG chart: a colour for each series, bars of 1.96 standard errors, and a line through the Pareto set."""
    bars = [
        [value + sign * 1.96 * (error or 0) for value, error in ((point.x, point.x_error), (point.y, point.y_error))
         for sign in (-1, 1)] for point in points
    ]  # fmt: skip
    frame = Frame.around([x for bar in bars for x in bar[:2]], [y for bar in bars for y in bar[2:]])
    x, y, colour_of = frame.at_x, frame.at_y, colours([point.series for point in points])
    best, elements = pareto([(point.x, point.y) for point in points]), []
    if len(best) > 1:
        line = " L".join(f"{x(points[k].x)} {y(points[k].y)}" for k in best)
        elements.append(f'<path d="M{line}" fill="none" stroke="#999999" stroke-dasharray="5 4"/>')
    for number, (point, (left, right, low, high)) in enumerate(zip(points, bars, strict=True)):
        at_x, at_y, fill = x(point.x), y(point.y), colour_of[point.series]
        bar = f"M{x(left)} {at_y}H{x(right)}M{at_x} {y(low)}V{y(high)}"
        elements.append(f'<path d="{bar}" stroke="{fill}" opacity="0.5"/>')
        ring = ' stroke="#222222" stroke-width="1.5"' if number in best else ""
        label = escaped(f"{point.label}: {point.x:.4g}, {point.y:.4g}")
        elements.append(f'<circle cx="{at_x}" cy="{at_y}" r="4.5" fill="{fill}"{ring}><title>{label}</title></circle>')
    return frame.draw(elements, colour_of | {"ringed: Pareto set": "#ffffff"}, x_label, y_label, title)
