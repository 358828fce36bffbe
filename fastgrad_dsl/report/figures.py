"""The figures of the page: where the budget goes, p beside exp, the candidates, and cost against the length.

Each is made from numbers of the JSON; what is worked out here is where on the page they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastgrad_dsl.bench.plot import COLOURS
from fastgrad_dsl.report.svg import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    bottom_axis,
    element,
    figure,
    key,
    left_axis,
    line,
    logarithmic,
    text,
)
from fastgrad_dsl.report.words import number

ROW = 17.0  # height of a step of the waterfall
NAMES = 190.0  # room for the names of attentions beside it
CURVE, HISTOGRAM = 230.0, 80.0  # heights of the two panels of a range
PANEL = 300.0  # height of the other figures
FAMILY_COLOURS = {None: 4, "taylor": 2, "minimax": 3, "balanced": 0}


def waterfall(what: str, document: Mapping[str, Any]) -> Markup:
    """Each attention's part of the error, one after the other, with the limit and what was measured of the whole."""
    steps, limit, measured = document["steps"], document["limit"], document["measured"]
    top, bottom = 30.0, 30.0 + ROW * (len(steps) + 1)
    largest = max(document["total"], limit or 0.0, measured or 0.0) or 1.0
    axis = Axis(0.0, 1.04 * largest, NAMES, WIDTH - RIGHT)
    parts = bottom_axis(axis, bottom, top, f"relative L2 error of the {what}, added up; smaller is better")
    for place, step in enumerate(steps):
        parts += _bar(axis, top + ROW * place, step["path"], step["start"], step["end"], 1)
    parts += _bar(axis, top + ROW * len(steps), "all (estimate)", 0.0, document["total"], 4)
    known = ((limit, "budget", 5), (measured, "measured", 2))
    marks = sorted((value, name, colour) for value, name, colour in known if value is not None)
    for place, (value, name, colour) in enumerate(marks):
        x = axis.at(value)
        parts.append(line([(x, top - 6), (x, bottom)], colour, dashed=name == "measured"))
        before = place < len(marks) - 1 or x > WIDTH - 130
        parts.append(
            text(x + (-3 if before else 3), top - 10, f"{name} {number(value)}", "end" if before else "start")
        )
    description = (
        f"{len(steps)} attentions. Their estimated parts add up to {number(document['total'])}; "
        f"the budget is {number(limit)}, measured {number(measured)}. Basis: {document['basis']}."
    )
    return figure(
        f"waterfall-{what}", f"Where the error of the {what} comes from", description, bottom + BOTTOM, parts
    )


def curve(place: int, document: Mapping[str, Any], histogram: str | None) -> Markup:
    """p(s)/exp(s) - 1 and the same of p' over the range; under it, where given, the path of a head's histogram."""
    bound, bottom = document["range"], TOP + 16 + CURVE
    x_axis = Axis(-bound, bound, LEFT, WIDTH - RIGHT)
    values = [*document["p"], *document["p_prime"], document["eps"], -document["eps"]]
    y_axis = Axis(min(values), max(values), bottom, TOP + 16)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, "relative error, 0 is best")
    for name, colour in (("p", 0), ("p_prime", 1)):
        parts.append(
            line(
                [(x_axis.at(s), y_axis.at(v)) for s, v in zip(document["s"], document[name], strict=True)],
                colour,
            )
        )
    for sign in (-1, 1):
        y = y_axis.at(sign * document["eps"])
        parts.append(line([(LEFT, y), (WIDTH - RIGHT, y)], 4, dashed=True))
    names = ("p(s)/exp(s) − 1", "p'(s)/exp(s) − 1", "±eps (bound)")
    parts += key(LEFT + 8, TOP + 4, [(0, names[0], False), (1, names[1], False), (4, names[2], True)])
    if histogram is not None:
        parts.append(element('<path class="histogram" fill="{}" d="{}"/>', COLOURS[6], histogram))
        parts.append(text(LEFT - 6, bottom + 14 + HISTOGRAM, "logits", "end"))
        bottom += HISTOGRAM + 14
    parts += bottom_axis(x_axis, bottom, TOP + 16, "logit s, on the range [−R, R] of the plan")
    description = (
        f"The {document['family']} polynomial of degree {document['degree']} on [-{number(bound)}, {number(bound)}]: "
        f"p is off by at most {number(document['eps'])} and p' by at most {number(document['eps_prime'])} (bounds)."
    )
    return figure(f"curve-{place}", "The polynomial beside exp", description, bottom + BOTTOM, parts)


def histogram_path(document: Mapping[str, Any], bound: float) -> str:
    """The path of the bars of a histogram over [-bound, bound], as high as the panel where they are highest."""
    axis = Axis(-bound, bound, LEFT, WIDTH - RIGHT)
    bottom = TOP + 16 + CURVE + 14 + HISTOGRAM
    most = max(document["counts"], default=0) or 1
    edges = document["edges"]
    parts = []
    for count, low, high in zip(document["counts"], edges, edges[1:], strict=False):
        if count and high > -bound and low < bound:
            parts.append(
                f"M{axis.at(low):.1f} {bottom:g}v-{HISTOGRAM * count / most:.1f}H{axis.at(high):.1f}V{bottom:g}z"
            )
    return "".join(parts)


