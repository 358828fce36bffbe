"""The plot of the benchmark: error against time beside the peers, and time against length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import best_of_each, cell_groups
from fastgrad_dsl.plots.panels import Panel, Series, render

TITLE = "Error against time at 16,384 tokens, and time against length"
OWN, EXACT, OTHER = 0, 4, 1  # colours
PLOTTED = ("SDPA", "degree 2", "degree 2, near 64", "degree 3", "degree 4")
COLOURS = dict(zip(PLOTTED, (EXACT, OWN, 3, 2, 6), strict=True))


def figure(document: Mapping[str, Any]) -> str:
    """The SVG text; a section that is not there leaves out its panel."""
    sections = document["sections"]
    panels, told = [], []
    if "peers" in sections:
        panel, words = _errors(sections["peers"])
        panels.append(panel)
        told.append(words)
    if "attention" in sections:
        panel, words = _times(sections["attention"])
        panels.append(panel)
        told.append(words)
    return render(panels, TITLE, " ".join(told))


def _errors(section: Mapping[str, Any]) -> tuple[Panel, str]:
    best = best_of_each(section)
    series = tuple(
        Series(entry["name"], ((1e3 * entry["total_s"], entry["output_error"]),), _colour(entry))
        for entry in best
    )
    n = section["shape"]["n"]
    panel = Panel(
        f"error and time at n = {n:,}",
        "milliseconds, forward and backward (lower is better)",
        "relative error of the output (lower is better)",
        series,
    )
    words = "; ".join(
        f"{entry['name']}: {1e3 * entry['total_s']:.0f} ms, error {entry['output_error']:.1g}"
        for entry in best
    )
    return panel, f"At {n:,} tokens, forward and backward: {words}."


def _colour(entry: Mapping[str, Any]) -> int:
    if entry["name"] == "SDPA":
        return EXACT
    return OWN if entry["package"] == "fastgrad-dsl" else OTHER


def _times(section: Mapping[str, Any]) -> tuple[Panel, str]:
    series, words = [], []
    slopes = {(entry["name"], entry["d"]): entry["slope"] for entry in section["slopes"]}
    for (name, d), cells in cell_groups(section).items():
        if d != 16 or name not in PLOTTED:
            continue
        slope = slopes.get((name, d))
        label = name if slope is None else f"{name} (slope {slope:.2f})"
        points = tuple((float(c["n"]), c["total_s"]) for c in cells)
        count = sum(c["measured"] for c in cells)  # what was extrapolated stands after what was measured
        longer = points[max(0, count - 1) :] if count < len(points) else ()
        series.append(Series("" if longer else label, points[:count], COLOURS[name], line=True))
        if longer:
            series.append(Series(label, longer, COLOURS[name], line=True, dashed=True))
        words.append(f"{label}: {cells[-1]['total_s']:.3g} s at {cells[-1]['n']:,} tokens")
    panel = Panel(
        "time and length, d = 16 (dashed: extrapolated)",
        "tokens",
        "seconds, forward and backward (lower is better)",
        tuple(series),
    )
    return panel, "Time against length: " + "; ".join(words) + "."
