"""`fastgrad graph`: the picture of a model as an SVG file."""

from __future__ import annotations

from pathlib import Path

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.report.diagram import draw
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_grammar.quote import terminal


def write_graph(program: Program, out: Path) -> None:
    """Draw a program after `plan`, and say where the picture is."""
    write_atomically(out, draw(program))
    print(f"written to {terminal(str(out))}")
