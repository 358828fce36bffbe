"""What a notebook shows of a report and of a compiled model: verdict, budget, attentions, picture.

A part of a page and no page: styles are written at the elements, so that they change nothing else in the notebook.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fastgrad_compiler.ir.graph import Program
from fastgrad_dsl.documents.base import SHOWN
from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_dsl.documents.report import NOTHING, Errors, Kind, Report, ReportedAttention, Use
from fastgrad_dsl.plots.svg import element
from fastgrad_dsl.report.diagram import draw
from fastgrad_dsl.report.words import decision, folded, number

KINDS: tuple[Kind, ...] = ("measured", "estimate", "bound")  # of errors, the best first
HEADINGS = ("attention", "decision", "rank", "R", "eps (bound)", "output error", "gradient error")
KEPT, OVER = "#2f9e44", "#e8590c"


def report_html(report: Report) -> str:
    """The verdict, how much of the budget is used, and a row for each attention; equal rows are one."""
    bars = [_bar(what, of(report.headline, what)) for what in WHATS]
    verdict = element("<p><strong>{}</strong></p>", report.headline.verdict.text)
    return str(Markup("<div>{}{}{}</div>").format(verdict, Markup("").join(bars), _table(report.attentions)))


def compiled_html(report: Report, program: Program) -> str:
    """`report_html`, and the picture of the model."""
    picture = Markup(draw(program))
    return str(Markup("<div>{}<details open><summary>graph</summary>{}</details></div>").format(
        Markup(report_html(report)), picture
    ))  # fmt: skip


def _bar(what: str, use: Use) -> Markup:
    said = element("<div>{}: {}</div>", what, use.words)
    if use.share is None:
        return said
    frame = Markup(
        '<div style="width:20em;max-width:100%;height:.6em;border:1px solid #868e96;margin:.2em 0">{}</div>'
    )
    part = element(
        '<div style="width:{:.1f}%;height:100%;background:{}"></div>',
        100 * min(use.share, 1.0),
        KEPT if use.share <= 1 else OVER,
    )
    return said + frame.format(part)


def _table(attentions: Sequence[ReportedAttention]) -> Markup:
    rows: dict[tuple[str, ...], list[str]] = {}
    for entry in attentions:
        rows.setdefault(_cells(entry), []).append(entry.path)
    if not rows:
        return Markup("")
    lines = [_row("th", HEADINGS), *(_row("td", (folded(paths), *cells)) for cells, paths in rows.items())]
    shape = Markup('<div style="overflow-x:auto"><table style="text-align:left">{}</table></div>')
    return shape.format(Markup("").join(lines))


def _row(kind: str, cells: Sequence[str]) -> Markup:
    shape = Markup('<{0} style="text-align:left;padding:.2em 1em .2em 0">{1}</{0}>')
    return Markup("<tr>{}</tr>").format(
        Markup("").join(shape.format(Markup(kind), element("{}", cell)) for cell in cells)
    )


def _cells(entry: ReportedAttention) -> tuple[str, ...]:
    errors = (entry.errors.output, entry.errors.gradient)
    return (decision(entry), number(entry.rank), number(entry.bound), number(entry.eps), *map(_best, errors))


def _best(errors: Errors) -> str:
    if errors == NOTHING:
        return "0 (bound)"  # of what is exact; nothing needs to have been measured
    return next(
        (f"{number(value)} ({kind})" for kind in KINDS if (value := errors.of(kind)) is not None), "-"
    )


SHOWN[Report] = report_html
