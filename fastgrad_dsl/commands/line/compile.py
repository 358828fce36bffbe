"""`fastgrad compile`: a folder with a readable model from a file."""

from __future__ import annotations

import sys
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
    params_of,
    path_option,
    sizes_of,
)
from fastgrad_dsl.storage.outputs import try_folder
from fastgrad_grammar.quote import terminal
from fastgrad_grammar.render import render


def compile_(
    file: File,
    out: Annotated[Path, path_option("The folder to write.", "--out", "-o")],
    model: Model = None,
    set_: Set = None,
    include: Include = None,
    target: Target = "auto",
    calibrate: Annotated[
        str | None,
        Option(
            metavar="DATA",
            help="Plan from measurements on DATA: a text, a .safetensors file of batches, or the word random.",
        ),
    ] = None,
    weights: Weights = None,
    dim: Dim = None,
    seed: Seed = 0,
    validate: Annotated[
        bool,
        Option(
            "--validate/--no-validate", help="Compare the program before and after each pass on small inputs."
        ),
    ] = True,
    force: Annotated[
        bool,
        Option("--force", help="Write even to a folder that holds something else or was changed by hand."),
    ] = False,
) -> None:
    """Compile a file to a folder with a readable model.py that needs only PyTorch.

    With --target cpp the C++ kernels are built now; with auto, when the model first runs on a CPU. Triton kernels are
    compiled when it first runs on a GPU. A budget with `trust = calibrated` is calibrated on random inputs unless
    --calibrate names other data.
    """
    try_folder(out)

    import fastgrad_dsl as fg
    from fastgrad_dsl.api.native_build import build_kernels
    from fastgrad_dsl.calibration.data import RANDOM, calibrated
    from fastgrad_dsl.commands.terminal import print_calibration, print_memory, print_plan, progress
    from fastgrad_dsl.storage.build_manifest import check_folder

    check_folder(out, force=force)  # before anything that takes time
    compiled = fg.compile(
        file,
        params=params_of(set_),
        model=model,
        target=target,
        validate=validate,
        include=include or (),
        dims=sizes_of(dim),
    )
    budget = compiled.program.budget
    if calibrate is None and budget is not None and budget.trust == "calibrated":
        calibrate = RANDOM
    if calibrate is not None:
        with progress("calibrating:") as tell:
            compiled = calibrated(compiled, calibrate, tell, dims=sizes_of(dim), weights=weights, seed=seed)
    compiled.write(out, force=force)
    print_plan(compiled.program, str(file))
    print_memory(compiled.program)
    if compiled.calibration is not None:
        print_calibration(compiled.calibration)
    print(f"written to {terminal(str(out))}/ (model.py, plan.json, report.html, report.json, stages/)")
    if target == "cpp":
        with progress("building") as tell:
            warning = build_kernels(compiled.modules, tell)
        if warning is not None:
            sys.stderr.write(render([warning], colour=sys.stderr.isatty()))
