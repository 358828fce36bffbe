"""`fastgrad check`: every error of a file, or how each attention will be computed."""

from __future__ import annotations

from fastgrad_dsl.commands.line.options import File, Include, Model, Set
from fastgrad_dsl.commands.line.stages import program_stages


def check(file: File, model: Model = None, set_: Set = None, include: Include = None) -> None:
    """Check a file: report every error, or show how each attention will be computed."""
    from fastgrad_dsl.commands.terminal import print_plan

    stages = program_stages(file, model, set_, include, until="plan")
    print_plan(stages[-1].program, str(file))
