"""`fastgrad bench`: polynomial attention against PyTorch's on this machine, as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgrad_compiler.approximation.polynomial import fit
from fastgrad_compiler.planning.candidates import MAX_RANK
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_dsl.bench.cells import Cell, extrapolated
from fastgrad_dsl.bench.contenders import Contender, Inputs, results
from fastgrad_dsl.bench.machine import describe_machine
from fastgrad_dsl.bench.memory import attention_peaks
from fastgrad_dsl.bench.peak import error_of_shares, highest, peak_flops
from fastgrad_dsl.bench.timing import time_together
from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.terminal import console
from fastgrad_dsl.models.batches import memory_bytes
from fastgrad_dsl.plots.panels import Panel, Series, render
from fastgrad_grammar.diagnostics import TfgError

LENGTHS, QUICK_LENGTHS = (1024, 4096, 16384), (256, 1024)
SECONDS, QUICK_SECONDS = 10.0, 2.0  # for the passes of one attention at one length
COLUMNS = [
    Column("attention", is_number=False),
    *map(
        Column,
        ("n", "forward\nms", "backward\nms", "total\nms", "faster\nthan SDPA", "of FMA\npeak", "peak\nMiB"),
    ),
]
DTYPES = ("float32", "bfloat16", "float64")
LONGEST_EXACT = 60.0  # seconds that a pass of exact attention may take; longer ones are extrapolated


@dataclass(frozen=True)
class BenchRequest:
    """What to measure; no lengths: those of the default or the quick run. `threads` None: as many as PyTorch takes."""

    polynomial: Contender
    degree: int
    lengths: tuple[int, ...]
    threads: int | None
    repeats: int
    quick: bool

    @property
    def exact(self) -> Contender:
        """What it is measured beside."""
        return replace(self.polynomial, degree=None, near=None)


def check_request(request: BenchRequest) -> None:
    """Raise TfgError FG416 for what cannot be served or does not fit, FG420 for a target that is not available."""
    served, degree = request.polynomial, request.degree
    size, option = rank(served.d, degree), f"--degree {degree}"
    if served.dtype not in DTYPES:
        said = f"--dtype {served.dtype} is not one of {', '.join(DTYPES)}"
        raise TfgError.of("FG416", said, "take one of these")
    if size > MAX_RANK:
        said = f"{option} with --d {served.d} has rank {size:,}, more than {MAX_RANK:,}"
        raise TfgError.of("FG416", said, "take a smaller degree or a smaller d")
    try:
        positive = fit("balanced", degree, 1.0).positive
    except ValueError as error:
        raise TfgError.of("FG416", f"{option}: {error}", "take a smaller degree") from None
    if not positive:
        raise TfgError.of("FG416", f"{option}: its polynomial is not positive", "take an even degree")
    numbers = max(request.lengths, default=1) * served.heads * (4 * served.d + 4 * served.dv)
    if 4 * numbers > memory_bytes():
        said = "the inputs and their gradients do not fit into memory"
        raise TfgError.of("FG416", said, "take a smaller --n or --heads")
    served.ready()


def run_bench(request: BenchRequest, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure all lengths; the document is that of docs/benchmark.md with one section, `attention`."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    check_request(request)
    threads = torch.get_num_threads()
    lengths = request.lengths or (QUICK_LENGTHS if request.quick else LENGTHS)
    progress("the peak of the machine")
    peaks = [peak_flops(threads)]
    cells: list[Cell] = []
    exact_cell: Cell | None = None
    for n in sorted(set(lengths)):
        progress(f"n = {n:,}")
        found = _measure(request, n, exact_cell)
        cells += found
        measured = [cell for cell in found if cell.degree is None and cell.measured]
        exact_cell = measured[0] if measured else exact_cell
        peaks.append(peak_flops(threads))
    peak = highest(peaks) if request.polynomial.dtype == "float32" else None  # it is one of float32
    memory = []
    for n in [] if request.quick else sorted(set(lengths)):
        progress(f"memory at n = {n:,}")
        used = attention_peaks(request.polynomial, n, threads)
        memory.append({"contender": asdict(request.polynomial), "n": n, **used})
    section = {
        "machine": describe_machine(threads),
        "peak_flops": peak,
        "cells": [cell.document(peak) for cell in cells],
        "memory": memory,
        "output_error": _output_error(request, min(lengths)),
    }
    return {"format": 1, "sections": {"attention": section}}


def _measure(request: BenchRequest, n: int, before: Cell | None) -> list[Cell]:
    """Both attentions at one length; the exact one extrapolated from `before` where it would take too long."""
    polynomial, exact = request.polynomial, request.exact
    predicted = 0.0 if before is None else extrapolated(before, n).timing.total
    contenders = [polynomial] if predicted > LONGEST_EXACT else [polynomial, exact]
    times = time_together(
        {contender.name: contender.ready() for contender in contenders},
        polynomial.inputs(n),
        request.repeats,
        QUICK_SECONDS if request.quick else SECONDS,
    )
    cells = [Cell(contender, n, times[contender.name]) for contender in contenders]
    if before is not None and len(contenders) == 1:
        cells.append(extrapolated(before, n))
    return cells


def _output_error(request: BenchRequest, n: int) -> dict[str, object]:
    """Relative L2 errors: of the output against exact attention in float64 on the same inputs; and of output and the
    gradients of q, k and v against the same attention in float64.
    """
    served = request.polynomial
    inputs = served.inputs(n)
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    precise = Inputs(q, k, v, inputs.cotangent.double())
    found = results(served.function(), inputs)
    rounded = map(_relative, found, results(replace(served, target="torch").function(), precise))
    with torch.no_grad():
        exact = request.exact.function()(q, k, v)
    return {"n": n, "relative_l2": _relative(found[0], exact), "rounding": [*rounded]}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def plot(document: dict[str, Any]) -> str:
    """Time against length, with extrapolations dashed."""
    cells = document["sections"]["attention"]["cells"]
    series = []
    for colour, name in enumerate(dict.fromkeys(cell["name"] for cell in cells)):
        for measured in (True, False):
            points = tuple(
                (float(cell["n"]), cell["total_s"])
                for cell in cells
                if cell["name"] == name and cell["measured"] is measured
            )
            if points:
                label = name if measured else f"{name}, extrapolated"
                series.append(Series(label, points, colour, line=True, dashed=not measured))
    panel = Panel("forward and backward", "tokens", "seconds (lower is better)", tuple(series))
    description = "; ".join(
        f"{cell['name']} at n = {cell['n']:,}: {cell['total_s']:.3g} s" for cell in cells if cell["measured"]
    )
    return render([panel], "Time of attention against sequence length", description)


def print_bench(document: dict[str, Any]) -> None:
    """The table."""
    out = console()
    section = document["sections"]["attention"]
    machine, cells = section["machine"], section["cells"]
    shape = cells[0]
    say(
        out,
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; {shape['heads']} heads, "
        f"d = {shape['d']}, dv = {shape['dv']}, causal, {shape['dtype']}, target {shape['target']}",
        style="bold",
    )
    peaks = {(entry["n"], entry["contender"]["degree"]): entry["total"] for entry in section["memory"]}
    exact = {cell["n"]: cell["total_s"] for cell in cells if cell["degree"] is None}
    rows = []
    for cell in cells:
        memory, share = peaks.get((cell["n"], cell["degree"])), cell["peak_share_total"]
        rows.append(
            [
                cell["name"] + ("" if cell["measured"] else " (extrapolated)"),
                f"{cell['n']:,}",
                *(f"{1e3 * cell[key]:.1f}" for key in ("forward_s", "backward_s", "total_s")),
                f"{exact[cell['n']] / cell['total_s']:.1f} x",
                "-" if share is None else f"{share:.0%}",
                "-" if memory is None else f"{memory / 2**20:.1f}",
            ]
        )
    print_table(out, COLUMNS, rows)
    output_error = section["output_error"]
    notes = "medians of interleaved passes; lower is better; peak memory beyond inputs, outputs and gradients"
    say(out, notes, style="dim")
    if error := error_of_shares(cell["peak_share_total"] for cell in cells):
        say(out, error, style="yellow")
    say(
        out,
        f"relative error of the output against float64 softmax, logits within 1, n = {output_error['n']:,}: "
        f"{output_error['relative_l2']:.2g} (measured)",
    )
    of_out, *of_gradients = (f"{error:.2g}" for error in output_error["rounding"])
    say(out, f"rounding, by the same attention in float64: {of_out} of the output,")
    say(out, f"{', '.join(of_gradients)} of the gradients of q, k, v (measured)")
