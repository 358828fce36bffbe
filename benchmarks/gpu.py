"""Measure the Triton kernels on this machine's GPU, beside SDPA and flash-linear-attention where that is installed.

    python -m benchmarks.gpu [--quick] [--json FILE] [--repeats N] [--seconds S]

First the kernels are checked on the device against the same polynomial in float64; wrong results end it with status 1.
Then all contenders take the same inputs in turns, forward and backward, by the device's own clock, from 1,024 to a
million tokens. The section `gpu` of the JSON is replaced, the others stay (docs/benchmark.md). Without a GPU that
PyTorch can use, or without the target, it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_contenders import Case, Contestant, contestants
from benchmarks.settings import ROOT, Settings, heading, say
from fastgrad_compiler.planning.roofline import best, shape_of
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import DEVICES
from fastgrad_dsl.bench.cells import Cell
from fastgrad_dsl.bench.contenders import Attention, Inputs, make_inputs, results
from fastgrad_dsl.bench.machine import package_version
from fastgrad_dsl.bench.timing import Timing, medians
from fastgrad_dsl.functional import polynomial_attention
from fastgrad_grammar.diagnostics import TfgError

T = TypeVar("T")
HEADS = 8
LONGEST = 20.0  # seconds that one pass may take, by extrapolation from the length before
LONG_PASS = 1.0  # seconds
UNITS = 8  # rounding errors, of the operands of the products, that a result may be off by (relative, L2)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}  # last: three tf32
CHECKED_N, CHECKED_HEADS = 1000, 4  # not a multiple of any tile
ERRORS_N = 2048


class WrongResults(Exception):
    """The kernels do not compute on this device what they should."""


@dataclass(frozen=True)
class Setup:
    """The device and how it is observed, so that a test can stand in for it.

    clock: runs a function and gives its result and its seconds; peak: runs one and gives the bytes it held at most.
    """

    device: str
    name: str
    architecture: str
    clock: Callable[[Callable[[], Any]], tuple[Any, float]]
    peak: Callable[[Callable[[], object]], int | None]


@dataclass(frozen=True)
class Grid:
    """What is measured: attentions, by dtype, and lengths."""

    cases: Mapping[torch.dtype, tuple[Case, ...]]
    lengths: tuple[int, ...]
    checked_n: int = CHECKED_N
    errors_n: int = ERRORS_N


FULL = Grid(
    {
        torch.bfloat16: (
            Case(16, 64, 2), Case(16, 64, 2, 64), Case(16, 64, 3), Case(8, 64, 2), Case(32, 64, 2),
            Case(64, 64, 2), Case(64, 128, 2),
        ),
        torch.float32: (Case(16, 64, 2), Case(16, 64, 2, 64), Case(16, 64, 3)),
    },
    tuple(2**power for power in range(10, 21)),
)  # fmt: skip
QUICK = Grid({torch.bfloat16: (Case(16, 64, 2),), torch.float32: (Case(16, 64, 2),)}, (1024, 4096))


def main() -> None:
    """Measure and write; the status is 2 where there is nothing to measure on, 1 for wrong results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "performance.json")
    parser.add_argument("--repeats", type=int, default=20, help="passes of which the median is taken")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one contender at one length")
    parser.add_argument("--quick", action="store_true", help="few sizes, to see whether it works")
    options = parser.parse_args()
    seconds = 1.0 if options.quick else options.seconds
    settings = Settings("triton", torch.get_num_threads(), options.repeats, seconds, options.quick)
    started = time.monotonic()
    section = measure(settings)
    from benchmarks.run import merge  # which imports this file

    merge(options.json, "gpu", {**section, "seconds": round(time.monotonic() - started, 1)})


def measure(settings: Settings, grid: Grid | None = None, setup: Setup | None = None) -> dict[str, object]:
    """The section `gpu` of the JSON. SystemExit with status 2 or 1, and a message, as `main` says."""
    setup = setup or _cuda()
    target = "triton" if settings.target == "auto" else settings.target
    grid = grid or (QUICK if settings.quick else FULL)
    try:
        checks = check(grid, setup, target)
    except TfgError as error:
        _leave(2, f"the target cannot be measured: {error.diagnostics[0].message}")
    except WrongResults as error:
        _leave(1, str(error))
    cells: list[dict[str, object]] = []
    errors: list[dict[str, object]] = []
    skipped: list[dict[str, object]] = []
    for dtype, cases in grid.cases.items():
        for widths in dict.fromkeys((case.d, case.dv) for case in cases):
            here = [case for case in cases if (case.d, case.dv) == widths]
            for n in grid.lengths:
                _together(contestants(HEADS, here, dtype, target), n, dtype, settings, setup, cells, skipped)
            errors += _errors(contestants(2, here, dtype, target), grid.errors_n, dtype, setup)
    return {
        **heading(settings),
        "target": target,
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "device": {
            "name": setup.name,
            "architecture": setup.architecture,
            "triton": package_version("triton"),
        },
        "shape": {"batch": 1, "heads": HEADS, "causal": True},
        "checks": checks,
        "errors": errors,
        "cells": cells,
        "skipped": skipped,
    }


