"""Axes and paths of figures: SVG text that takes its colours from the page and names itself in words.

Every part is `Markup` made by `element`, which escapes values; anything else is escaped where parts are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import wrap

from markupsafe import Markup

from fastgrad_compiler.approximation.elementary import log10, power
from fastgrad_grammar.quote import html

COLOURS = ("#e8590c", "#1c7ed6", "#2f9e44", "#ae3ec9", "#868e96", "#d6336c", "#0c8599")
"""Of lines and points, on white and on black."""
WIDTH = 400.0  # of every figure: a phone shows it whole, with letters that can be read
LEFT, RIGHT, TOP, BOTTOM = 74.0, 16.0, 14.0, 60.0
LETTER = 7.2  # mean width of a letter, of a wide font
LINE = 15.0  # from a line of text to the next

_logarithm = lru_cache(1024)(log10)  # ends of axes come again and again


def element(template: str, *values: float | str) -> Markup:
    """SVG from a template of ours and the values of its fields, which are escaped unless they are SVG."""
    return Markup(template).format(*(html(value) if isinstance(value, str) else value for value in values))


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on the line from `first` to `last`, both in units of the figure."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; values beyond the ends are drawn at the ends."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.logarithmic:
            low, high, value = (_logarithm(x) for x in (low, high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Powers of ten, or some round numbers."""
        if self.logarithmic:
            first, last = math.floor(log10(self.low)), math.ceil(log10(self.high))
            step, factors = (max(1, (last - first) // 6), (1,)) if last - first > 3 else (1, (1, 2, 5))
            exponents = range(first, last + 1, step)
            found = [factor * float(f"1e{exponent}") for exponent in exponents for factor in factors]
            return [value for value in found if self.low / 1.001 <= value <= self.high * 1.001]
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / 8
        unit = float(f"1e{math.floor(log10(rough))}")
        width = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        places = range(math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9) + 1)
        return [width * place for place in places]


def logarithmic(values: Sequence[float], first: float, last: float) -> Axis:
    """A logarithmic axis that holds all values, which lie above 0, with some room at both ends."""
    low, high = min(values), max(values)
    room = 3.0 if high < 4 * low else max(power(high / low, 0.06), 1.2)
    return Axis(low / room, high * room, first, last, logarithmic=True)


def tick(value: float, longest: float = 99_999.0) -> str:
    """The text of a tick: powers of ten as people write them, in full up to `longest`."""
    if value == 0:
        return "0"
    exponent = log10(abs(value))
    if 1e-3 <= abs(value) <= longest:
        return f"{value:,.6g}"
    if exponent == round(exponent):
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.3g}"


def bottom_axis(axis: Axis, y: float, top: float, label: str) -> list[Markup]:
    """Ticks, grid lines up to `top`, and the label, below the line at y; numbers only where there is room for them."""
    parts, end = [], -math.inf
    for value in axis.ticks():
        x, half = axis.at(value), LETTER * len(tick(value)) / 2
        parts.append(element('<path class="grid" d="M{:.1f} {:g}V{:g}"/>', x, top, y))
        if x - half > end and x + half < axis.last + RIGHT:
            parts.append(text(x, y + 16, tick(value), "middle"))
            end = x + half + LETTER
    parts.append(element('<path class="axis" d="M{:g} {:g}H{:g}"/>', axis.first, y, axis.last))
    for place, words in enumerate(broken(label, axis.last + RIGHT)):
        half = LETTER * len(words) / 2
        middle = max(min((axis.first + axis.last) / 2, axis.last + RIGHT - half), half)
        parts.append(text(middle, y + 36 + LINE * place, words, "middle"))
    return parts


def broken(words: str, width: float) -> list[str]:
    """The lines of a text in so much room."""
    return wrap(words, max(int(width / LETTER), 1)) or [""]


def left_axis(axis: Axis, x: float, right: float, label: str) -> list[Markup]:
    """Ticks, grid lines to `right`, and the label, upright, left of the line at x."""
    parts = []
    for value in axis.ticks():
        y = axis.at(value)
        parts.append(element('<path class="grid" d="M{:g} {:.1f}H{:g}"/>', x, y, right))
        parts.append(text(x - 6, y + 4, tick(value), "end"))
    middle = (axis.first + axis.last) / 2
    upright = '<text transform="translate(13 {:g}) rotate(-90)" text-anchor="middle">{}</text>'
    parts.append(element('<path class="axis" d="M{:g} {:g}V{:g}"/>', x, axis.first, axis.last))
    return [*parts, element(upright, middle, label)]


def line(
    points: Sequence[tuple[float, float]],
    colour: int,
    *,
    dashed: bool = False,
    width: float = 2.0,
    opacity: float = 1.0,
) -> Markup:
    """A line through points of the figure."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    more = Markup(' stroke-dasharray="5 4"' if dashed else "")
    more += element(' opacity="{:g}"', opacity) if opacity < 1 else ""
    shape = '<path d="M{}" fill="none" stroke="{}" stroke-width="{:g}"{}/>'
    return element(shape, path, COLOURS[colour], width, more)


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> Markup:
    """A text; `kind` is a class of the page."""
    class_ = element(' class="{}"', kind) if kind else Markup("")
    return element('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>', class_, x, y, anchor, content)


def key(x: float, y: float, entries: Sequence[tuple[int, str, bool]]) -> list[Markup]:
    """A legend in one row: colour, name, whether its line is dashed."""
    parts = []
    for colour, name, dashed in entries:
        parts.append(line([(x, y - 4), (x + 16, y - 4)], colour, dashed=dashed))
        parts.append(text(x + 20, y, name))
        x += 28 + LETTER * len(name)
    return parts


def figure(
    name: str,
    title: str,
    description: str,
    height: float,
    parts: Iterable[Markup],
    width: float = WIDTH,
    style: str = "",
) -> Markup:
    """An SVG whose title and description stand for it where it cannot be seen; `name` is unique in the page.

    style: of an SVG that is a file of its own and no part of a page.
    """
    return element(
        '<svg{6} viewBox="0 0 {0:g} {1:g}" width="{0:g}" height="{1:g}" role="img" '
        'aria-labelledby="{2}-title {2}-desc">{7}'
        '<title id="{2}-title">{3}</title><desc id="{2}-desc">{4}</desc>{5}</svg>',
        width,
        height,
        name,
        title,
        description,
        Markup("").join(parts),
        Markup(' xmlns="http://www.w3.org/2000/svg"' if style else ""),
        Markup(style),
    )
