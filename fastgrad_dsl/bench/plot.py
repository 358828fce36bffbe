"""Log-log plots as one SVG file: text alternative, readable on light and dark pages, no library and nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastgrad_grammar.quote import html

COLOURS = (
    "#e8590c",
    "#1c7ed6",
    "#2f9e44",
    "#ae3ec9",
    "#868e96",
    "#d6336c",
    "#0c8599",
)  # on white and on black
WIDTH, HEIGHT = 560, 420  # of a panel, with its margins
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 40, 52
LETTER, LINE, RADIUS = 6.6, 13.0, 3.6  # room that a letter and a line of a label take; of a point
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:14px;font-weight:600}"
    ".paper{fill:#fff}.axis{stroke:#57606a;fill:none}.grid{stroke:#d0d7de;stroke-width:.6}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.axis{stroke:#8b949e}.grid{stroke:#30363d}}"
)


@dataclass(frozen=True)
class Series:
    """Points (x, y) above 0 with one label, drawn at the last; a line joins them where `line` is set.

    `colour` is an index into COLOURS; a dashed line is one that was not measured.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int
    line: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot. Labels of axes say the unit and which direction is better."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]


def render(panels: Sequence[Panel], title: str, description: str) -> str:
    """The SVG text; `description` is what a reader who cannot see the plot gets. Deterministic."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title description">',
        f'<title id="title">{html(title)}</title>',
        f'<desc id="description">{html(description)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{HEIGHT}"/>',
    ]
    for index, panel in enumerate(panels):
        parts += [f'<g transform="translate({index * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    points = [point for series in panel.series for point in series.points]
    parts = [f'<text class="title" x="{LEFT}" y="22">{html(panel.title)}</text>']
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{html(panel.x_label)}</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{html(panel.y_label)}</text>',
    ]
    if not points:
        return parts
    low_x, high_x = _decades([x for x, _ in points])
    low_y, high_y = _decades([y for _, y in points])
    to_x = _scale(low_x, high_x, LEFT, WIDTH - RIGHT)
    to_y = _scale(low_y, high_y, HEIGHT - BOTTOM, TOP)
    for power in range(low_x, high_x + 1):
        x = to_x(10.0**power)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_power(power)}</text>'
        )
    for power in range(low_y, high_y + 1):
        y = to_y(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_power(power)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    placed = [(to_x(x) - RADIUS, to_x(x) + RADIUS, to_y(y)) for x, y in points]  # labels keep off the points
    for series in panel.series:
        parts += _series(series, to_x, to_y, placed)
    return parts


def _series(
    series: Series,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    placed: list[tuple[float, float, float]],
) -> list[str]:
    colour = COLOURS[series.colour % len(COLOURS)]
    spots = [(to_x(x), to_y(y)) for x, y in series.points]
    parts = []
    if series.line:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        dashes = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
    if not series.dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}"/>' for x, y in spots]
    if series.label and spots:
        left, y = _place(*spots[-1], LETTER * len(series.label), placed)
        parts.append(
            f'<text x="{left:.1f}" y="{y + 4:.1f}" style="fill:{colour}">{html(series.label)}</text>'
        )
    return parts


def _place(x: float, y: float, width: float, placed: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Where a label of `width` starts: beside its point, moved up or down until it meets no other; it is noted."""
    left = x + 8 if x + 8 + width < WIDTH - RIGHT else max(float(LEFT), x - 8 - width)

    def is_free(line: float) -> bool:
        return all(
            abs(line - other) >= LINE or left > end or left + width < start for start, end, other in placed
        )

    steps = (sign * step * LINE / 4 for step in range(120) for sign in (-1, 1))
    line = next((y + step for step in steps if TOP <= y + step <= HEIGHT - BOTTOM and is_free(y + step)), y)
    placed.append((left, left + width, line))
    return left, line


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten that hold all values, at least one decade apart."""
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _scale(low: int, high: int, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (math.log10(value) - low) / (high - low) * (last - first)


def _power(power: int) -> str:
    """10^power, as people write it between a thousandth and a hundred thousand."""
    if -3 <= power < 0:
        return f"{10.0**power:.{-power}f}"
    if 0 <= power <= 5:
        return f"{10**power:,}"
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
