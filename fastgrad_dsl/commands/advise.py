"""`fastgrad advise`: the advice of the compiler, and measured candidates beside it, as a document and as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.planning.advice import Advice, Advised, advise, cheapest
from fastgrad_compiler.targets import check_target
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands.tables import Column, print_table, say
from fastgrad_dsl.commands.terminal import console
from fastgrad_dsl.documents.base import Document
from fastgrad_dsl.documents.calibration import Calibration, Candidate, Limits, Planned
from fastgrad_dsl.report.words import folded
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source

if TYPE_CHECKING:
    from fastgrad_dsl.calibration.calibrate import Tell

FORMAT = "fastgrad-advice-1"


@dataclass(frozen=True)
class AdviceRequest:
    """Which model of which file, and, with `data`, what to measure candidates on (`calibrated`)."""

    file: Path
    params: Mapping[str, object]
    model: str | None = None
    target: str = "auto"
    data: str | None = None
    weights: Path | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    include: Sequence[Path] = ()


class AdvisedAttention(Document, frozen=True):
    """Equal attentions, what could be done of them, and candidates of the first where they were measured."""

    paths: tuple[str, ...]
    place: str | None
    bound: float | None
    limits: str
    length: int
    cheapest: str | None
    warning: str | None
    advice: tuple[Advice, ...]
    candidates: tuple[Candidate, ...] | None


class Measured(Document, frozen=True):
    """What candidates were measured on."""

    data: str
    weights: str
    dims: dict[str, int]
    planned: Planned


class AdviceDocument(Document, frozen=True):
    """The advice for a file."""

    format: str
    model: str
    source: str
    target: str
    budget: Limits | None
    attentions: tuple[AdvisedAttention, ...]
    measured: Measured | None


def make_advice(request: AdviceRequest, tell: Tell = lambda what: None) -> AdviceDocument:
    """The advice for a file, also for one whose budget is refused. Raises TfgError for what is wrong otherwise."""
    check_target(request.target)
    source = read_source(request.file, include=request.include)
    elaborated = elaborate(source, model=request.model, params=request.params)
    program = run(elaborated, until="attention", target=request.target, validate=False)[-1].program
    measured: Calibration | None = None
    if request.data is not None:
        measured = _measured(request, source, elaborated, tell)
    budget = program.budget
    return AdviceDocument(
        format=FORMAT,
        model=program.name,
        source=str(request.file),
        target=request.target,
        budget=Limits(budget.output, budget.gradient) if budget else None,
        attentions=tuple(_document(each, measured) for each in advise(program, request.target)),
        measured=Measured(measured.data, measured.weights, measured.dims, measured.planned)
        if measured
        else None,
    )


def _measured(request: AdviceRequest, source: Source, elaborated: Program, tell: Tell) -> Calibration | None:
    """The calibration document of the file, rules of its budget left out: all candidates are to be seen."""
    from fastgrad_dsl.calibration.data import calibrated

    budget = elaborated.budget
    free = elaborated if budget is None else replace(elaborated, budget=replace(budget, rules=()))
    stages = run(free, target=request.target, validate=False)
    compiled = Compiled(source, request.target, stages, dict(request.params), validate=False)
    data, weights = str(request.data), request.weights
    return calibrated(compiled, data, tell, dims=request.dims, weights=weights, seed=request.seed).calibration


def _document(advised: Advised, measured: Calibration | None) -> AdvisedAttention:
    best = cheapest(advised.advice)
    paths = [entry.path for entry in advised.entries]
    found = {each.path: each.candidates for each in measured.attentions} if measured else {}
    first = advised.entries[0]
    known = first.attention.range
    return AdvisedAttention(
        paths=tuple(paths),
        place=first.place or None,
        bound=None if known.bound is None else known.limit,
        limits=advised.limits,
        length=advised.length,
        cheapest=best.change if best else None,
        warning=advised.warning,
        advice=tuple(advised.advice),
        candidates=found.get(paths[0]),
    )


def print_advice(document: AdviceDocument, *, wide: bool = False) -> None:
    """A table for each kind of attention; every number says what it is. `wide`: with rank, eps and what is changed."""
    out = console()
    say(out, f"model {document.model} ({document.source})", style="bold")
    if not document.attentions:
        say(out, "no attention that a budget could change")
        return
    for each in document.attentions:
        known = "nothing limits its logits" if each.bound is None else f"|s| <= {each.bound:.3g}"
        out.print()
        say(out, f"{folded(each.paths)}  {known}; limits: {each.limits}", style="bold")
        if each.warning:
            say(out, f"warning: {each.warning}", indent=2, style="yellow")
        _print_options(out, each.advice, each.length, [*OPTION, *(OPTION_MORE if wide else ())])
        if each.candidates and document.measured:
            _print_measured(out, each.candidates, document.measured)
    out.print()
    time = "time: beside exact attention of the model as it is, an estimate of the cost model."
    bounds = "output (share of the values' range) and gradient (share of omega): bounds."
    more = "" if wide else " `fastgrad advise --wide` shows rank and eps."
    say(out, time, style="dim")
    say(out, f"{'eps, ' * wide}{bounds} A change of the model needs training.{more}", style="dim")


Shown = tuple[Column, Callable[[Advice], str]]
OPTION: tuple[Shown, ...] = (
    (Column("output"), lambda advice: f"{advice.output:.2g}"),
    (Column("gradient"), lambda advice: f"{advice.gradient:.2g}"),
    (Column("feasible", is_number=False), lambda advice: "yes" if advice.feasible else "no"),
)
OPTION_MORE: tuple[Shown, ...] = (
    (Column("of the", is_number=False), lambda advice: advice.kind),
    (Column("rank"), lambda advice: "-" if advice.rank is None else f"{advice.rank:,}"),
    (Column("eps"), lambda advice: f"{advice.eps:.2g}"),
)


def _print_options(out: Console, advice: Sequence[Advice], length: int, shown: list[Shown]) -> None:
    """What could be done, feasible changes first, the fastest of them first."""
    best = cheapest(advice)
    made: list[Shown] = [
        (
            Column("change", is_number=False),
            lambda a: a.change + (" (cheapest without training)" if a == best else ""),
        ),
        (Column(f"time at\nn = {length:,}"), lambda a: f"{a.time:.2g}"),
        *shown,
    ]
    ordered = sorted(advice, key=lambda a: (not a.feasible, a.time))
    print_table(out, [column for column, _ in made], [[cell(each) for _, cell in made] for each in ordered])


def _print_measured(out: Console, candidates: Sequence[Candidate], measured: Measured) -> None:
    sizes = ", ".join(f"{name} = {size}" for name, size in measured.dims.items())
    say(out, f"estimates from what was measured on {measured.data} ({sizes}):", style="italic")
    columns = [
        Column("candidate", is_number=False), Column("R"), Column("seconds"), Column("output"), Column("gradient"),
        Column("", is_number=False),
    ]  # fmt: skip
    rows = [
        [
            each.name,
            "-" if each.bound is None else f"{each.bound:.2g}",
            *(f"{value:.2g}" for value in (each.seconds, each.output, each.gradient)),
            "chosen" if each.chosen else "",
        ]
        for each in sorted(candidates, key=lambda c: c.seconds)
    ]
    print_table(out, columns, rows)