def _leave(status: int, message: str) -> NoReturn:
    print(f"benchmarks.gpu: {message}", file=sys.stderr)
    raise SystemExit(status)


def _cuda() -> Setup:
    """The first GPU of this machine, of NVIDIA or AMD; SystemExit with status 2 without one."""
    if not torch.cuda.is_available():
        _leave(
            2,
            "PyTorch finds no GPU here (torch.cuda.is_available() is false). What the kernels should take by their "
            "bytes and flops needs none: python -m benchmarks.run --section gpu_model",
        )
    properties = torch.cuda.get_device_properties(0)
    architecture = getattr(properties, "gcnArchName", "").partition(":")[0]
    return Setup(
        "cuda",
        properties.name,
        architecture if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        _events,
        _peak,
    )


def _events(run: Callable[[], T]) -> tuple[T, float]:
    """Between two events in the device's queue: what the host does meanwhile counts only where the device waits."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def _peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return Inputs(q, k, v, inputs.cotangent.double())


def check(grid: Grid, setup: Setup, target: str) -> list[dict[str, object]]:
    """Every attention of the grid in every dtype, causal and not, against float64. Raises WrongResults."""
    found: list[dict[str, object]] = []
    for case in dict.fromkeys(case for cases in grid.cases.values() for case in cases):
        for dtype in ROUNDING:
            for causal in (True, False):
                found.append(_check(case, dtype, causal, grid.checked_n, setup, target))
    wrong = [c for c in found if not c["correct"]]
    if wrong:
        lines = [
            f"{c['name']}, d = {c['d']}, dv = {c['dv']}, {c['dtype']}: output {c['output_error']:.1e}, "
            f"gradient {c['gradient_error']:.1e}, allowed {c['allowed']:.1e}"
            for c in wrong
        ]
        raise WrongResults("\n".join(["results on this device are wrong, so nothing is timed:", *lines]))
    return found


def _check(
    case: Case, dtype: torch.dtype, causal: bool, n: int, setup: Setup, target: str
) -> dict[str, object]:
    """Grouped heads: two of queries to one of keys."""
    made = make_inputs(n, CHECKED_HEADS, case.d, case.dv, dtype=dtype, device=setup.device)
    k, v = (x.detach()[:, ::2].contiguous().requires_grad_() for x in (made.k, made.v))
    inputs = Inputs(made.q, k, v, made.cotangent)
    exact = in_double(inputs)
    run = partial(
        polynomial_attention, degree=case.degree or 2, bound=1.0, scale=1.0, causal=causal, near=case.near
    )
    output, gradient = relative_errors(
        results(partial(run, target=target), inputs), results(partial(run, target="torch"), exact)
    )
    allowed = UNITS * ROUNDING[dtype]
    return {
        **case.sizes(),
        "name": case.name + ("" if causal else ", no mask"),
        "dtype": _name(dtype),
        "n": n,
        "output_error": output,
        "gradient_error": gradient,
        "allowed": allowed,
        "correct": max(output, gradient) <= allowed,
    }


def relative_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Of the output, and the largest of those of the gradients; NaN counts as infinite."""
    errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]
    errors = [error if error == error else float("inf") for error in errors]
    return errors[0], max(errors[1:])


