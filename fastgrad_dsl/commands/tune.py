"""`fastgrad tune`: what it is asked, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fastgrad_dsl as fg
from fastgrad_compiler.codegen.titles import kernel_title
from fastgrad_compiler.runtime.triton_tuned import Configuration
from fastgrad_dsl.bench.tuning import (
    DTYPES,
    Choice,
    Shape,
    Timer,
    Work,
    cuda_timer,
    listed,
    shapes,
    store,
    tune,
    tuning_device,
)
from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.terminal import console
from fastgrad_dsl.report.words import folded
from fastgrad_grammar.diagnostics import TfgError, suggestions


@dataclass(frozen=True)
class TuneRequest:
    """A file and its params, and the work to time: sequences of a batch, tokens of each, type of the inputs."""

    file: Path
    params: Mapping[str, object]
    model: str | None
    batch: int
    tokens: int
    dtype: str
    include: Sequence[Path] = ()


@dataclass(frozen=True)
class Tuned:
    """What was found for the kernels of each attention, and where it is kept (None: nowhere)."""

    found: tuple[tuple[Shape, list[Choice]], ...]
    path: Path | None


def run_tune(request: TuneRequest, tell: Callable[[str], None], timer: Timer = cuda_timer) -> Tuned:
    """Time the candidates and keep the fastest. TfgError FG424 without a GPU, FG416 for an unknown type."""
    found = _shapes(request)
    work = Work(request.batch, request.tokens, request.dtype, tuning_device(request.dtype))
    result = tuple((shape, tune(shape, work, timer, tell)) for shape in found)
    return Tuned(result, store([choice for _, choices in result for choice in choices]))


def print_candidates(request: TuneRequest) -> None:
    """For each kernel the row of its table and the candidates of the first round; nothing is timed."""
    out = console()
    for shape in _shapes(request):
        row, kernels = listed(shape, request.dtype)
        say(out, _title(shape, f"{request.dtype}, table of {row}"), style="bold")
        for kernel, (table, *others) in kernels.items():
            say(out, f"{kernel}  {_text(table)}, and {len(others)} others:", indent=2)
            say(out, "; ".join(map(_text, others)), indent=6)


def print_choices(result: Tuned) -> None:
    """A line for each kernel: the table's configuration, the one that was found, and their times."""
    out = console()
    texts = {"kernel", "table", "found"}
    headings = ("kernel", "table", "us", "found", "us", "candidates")
    columns = [Column(heading, is_number=heading not in texts) for heading in headings]
    for shape, choices in result.found:
        say(out, _title(shape, ""), style="bold")
        rows = []
        for choice in choices:
            found = "the same" if choice.found == choice.table else _text(choice.found)
            before, after = (f"{1e6 * seconds:.1f}" for seconds in (choice.table_seconds, choice.seconds))
            rows.append([choice.kernel, _text(choice.table), before, found, after, str(choice.tried)])
        print_table(out, columns, rows)
    say(out, "medians, measured on this GPU; lower is better", style="dim")
    say(out, f"kept in {result.path}" if result.path else "kept nowhere: there is no cache folder")


def _shapes(request: TuneRequest) -> tuple[Shape, ...]:
    if request.dtype not in DTYPES:
        help_ = suggestions(request.dtype, DTYPES)
        raise TfgError.of("FG416", f"--dtype {request.dtype}: unknown type", *help_)
    compiled = fg.compile(
        request.file, params=request.params, model=request.model, target="triton", include=request.include
    )
    found = shapes(compiled.program)
    if not found:
        message = f"no attention of {compiled.program.name} has Triton kernels"
        raise TfgError.of("FG424", message, "`fastgrad check` says how each will be computed")
    return found


def _title(shape: Shape, work: str) -> str:
    heads = f"{shape.heads} heads" + (f" on {shape.key_heads}" if shape.key_heads != shape.heads else "")
    spec = shape.spec
    what = f"{kernel_title(spec)}, d = {spec.d}, dv = {spec.dv}, {heads}"
    return f"{folded(list(shape.paths))}  {what}" + (f"; {work}" if work else "")


def _text(config: Configuration) -> str:
    rows, keys, features, warps, stages = config
    return f"{rows} x {keys} x {features}, {warps} warps, {stages} stages"
