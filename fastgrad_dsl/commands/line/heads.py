"""`fastgrad heads`: what each head of a model with its weights could be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import (
    Dim,
    File,
    Include,
    Model,
    Seed,
    Set,
    Weights,
    params_of,
    path_option,
    positive,
    sizes_of,
)
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import try_file


def heads(
    file: File,
    data: Annotated[
        str,
        Option(metavar="DATA", help="A text, a .safetensors file of batches, or the word random."),
    ],
    weights: Weights = None,
    limit: Annotated[
        float, Option(callback=positive, help="Largest relative error allowed for a head's output.")
    ] = 0.05,
    picture: Annotated[Path | None, path_option("Also draw the heads, layers by heads, as SVG.")] = None,
    dim: Dim = None,
    seed: Seed = 0,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Show what each head of a model with these weights could be: a window, a polynomial, or exact attention."""
    try_file(picture)

    from fastgrad_dsl.calibration.head_picture import head_picture
    from fastgrad_dsl.commands.heads import HeadsRequest, make_heads, print_heads
    from fastgrad_dsl.commands.terminal import progress

    request = HeadsRequest(
        file, params_of(set_), model, data, weights, sizes_of(dim), seed, limit, include or ()
    )
    with progress("measuring") as tell:
        found = make_heads(request, tell)
    print_heads(found)
    if picture is not None:
        write_atomically(picture, head_picture(found))
