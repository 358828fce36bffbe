"""`fastgrad graph`: a model as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastgrad_dsl.commands.line.options import File, Include, Model, Set, path_option
from fastgrad_dsl.commands.line.stages import program_stages
from fastgrad_dsl.storage.outputs import try_file


def graph(
    file: File,
    out: Annotated[Path, path_option("The SVG file to write.", "--out", "-o")],
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Draw a model: blocks as boxes, attentions in the colour of what was decided for them."""
    try_file(out)

    from fastgrad_dsl.commands.graph import write_graph

    write_graph(program_stages(file, model, set_, include, until="plan")[-1].program, out)
