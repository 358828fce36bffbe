"""`fastgrad advise`: the advice of the compiler, and measured candidates beside it, as a document and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fastgrad_compiler.advice import Advice, Advised, advise, cheapest
from fastgrad_compiler.elaborate import elaborate
from fastgrad_compiler.graph import Program
from fastgrad_compiler.pipeline import run
from fastgrad_compiler.targets import check_target
from fastgrad_dsl.outputs import write_output
from fastgrad_dsl.terminal import console
from fastgrad_grammar.quote import json_text
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source

FORMAT = "fastgrad-advice-1"


@dataclass(frozen=True)
class AdviceRequest:
    """Which model of which file, and, with `data`, what to measure candidates on (`CalibrationRequest`)."""

    file: Path
    params: Mapping[str, object]
    model: str | None = None
    target: str = "auto"
    data: str | None = None
    weights: Path | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    include: Sequence[Path] = ()


def make_advice(request: AdviceRequest, tell: Any = lambda what: None) -> dict[str, Any]:
    """The advice for a file, also for one whose budget is refused. Raises TfgError for what is wrong otherwise."""
    check_target(request.target)
    source = read_source(request.file, include=request.include)
    elaborated = elaborate(source, model=request.model, params=request.params)
    program = run(elaborated, until="attention", target=request.target, validate=False)[-1].program
    measured: Mapping[str, Any] = {}
    if request.data is not None:
        measured = _measured(request, source, elaborated, tell)
    budget = program.budget
    return {
        "format": FORMAT,
        "model": program.name,
        "source": str(request.file),
        "target": request.target,
        "budget": None if budget is None else {"output": budget.output, "gradient": budget.gradient},
        "attentions": [_document(each, measured) for each in advise(program, request.target)],
        "measured": None
        if not measured
        else {key: measured[key] for key in ("data", "weights", "dims", "planned")},
    }


def _measured(request: AdviceRequest, source: Source, elaborated: Program, tell: Any) -> Mapping[str, Any]:
    """The calibration document of the file, rules of its budget left out: all candidates are to be seen."""
    from fastgrad_dsl.calibration.data import CalibrationRequest, calibrated
    from fastgrad_dsl.compiled import Compiled

    budget = elaborated.budget
    free = elaborated if budget is None else replace(elaborated, budget=replace(budget, rules=()))
    stages = run(free, target=request.target, validate=False)
    compiled = Compiled(source, request.target, stages, dict(request.params), validate=False)
    asked = CalibrationRequest(str(request.data), request.weights, request.dims, request.seed)
    return calibrated(compiled, asked, tell).calibration or {}


def _document(advised: Advised, measured: Mapping[str, Any]) -> dict[str, Any]:
    best = cheapest(advised.advice)
    paths = [entry.path for entry in advised.entries]
    found = {each["path"]: each["candidates"] for each in measured.get("attentions", ())}
    first = advised.entries[0]
    return {
        "paths": paths,
        "place": first.place or None,
        "bound": first.node["bound"],
        "limits": advised.limits,
        "length": advised.length,
        "cheapest": None if best is None else best.change,
        "advice": [asdict(each) for each in advised.advice],
        "candidates": found.get(paths[0]),
    }


def write_advice(path: Path, advice: Mapping[str, Any]) -> None:
    """Write the advice as JSON, atomically."""
    write_output(path, json_text(advice, 2) + "\n")


def print_advice(document: Mapping[str, Any]) -> None:
    """A table for each kind of attention; every number says what it is."""
    out = console()
    out.print(Text(f"model {document['model']} ({document['source']})", style="bold"))
    if not document["attentions"]:
        out.print(Text("no attention that a budget could change"))
    for each in document["attentions"]:
        paths = each["paths"]
        named = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]} ({len(paths)})"
        known = "nothing limits its logits" if each["bound"] is None else f"|s| <= {each['bound']:.3g}"
        out.print(Text(f"\n{named}  {known}; limits: {each['limits']}", style="bold"), soft_wrap=True)
        out.print(_table([Advice(**advice) for advice in each["advice"]], each["length"]))
        if each["candidates"]:
            out.print(_measured_table(each["candidates"], document["measured"]))
    notes = "time: beside exact attention of the model as it is, an estimate of the cost model. eps, output (share of the values' range) and gradient (share of omega): bounds. A change of the model needs training."  # noqa: E501 (one paragraph)
    out.print(Text(notes, style="dim"))


def _table(advice: list[Advice], length: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in (
        "change",
        "of the",
        "rank",
        "eps",
        "output",
        "gradient",
        f"time at n = {length:,}",
        "feasible",
    ):
        table.add_column(heading, justify="left" if heading in ("change", "of the", "feasible") else "right")
    best = cheapest(advice)
    for each in sorted(advice, key=lambda a: (not a.feasible, a.time)):
        mark = " (cheapest)" if each == best else ""
        numbers = (f"{each.eps:.2g}", f"{each.output:.2g}", f"{each.gradient:.2g}", f"{each.time:.2g}")
        cells = (each.change + mark, each.kind, "-" if each.rank is None else f"{each.rank:,}", *numbers)
        table.add_row(*map(Text, (*cells, "yes" if each.feasible else "no")))
    return table


def _measured_table(candidates: list[Mapping[str, Any]], measured: Mapping[str, Any]) -> Table:
    sizes = ", ".join(f"{name} = {size}" for name, size in measured["dims"].items())
    table = Table(
        box=None, pad_edge=False, title=f"measured on {measured['data']} ({sizes})", title_justify="left"
    )
    for heading in ("candidate", "R", "seconds (estimate)", "output (estimate)", "gradient (estimate)", ""):
        table.add_column(heading, justify="left" if heading in ("candidate", "") else "right")
    for each in sorted(candidates, key=lambda c: c["seconds"]):
        bound = "-" if each["bound"] is None else f"{each['bound']:.2g}"
        numbers = (bound, f"{each['seconds']:.2g}", f"{each['output']:.2g}", f"{each['gradient']:.2g}")
        table.add_row(*map(Text, (each["name"], *numbers, "chosen" if each["chosen"] else "")))
    return table
