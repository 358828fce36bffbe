"""Log-log plots side by side as one SVG file, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastgrad_dsl.plots.svg import COLOURS, Axis, element, line, tick

WIDTH, HEIGHT = 560, 420  # of a panel, with its margins
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 40, 52
LETTER, LINE, RADIUS = 6.6, 13.0, 3.6  # room that a letter and a line of a label take; of a point
LONGEST_TICK = 100_000  # larger powers of ten are written as powers
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
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
        'role="img" aria-labelledby="title description">'
    )
    width = WIDTH * len(panels)
    parts = [
        element(opening, width, HEIGHT),
        element('<title id="title">{}</title>', title),
        element('<desc id="description">{}</desc>', description),
        element("<style>{}</style>", Markup(STYLE)),
        element('<rect class="paper" width="{}" height="{}"/>', width, HEIGHT),
    ]
    for index, panel in enumerate(panels):
        parts += [element('<g transform="translate({} 0)">', index * WIDTH), *_panel(panel), Markup("</g>")]
    return str(Markup("\n").join([*parts, Markup("</svg>\n")]))


def _panel(panel: Panel) -> list[Markup]:
    points = [point for series in panel.series for point in series.points]
    across, down = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    label = '<text x="{}" y="{}" text-anchor="middle">{}</text>'
    upright = '<text transform="translate(16 {}) rotate(-90)" text-anchor="middle">{}</text>'
    parts = [
        element('<text class="title" x="{}" y="22">{}</text>', LEFT, panel.title),
        element(label, across, HEIGHT - 12, panel.x_label),
        element(upright, down, panel.y_label),
    ]
    if not points:
        return parts
    x_axis = _decades([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = _decades([y for _, y in points], HEIGHT - BOTTOM, TOP)
    for value in _powers(x_axis):
        x, said = x_axis.at(value), tick(value, LONGEST_TICK)
        parts.append(element('<path class="grid" d="M{:.1f} {}V{}"/>', x, TOP, HEIGHT - BOTTOM))
        parts.append(
            element('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>', x, HEIGHT - BOTTOM + 16, said)
        )
    for value in _powers(y_axis):
        y, said = y_axis.at(value), tick(value, LONGEST_TICK)
        parts.append(element('<path class="grid" d="M{} {:.1f}H{}"/>', LEFT, y, WIDTH - RIGHT))
        parts.append(element('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>', LEFT - 6, y + 4, said))
    frame = '<path class="axis" d="M{} {}V{}H{}"/>'
    parts.append(element(frame, LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT))
    spots = [[(x_axis.at(x), y_axis.at(y)) for x, y in series.points] for series in panel.series]
    placed = [(x - RADIUS, x + RADIUS, y) for each in spots for x, y in each]  # labels keep off the points
    for series, each in zip(panel.series, spots, strict=True):
        parts += _series(series, each, placed)
    return parts


def _series(
    series: Series, spots: Sequence[tuple[float, float]], placed: list[tuple[float, float, float]]
) -> list[Markup]:
    place = series.colour % len(COLOURS)
    colour = COLOURS[place]
    parts = []
    if series.line:
        parts.append(line(spots, place, dashed=series.dashed, width=1.8))
    if not series.dashed:
        circle = '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"/>'
        parts += [element(circle, x, y, RADIUS, colour) for x, y in spots]
    if series.label and spots:
        left, y = _place(*spots[-1], LETTER * len(series.label), placed)
        label = '<text x="{:.1f}" y="{:.1f}" style="fill:{}">{}</text>'
        parts.append(element(label, left, y + 4, colour, series.label))
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


def _decades(values: Sequence[float], first: float, last: float) -> Axis:
    """From a power of ten to another, at least one decade apart, between which all values lie."""
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    return Axis(float(f"1e{low}"), float(f"1e{high}"), first, last, logarithmic=True)


def _powers(axis: Axis) -> list[float]:
    low, high = (round(math.log10(end)) for end in (axis.low, axis.high))
    return [float(f"1e{power}") for power in range(low, high + 1)]
