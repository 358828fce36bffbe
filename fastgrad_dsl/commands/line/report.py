"""`fastgrad report`: the errors of a model, on the terminal and as documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastgrad_dsl.commands.line.options import (
    Dim,
    Include,
    Model,
    Seed,
    Set,
    Weights,
    Wide,
    check_spec_options,
    params_of,
    path_option,
    sizes_of,
)
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import try_files


def report(
    where: Annotated[
        Path,
        Argument(
            metavar="DIR_OR_FILE", help="A folder that `compile` wrote, or a .tfg file.", readable=False
        ),
    ],
    json_: Annotated[Path | None, path_option("Also write the report as JSON.", "--json")] = None,
    html: Annotated[
        Path | None,
        path_option("Also write the report as one HTML page that opens offline.", "--html"),
    ] = None,
    text: Annotated[Path | None, path_option("Measure on this text instead of random inputs.")] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    measure: Annotated[bool, Option(help="Run the model, or show only what is known without data.")] = True,
    serve: Annotated[
        bool,
        Option("--serve", help="Show what is known without data on a local page that follows the .tfg file."),
    ] = False,
    port: Annotated[int, Option(min=0, max=65535, help="The port of --serve; 0 takes any that is free.")] = 0,
    wide: Wide = False,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Show the error of each attention and of the whole model: bounds, estimates and measurements."""
    check_spec_options(where, set_, model, include)
    if serve:
        from fastgrad_dsl.commands.serve import ServeRequest, check_alone
        from fastgrad_dsl.commands.serve import serve as serve_report

        check_alone(json=json_, html=html, text=text, weights=weights, dim=dim)
        serve_report(ServeRequest(where, params_of(set_), model, include or ()), port)
        return
    try_files(json=json_, html=html)

    from fastgrad_dsl.api.report import ReportRequest, make_report
    from fastgrad_dsl.commands.terminal import print_report, progress
    from fastgrad_dsl.documents.write import to_json
    from fastgrad_dsl.report.page import render_html

    request = ReportRequest(
        where, params_of(set_), model, text, weights, sizes_of(dim), seed, measure, include=include or ()
    )
    with progress("measuring") as tell:
        result = make_report(request, tell)
    print_report(result, wide=wide)
    if json_ is not None:
        write_atomically(json_, to_json(result))
    if html is not None:
        write_atomically(html, render_html(result))
