"""docs/performance.md, docs/scaling.md, plots and a region of README.md, made from docs/performance.json.

python -m benchmarks.document [--json FILE] [--root FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, generation_table, gpu_tables, soak, tables
from benchmarks.curves_figure import curves_figure
from benchmarks.headlines import HEADLINES
from benchmarks.scaling import page as scaling
from benchmarks.settings import ROOT
from fastgrad_dsl.storage.files import write_atomically

Document = Mapping[str, Any]
PAGE, FIGURE, README = "docs/performance.md", "docs/performance.svg", "README.md"
CURVES = "docs/curves.svg"
WRITERS = {
    **tables.SECTIONS,
    "generation": generation_table.generation,
    "soak": soak.soak,
    **gpu_tables.SECTIONS,
}
BEGIN, END = "<!-- performance: made by benchmarks/document.py -->", "<!-- end of performance -->"
INTRODUCTION = """\
# Performance

Made from [performance.json](performance.json) by `python -m benchmarks.document`; `make bench` measures again, and
[benchmark.md](benchmark.md) says what and how. Every number is **measured** unless it is marked as extrapolated or, for
GPUs, as a model. The machine is shared and noisy: ratios within a section mean more than times.
"""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "performance.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds README.md and docs/")
    options = parser.parse_args()
    document = json.loads(options.json.read_text(encoding="utf-8"))
    readme = (options.root / README).read_text(encoding="utf-8")
    for name, text in render(document, readme).items():
        write_atomically(options.root / name, text)


def render(document: Document, readme: str) -> dict[str, str]:
    """The text of each file by its path. Raises ValueError where the README has no region to fill."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.S)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"README.md needs one region between {BEGIN} and {END}")
    region = f"{BEGIN}\n{_region(document)}{END}"
    made = {
        PAGE: page(document),
        FIGURE: figures.figure(document),
        README: pattern.sub(lambda _: region, readme),
    }
    if "curves" in document["sections"]:
        made[CURVES] = curves_figure(document["sections"]["curves"])
    if "scaling" in document["sections"]:
        section = document["sections"]["scaling"]
        made |= {scaling.PAGE: wrapped(scaling.page(section)), **scaling.figures(section)}
    return made


def page(document: Document) -> str:
    """docs/performance.md."""
    parts = [INTRODUCTION, f"![{figures.TITLE}](performance.svg)\n"]
    for name, section in document["sections"].items():
        if name in WRITERS:
            parts.append(WRITERS[name](section))
    return wrapped("\n".join(parts))


def wrapped(text: str) -> str:
    """The text with its prose at most 120 columns wide; tables, headings and pictures stay as they are."""
    return "\n".join(
        line if line.startswith(("|", "#", "!")) else textwrap.fill(
            line, 120, subsequent_indent="  " if line.startswith("* ") else "",
            break_long_words=False, break_on_hyphens=False,
        )
        for line in text.split("\n")
    )  # fmt: skip


def _region(document: Document) -> str:
    """The plot and the numbers that matter most, as far as they are measured."""
    facts = [fact for make in HEADLINES if (fact := make(document["sections"])) is not None]
    lines = [f"* {fact}" for fact in facts]
    machine = tables.machine_line(next(iter(document["sections"].values())))
    return wrapped(
        "\n".join([f"![{figures.TITLE}]({FIGURE})", "", f"Measured on {machine}:", "", *lines, ""])
    )


if __name__ == "__main__":
    main()
