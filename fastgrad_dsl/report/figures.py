"""The figures of the page: where the budget goes, p beside exp, the candidates, and cost against the length.

Each is made from numbers of the JSON; what is worked out here is where on the page they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from fastgrad_compiler.planning.memory import in_bytes
from fastgrad_dsl.documents.calibration import Histogram
from fastgrad_dsl.documents.pairs import What, of
from fastgrad_dsl.documents.plan import StepMemory
from fastgrad_dsl.documents.report import Candidates, Cost, Curve, Point, Waterfall
from fastgrad_dsl.plots.svg import (
    BOTTOM,
    COLOURS,
    LEFT,
    LETTER,
    LINE,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    bottom_axis,
    broken,
    element,
    figure,
    key,
    left_axis,
    line,
    logarithmic,
    text,
)
from fastgrad_dsl.report.words import number

BAR = 10.0  # height of a step of the waterfall
MARGIN = 8.0  # left of the waterfall
CURVE, HISTOGRAM = 210.0, 70.0  # heights of the two panels of a range
PANEL = 260.0  # height of the other figures
FAMILY_COLOURS = {None: 4, "taylor": 2, "minimax": 3, "balanced": 0}


def waterfall(what: What, document: Waterfall) -> Markup:
    """Each attention's part of the error, one after the other, with the limit and what was measured of the whole."""
    steps, limit, measured = document.steps, document.limit, document.measured
    top = bottom = 40.0
    largest = max(document.total, limit or 0.0, measured or 0.0) or 1.0
    axis = Axis(0.0, 1.04 * largest, MARGIN, WIDTH - RIGHT)
    bars: list[Markup] = []
    rows = [(step.path, step.start, step.end, 1) for step in steps]
    for row in (*rows, ("all (estimate)", 0.0, document.total, 4)):
        bottom, parts = _bar(axis, bottom, *row)
        bars += parts
    label = f"relative L2 error of the {what}, added up"
    parts = bottom_axis(axis, bottom, top, label)
    for place, (value, name, colour) in enumerate(((limit, "budget", 5), (measured, "measured", 2))):
        if value is not None:
            x, y = axis.at(value), 12 + LINE * place
            parts.append(line([(x, y + 4), (x, bottom)], colour, dashed=name == "measured"))
            parts.append(_beside(x, y, f"{name} {number(value)}", 3))
    parts += bars  # names over the lines
    description = (
        f"{len(steps)} attentions. Their estimated parts add up to {number(document.total)}; "
        f"the budget is {number(limit)}, measured {number(measured)}. Basis: {document.basis}."
    )
    title = f"Where the error of the {what} comes from"
    return figure(f"waterfall-{what}", title, description, bottom + BOTTOM, parts)


def curve(place: int, document: Curve, histogram: str | None) -> Markup:
    """p(s)/exp(s) - 1 and the same of p' over the range; under it, where given, the path of a head's histogram."""
    bound, bottom = document.range, TOP + 16 + CURVE
    x_axis = Axis(-bound, bound, LEFT, WIDTH - RIGHT)
    values = [*document.p, *document.p_prime, document.eps, -document.eps]
    y_axis = Axis(min(values), max(values), bottom, TOP + 16)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, "relative error, 0 is best")
    for errors, colour in ((document.p, 0), (document.p_prime, 1)):
        spots = [(x_axis.at(s), y_axis.at(v)) for s, v in zip(document.s, errors, strict=True)]
        parts.append(line(spots, colour))
    for sign in (-1, 1):
        y = y_axis.at(sign * document.eps)
        parts.append(line([(LEFT, y), (WIDTH - RIGHT, y)], 4, dashed=True))
    names = ("p(s)/exp(s) − 1", "p'(s)/exp(s) − 1", "±eps (bound)")
    parts += key(2, TOP, [(0, names[0], False), (1, names[1], False), (4, names[2], True)])
    if histogram is not None:
        parts.append(element('<path class="histogram" fill="{}" d="{}"/>', COLOURS[6], histogram))
        parts.append(text(LEFT - 6, bottom + 14 + HISTOGRAM, "logits", "end"))
        bottom += HISTOGRAM + 14
    parts += bottom_axis(x_axis, bottom, TOP + 16, "logit s, on the range [−R, R] of the plan")
    description = (
        f"The {document.family} polynomial of degree {document.degree} on [-{number(bound)}, {number(bound)}]: "
        f"p is off by at most {number(document.eps)} and p' by at most {number(document.eps_prime)} (bounds)."
    )
    return figure(f"curve-{place}", "The polynomial beside exp", description, bottom + BOTTOM, parts)


