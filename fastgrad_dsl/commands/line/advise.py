"""`fastgrad advise`: what would make a budget feasible or cheaper."""

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
    Target,
    Weights,
    Wide,
    params_of,
    path_option,
    sizes_of,
)
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import try_file


def advise(
    file: File,
    calibrate: Annotated[
        str | None,
        Option(metavar="DATA", help="Also measure candidates on DATA, as `compile --calibrate` does."),
    ] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    json_: Annotated[Path | None, path_option("Also write the advice as JSON.", "--json")] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
    wide: Wide = False,
) -> None:
    """Show what would make the budget feasible or cheaper, and what each change costs in time and error."""
    try_file(json_)

    from fastgrad_dsl.commands.advise import AdviceRequest, make_advice, print_advice
    from fastgrad_dsl.commands.terminal import progress
    from fastgrad_dsl.documents.write import to_json

    request = AdviceRequest(
        file, params_of(set_), model, target, calibrate, weights, sizes_of(dim), seed, include or ()
    )
    with progress("measuring") as tell:
        advice = make_advice(request, tell)
    print_advice(advice, wide=wide)
    if json_ is not None:
        write_atomically(json_, to_json(advice))
