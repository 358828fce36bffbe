"""docs/theory.md and its plot, made from docs/theory.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import table
from fastgrad_dsl.bench.timing import slope
from fastgrad_dsl.plots.panels import Panel, Series
from fastgrad_dsl.plots.panels import render as render_plot

JSON, PAGE, FIGURE = "docs/theory.json", "docs/theory.md", "docs/theory.svg"
TITLE = "Error of a whole model against the degree, the depth and the length"
ERROR = "relative error (lower is better)"

Document = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

INTRODUCTION = """\
# The theorem in numbers

arXiv 2408.13233 proves that a transformer with several layers keeps an almost linear cost and a small error if every
attention is replaced by a low-rank polynomial. Its statement is asymptotic. This page shows the numbers: one model, in
**float64**, so that rounding plays no part, against itself with softmax everywhere, with the same weights and text.
Made from [theory.json](theory.json) by

    {command}

The model: byte-level, width 64; each layer has a causal attention with {heads} heads (queries and keys of width 4 and
norm 1, rotary positions, R = {gain:g}), a swiglu MLP, residual streams and RMS norms. The text is held-out text of the
demonstration. Weights are the initial ones with seed 0; polynomials are of the family `{family}`.

* **measured**: relative L2 error of the logits (`output`), and of the gradients of the cross entropy with respect to
  all weights, as one vector (`gradient`).
* **estimate**: the sum over attentions of how far the model moves when that one is made exact. First order, no proof.
* **certificates**: the sum over attentions of the proved bound of each one's own output (for the gradient the largest
  of dQ, dK and dV), on its own inputs. Each is a **bound** for its attention; their sum is *not* a bound for the model,
  since it ignores how layers amplify errors. Plans without data use this sum.