def histogram_path(document: Histogram, bound: float) -> str:
    """The path of the bars of a histogram over [-bound, bound], as high as the panel where they are highest."""
    axis = Axis(-bound, bound, LEFT, WIDTH - RIGHT)
    bottom = TOP + 16 + CURVE + 14 + HISTOGRAM
    most = max(document.counts, default=0) or 1
    edges = document.edges
    parts = []
    for count, low, high in zip(document.counts, edges, edges[1:], strict=False):
        if count and high > -bound and low < bound:
            parts.append(
                f"M{axis.at(low):.1f} {bottom:g}v-{HISTOGRAM * count / most:.1f}H{axis.at(high):.1f}V{bottom:g}z"
            )
    return "".join(parts)


def pareto(place: int, what: What, document: Candidates) -> Markup:
    """Error against time of all candidates on logarithmic axes; those without any lie on the lowest line."""
    points = document.points
    top, bottom = TOP + 16, TOP + 16 + PANEL
    x_axis = logarithmic([p.time for p in points], LEFT, WIDTH - RIGHT)
    errors = [error for p in points if (error := of(p, what))] or [1.0]
    y_axis = logarithmic(errors, bottom - 22, top)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, f"error of the {what} ({document.error_kind})")
    parts.append(text(LEFT - 6, bottom - 2, "0", "end"))
    parts += bottom_axis(x_axis, bottom, top, f"time (estimate): {document.time_unit}")
    spots = [(x_axis.at(p.time), y_axis.at(error) if (error := of(p, what)) else bottom - 6) for p in points]
    taken = [(x - 5, x + 5, y) for x, y in spots]
    for point, (x, y) in sorted(zip(points, spots, strict=True), key=lambda placed: not placed[0].chosen):
        parts += _candidate(point, x, y, taken)
    families = [f for f in FAMILY_COLOURS if any(p.family == f for p in points)]
    parts += key(2, TOP, [(FAMILY_COLOURS[f], f or "exact", False) for f in families])
    chosen = next((p for p in points if p.chosen), None)
    description = f"{len(points)} candidates; lower left is better."
    if chosen is not None:
        description += f" Chosen: {chosen.name}, error {number(of(chosen, what))} ({document.error_kind})."
    title = f"Candidates: error of the {what} against time"
    return figure(f"pareto-{place}-{what}", title, description, bottom + BOTTOM, parts)


def memory(document: StepMemory) -> Markup:
    """Time of a training step against its memory, of all plans that no other beats, and the limit."""
    points, top, bottom = document.points, TOP + 16, TOP + 16 + PANEL
    x_axis = Axis(1.0, 1.02 * max(max(p.time for p in points), 1.1), LEFT, WIDTH - RIGHT)
    y_axis = logarithmic([*(p.bytes for p in points), document.limit], bottom, top)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, "bytes at the peak (estimate)")
    parts += bottom_axis(x_axis, bottom, top, "time of a step (estimate); 1 keeps all; lower left is better")
    y = y_axis.at(document.limit)
    parts.append(line([(LEFT, y), (WIDTH - RIGHT, y)], 5, dashed=True))
    dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}"><title>{}</title></circle>'
    for point in points:
        x, y = x_axis.at(point.time), y_axis.at(point.bytes)
        name = "some values made again" if point.piece is None else f"pieces of {point.piece:,} tokens"
        parts.append(element(dot, x, y, COLOURS[0 if point.piece is None else 2], name))
        if point.chosen:
            parts.append(element('<circle class="chosen" cx="{:.1f}" cy="{:.1f}" r="8"/>', x, y))
    keys = [(0, "values made again", False), (2, "pieces", False), (5, "limit", True)]
    parts += key(2, TOP, keys)
    description = (
        f"{len(points)} plans; lower left is better. Chosen: {in_bytes(document.bytes)}, "
        f"{document.time:.2f} times the time of a step that keeps all (estimates)."
    )
    return figure("memory", "Time of a training step against its memory", description, bottom + BOTTOM, parts)