def _errors(
    contenders: Sequence[Contestant], n: int, dtype: torch.dtype, setup: Setup
) -> list[dict[str, object]]:
    """Of those that stand for softmax, against it in float64 on the same, rounded inputs."""
    rows: list[dict[str, object]] = []
    for c in contenders:
        if not c.softmax or c.missing is not None:
            continue
        inputs = make_inputs(n, 2, c.case.d, c.case.dv, dtype=dtype, device=setup.device)
        try:
            output, gradient = relative_errors(results(c.run, inputs), results(_softmax, in_double(inputs)))
        except (RuntimeError, AssertionError):
            continue  # it is named with its reason where it is timed
        entry = {**c.entry(), "dtype": _name(dtype), "n": n}
        rows.append({**entry, "output_error": output, "gradient_error": gradient})
    return rows


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, scale 1, by its definition."""
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _together(
    contenders: Sequence[Contestant],
    n: int,
    dtype: torch.dtype,
    settings: Settings,
    setup: Setup,
    cells: list[dict[str, object]],
    skipped: list[dict[str, object]],
) -> None:
    """Add the cells of one length, and what was left out with the reason."""
    case = contenders[0].case
    say(f"{_name(dtype)}, d = {case.d}, n = {n:,}")
    inputs = make_inputs(n, HEADS, case.d, case.dv, dtype=dtype, device=setup.device)
    ready: list[tuple[Contestant, int | None, float]] = []
    for c in contenders:
        entry = {**c.entry(), "dtype": _name(dtype), "n": n}
        reason = c.missing or _too_long(c, n, dtype, cells, skipped)
        if reason is None:
            try:
                ready.append((c, *_warm(c.run, inputs, setup)))
                continue
            except (RuntimeError, AssertionError) as error:  # out of memory, or a shape that it does not take
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        skipped.append({**entry, "reason": reason})
    times: dict[Contestant, list[tuple[float, float]]] = {c: [] for c, _, _ in ready}
    for turn in range(settings.repeats):
        for c, _, seconds in ready:
            if turn == 0 or (turn + 1) * seconds <= settings.seconds:
                times[c].append(one_pass(c.run, inputs, setup))
    cells += [_cell(c, n, dtype, medians(times[c]), memory, setup) for c, memory, _ in ready]


def _too_long(
    c: Contestant,
    n: int,
    dtype: torch.dtype,
    cells: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]],
) -> str | None:
    """Why it is not even tried: a shorter length failed, or a pass would take more than LONGEST."""

    def same(row: Mapping[str, Any]) -> bool:
        return row["dtype"] == _name(dtype) and all(row[key] == value for key, value in c.entry().items())

    if any(same(row) and row["n"] < n for row in skipped):
        return "a shorter length was left out"
    last = max((row for row in cells if same(row)), key=lambda row: int(row["n"]), default=None)
    if last is None:
        return None
    seconds = last["total_s"] * (n / last["n"]) ** (2 if c.quadratic else 1)
    return f"a pass would take {seconds:.0f} s" if seconds > LONGEST else None


def _warm(run: Attention, inputs: Inputs, setup: Setup) -> tuple[int | None, float]:
    """Peak bytes of a pass, and seconds of one, once its kernels are compiled. Long passes need less warming."""
    one_pass(run, inputs, setup)
    memory = setup.peak(lambda: results(run, inputs))
    second = sum(one_pass(run, inputs, setup))
    return memory, second if second > LONG_PASS else sum(one_pass(run, inputs, setup))


def one_pass(run: Attention, inputs: Inputs, setup: Setup) -> tuple[float, float]:
    """Seconds of one forward and of one backward pass."""
    out, forward = setup.clock(lambda: run(inputs.q, inputs.k, inputs.v))
    leaves = (inputs.q, inputs.k, inputs.v)
    _, backward = setup.clock(lambda: torch.autograd.grad(out, leaves, inputs.cotangent))
    return forward, backward


def _cell(
    c: Contestant, n: int, dtype: torch.dtype, timing: Timing, memory: int | None, setup: Setup
) -> dict[str, object]:
    """As the cells of the section `attention`, with the dtype, whose code it is, and the peak of memory."""
    device = DEVICES.get(setup.architecture)
    peak = None if device is None else device.single if dtype == torch.float32 else device.half
    row = Cell(c.contender, n, timing).document(peak if c.counted else None)
    if not c.counted:
        row |= {"flops_forward": None, "flops_total": None}
    row["chunk"] = None
    if device is not None and c.case.degree is not None and c.counted:
        shape = shape_of(
            heads=HEADS, n=n, d=c.case.d, dv=c.case.dv, degree=c.case.degree, dtype=_name(dtype), near=c.case.near or 0
        )  # fmt: skip
        row["chunk"] = best(device, shape).chunk
    row["rank"] = None if c.case.degree is None or not c.counted else rank(c.case.d, c.case.degree)
    return {**row, **c.entry(), "dtype": _name(dtype), "peak_bytes": memory}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
