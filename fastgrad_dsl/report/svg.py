"""Axes and paths of the report's figures: SVG text that takes its colours from the page and names itself in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from fastgrad_compiler.elementary import log10, power
from fastgrad_dsl.bench.plot import COLOURS

WIDTH = 640.0  # of every figure; a narrow page scrolls it in a box of its own
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 14.0, 44.0
LETTER = 6.4  # mean width of a letter

_logarithm = lru_cache(1024)(log10)  # ends of axes come again and again


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


def tick(value: float) -> str:
    """The text of a tick: powers of ten as people write them."""
    if value == 0:
        return "0"
    exponent = log10(abs(value))
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    if exponent == round(exponent):
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.3g}"


def bottom_axis(axis: Axis, y: float, top: float, label: str) -> list[str]:
    """Ticks, grid lines up to `top`, and the label, below the line at y."""
    parts = []
    for value in axis.ticks():
        x = axis.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top:g}V{y:g}"/>')
        parts.append(text(x, y + 16, tick(value), "middle"))
    middle = (axis.first + axis.last) / 2
    return [
        *parts,
        f'<path class="axis" d="M{axis.first:g} {y:g}H{axis.last:g}"/>',
        text(middle, y + 36, label, "middle"),
    ]


def left_axis(axis: Axis, x: float, right: float, label: str) -> list[str]:
    """Ticks, grid lines to `right`, and the label, upright, left of the line at x."""
    parts = []
    for value in axis.ticks():
        y = axis.at(value)
        parts.append(f'<path class="grid" d="M{x:g} {y:.1f}H{right:g}"/>')
        parts.append(text(x - 6, y + 4, tick(value), "end"))
    middle = (axis.first + axis.last) / 2
    return [
        *parts,
        f'<path class="axis" d="M{x:g} {axis.first:g}V{axis.last:g}"/>',
        f'<text transform="translate(13 {middle:g}) rotate(-90)" text-anchor="middle">{escape(label)}</text>',
    ]


def line(points: Sequence[tuple[float, float]], colour: int, *, dashed: bool = False) -> str:
    """A line through points of the figure."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{path}" fill="none" stroke="{COLOURS[colour]}" stroke-width="2"{dashes}/>'


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    """A text; `kind` is a class of the page."""
    class_ = f' class="{kind}"' if kind else ""
    return f'<text{class_} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def key(x: float, y: float, entries: Sequence[tuple[int, str, bool]]) -> list[str]:
    """A legend in one row: colour, name, whether its line is dashed."""
    parts = []
    for colour, name, dashed in entries:
        parts.append(line([(x, y - 4), (x + 18, y - 4)], colour, dashed=dashed))
        parts.append(text(x + 23, y, name))
        x += 36 + LETTER * len(name)
    return parts


def figure(name: str, title: str, description: str, height: float, parts: Iterable[str]) -> str:
    """An SVG whose title and description stand for it where it cannot be seen; `name` is unique in the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" height="{height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(parts)}</svg>'
    )
