"""A report as it is, for a page that embeds it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

import fastgrad_dsl as fg
from fastgrad_dsl.report.page import render_html

ROOT = Path(__file__).parent.parent
PAGE = """# A report

The report of `examples/bounded.tfg` with `depth = 2`, measured when this site was built, on {tokens} random tokens
and initial weights. [How to read it](report.md); <a href="sample-report-page.html">open it alone</a>.

<iframe class="report" title="The report of examples/bounded.tfg" src="sample-report-page.html"></iframe>
"""
TOKENS = 1024  # the least power of two that polynomials serve here


def write_figures(pages: Path) -> None:
    """Write the page and the report that it shows."""
    extra = pages / "extra"
    extra.mkdir()
    (extra / "sample-report-page.html").write_text(sample_report(), encoding="utf-8")
    (pages / "sample-report.md").write_text(PAGE.format(tokens=TOKENS), encoding="utf-8")


def sample_report() -> str:
    """The page of a report that was measured now."""
    with contextlib.chdir(ROOT):  # the page names the file as a reader would
        compiled = fg.compile("examples/bounded.tfg", params={"depth": 2}, target="torch", validate=False)
    tokens = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return render_html(compiled.report(compiled.module(seed=0), (tokens, tokens)))
