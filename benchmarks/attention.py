"""Time and memory of the polynomial attention against PyTorch's SDPA, from 256 to 262,144 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.settings import Settings, heading, say
from fastgrad_compiler.planning.candidates import MAX_RANK
from fastgrad_dsl.bench.cells import Cell, extrapolated
from fastgrad_dsl.bench.contenders import Contender
from fastgrad_dsl.bench.memory import attention_peaks
from fastgrad_dsl.bench.peak import highest, peak_flops
from fastgrad_dsl.bench.timing import slope, time_together

HEADS, DV = 8, 64
LONGEST = 20.0  # seconds that one pass may take, by extrapolation from the length before
FROM = 16_384  # slopes are those from here up
LONGEST_EXACT_MEMORY = 16_384


@dataclass(frozen=True)
class Grid:
    """What is measured: polynomials as (d, degree, near), lengths; `only`: polynomials at one length alone.

    SDPA takes the time of its widest head for every d up to dv, so that it is measured with the inputs of `exact_d`
    alone. `exact_once`: a length at which it is measured whatever it takes.
    """

    polynomials: tuple[tuple[int, int, int | None], ...]
    lengths: tuple[int, ...]
    only: tuple[tuple[int, int, int], ...]
    memory_lengths: tuple[int, ...]
    exact_d: int = 16
    exact_once: int | None = None


FULL = Grid(
    polynomials=(
        (16, 2, None), (16, 2, 64), (16, 3, None), (16, 4, None),
        (8, 2, None), (8, 3, None), (8, 4, None),
        (32, 2, None), (32, 3, None), (32, 4, None),
    ),
    lengths=tuple(2**power for power in range(8, 19)),
    only=((4, 8, 16_384),),
    memory_lengths=(4096, 16_384, 65_536, 262_144),
    exact_once=65_536,
)  # fmt: skip
QUICK = Grid(
    polynomials=((16, 2, None), (16, 2, 64), (8, 4, None), (32, 4, None)),
    lengths=(64, 128, 256),
    only=((4, 8, 128),),
    memory_lengths=(128,),
)


def measure(settings: Settings, grid: Grid | None = None) -> dict[str, object]:
    """The section `attention` of the JSON."""
    grid = grid or (QUICK if settings.quick else FULL)
    peaks = [peak_flops(settings.threads)]
    chosen = {
        Contender(HEADS, d, DV, degree, near, settings.target): grid.lengths
        for d, degree, near in grid.polynomials
    }
    chosen |= {Contender(HEADS, d, DV, degree, None, settings.target): (n,) for d, degree, n in grid.only}
    skipped = [
        {**asdict(c), "rank": c.rank, "reason": f"rank {c.rank:,} is more than {MAX_RANK:,}"}
        for c in chosen
        if (c.rank or 0) > MAX_RANK
    ]
    polynomials = {c: lengths for c, lengths in chosen.items() if (c.rank or 0) <= MAX_RANK}
    cells: list[Cell] = []
    for n in grid.lengths:
        for d in dict.fromkeys(c.d for c in polynomials):
            here = [c for c, lengths in polynomials.items() if c.d == d and n in lengths]
            cells += _together(here, n, d == grid.exact_d, grid, settings, cells)
        peaks.append(peak_flops(settings.threads))
    peak = highest(peaks)
    return {
        **heading(settings),
        "shape": {"batch": 1, "heads": HEADS, "dv": DV, "dtype": "float32", "causal": True},
        "peak_flops": peak,
        "cells": [cell.document(peak) for cell in _with_extrapolations(cells, grid)],
        "slopes": _slopes(cells),
        "skipped": skipped,
        "memory": _memory(grid, settings),
    }


def _together(
    polynomials: Sequence[Contender],
    n: int,
    with_exact: bool,
    grid: Grid,
    settings: Settings,
    before: Sequence[Cell],
) -> list[Cell]:
    """The cells of one length and one width of queries, those left out that would take too long."""
    if not polynomials:
        return []
    exact = Contender(HEADS, polynomials[0].d, DV)
    contenders = [*polynomials, exact] if with_exact else list(polynomials)
    contenders = [
        c
        for c in contenders
        if _seconds(c, n, before) <= LONGEST or (c.degree is None and n == grid.exact_once)
    ]
    if not contenders:
        return []
    say(f"n = {n:,}, d = {exact.d}: " + "; ".join(c.name for c in contenders))
    seconds = settings.seconds if n <= FROM else settings.less
    times = time_together({c.name: c.ready() for c in contenders}, exact.inputs(n), settings.repeats, seconds)
    return [Cell(c, n, times[c.name]) for c in contenders]


def _seconds(contender: Contender, n: int, before: Sequence[Cell]) -> float:
    """What a pass will take, from the longest measured one: linear for a polynomial, quadratic for exact attention."""
    measured = [cell for cell in before if cell.contender == contender]
    if not measured:
        return 0.0
    last = measured[-1]
    ratio = n / last.n
    return last.timing.total * (ratio if contender.degree is not None else ratio**2)


def _with_extrapolations(cells: Sequence[Cell], grid: Grid) -> list[Cell]:
    """All cells, and SDPA at the lengths where it was not measured, from the longest where it was."""
    exact = [cell for cell in cells if cell.degree is None]
    measured = {cell.n for cell in exact}
    longer = [n for n in grid.lengths if exact and n not in measured]
    return [*cells, *(extrapolated(exact[-1], n) for n in longer)]


def _slopes(cells: Sequence[Cell]) -> list[dict[str, object]]:
    """Of log time on log n, forward and backward, over the measured lengths from FROM up."""
    result: list[dict[str, object]] = []
    for contender in dict.fromkeys(cell.contender for cell in cells):
        long = [cell for cell in cells if cell.contender == contender and cell.n >= FROM]
        found = slope([(cell.n, cell.timing.total) for cell in long])
        if found is not None:
            ends = {"from": long[0].n, "to": long[-1].n}
            result.append({**asdict(contender), "name": contender.name, "slope": found, **ends})
    return result


def _memory(grid: Grid, settings: Settings) -> list[dict[str, object]]:
    result: list[dict[str, object]] = []
    d = grid.exact_d
    polynomials = (Contender(HEADS, d, DV, 2, near, settings.target) for near in (None, 64))
    for contender in (*polynomials, Contender(HEADS, d, DV)):
        for n in grid.memory_lengths:
            if contender.degree is None and n > LONGEST_EXACT_MEMORY:
                continue  # minutes
            say(f"memory of {contender.name} at n = {n:,}")
            peaks = attention_peaks(contender, n, settings.threads)
            result.append({"contender": asdict(contender), "name": contender.name, "n": n, **peaks})
    return result
