"""A plot of what the probe promised against what training gained, as SVG written by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, EDGE = 640, 420, 56
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#b8860b", "#34495e", "#d35400", "#16a085", "#7f8c8d", "#2c3e50")


@dataclass(frozen=True)
class Point:
    """A row of a claim: the gap between teacher and student, and the gain, in points of accuracy."""

    claim: str
    row: str
    gap: float
    gain: float


def plot(points: Sequence[Point]) -> str:
    """The SVG: a point for each row, coloured by claim, with its name as tooltip."""
    x_low, x_high = _range([point.gap for point in points])
    y_low, y_high = _range([point.gain for point in points])

    def x(value: float) -> float:
        return EDGE + (value - x_low) / (x_high - x_low) * (WIDTH - 2 * EDGE)

    def y(value: float) -> float:
        return HEIGHT - EDGE - (value - y_low) / (y_high - y_low) * (HEIGHT - 2 * EDGE)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for value in _ticks(x_low, x_high):
        parts.append(_line(x(value), EDGE, x(value), HEIGHT - EDGE, value == 0))
        parts.append(_text(x(value), HEIGHT - EDGE + 18, f"{value:g}", "middle"))
    for value in _ticks(y_low, y_high):
        parts.append(_line(EDGE, y(value), WIDTH - EDGE, y(value), value == 0))
        parts.append(_text(EDGE - 8, y(value) + 4, f"{value:g}", "end"))
    claims = list(dict.fromkeys(point.claim for point in points))
    for point in points:
        colour = COLOURS[claims.index(point.claim) % len(COLOURS)]
        told = escape(f"{point.claim}, {point.row}: gap {point.gap:+.1f}, gain {point.gain:+.1f}")
        circle = f'<circle cx="{x(point.gap):.1f}" cy="{y(point.gain):.1f}" r="5" fill="{colour}">'
        parts.append(f"{circle}<title>{told}</title></circle>")
    for i, claim in enumerate(claims):
        parts.append(f'<circle cx="{EDGE + 8}" cy="{18 + 16 * i}" r="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(_text(EDGE + 18, 22 + 16 * i, claim, "start"))
    below = "probe: accuracy of the teacher less that of the student (points)"
    parts.append(_text(WIDTH / 2, HEIGHT - 12, below, "middle"))
    turn = f'transform="rotate(-90 16 {HEIGHT / 2})"'
    parts.append(_text(16, HEIGHT / 2, "gain of accuracy by training (points)", "middle", turn))
    return "\n".join([*parts, "</svg>", ""])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest of the values and 0, widened."""
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100) if (high - low) / step <= 8)
    return [float(i * step) for i in range(int(low // step), int(high // step) + 1) if low <= i * step <= high]


def _line(x1: float, y1: float, x2: float, y2: float, strong: bool) -> str:
    colour = "#555555" if strong else "#dddddd"
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
