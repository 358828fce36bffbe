"""`fastgrad check`: every error of a file, or how each attention will be computed."""

from __future__ import annotations

from fastgrad_dsl.commands.line.options import File, Include, Model, PlannedDim, Set, sizes_of
from fastgrad_dsl.commands.line.stages import program_stages


def check(
    file: File, model: Model = None, set_: Set = None, include: Include = None, dim: PlannedDim = None
) -> None:
    """Check a file: report every error, or show how each attention will be computed and the memory of a step."""
    from fastgrad_dsl.commands.terminal import print_memory, print_plan, print_way_on

    sizes = sizes_of(dim)
    program = program_stages(file, model, set_, include, until="plan")[-1].program
    print_plan(program, str(file))
    print_way_on(program, str(file))
    if program.budget is not None and program.budget.memory is not None:
        print_memory(program_stages(file, model, set_, include, until=None, dims=sizes)[-1].program)
