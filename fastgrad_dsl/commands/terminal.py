"""What the command line shows: plans and reports as tables, progress on a terminal. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fastgrad_compiler.attention.table import Lengths, attention_table
from fastgrad_compiler.attention.unserved import unserved_gates
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.decision import LEFT_EXACT
from fastgrad_compiler.planning.memory import in_bytes
from fastgrad_compiler.planning.selectivity import averages
from fastgrad_dsl.commands.tables import print_table, say
from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_dsl.report.words import NO_ERROR, as_exact, counted, family, folded, run_on, size, verified_on
from fastgrad_grammar import quote

if TYPE_CHECKING:  # `check` starts without msgspec
    from fastgrad_dsl.documents.calibration import Calibration
    from fastgrad_dsl.documents.report import Report

VERDICTS = {"kept": "bold green", "likely": "green", "missed": "bold red", "unlikely": "red"}
WIDTH_OF_A_FILE = 1_000_000  # if the output is not a terminal: no line is broken


class PlainConsole(Console):
    """A console that obeys nothing inside a text: no markup of rich, no control character, no mark of direction."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is shown, with rich's own control sequences as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=quote.terminal(segment.text, "\n"))


def console(*, error: bool = False) -> Console:
    """A console for results (stdout) or progress (stderr); no colour and no line breaks if it is not a terminal."""
    made = PlainConsole(stderr=error)
    return made if made.is_terminal else PlainConsole(stderr=error, width=WIDTH_OF_A_FILE)


@contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that says what is being done ("measuring") and to what; silent if it is not a terminal."""
    out = console(error=True)
    if not out.is_terminal:
        yield lambda what: None
        return
    with out.status("starting") as status:
        yield lambda what: status.update(Text(f"{doing} {what}"))


def print_plan(program: Program, file: str) -> None:
    """What each attention will be and why; equal ones of a repeat are folded. Then the forget gates that are none's."""
    out = console()
    table = attention_table(program)
    said = f"{file}: model {program.name}, {counted(len(table), 'attention')}"
    served = [entry.attention for entry in table if entry.attention.is_polynomial]
    own = bool(served) and all(attention.is_own for attention in served)
    say(out, f"{said}, {NO_ERROR}" if own else said)
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    lengths = Lengths(program)
    for entry in table:
        attention, polynomial = entry.attention, entry.attention.polynomial
        decision = f"{family(polynomial.family)} degree {polynomial.degree}" if polynomial else "exact"
        if polynomial and attention.near is not None:
            decision += f", {'exp' if attention.is_own else 'exact'} in blocks of {attention.near}"
        place = entry.span.short_place if entry.span else ""
        why = "" if attention.verdict is None else attention.verdict.why
        rows.setdefault((place, decision, why, averages(entry, lengths) or ""), []).append(entry.path)
    for (place, decision, why, warning), paths in rows.items():
        say(out, f"{folded(paths)}  {decision}  ({place})", indent=2, style="bold")
        say(out, why, indent=6)
        if warning:
            say(out, f"warning: {warning}", indent=6, style="yellow")
    for gate in unserved_gates(program):
        place = f"  ({gate.node.span.short_place})" if gate.node.span else ""
        say(out, f"{gate.node.op}  as it is written, on all pairs{place}", indent=2, style="bold")
        say(out, f"this gate belongs to no attention: {gate.why}", indent=6)


def print_way_on(program: Program, file: str) -> None:
    """Where attention stays exact that a polynomial could serve, and nobody asked for that: the command that helps."""
    exact = [entry.attention for entry in attention_table(program) if not entry.attention.is_polynomial]
    asked = [each for each in exact if each.verdict is not None and each.verdict.why == LEFT_EXACT]
    if any(not each.unservable for each in exact if each not in asked):
        said = "what would make exact attention faster, and what it would cost:"
        say(console(), f"{said} fastgrad advise {file}", indent=2)


def print_memory(program: Program) -> None:
    """What a training step is expected to hold, and what is made again for it; nothing without a limit."""
    from fastgrad_dsl.models.memory import memory_document  # loads what `check` does without

    document = memory_document(program)
    if document is None:
        return
    at = ", ".join(f"{name} = {size:,}" for name, size in document.sizes.items())
    said = f"memory of a training step at {at}: {in_bytes(document.bytes)} (estimate), limit {in_bytes(document.limit)}"
    if document.piece is not None:
        how = f"the sequence runs in pieces of {document.piece:,} tokens"
    elif document.recomputed:
        how = f"recomputed in the backward pass: {', '.join(document.recomputed)}"
    else:
        how = "everything is kept"
    time = "" if document.time == 1 else f", {document.time:.2f} times the time (estimate)"
    say(console(), f"{said}; {how}{time}")


def print_calibration(document: Calibration) -> None:
    """What the plan rests on, what it is expected to cost, and what was measured of it."""
    out = console()
    planned, verified = document.planned, document.verification
    sizes = ", ".join(f"{name} = {size}" for name, size in document.dims.items())
    say(out, f"calibrated on {document.data} ({sizes}), {document.weights}")
    say(
        out,
        f"attention at n = {planned.length:,}: {planned.speed_up:.1f} times as fast as PyTorch's fused softmax "
        f"(estimate); no plan is more than {100 * planned.gap:.2g} % faster (bound, given the estimates)",
        indent=2,
    )
    kind = "bound, gains of at least 1" if document.trust == "certified" else "estimate"
    for what in WHATS:
        measured = ""
        if verified is not None:
            measured = f", {of(verified, what):.2g} (measured on {verified_on(document, verified)})"
        say(out, f"{what} error {of(planned, what):.2g} ({kind}){measured}", indent=2)
    if verified is not None and verified.violations:
        text = f"{counted(verified.violations, 'call')} had logits beyond their R: calibrate on more data"
        say(out, text, indent=2, style="yellow")


def print_report(report: Report, *, wide: bool = False) -> None:
    """The headline, the warnings, then a table of attentions; every number is named bound, estimate or measured.

    wide: all that is known of each attention, in place of what is asked most: decision, errors and time.
    """
    out = console()
    said, verdict = f"model {report.model} ({report.source})", report.headline.verdict
    say(out, f"{said}: {verdict.text}" if verdict.state == "exact" else said, style="bold")
    _print_headline(out, report)
    for warning in report.warnings:
        say(out, f"warning: {warning.text}", style="yellow")
    if report.attentions:
        from fastgrad_dsl.commands.report_table import report_table  # loads what `check` does without

        columns, rows, legend = report_table(report, wide=wide)
        print_table(out, columns, rows)
        for sentence in legend:
            say(out, sentence, style="dim")
    for note in report.notes:
        say(out, f"note: {note}")


def _print_headline(out: Console, report: Report) -> None:
    """Verdict, use of the budget, the batch and what was measured of it, predicted time and memory."""
    headline = report.headline
    if headline.verdict.state != "exact":  # which the first line says
        say(out, headline.verdict.text, style=VERDICTS.get(headline.verdict.state, "bold"))
    for what in WHATS:
        say(out, f"{what}: {of(headline, what).words}", indent=2)
    say(out, run_on(report))
    for line in report.summary:
        say(out, line, indent=2)
    prediction = headline.prediction
    if prediction is not None:
        memory = prediction.memory
        say(
            out,
            f"at n = {prediction.n:,}: attention {as_exact(prediction.speed_up.total)}, "
            f"forward and backward, in {size(memory.compiled)}, exact {size(memory.exact)} (estimates)",
        )