![{title}](theory.svg)
"""


def render(document: Document) -> dict[str, str]:
    """The page and the plot by their paths."""
    return {PAGE: page(document), FIGURE: figure(document)}


def page(document: Document) -> str:
    """docs/theory.md."""
    from benchmarks.theory import FAMILY, GAIN, HEADS

    parts = [
        INTRODUCTION.format(command=document["command"], heads=HEADS, gain=GAIN, family=FAMILY, title=TITLE),
        _degree_section(document),
        _depth_section(document),
        _length_section(document),
        _running_section(document["running"]),
    ]
    return "\n".join(parts)


# --------------------------------------------------------------------------- sections


def _degree_section(document: Document) -> str:
    grid = document["grid"]
    lines = ["## The degree\n", f"n = {grid['length']:,}.\n"]
    for depth in grid["degrees_depths"]:
        rows = _at(document, depth=depth, n=grid["length"])
        lines += [f"{depth} {'layer' if depth == 1 else 'layers'}:\n", _table("degree", rows)]
    last = _at(document, depth=grid["degrees_depths"][-1], n=grid["length"])
    fall = _fall(last)
    if fall is not None:
        depth = last[0]["depth"]
        text = f"""Each further degree divides the measured output error by {fall:.0f} (geometric mean, {depth} layers).
            The error follows eps, which falls faster than geometrically."""
        lines.append(_paragraph(text) + "\n")
    return "\n".join(lines)


def _depth_section(document: Document) -> str:
    grid = document["grid"]
    lines = [
        "## The depth\n",
        f"n = {grid['length']:,}; measured output error, and in brackets that of the gradient.\n",
    ]
    lines.append(_crossed(document, "depth", grid["depths"], n=grid["length"]))
    growth = []
    for g in grid["some_degrees"]:
        rows = [r for r in _at(document, degree=g, n=grid["length"]) if r["depth"] in grid["depths"]]
        slopes = [slope([(r["depth"], r[what]) for r in rows]) for what in ("output", "gradient")]
        if None not in slopes:
            growth.append(f"{slopes[0]:.2f} and {slopes[1]:.2f} at degree {g}")
    lines.append(
        "The slope on logarithmic axes (1 is growth in proportion to the depth), of output and gradient:\n"
        f"{'; '.join(growth)}.\n"
    )
    return "\n".join(lines)


def _length_section(document: Document) -> str:
    grid = document["grid"]
    lines = [
        "## The length\n",
        f"{grid['depth']} layers; measured output error, and in brackets that of the gradient.\n",
        _crossed(document, "n", grid["lengths"], depth=grid["depth"]),
        "In real arithmetic an attention's bound does not depend on n; the measured error does not grow with it.\n",
    ]
    return "\n".join(lines)


def _running_section(running: Mapping[str, Any]) -> str:
    depth = len(running["bounds"][0]["layers"])
    lines = [
        "## Why no bound is printed for a whole model\n",
        _paragraph(
            f"""A rigorous bound can be carried through the layers: a ball around every activation, which each operation
            turns into a ball around its result, with Lipschitz constants on that ball and the known activations of one
            batch (`benchmarks/running_bound.py`; rows of attention are taken with their real weights, so that it is far
            tighter than products of norms). Here it is for the model of this page with {depth} layers, after
            {running["steps"]} steps of training (n = {running["tokens"]:,}, cross entropy {running["loss"]:.2f} nats
            per byte), as a share of the residual stream, for attentions with a polynomial of this eps:"""
        ),
        "",
        table(
            ["eps", *(f"layer {i + 1}" for i in range(depth))],
            [[f"{row['eps']:.0e}", *map(_number, row["layers"])] for row in running["bounds"]],
            left=0,
        ),
        _paragraph(
            """Every layer multiplies the ball by the largest slopes of any input in it, while the errors of real inputs
            meet typical slopes. For comparison, the measured error with the same weights:"""
        ),
        "",
        table(
            [
                "degree",
                "eps",
                "bound after the last layer (share of the stream)",
                "measured error of the output",
            ],
            [
                [f"{row['degree']}", f"{row['eps']:.1e}", _number(row["layers"][-1]), _number(row["output"])]
                for row in running["measured"]
            ],
            left=0,
        ),
        _paragraph(
            """A bound of 1 or more is vacuous: an output of zeros would meet it. That is why a report gives a proved
            bound for each attention, and for the whole model an estimate and a measured error, but no bound."""
        ),
        "",
    ]
    return "\n".join(lines)


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


# --------------------------------------------------------------------------- tables


def _at(document: Document, **fixed: int) -> list[Mapping[str, Any]]:
    rows = [row for row in document["points"] if all(row[key] == value for key, value in fixed.items())]
    return sorted(rows, key=lambda row: (row["degree"], row["depth"], row["n"]))


def _table(first: str, rows: Rows) -> str:
    kinds = ("", "_estimate", "_certificates")
    keys = ("eps", *(f"{what}{kind}" for what in ("output", "gradient") for kind in kinds))
    heading = [
        first,
        "eps",
        *(("output", "estimate", "certificates", "gradient", "estimate", "certificates")),
    ]
    return table(heading, [[str(row[first]), *(_number(row[key]) for key in keys)] for row in rows], left=0)


def _crossed(document: Document, down: str, values: Sequence[int], **fixed: int) -> str:
    degrees = document["grid"]["some_degrees"]
    rows = [
        [
            f"{value:,}",
            *(
                f"{_number(row['output'])} ({_number(row['gradient'])})"
                for row in _at(document, **{down: value}, **fixed)
                if row["degree"] in degrees
            ),
        ]
        for value in values
    ]
    return table([down, *(f"degree {g}" for g in degrees)], rows, left=0)


def _number(value: float | None) -> str:
    """Two digits; None is what is beyond float64."""
    return "over 1e308" if value is None else f"{value:.1e}" if math.isfinite(value) else "none"


def _fall(rows: Rows) -> float | None:
    """The mean factor between neighbouring degrees, down to where rounding rules."""
    seen = [row["output"] for row in rows if row["output"] > 1e-12]
    return (seen[0] / seen[-1]) ** (1 / (len(seen) - 1)) if len(seen) > 1 else None


# --------------------------------------------------------------------------- the plot


def figure(document: Document) -> str:
    """The SVG text: three panels."""
    grid = document["grid"]
    deepest = grid["degrees_depths"][-1]
    of_degree = _at(document, depth=deepest, n=grid["length"])
    names = {
        "output_certificates": ("output", 0, True),
        "gradient_certificates": ("gradient", 1, True),
        "output": ("", 0, False),
        "gradient": ("", 1, False),
    }
    panels = [
        Panel(
            f"degree: {deepest} layers, n = {grid['length']:,} (dashed: certificates)",
            "degree",
            ERROR,
            tuple(
                Series(label, _pairs(of_degree, "degree", key), colour, line=True, dashed=dashed)
                for key, (label, colour, dashed) in names.items()
            ),
        ),
        _swept(document, "depth", f"depth: n = {grid['length']:,}", "layers", n=grid["length"]),
        _swept(document, "n", f"length: {grid['depth']} layers", "tokens", depth=grid["depth"]),
    ]
    told = "; ".join(
        f"degree {r['degree']}: output {r['output']:.1e}, gradient {r['gradient']:.1e}" for r in of_degree
    )
    return render_plot(panels, TITLE, f"Measured errors at {deepest} layers: {told}.")


def _swept(document: Document, key: str, title: str, label: str, **fixed: int) -> Panel:
    series = []
    colours = (0, 2, 1, 3)
    for colour, g in zip(colours, document["grid"]["some_degrees"], strict=False):
        rows = sorted(_at(document, degree=g, **fixed), key=lambda row: int(row[key]))
        series.append(Series(f"degree {g}", _pairs(rows, key, "output"), colour, line=True))
        series.append(Series("", _pairs(rows, key, "gradient"), colour, line=True, dashed=True))
    return Panel(f"{title} (dashed: gradient)", label, ERROR, tuple(series))


def _pairs(rows: Rows, x: str, y: str) -> tuple[tuple[float, float], ...]:
    return tuple((float(row[x]), row[y]) for row in rows if row[y] and math.isfinite(row[y]))
