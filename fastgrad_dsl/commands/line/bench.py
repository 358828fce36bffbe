"""`fastgrad bench`: polynomial attention beside PyTorch's on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from fastgrad_dsl.commands.line.options import MANY, Target, path_option
from fastgrad_dsl.storage.files import write_atomically
from fastgrad_dsl.storage.outputs import try_files
from fastgrad_grammar.quote import json_text


def bench(
    n: Annotated[
        list[int] | None,
        Option("--n", min=1, max=MANY, help="A sequence length in tokens; can be repeated."),
    ] = None,
    d: Annotated[int, Option("--d", min=1, max=MANY, help="Width of queries and keys.")] = 16,
    degree: Annotated[int, Option(min=1, max=1000, help="Degree of the polynomial.")] = 2,
    near: Annotated[
        int | None, Option(min=1, max=MANY, help="Tokens per block of the exact near field.")
    ] = None,
    heads: Annotated[int, Option(min=1, max=MANY, help="Number of heads.")] = 8,
    dv: Annotated[int, Option("--dv", min=1, max=MANY, help="Width of values.")] = 64,
    dtype: Annotated[str, Option(help="Type of the inputs: float32, bfloat16 or float64.")] = "float32",
    threads: Annotated[
        int | None,
        Option(min=1, max=os.cpu_count(), help="Threads; by default as many as PyTorch uses."),
    ] = None,
    repeats: Annotated[int, Option(min=1, max=MANY, help="Number of passes; the median is shown.")] = 5,
    json_: Annotated[Path | None, path_option("Also write the numbers as JSON.", "--json")] = None,
    svg: Annotated[Path | None, path_option("Also write a plot of time against length.")] = None,
    quick: Annotated[
        bool, Option("--quick", help="Short lengths and no memory measurements: takes seconds.")
    ] = False,
    target: Target = "auto",
) -> None:
    """Time polynomial attention against PyTorch's on this machine, forward and backward."""
    try_files(json=json_, svg=svg)

    from fastgrad_dsl.bench.contenders import Contender
    from fastgrad_dsl.commands.bench import BenchRequest, plot, print_bench, run_bench
    from fastgrad_dsl.commands.terminal import progress

    polynomial = Contender(heads, d, dv, degree, near, target, dtype=dtype)
    request = BenchRequest(polynomial, degree, tuple(n or ()), threads, repeats, quick)
    with progress("measuring") as tell:
        result = run_bench(request, tell)
    print_bench(result)
    if json_ is not None:
        write_atomically(json_, json_text(result, 2) + "\n")
    if svg is not None:
        write_atomically(svg, plot(result))
