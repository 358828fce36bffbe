"""`fastgrad tune`: the fastest configurations of Triton kernels on this GPU."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import MANY, File, Include, Model, Seq, Set, params_of


def tune(
    file: File,
    seq: Seq = 8192,
    batch: Annotated[int, Option(min=1, max=MANY, help="Sequences per batch.")] = 1,
    dtype: Annotated[str, Option(help="Type of the inputs: float32, float16 or bfloat16.")] = "bfloat16",
    dry_run: Annotated[
        bool, Option("--dry-run", help="List the candidates and time nothing; needs no GPU.")
    ] = False,
    model: Model = None,
    set_: Set = None,
    include: Include = None,
) -> None:
    """Find the fastest configurations of a model's Triton kernels on this GPU, and keep them in the user's cache."""
    from fastgrad_dsl.commands.terminal import progress
    from fastgrad_dsl.commands.tune import TuneRequest, print_candidates, print_choices, run_tune

    request = TuneRequest(file, params_of(set_), model, batch, seq, dtype, include or ())
    if dry_run:
        print_candidates(request)
        return
    with progress("timing") as tell:
        result = run_tune(request, tell)
    print_choices(result)