def pareto(place: int, what: str, document: Mapping[str, Any]) -> Markup:
    """Error against time of all candidates on logarithmic axes; those without any lie on the lowest line."""
    points = document["points"]
    top, bottom = TOP + 16, TOP + 16 + PANEL
    x_axis = logarithmic([p["time"] for p in points], LEFT, WIDTH - RIGHT)
    errors = [p[what] for p in points if p[what]] or [1.0]
    y_axis = logarithmic(errors, bottom - 22, top)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, f"error of the {what} ({document['error_kind']})")
    parts.append(text(LEFT - 6, bottom - 2, "0", "end"))
    parts += bottom_axis(x_axis, bottom, top, f"time (estimate): {document['time_unit']}")
    spots = [(x_axis.at(p["time"]), y_axis.at(p[what]) if p[what] else bottom - 6) for p in points]
    taken = [(x - 5, x + 5, y) for x, y in spots]
    for point, (x, y) in sorted(zip(points, spots, strict=True), key=lambda placed: not placed[0]["chosen"]):
        parts += _candidate(point, x, y, taken)
    families = [f for f in FAMILY_COLOURS if any(p["family"] == f for p in points)]
    parts += key(LEFT + 8, TOP + 2, [(FAMILY_COLOURS[f], f or "exact", False) for f in families])
    chosen = next((p for p in points if p["chosen"]), None)
    description = f"{len(points)} candidates; lower left is better."
    if chosen is not None:
        description += f" Chosen: {chosen['name']}, error {number(chosen[what])} ({document['error_kind']})."
    return figure(
        f"pareto-{place}-{what}",
        f"Candidates: error of the {what} against time",
        description,
        bottom + BOTTOM,
        parts,
    )


def cost(place: int, what: str, document: Mapping[str, Any]) -> Markup:
    """Time of exact and polynomial attention against the length, with the break-even point (of both passes)."""
    lengths, ways = document["lengths"], [w for w in ("exact", "polynomial") if document[w] is not None]
    top, bottom = TOP + 16, TOP + 16 + PANEL
    times = [t for way in ways for t in document[way][what]]
    x_axis = logarithmic(lengths, LEFT, WIDTH - RIGHT)
    y_axis = logarithmic(times, bottom, top)
    parts = left_axis(y_axis, LEFT, WIDTH - RIGHT, "relative time (estimate)")
    parts += bottom_axis(x_axis, bottom, top, "tokens n; lower is better")
    colours = {"exact": 4, "polynomial": 0}
    for way in ways:
        spots = zip(lengths, document[way][what], strict=True)
        parts.append(line([(x_axis.at(n), y_axis.at(t)) for n, t in spots], colours[way]))
    parts += key(LEFT + 8, TOP + 2, [(colours[way], way, False) for way in ways])
    even = document["break_even"]
    description = (
        f"From {lengths[0]:,} to {lengths[-1]:,} tokens; 1 is exact, both passes, at {document['longest']:,}."
    )
    if even and what == "total":
        x = x_axis.at(even)
        parts.append(line([(x, top), (x, bottom)], 2, dashed=True))
        parts.append(text(x + 4, top + 12, f"break-even: {even:,} tokens"))
        description += f" The polynomial pays from {even:,} tokens on (estimate)."
    passes = "forward and backward" if what == "total" else "forward"
    return figure(
        f"cost-{place}-{what}", f"Cost against the length, {passes}", description, bottom + BOTTOM, parts
    )


def _bar(axis: Axis, y: float, name: str, start: float, end: float, colour: int) -> list[Markup]:
    room = int((NAMES - 12) / LETTER)
    shown = name if len(name) <= room else "…" + name[1 - room :]
    x = axis.at(start)
    width = max(axis.at(end) - x, 1.0)
    bar = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:g}" fill="{}"><title>{}</title></rect>'
    return [
        text(NAMES - 8, y + 12, shown, "end"),
        element(bar, x, y + 2, width, ROW - 4, COLOURS[colour], f"{name}: {number(end - start)} (estimate)"),
    ]


def _candidate(
    point: Mapping[str, Any], x: float, y: float, taken: list[tuple[float, float, float]]
) -> Sequence[Markup]:
    """A point with its name, where there is room for it; the chosen one has a ring and is always named."""
    colour = COLOURS[FAMILY_COLOURS.get(point["family"], 1)]
    dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}"><title>{}</title></circle>'
    parts = [element(dot, x, y, colour, point["name"])]
    if point["chosen"]:
        parts.append(element('<circle class="chosen" cx="{:.1f}" cy="{:.1f}" r="8"/>', x, y))
    name = point["name"] + (" (chosen)" if point["chosen"] else "")
    width = LETTER * len(name) + 10
    left = x + 11 if x + 11 + width < WIDTH - RIGHT else x - 11 - width
    free = all(abs(y - other) > 13 or left > end or left + width < start for start, end, other in taken)
    if point["chosen"] or free:
        parts.append(text(left, y + 4, name, kind="strong" if point["chosen"] else ""))
        taken.append((left, left + width, y))
    return parts
