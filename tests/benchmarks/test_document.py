"""docs/performance.md, its plot and the README's region are what the committed JSON says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.document import BEGIN, END, FIGURE, PAGE, README, render
from benchmarks.settings import ROOT
from fastgrad_dsl.bench.cells import Cell, extrapolated
from fastgrad_dsl.bench.contenders import Contender
from fastgrad_dsl.bench.timing import Timing

REGION = f"# A project\n\n{BEGIN}\n{END}\n\nThe end.\n"
HEADING: dict[str, Any] = {
    "machine": {"cpu": "A CPU", "vectors": "AVX2", "threads": 2, "torch": "2.0", "date": "2000-01-01"},
    "target": "torch",
    "command": "python -m benchmarks.run",
    "quick": False,
}


def cell(degree: int | None, n: int, seconds: float) -> Cell:
    return Cell(
        Contender(8, 16, 64, degree, target="torch"), n, Timing(seconds / 4, 3 * seconds / 4, seconds, 3)
    )


def document() -> dict[str, Any]:
    """A JSON with every section, of round numbers."""
    softmax = cell(None, 16_384, 8.0)
    cells = [
        cell(2, 256, 0.01), cell(None, 256, 0.005), cell(2, 16_384, 0.5), softmax,
        cell(2, 65_536, 2.0), extrapolated(softmax, 65_536),
    ]  # fmt: skip
    polynomial = asdict(Contender(8, 16, 64, 2, target="torch"))
    peer = {"version": "1", "setting": "s", "forward_s": 0.1, "gradient_error": 0.1}
    training = [("near", 16_384, 4.0, True), ("sdpa", 16_384, 40.0, True), ("near", 65_536, 16.0, True)]
    return {
        "format": 1,
        "sections": {
            "attention": {
                **HEADING,
                "shape": {"heads": 8, "dv": 64},
                "peak_flops": 1e11,
                "cells": [c.document(1e11) for c in cells],
                "slopes": [{**polynomial, "name": "degree 2", "slope": 1.0, "from": 16_384, "to": 65_536}],
                "skipped": [{**polynomial, "d": 32, "degree": 4, "reason": "its rank"}],
                "memory": [
                    {
                        "contender": polynomial,
                        "name": "degree 2",
                        "n": 65_536,
                        "forward": None,
                        "total": 2**20,
                    }
                ],
            },
            "peers": {
                **HEADING,
                "shape": {"n": 16_384, "heads": 8, "d": 16, "dv": 64},
                "largest_logit": 1.0,
                "measured": [
                    {
                        **peer,
                        "name": "degree 2",
                        "package": "fastgrad-dsl",
                        "total_s": 0.5,
                        "output_error": 0.01,
                    },
                    {**peer, "name": "fast and wrong", "package": "x", "total_s": 0.1, "output_error": 0.5},
                    {**peer, "name": "as good", "package": "x", "total_s": 5.0, "output_error": 0.01},
                ],
                "not_available": [
                    {"name": "gone", "setting": "s", "package": "y", "version": None, "reason": "no wheel"}
                ],
            },
            "training": {
                **HEADING,
                "models": {"near": "compiled", "sdpa": "SDPA"},
                "layers": 6,
                "width": 256,
                "batch": 1,
                "rows": [
                    {"model": m, "n": n, "seconds": s, "steps": 1, "peak_bytes": None, "measured": ok}
                    for m, n, s, ok in [*training, ("sdpa", 65_536, 600.0, False)]
                ],
            },
            "compiler": {
                **HEADING,
                "quick": True,
                "runs": 1,
                "compile_96_layers_s": 0.1,
                "compile_1_layer_s": 0.05,
                "check_process_s": 0.5,
            },
            "demo": {
                **HEADING,
                "minutes": 3.0,
                "tokens": 4096,
                "models": {
                    name: {"steps": 100, "validation_loss": 2.0, "seconds": 1.0, "peak_bytes": None}
                    for name in ("gpt", "softmax")
                },
                "recall": {"gpt": {"accuracy": 0.99, "seconds": 60.0}},
            },
        },
    }


def test_committed_pages_are_what_the_committed_json_gives() -> None:
    """Otherwise: `python -m benchmarks.document`."""
    committed = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    readme = (ROOT / README).read_text(encoding="utf-8")
    for name, text in render(committed, readme).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, name


def test_committed_json_holds_numbers_and_no_quick_run() -> None:
    text = (ROOT / "docs" / "performance.json").read_text(encoding="utf-8")
    sections = json.loads(text, parse_constant=pytest.fail)["sections"]
    assert sections
    for section in sections.values():
        assert not section["quick"]
        assert section["machine"]["cpu"]


def test_the_page_shows_every_section_and_marks_what_was_not_measured() -> None:
    page = render(document(), REGION)[PAGE]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("|")]
    assert ["16,384", "8,000", "500.0 (16.0)"] in rows
    assert ["65,536", "~128,000", "2,000 (~64.0)"] in rows
    assert ["d = 16, degree 2", "16,384"] in rows, "break-even: slower at 256"
    assert ["65,536", "degree 2", "-", "1.0"] in rows
    assert ["compiled", "16,384", "4.00", "10.0", "-"] in rows
    assert ["SDPA", "65,536", "~600.00", "~1.0", "-"] in rows
    assert "32, degree 4 is left out: its rank" in page
    assert "* degree 2: 10.0 times faster than the fastest other with no larger error, as good" in page
    assert "* gone (s), y: not available: no wheel" in page
    assert page.count("these numbers mean nothing") == 1
    share = cell(2, 16_384, 0.5).document(1e11)["peak_share_total"]
    assert f"{share:.0%}" in page


def test_the_readme_gets_the_plot_and_three_numbers() -> None:
    text = render(document(), REGION)[README]
    assert text.startswith(f"# A project\n\n{BEGIN}\n![")
    assert text.endswith(f"{END}\n\nThe end.\n")
    assert text.count("\n* ") == 3
    for number in ("**16.0 times**", "**1.0 MiB** at n = 65,536", "**4.00 s**, 10.0 times faster"):
        assert number in text
    assert render(document(), text)[README] == text
    with pytest.raises(ValueError, match="region"):
        render(document(), "# A project\n")


def test_the_figure_shows_peers_and_lengths() -> None:
    svg = render(document(), REGION)[FIGURE]
    ElementTree.fromstring(svg)
    for words in ("fast and wrong", "as good", "degree 2 (slope 1.00)", "stroke-dasharray"):
        assert words in svg
