"""What the command line shows: plans and reports as tables, progress on a terminal. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fastgrad_compiler.graph import Program
from fastgrad_compiler.passes.attention_table import OWN, attention_table, is_own
from fastgrad_dsl.report.words import bound, folded, number, size, times, verified_on
from fastgrad_grammar import quote

VERDICTS = {"kept": "bold green", "likely": "green", "missed": "bold red", "unlikely": "red"}
WIDTH_OF_A_FILE = 200  # where the output is no terminal


class PlainConsole(Console):
    """A console that obeys nothing inside a text: no markup of rich, no control character, no mark of direction."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is shown, with rich's own control sequences as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=quote.terminal(segment.text, "\n"))


def console(*, error: bool = False) -> Console:
    """A console for results (stdout) or progress (stderr); no colour and a fixed width where it is no terminal."""
    made = PlainConsole(stderr=error)
    return made if made.is_terminal else PlainConsole(stderr=error, width=WIDTH_OF_A_FILE)


@contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that says what is being done ("measuring") and to what; silent where it is no terminal."""
    out = console(error=True)
    if not out.is_terminal:
        yield lambda what: None
        return
    with out.status("starting") as status:
        yield lambda what: status.update(Text(f"{doing} {what}"))


def print_plan(program: Program, file: str) -> None:
    """One line an attention: what it will be and why; equal ones of a repeat are folded."""
    out = console()
    table = attention_table(program)
    out.print(Text(f"{file}: model {program.name}, {len(table)} attention{'s' if len(table) != 1 else ''}"))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for entry in table:
        node = entry.node
        polynomial = node.op == "poly_attention" or node.get("decision") == "polynomial"
        decision = f"{_family(node['family'])} degree {node['degree']}" if polynomial else "exact"
        if polynomial and node["near"] is not None:
            decision += f", {'exp' if is_own(node) else 'exact'} in blocks of {node['near']}"
        place = entry.span.short_place if entry.span else ""
        rows.setdefault((place, decision, str(node.get("why", ""))), []).append(entry.path)
    for (place, decision, why), paths in rows.items():
        out.print(Text(f"  {folded(paths)}  {decision}  ({place})", style="bold"), soft_wrap=True)
        out.print(Text(f"      {why}"), soft_wrap=True)


def print_calibration(document: Mapping[str, Any]) -> None:
    """What the plan rests on, what it is expected to cost, and what was measured of it."""
    out = console()
    planned, verified = document["planned"], document["verification"]
    sizes = ", ".join(f"{name} = {size}" for name, size in document["dims"].items())
    out.print(Text(f"calibrated on {document['data']} ({sizes}), {document['weights']}"), soft_wrap=True)
    ratio = planned["exact_seconds"] / planned["seconds"] if planned["seconds"] else 1.0
    out.print(
        Text(
            f"  attention at n = {planned['length']:,}: {ratio:.1f} times as fast as PyTorch's fused softmax"
            f" (estimate); no plan is more than {100 * planned['gap']:.2g} % faster (bound, given the estimates)"
        )
    )
    kind = "bound, gains of at least 1" if document["trust"] == "certified" else "estimate"
    for what in ("output", "gradient"):
        measured = "" if verified is None else f", {verified[what]:.2g} (measured on {verified_on(document)})"
        out.print(Text(f"  {what} error {planned[what]:.2g} ({kind}){measured}"))
    if verified is not None and verified["violations"]:
        out.print(
            Text(
                f"  {verified['violations']} calls had logits beyond their R: calibrate on more data",
                style="yellow",
            )
        )


def _family(family: object) -> str:
    return "own polynomial" if family == OWN else str(family)


def print_report(report: Mapping[str, Any]) -> None:
    """The headline, the warnings, then a table of attentions; every number is named bound, estimate or measured."""
    out = console()
    out.print(Text(f"model {report['model']} ({report['source']})", style="bold"))
    _print_headline(out, report)
    for warning in report["warnings"]:
        out.print(Text(f"warning: {warning['text']}", style="yellow"))
    if report["attentions"]:
        out.print(_table(report))
        out.print(
            Text(
                "relative L2 errors, smaller is better. bound: proved for this batch; estimate: how far the whole "
                "model moves when this attention alone is made exact; measured, on this batch: this attention alone "
                "against exact softmax.",
                style="dim",
            )
        )
    for note in report["notes"]:
        out.print(Text(f"note: {note}"))


def _print_headline(out: Console, report: Mapping[str, Any]) -> None:
    """Verdict, use of the budget, the batch and what was measured of it, predicted time and memory."""
    headline, batch = report["headline"], report["batch"]
    out.print(Text(headline["verdict"]["text"], style=VERDICTS.get(headline["verdict"]["state"], "bold")))
    for what in ("output", "gradient"):
        out.print(Text(f"  {what}: {headline[what]['words']}"))
    if batch is None:
        out.print(Text("no model was run: bounds only"))
    else:
        sizes = ", ".join(f"{name} = {size}" for name, size in batch["dims"].items())
        out.print(Text(", ".join(filter(None, (f"on {batch['kind']}", sizes, batch["weights"])))))
    for line in report["summary"]:
        out.print(Text(f"  {line}"))
    prediction = headline["prediction"]
    if prediction is not None:
        memory = prediction["memory"]
        out.print(
            Text(
                f"at n = {prediction['n']:,}: attention {times(prediction['speed_up']['total'])} faster than exact, "
                f"forward and backward, in {size(memory['compiled'])}, exact {size(memory['exact'])} (estimates)"
            )
        )


def _table(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("attention", "decision", "rank", "R", "eps (bound)", "rounding (bound)", "exact below"):
        named = heading in ("attention", "decision")
        table.add_column(heading, justify="left" if named else "right", no_wrap=named)
    for what in ("output", "gradient"):
        for kind in ("bound", "estimate", "measured"):
            table.add_column(f"{what} {kind}", justify="right")
    for entry in report["attentions"]:
        polynomial = entry["decision"] == "polynomial"
        decision = f"{_family(entry['family'])} {entry['degree']}" if polynomial else "exact"
        row = [
            entry["path"],
            decision,
            number(entry["rank"]),
            number(entry["bound"]),
            number(entry["eps"]),
            number(entry["rounding"]["weights"] if entry["rounding"] else None),
        ]
        row.append(number(entry["break_even"]))
        for what in ("output", "gradient"):
            errors = entry["errors"][what]
            row += [bound(errors["bound"]), number(errors["estimate"]), number(errors["measured"])]
        table.add_row(*map(Text, row))
    return table
