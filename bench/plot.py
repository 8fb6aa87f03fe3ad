"""A line chart as SVG, with no library: enough for a curve of memory."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 44, 48
TICKS = 6
LABEL_GAP = 15.0  # between two labels at the right edge
COLOURS = ("#1f6fb4", "#c8501e", "#2b8a57", "#8a3fa0", "#a67c00", "#5b6470", "#c2185b", "#00838f")

Point = tuple[float, float]


def line_chart(lines: Mapping[str, Sequence[Point]], *, title: str, x_title: str, y_title: str) -> str:
    """One line for each name, labelled at its right end. The axes begin at 0."""
    points = [point for line in lines.values() for point in line]
    x_step, y_step = nice_step(max(x for x, _ in points)), nice_step(max(y for _, y in points))
    x_top = x_step * math.ceil(max(x for x, _ in points) / x_step)
    y_top = y_step * math.ceil(max(y for _, y in points) / y_step)

    def place(point: Point) -> Point:
        return (
            LEFT + point[0] / x_top * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - point[1] / y_top * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" fill="#1b1f24">{escape(title)}</text>',
    ]
    for value in steps(y_step, y_top):
        _, y = place((0.0, value))
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#57606a">{value:,.0f}</text>')
    for value in steps(x_step, x_top):
        x, _ = place((value, 0.0))
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#57606a">{value:,.0f}</text>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle" fill="#57606a">{escape(x_title)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 6}" text-anchor="start" fill="#57606a">{escape(y_title)}</text>')
    placed = {name: [place(point) for point in line] for name, line in lines.items()}
    label_ys = spread({name: line[-1][1] for name, line in placed.items()})
    for number, (name, line) in enumerate(placed.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = f"{name} {lines[name][-1][1]:,.0f}"
        parts.append(
            f'<text x="{line[-1][0] + 8:.1f}" y="{label_ys[name] + 4:.1f}" fill="{colour}">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def nice_step(top: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that makes at most TICKS steps up to *top*."""
    least = max(top, 1e-9) / TICKS
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def steps(step: float, top: float) -> list[float]:
    return [step * number for number in range(round(top / step) + 1)]


def spread(wanted: Mapping[str, float]) -> dict[str, float]:
    """The wanted heights, moved down where two would overlap."""
    given: dict[str, float] = {}
    last = -math.inf
    for name, y in sorted(wanted.items(), key=lambda item: item[1]):
        last = max(y, last + LABEL_GAP)
        given[name] = last
    return given
