"""The plot of two training runs: loss against steps, thick on held-out text, thin for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgrad_dsl.plots.svg import RIGHT, TOP, Axis, bottom_axis, figure, key, left_axis, line

TITLE = "Training with the planned and with exact attention"
WIDTH, HEIGHT, LEFT, BOTTOM = 640.0, 320.0, 64.0, 44.0
LOW = 0.97  # of the least held-out loss: where the axis begins
STYLE = """<style>
svg { background: #ffffff; color: #1a1a1a; font: 12px sans-serif }
text { fill: currentColor } .grid { stroke: #d8d8d8; fill: none } .axis { stroke: currentColor; fill: none }
@media (prefers-color-scheme: dark) { svg { background: #14171a; color: #e6e6e6 } .grid { stroke: #3a3f44 } }
</style>"""
NAMES = {"planned": 0, "planned for training": 2, "exact": 4}  # colours

Curve = Sequence[Mapping[str, float]]


def curves_figure(section: Mapping[str, Any]) -> str:
    """The SVG text of the section `curves`."""
    curves: Mapping[str, Curve] = {name: curve["points"] for name, curve in section["curves"].items()}
    points = [point for curve in curves.values() for point in curve]
    held_out = [point["validation_loss"] for point in points if "validation_loss" in point]
    x = Axis(0.0, float(section["steps"]), LEFT, WIDTH - RIGHT)
    y = Axis(LOW * min(held_out), max(held_out), HEIGHT - BOTTOM, TOP + 18)  # the first steps lie above it
    parts = bottom_axis(x, HEIGHT - BOTTOM, TOP + 18, "steps")
    parts += left_axis(y, LEFT, WIDTH - RIGHT, "held out (thick), nats per byte: lower is better")
    shown = {name: colour for name, colour in NAMES.items() if name in curves}
    parts += key(LEFT, TOP + 4, [(colour, name, name == "exact") for name, colour in shown.items()])
    for name, colour in shown.items():
        trained = [(x.at(p["step"]), y.at(p["loss"])) for p in curves[name] if "loss" in p]
        parts.append(line(trained, colour, width=1.0, opacity=0.35))
    for name, colour in shown.items():
        places = [
            (x.at(p["step"]), y.at(p["validation_loss"])) for p in curves[name] if "validation_loss" in p
        ]
        parts.append(line(places, colour, dashed=name == "exact"))
    return str(figure("curves", TITLE, _words(curves), HEIGHT, parts, WIDTH, STYLE)) + "\n"


def final(curve: Curve) -> float:
    """The last held-out loss."""
    return [point["validation_loss"] for point in curve if "validation_loss" in point][-1]


def _words(curves: Mapping[str, Curve]) -> str:
    ends = ", ".join(f"{name} {final(curve):.3f}" for name, curve in curves.items())
    return f"Loss in nats per byte against steps, thin for each step, thick on held-out text. At the end: {ends}."