def cost(place: int, what: Literal["forward", "total"], document: Cost) -> Markup:
    """Time of exact and polynomial attention against the length, with the break-even point (of both passes)."""
    lengths = document.lengths
    ways = [(n, w) for n, w in (("exact", document.exact), ("polynomial", document.polynomial)) if w]
    top, bottom = TOP + 16, TOP + 16 + PANEL
    times = [t for _, way in ways for t in way.of(what)]
    x_axis = logarithmic(lengths, LEFT, WIDTH - RIGHT)
    y_axis = logarithmic(times, bottom, top)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, "relative time (estimate)")
    parts += bottom_axis(x_axis, bottom, top, "tokens n; lower is better")
    colours = {"exact": 4, "polynomial": 0}
    for name, way in ways:
        spots = zip(lengths, way.of(what), strict=True)
        parts.append(line([(x_axis.at(n), y_axis.at(t)) for n, t in spots], colours[name]))
    parts += key(2, TOP, [(colours[name], name, False) for name, _ in ways])
    even = document.break_even
    description = (
        f"From {lengths[0]:,} to {lengths[-1]:,} tokens; 1 is exact, both passes, at {document.longest:,}."
    )
    if even and what == "total":
        x = x_axis.at(even)
        parts.append(line([(x, top), (x, bottom)], 2, dashed=True))
        parts.append(_beside(x, top + 12, f"break-even: {even:,} tokens", 4))
        description += f" The polynomial pays from {even:,} tokens on (estimate)."
    title = f"Cost against the length, {'forward and backward' if what == 'total' else 'forward'}"
    return figure(f"cost-{place}-{what}", title, description, bottom + BOTTOM, parts)


def _beside(x: float, y: float, words: str, gap: float) -> Markup:
    """A text right of a line at x, or left of it where there is no room."""
    before = x + LETTER * len(words) > WIDTH - RIGHT
    return text(x + (-gap if before else gap), y, words, "end" if before else "start")


def _bar(
    axis: Axis, y: float, name: str, start: float, end: float, colour: int
) -> tuple[float, list[Markup]]:
    """The end of a row and what stands in it: a name, in as many lines as it takes, and a bar below."""
    parts = []
    for words in broken(name, WIDTH - RIGHT - MARGIN):
        y += LINE
        parts.append(text(MARGIN, y - 3, words))
    x = axis.at(start)
    width = max(axis.at(end) - x, 1.0)
    bar = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:g}" fill="{}"><title>{}</title></rect>'
    words = f"{name}: {number(end - start)} (estimate)"
    return y + BAR + 5, [*parts, element(bar, x, y + 1, width, BAR, COLOURS[colour], words)]


def _candidate(point: Point, x: float, y: float, taken: list[tuple[float, float, float]]) -> Sequence[Markup]:
    """A point with its name, where there is room for it; the chosen one has a ring and is always named."""
    colour = COLOURS[FAMILY_COLOURS.get(point.family, 1)]
    dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}"><title>{}</title></circle>'
    parts = [element(dot, x, y, colour, point.name)]
    if point.chosen:
        parts.append(element('<circle class="chosen" cx="{:.1f}" cy="{:.1f}" r="8"/>', x, y))
    name = point.name + (" (chosen)" if point.chosen else "")
    width = LETTER * len(name) + 10
    left = x + 11 if x + 11 + width < WIDTH else x - 11 - width
    if left < LEFT:  # room at neither side: below
        left, y = min(max(x - width / 2, LEFT), WIDTH - width), y + 18
    free = all(abs(y - other) > 13 or left > end or left + width < start for start, end, other in taken)
    if point.chosen or free:
        parts.append(text(left, y + 4, name, kind="strong" if point.chosen else ""))
        taken.append((left, left + width, y))
    return parts
