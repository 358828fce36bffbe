"""`fastgrad stages`: the program as each pass leaves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import File, Include, Model, Set, params_of
from fastgrad_grammar.diagnostics import TfgError, suggestions
from fastgrad_grammar.read import read_source

if TYPE_CHECKING:
    from fastgrad_compiler.ir.graph import Program
    from fastgrad_compiler.pipeline import Stage


def stages(
    file: File,
    after: Annotated[str | None, Option(help="Show only the program after this pass.")] = None,
    along: Annotated[
        str | None,
        Option(
            metavar="DIM",
            help="The dim along which to derive the step form; an error says why there is none.",
        ),
    ] = None,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Print the program as each pass leaves it."""
    from fastgrad_compiler.passes.step import with_step
    from fastgrad_compiler.pipeline import PASSES
    from fastgrad_dsl.commands.stages import print_stage

    names = ["elaborate", *(p.name for p in PASSES)]
    if after is not None and after not in names:
        raise TfgError.of("FG417", f"unknown pass {after}", *suggestions(after, names))
    found = program_stages(file, model, set_, include, until=after)
    if along is not None and after in (None, "step"):
        found = (*found[:-1], replace(found[-1], program=with_step(found[-2].program, along)))
    for stage in found:
        if after in (None, stage.name):
            print_stage(stage)


def program_stages(
    file: Path,
    model: str | None,
    set_: list[str] | None,
    include: list[Path] | None,
    until: str | None,
    dims: dict[str, int] | None = None,
) -> tuple[Stage, ...]:
    """The stages of a file from its text to the pass `until`; no output of them is written, so nothing is compared."""
    from fastgrad_compiler.frontend import elaborate
    from fastgrad_compiler.pipeline import run

    program: Program = elaborate(
        read_source(file, include=include or ()), model=model, params=params_of(set_)
    )
    return run(program, until=until, validate=False, dims=dims)
