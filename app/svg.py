"""SVG charts: a frame with axes, and curves in it. All functions are pure, and no chart loads anything."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#1f5fa8", "#c8501e", "#2e8540", "#7d4aa5", "#a38a00", "#c23b80", "#3a8f9e", "#6b6b6b")
LEFT, BOTTOM, TOP = 64, 52, 36
GRID, FAINT, TEXT = "#e6e6e6", "#555555", "#222222"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    raw = (high - low) / max(1, count - 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """The coordinates of a chart of `width` × `height` pixels. `x` and `y` are the ranges of values that it shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 760
    height: int = 480
    right: int = 190
    """Width of the legend, in pixels."""

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], **size: int) -> "Frame":
        """A frame around all values, with a small margin."""
        return cls(_range(xs), _range(ys), **size)

    def at_x(self, value: float) -> float:
        """Pixels from the left edge."""
        return round(LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - LEFT - self.right), 1)

    def at_y(self, value: float) -> float:
        """Pixels from the top edge."""
        low, high = self.y
        return round(self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - TOP), 1)

    def draw(self, inside: Sequence[str], names: dict[str, str], x_label: str, y_label: str, title: str) -> str:
        """The whole chart: axes, the elements `inside`, and the legend of `names` (name → colour)."""
        bottom, end = self.height - BOTTOM, self.width - self.right
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
            _text(LEFT, 20, title, size=14),
            _text((LEFT + end) / 2, self.height - 12, x_label, anchor="middle"),
            f'<g transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)">',
            _text(0, 0, y_label, anchor="middle") + "</g>",
        ]
        for value in ticks(*self.x):
            left = self.at_x(value)
            out.append(f'<path d="M{left} {TOP}V{bottom}" stroke="{GRID}"/>')
            out.append(_text(left, bottom + 18, f"{value:g}", anchor="middle", fill=FAINT))
        for value in ticks(*self.y):
            top = self.at_y(value)
            out.append(f'<path d="M{LEFT} {top}H{end}" stroke="{GRID}"/>')
            out.append(_text(LEFT - 8, top + 4, f"{value:g}", anchor="end", fill=FAINT))
        out += inside
        for number, (name, colour) in enumerate(names.items()):
            y = TOP + 10 + 18 * number
            out.append(f'<circle cx="{end + 16}" cy="{y}" r="4.5" fill="{colour}"/>')
            out.append(_text(end + 26, y + 4, name))
        return "\n".join([*out, "</svg>\n"])


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str = "step") -> str:
    """A small chart of named curves. Each curve is a list of (x, y) with at least one point."""
    frame = Frame.around(
        [x for line in lines.values() for x, _ in line], [y for line in lines.values() for _, y in line],
        width=420, height=260, right=60,
    )  # fmt: skip
    colour_of = colours(list(lines))
    paths = [
        f'<path d="M{" L".join(f"{frame.at_x(x)} {frame.at_y(y)}" for x, y in line)}" fill="none" '
        f'stroke="{colour_of[name]}" stroke-width="1.5"/>'
        for name, line in lines.items()
    ]
    return frame.draw(paths, colour_of, x_label, "", title)


def escaped(text: str) -> str:
    """`text` escaped for XML, without the control characters that XML forbids."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "", text))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, fill: str = TEXT) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escaped(text)}</text>'
